// Registers the CUDA kernels as kernels of the operators: checks, allocations, launches.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "../check.h"
#include "kernels.h"

namespace selective_scan {
namespace {

using at::Tensor;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return Dtype::kDouble;
    case at::kFloat: return Dtype::kFloat;
    case at::kHalf: return Dtype::kHalf;
    default: return Dtype::kBFloat16;
  }
}

// `batch`, `channel`, `state` and `token` are the tensor's dimensions for these indices, or -1 if it has none.
View view_of(const Tensor& t, int batch, int channel, int state, int token) {
  const auto stride = [&](int dim) { return dim < 0 || t.size(dim) == 1 ? 0 : t.stride(dim); };
  View view;
  view.data = t.const_data_ptr();
  view.batch = stride(batch);
  view.channel = stride(channel);
  view.state = stride(state);
  view.token = stride(token);
  return view;
}

// Every row block reads B. So a copy is worth it if B's tokens are not adjacent, unless few rows share B.
Tensor with_adjacent_tokens(const Tensor& B, const Sizes& sizes) {
  const bool apart = sizes.length > 1 && B.stride(-1) != 1;
  return apart && sizes.channels / sizes.groups >= 8 ? B.contiguous() : B;
}

Params params_of(const Sizes& sizes, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                 const std::optional<Tensor>& bias, bool softplus, bool A_is_log) {
  // Far more than fits in memory. The limit leaves a margin for the arithmetic of chunks.
  constexpr int64_t kMost = INT32_MAX / 2;
  TORCH_CHECK_VALUE(sizes.length <= kMost && sizes.channels <= kMost && sizes.states <= kMost && sizes.batch <= kMost,
                    "sizes above ", kMost, " are not supported on CUDA");
  Params p;
  p.batch = sizes.batch;
  p.channels = int(sizes.channels);
  p.states = int(sizes.states);
  p.length = int(sizes.length);
  p.groups = int(sizes.groups);
  p.softplus = softplus;
  p.A_is_log = A_is_log;
  p.u = view_of(u, 0, 1, -1, 2);
  p.delta = view_of(delta, 0, 1, -1, 2);
  p.A = view_of(A, -1, 0, 1, -1);
  p.B = B.dim() == 3 ? view_of(B, 0, -1, 1, 2) : view_of(B, 0, 1, 2, 3);
  if (bias) p.bias = view_of(*bias, -1, 0, -1, -1);
  return p;
}

// Lays out a gradient, which the kernels write contiguously, as `at::empty_like` lays out its input.
Tensor laid_out_as(const Tensor& grad, const Tensor& input) {
  const Tensor out = at::empty_like(input);
  return out.strides() == grad.strides() ? grad : out.copy_(grad);
}

Tensor empty_states(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return at::empty(sizes, like.options().dtype(state_dtype(like)));
}

Tensor forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
               const std::optional<Tensor>& bias, bool softplus, bool A_is_log) {
  const Sizes sizes = check_inputs(u, delta, A, B, bias);
  const c10::cuda::CUDAGuard guard(u.device());
  const Tensor h = empty_states(u, {sizes.batch, sizes.channels, sizes.states, sizes.length});
  if (sizes.batch == 0) return h;

  const Tensor dense_B = with_adjacent_tokens(B, sizes);
  Params p = params_of(sizes, u, delta, A, dense_B, bias, softplus, A_is_log);
  p.h = h.mutable_data_ptr();
  const Dtype dtype = dtype_of(u);
  make_plan(p, dtype, /*backward=*/false);
  C10_CUDA_CHECK(launch_forward(p, dtype, c10::cuda::getCurrentCUDAStream()));
  return h;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
    const std::optional<Tensor>& bias, bool softplus, bool A_is_log) {
  const Sizes sizes = check_inputs(u, delta, A, B, bias);
  check_grad(grad, u, sizes);
  const c10::cuda::CUDAGuard guard(u.device());
  const auto like = [](const Tensor& t) { return at::empty(t.sizes(), t.options()); };
  const Tensor grad_u = like(u), grad_delta = like(delta), grad_A = like(A), grad_B = like(B);
  const Tensor grad_bias = empty_states(u, {sizes.channels});
  if (sizes.batch == 0) return {at::empty_like(u), at::empty_like(delta), grad_A.zero_(), grad_B, grad_bias.zero_()};

  const Tensor dense_B = with_adjacent_tokens(B, sizes);
  Params p = params_of(sizes, u, delta, A, dense_B, bias, softplus, A_is_log);
  p.grad = view_of(grad, 0, 1, 2, 3);
  p.grad_u = grad_u.mutable_data_ptr();
  p.grad_delta = grad_delta.mutable_data_ptr();
  const Dtype dtype = dtype_of(u);
  make_plan(p, dtype, /*backward=*/true);
  const Tensor partials_A = empty_states(u, {sizes.batch, sizes.channels, sizes.states});
  const Tensor partials_bias = empty_states(u, {sizes.batch, sizes.channels});
  const Tensor partials_B = empty_states(u, {p.blocks(), sizes.states, sizes.length});
  p.partials_A = partials_A.mutable_data_ptr();
  p.partials_bias = partials_bias.mutable_data_ptr();
  p.partials_B = partials_B.mutable_data_ptr();

  const auto stream = c10::cuda::getCurrentCUDAStream();
  Tensor boundaries;
  if (p.plan.chunks > 1) {
    boundaries = empty_states(u, {sizes.batch, sizes.channels, sizes.states, p.plan.chunks});
    p.boundaries = boundaries.mutable_data_ptr();
    C10_CUDA_CHECK(launch_forward(boundary_pass(p), dtype, stream));
  }
  C10_CUDA_CHECK(launch_backward(p, dtype, stream));

  const auto sum = [](const Tensor& partials, const Tensor& to, int64_t outer, int64_t count, int64_t inner,
                      bool in_state_dtype) {
    return Sum{partials.const_data_ptr(), to.mutable_data_ptr(), outer, count, inner, in_state_dtype};
  };
  const int64_t groups = sizes.batch * sizes.groups, group_size = sizes.states * sizes.length;
  const Sums sums{sum(partials_A, grad_A, 1, sizes.batch, sizes.channels * sizes.states, true),
                  sum(partials_bias, grad_bias, 1, sizes.batch, sizes.channels, true),
                  sum(partials_B, grad_B, groups, p.plan.row_blocks, group_size, false)};
  C10_CUDA_CHECK(launch_sums(sums, dtype, stream));
  return {laid_out_as(grad_u, u), laid_out_as(grad_delta, delta), grad_A, grad_B, grad_bias};
}

TORCH_LIBRARY_IMPL(selective_scan, CUDA, m) {
  m.impl("selective_scan_state", &forward);
  m.impl("selective_scan_state_backward", &backward);
}

}  // namespace
}  // namespace selective_scan
