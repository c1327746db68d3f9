// Registers the CUDA kernels as kernels of the operators: checks, allocations, launches.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../check.h"
#include "kernels.h"

namespace dwconv2d {
namespace {

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return Dtype::kDouble;
    case at::kFloat: return Dtype::kFloat;
    case at::kHalf: return Dtype::kHalf;
    default: return Dtype::kBFloat16;
  }
}

// The kernels read contiguous planes. Others, such as channels-last ones, are copied first.
Tensor with_contiguous_planes(const Tensor& t) {
  const int64_t height = t.size(-2), width = t.size(-1);
  const bool rows = width == 1 || t.stride(-1) == 1, planes = height == 1 || t.stride(-2) == width;
  return rows && planes ? t : t.contiguous();
}

// (B, D, H, W), or (B, D, N, H, W), or with `per_state` (B, N, H, W).
Planes planes_of(const Tensor& t, bool per_state = false) {
  const auto stride = [&](int dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  Planes planes;
  planes.data = t.const_data_ptr();
  planes.batch = stride(0);
  planes.channel = per_state ? 0 : stride(1);
  planes.state = per_state ? stride(1) : t.dim() == 5 ? stride(2) : 0;
  return planes;
}

Tensor empty_contiguous(const Tensor& like) { return at::empty(like.sizes(), like.options()); }

// Lays out a result, whose planes the kernels write contiguously, as another tensor.
Tensor laid_out_as(const Tensor& result, const Tensor& like) {
  const bool same = like.suggest_memory_format() == at::MemoryFormat::Contiguous;
  return same ? result : empty_laid_out_as(like).copy_(result);
}

// An operator's inputs in the layout that the kernels need, and the kernels' parameters. It keeps the copies alive.
struct Call {
  Params p;
  Tensor input, grad, C, x, weights[3], alpha, D, bias;

  Call(Operation operation, const Sizes& sizes, const Tensor& convolved, const Tensor& of_dtype)
      : input(with_contiguous_planes(convolved)) {
    constexpr int64_t kMost = INT32_MAX / 2;
    for (int64_t size : {sizes.batch, sizes.channels, sizes.states, sizes.height, sizes.width,
                         sizes.kernel_height * sizes.kernel_width}) {
      TORCH_CHECK_VALUE(size <= kMost, "sizes above ", kMost, " are not supported on CUDA");
    }
    p.operation = operation;
    p.dtype = dtype_of(of_dtype);
    p.batch = sizes.batch;
    p.channels = int(sizes.channels);
    p.states = int(sizes.states);
    p.height = int(sizes.height);
    p.width = int(sizes.width);
    p.input = planes_of(input);
  }

  void set_weights(const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5, const Tensor& factors) {
    int k = 0;
    for (const Tensor& weight : {weight3, weight3_d3, weight3_d5}) {
      weights[k] = weight.contiguous();
      p.weights[k] = weights[k].const_data_ptr();
      ++k;
    }
    alpha = factors.contiguous();
    p.alpha = alpha.const_data_ptr();
  }

  void set_output(const Tensor& C_, const Tensor& D_, const Tensor& x_) {
    C = with_contiguous_planes(C_);
    x = with_contiguous_planes(x_);
    D = D_.contiguous();
    p.C = planes_of(C, /*per_state=*/true);
    p.x = planes_of(x);
    p.D = D.const_data_ptr();
  }

  void set_conv(const Sizes& sizes, const Tensor& weight, const std::optional<Tensor>& bias_, int64_t dilation,
                bool zeros) {
    weights[0] = weight.contiguous();
    p.weights[0] = weights[0].const_data_ptr();
    if (bias_) {
      bias = bias_->contiguous();
      p.bias = bias.const_data_ptr();
    }
    p.kernel_height = int(sizes.kernel_height);
    p.kernel_width = int(sizes.kernel_width);
    p.dilation = int(std::min<int64_t>(dilation, std::max(p.height, p.width)));  // larger ones give the same result
    p.zeros = zeros;
  }

  void set_grad(const Tensor& of_result) {
    grad = with_contiguous_planes(of_result);
    p.grad = planes_of(grad);
  }

  void run(Pass pass) {
    C10_CUDA_CHECK(launch_pass(p, pass, c10::cuda::getCurrentCUDAStream()));
  }
};

void forward(Call& call, const Planes& result) {
  call.p.result = result;
  make_plan(call.p, Pass::kForward);
  call.run(Pass::kForward);
}

Sum sum(const Tensor& partials, const Tensor& to, int64_t outer, int64_t count, int64_t inner, bool in_state_dtype) {
  return {partials.const_data_ptr(), to.mutable_data_ptr(), outer, count, inner, in_state_dtype};
}

// Computes the gradients of every operator. The first are those of the input and x. Then come sums: for the taps
// (D, taps), and, if they are defined, for D or the bias (D) and for C.
void backward(Call& call, const Planes& grad_input, const Planes& grad_x, const Tensor& grad_taps,
              const Tensor& grad_D_or_bias, const Tensor& grad_C) {
  Params& p = call.p;
  p.grad_input = grad_input;
  p.grad_x = grad_x;
  make_plan(p, Pass::kAdjoint);
  call.run(Pass::kAdjoint);

  make_plan(p, Pass::kGradients);
  const Dtype state = p.dtype == Dtype::kDouble ? Dtype::kDouble : Dtype::kFloat;
  const auto options = call.input.options().dtype(state == Dtype::kDouble ? at::kDouble : at::kFloat);
  const int64_t slices = p.batch * p.slices, taps = int64_t(p.channels) * p.taps();
  const Tensor partials_taps = at::empty({slices, taps}, options);
  p.partials_taps = partials_taps.mutable_data_ptr();
  Tensor partials_D_or_bias, partials_C;
  if (grad_D_or_bias.defined()) {
    partials_D_or_bias = at::empty({slices, p.channels}, options);
    p.partials_D_or_bias = partials_D_or_bias.mutable_data_ptr();
  }
  if (grad_C.defined()) {
    partials_C = at::empty({p.batch * p.plan.channel_blocks, p.states, p.height, p.width}, options);
    p.partials_C = partials_C.mutable_data_ptr();
  }
  call.run(Pass::kGradients);

  const bool in_state_dtype = p.operation != Operation::kConv;  // as the fusion's parameters are
  Sums sums;
  sums.first = sum(partials_taps, grad_taps, 1, slices, taps, in_state_dtype);
  if (grad_D_or_bias.defined()) {
    sums.second = sum(partials_D_or_bias, grad_D_or_bias, 1, slices, p.channels, in_state_dtype);
  }
  if (grad_C.defined()) {
    sums.third = sum(partials_C, grad_C, p.batch, p.plan.channel_blocks, p.states * p.pixels(), false);
  }
  C10_CUDA_CHECK(launch_sums(sums, p.dtype, c10::cuda::getCurrentCUDAStream()));
}

// Computes the gradients of the fusion's three kernels and alpha from those of the 25 taps (D, 25). Without images, all
// are zero.
std::tuple<Tensor, Tensor, Tensor, Tensor> unmerge(const Call& call, const Tensor& taps) {
  const Tensor weight3 = empty_contiguous(call.weights[0]), weight3_d3 = empty_contiguous(call.weights[1]);
  const Tensor weight3_d5 = empty_contiguous(call.weights[2]), alpha = empty_contiguous(call.alpha);
  if (call.p.batch == 0) return {weight3.zero_(), weight3_d3.zero_(), weight3_d5.zero_(), alpha.zero_()};
  void* const to[] = {weight3.mutable_data_ptr(), weight3_d3.mutable_data_ptr(), weight3_d5.mutable_data_ptr()};
  C10_CUDA_CHECK(launch_unmerge_taps(call.p, taps.const_data_ptr(), to, alpha.mutable_data_ptr(),
                                     c10::cuda::getCurrentCUDAStream()));
  return {weight3, weight3_d3, weight3_d5, alpha};
}

Tensor empty_taps(const Call& call) { return at::empty({call.p.channels, call.p.taps()}, call.alpha.options()); }

// ----- the operators

Tensor dilated_dwconv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t dilation,
                        c10::string_view padding_mode) {
  const Sizes sizes = check_conv_inputs(x, weight, bias, dilation, padding_mode);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor y = empty_contiguous(x);
  if (sizes.batch == 0) return laid_out_as(y, x);
  Call call(Operation::kConv, sizes, x, x);
  call.set_conv(sizes, weight, bias, dilation, padding_mode == "zeros");
  forward(call, planes_of(y));
  return laid_out_as(y, x);
}

std::tuple<Tensor, Tensor, Tensor> dilated_dwconv2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t dilation, c10::string_view padding_mode) {
  const Sizes sizes = check_conv_inputs(x, weight, std::nullopt, dilation, padding_mode);
  check_grad(grad, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor grad_x = empty_contiguous(x);
  const Tensor grad_weight = empty_contiguous(weight), grad_bias = at::empty({sizes.channels}, weight.options());
  if (sizes.batch == 0) return {laid_out_as(grad_x, x), grad_weight.zero_(), grad_bias.zero_()};
  Call call(Operation::kConv, sizes, x, x);
  call.set_conv(sizes, weight, std::nullopt, dilation, padding_mode == "zeros");
  call.set_grad(grad);
  backward(call, planes_of(grad_x), {}, grad_weight, grad_bias, {});
  return {laid_out_as(grad_x, x), grad_weight, grad_bias};
}

Tensor state_fusion(const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5,
                    const Tensor& alpha) {
  const Sizes sizes = check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha);
  const c10::cuda::CUDAGuard guard(h.device());
  const Tensor fused = empty_contiguous(h);
  if (sizes.batch == 0) return fused;
  Call call(Operation::kFusion, sizes, h, h);
  call.set_weights(weight3, weight3_d3, weight3_d5, alpha);
  forward(call, planes_of(fused));
  return fused;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> state_fusion_backward(
    const Tensor& grad, const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5,
    const Tensor& alpha) {
  const Sizes sizes = check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha);
  check_grad(grad, h);
  const c10::cuda::CUDAGuard guard(h.device());
  Call call(Operation::kFusion, sizes, h, h);
  call.set_weights(weight3, weight3_d3, weight3_d5, alpha);
  const Tensor grad_h = empty_contiguous(h), grad_taps = empty_taps(call);
  if (sizes.batch > 0) {
    call.set_grad(grad);
    backward(call, planes_of(grad_h), {}, grad_taps, {}, {});
  }
  return std::tuple_cat(std::tuple(grad_h), unmerge(call, grad_taps));
}

Tensor state_fusion_output(const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5,
                           const Tensor& alpha, const Tensor& C, const Tensor& D, const Tensor& x) {
  const Sizes sizes = check_output_inputs(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x);
  const c10::cuda::CUDAGuard guard(h.device());
  const Tensor y = empty_contiguous(x);
  if (sizes.batch == 0) return laid_out_as(y, x);
  Call call(Operation::kOutputEquation, sizes, h, x);
  call.set_weights(weight3, weight3_d3, weight3_d5, alpha);
  call.set_output(C, D, x);
  forward(call, planes_of(y));
  return laid_out_as(y, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> state_fusion_output_backward(
    const Tensor& grad, const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5,
    const Tensor& alpha, const Tensor& C, const Tensor& D, const Tensor& x) {
  const Sizes sizes = check_output_inputs(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x);
  check_grad(grad, x);
  const c10::cuda::CUDAGuard guard(h.device());
  Call call(Operation::kOutputEquation, sizes, h, x);
  call.set_weights(weight3, weight3_d3, weight3_d5, alpha);
  const Tensor grad_h = empty_contiguous(h), grad_C = empty_contiguous(C), grad_D = empty_contiguous(D);
  const Tensor grad_x = empty_contiguous(x), grad_taps = empty_taps(call);
  if (sizes.batch == 0) {
    grad_D.zero_();
  } else {
    call.set_output(C, D, x);
    call.set_grad(grad);
    backward(call, planes_of(grad_h), planes_of(grad_x), grad_taps, grad_D, grad_C);
  }
  return std::tuple_cat(std::tuple(grad_h), unmerge(call, grad_taps),
                        std::tuple(grad_C, grad_D, laid_out_as(grad_x, x)));
}

TORCH_LIBRARY_IMPL(dwconv2d, CUDA, m) {
  m.impl("dilated_dwconv2d", &dilated_dwconv2d);
  m.impl("dilated_dwconv2d_backward", &dilated_dwconv2d_backward);
  m.impl("state_fusion", &state_fusion);
  m.impl("state_fusion_backward", &state_fusion_backward);
  m.impl("state_fusion_output", &state_fusion_output);
  m.impl("state_fusion_output_backward", &state_fusion_output_backward);
}

}  // namespace
}  // namespace dwconv2d
