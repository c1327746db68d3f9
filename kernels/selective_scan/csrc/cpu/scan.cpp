// The state scan on the CPU: arguments, memory, threads and the choice of an instruction set.
#include "scan.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <torch/library.h>

#include "../check.h"

namespace selective_scan {
namespace {

using at::Tensor;
using Bias = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What PyTorch itself would use: the best this processor has, or less if ATEN_CPU_CAPABILITY says so.
const Kernels& kernels() {
#ifdef SELECTIVE_SCAN_X86
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return kAvx512;
  if (capability == "AVX2") return kAvx2;
#endif
  return kPortable;
}

DType dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return kFloat64;
    case at::kHalf: return kFloat16;
    case at::kBFloat16: return kBFloat16;
    default: return kFloat32;
  }
}

Problem problem(const Sizes& sizes, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                const Bias& bias, bool softplus) {
  Problem p{};
  p.batch = sizes.batch, p.channels = sizes.channels, p.states = sizes.states, p.length = sizes.length;
  p.groups = sizes.groups, p.softplus = softplus;
  p.u = u.const_data_ptr(), p.delta = delta.const_data_ptr(), p.A = A.const_data_ptr(), p.B = B.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.u_strides[i] = u.stride(i), p.delta_strides[i] = delta.stride(i);
  for (int i = 0; i < 2; ++i) p.A_strides[i] = A.stride(i);
  const Tensor grouped = B.dim() == 4 ? B : B.unsqueeze(1);
  for (int i = 0; i < 4; ++i) p.B_strides[i] = grouped.stride(i);
  if (bias) p.bias = bias->const_data_ptr(), p.bias_stride = bias->stride(0);
  return p;
}

void run(const Kernel& kernel, const Problem& p) {
  at::parallel_for(0, p.batch * p.groups * p.blocks(kernel.lanes), 1, [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetAllocator(at::kCPU)->allocate(kernel.scratch_bytes(p));
    for (int64_t task = begin; task < end; ++task) kernel.run(p, task, scratch.get());
  });
}

Tensor forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Bias& delta_bias,
               bool delta_softplus) {
  const Sizes sizes = check_inputs(u, delta, A, B, delta_bias);
  const Tensor h = at::empty({sizes.batch, sizes.channels, sizes.states, sizes.length}, A.options());
  Problem p = problem(sizes, u, delta, A, B, delta_bias, delta_softplus);
  p.h = h.mutable_data_ptr();
  run(kernels().forward[dtype(u)], p);
  return h;
}

// out[i][j] = sum over k of parts[i][k][j], i < outer and k < terms, in double precision and in the order of k whatever the thread.
template <class Part>
Tensor sum(const Tensor& parts, int64_t outer, int64_t terms, Tensor out) {
  const int64_t inner = outer ? out.numel() / outer : 0;
  const Tensor wide = at::empty({outer, inner}, out.options().dtype(at::kDouble));
  const Part* from = parts.const_data_ptr<Part>();
  double* to = wide.mutable_data_ptr<double>();
  at::parallel_for(0, outer * inner, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t i = index / inner, j = index % inner;
      double total = 0;
      for (int64_t k = 0; k < terms; ++k) total += from[(i * terms + k) * inner + j];
      to[index] = total;
    }
  });
  return out.copy_(wide.view(out.sizes()));
}

Gradients backward(const Tensor& grad, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                   const Bias& delta_bias, bool delta_softplus) {
  const Sizes sizes = check_inputs(u, delta, A, B, delta_bias);
  check_grad(grad, u, sizes);
  const Kernel& kernel = kernels().backward[dtype(u)];
  Problem p = problem(sizes, u, delta, A, B, delta_bias, delta_softplus);
  p.grad = grad.const_data_ptr();
  for (int i = 0; i < 4; ++i) p.grad_strides[i] = grad.stride(i);

  const int64_t blocks = p.blocks(kernel.lanes);
  const auto partial = A.options().dtype(at::kDouble);
  const Tensor grad_u = at::empty(u.sizes(), u.options()), grad_delta = at::empty(u.sizes(), u.options());
  const Tensor grad_A = at::empty({p.batch, p.channels, p.states}, partial);
  const Tensor grad_bias = at::empty({p.batch, p.channels}, partial);
  const Tensor grad_B = at::empty({p.batch, p.groups, blocks, p.states, p.length}, A.options());
  p.grad_u = grad_u.mutable_data_ptr(), p.grad_delta = grad_delta.mutable_data_ptr();
  p.grad_A = grad_A.mutable_data_ptr<double>(), p.grad_bias = grad_bias.mutable_data_ptr<double>();
  p.grad_B = grad_B.mutable_data_ptr();
  run(kernel, p);

  const auto sum_blocks = u.scalar_type() == at::kDouble ? sum<double> : sum<float>;
  return {grad_u, grad_delta, sum<double>(grad_A, 1, p.batch, at::empty(A.sizes(), A.options())),
          sum_blocks(grad_B, p.batch * p.groups, blocks, at::empty(B.sizes(), B.options())),
          sum<double>(grad_bias, 1, p.batch, at::empty({p.channels}, A.options()))};
}

}  // namespace

TORCH_LIBRARY_IMPL(selective_scan, CPU, m) {
  m.impl("selective_scan_state", &forward);
  m.impl("selective_scan_state_backward", &backward);
}

}  // namespace selective_scan
