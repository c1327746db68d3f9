// The state scan on the CPU: arguments, memory, threads and the choice of an instruction set.
#include "scan.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../check.h"
#include "host.h"

namespace selective_scan {
namespace {

using at::Tensor;
using Bias = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

const Kernels& kernels() {
#ifdef KERNELS_X86
  return host::choose(kPortable, kAvx2, kAvx512);
#else
  return kPortable;
#endif
}

ElementType element_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return kFloat64;
    case at::kHalf: return kFloat16;
    case at::kBFloat16: return kBFloat16;
    default: return kFloat32;
  }
}

Params params_of(const Sizes& sizes, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                 const Bias& bias, bool softplus, bool A_is_log) {
  Params p{};
  p.batch = sizes.batch, p.channels = sizes.channels, p.states = sizes.states, p.length = sizes.length;
  p.groups = sizes.groups, p.softplus = softplus, p.A_is_log = A_is_log;
  p.u = u.const_data_ptr(), p.delta = delta.const_data_ptr(), p.A = A.const_data_ptr(), p.B = B.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.u_strides[i] = u.stride(i), p.delta_strides[i] = delta.stride(i);
  for (int i = 0; i < 2; ++i) p.A_strides[i] = A.stride(i);
  const Tensor grouped = B.dim() == 4 ? B : B.unsqueeze(1);
  for (int i = 0; i < 4; ++i) p.B_strides[i] = grouped.stride(i);
  if (bias) p.bias = bias->const_data_ptr(), p.bias_stride = bias->stride(0);
  return p;
}

int64_t tasks(const Kernel& kernel, const Params& p) { return p.batch * p.groups * p.channel_blocks(kernel.lanes); }

Tensor forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Bias& delta_bias,
               bool delta_softplus, bool A_is_log) {
  const Sizes sizes = check_inputs(u, delta, A, B, delta_bias);
  const Tensor h = at::empty({sizes.batch, sizes.channels, sizes.states, sizes.length}, A.options());
  Params p = params_of(sizes, u, delta, A, B, delta_bias, delta_softplus, A_is_log);
  p.h = h.mutable_data_ptr();
  const Kernel& kernel = kernels().forward[element_type(u)];
  host::run(kernel, p, tasks(kernel, p));
  return h;
}

Gradients backward(const Tensor& grad, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                   const Bias& delta_bias, bool delta_softplus, bool A_is_log) {
  const Sizes sizes = check_inputs(u, delta, A, B, delta_bias);
  check_grad(grad, u, sizes);
  const Kernel& kernel = kernels().backward[element_type(u)];
  Params p = params_of(sizes, u, delta, A, B, delta_bias, delta_softplus, A_is_log);
  p.grad = grad.const_data_ptr();
  for (int i = 0; i < 4; ++i) p.grad_strides[i] = grad.stride(i);

  const int64_t channel_blocks = p.channel_blocks(kernel.lanes);
  const auto in_double = A.options().dtype(at::kDouble);
  const Tensor grad_u = at::empty_like(u), grad_delta = at::empty_like(delta);
  const Tensor grad_A = at::empty({p.batch, p.channels, p.states}, in_double);
  const Tensor grad_bias = at::empty({p.batch, p.channels}, in_double);
  const Tensor grad_B = at::empty({p.batch, p.groups, channel_blocks, p.states, p.length}, A.options());
  p.grad_u = grad_u.mutable_data_ptr(), p.grad_delta = grad_delta.mutable_data_ptr();
  for (int i = 0; i < 3; ++i) {
    p.grad_u_strides[i] = grad_u.stride(i);
    p.grad_delta_strides[i] = grad_delta.stride(i);
  }
  p.grad_A = grad_A.mutable_data_ptr<double>(), p.grad_bias = grad_bias.mutable_data_ptr<double>();
  p.grad_B = grad_B.mutable_data_ptr();
  host::run(kernel, p, tasks(kernel, p));

  const auto sum_blocks = u.scalar_type() == at::kDouble ? host::sum<double> : host::sum<float>;
  return {grad_u, grad_delta, host::sum<double>(grad_A, 1, p.batch, at::empty(A.sizes(), A.options())),
          sum_blocks(grad_B, p.batch * p.groups, channel_blocks, at::empty(B.sizes(), B.options())),
          host::sum<double>(grad_bias, 1, p.batch, at::empty({p.channels}, A.options()))};
}

}  // namespace

TORCH_LIBRARY_IMPL(selective_scan, CPU, m) {
  m.impl("selective_scan_state", &forward);
  m.impl("selective_scan_state_backward", &backward);
}

}  // namespace selective_scan
