// Functions around the CPU kernels.
//
// selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>

#include <string>

namespace host {

// Chooses the instruction set as PyTorch does: the best of this processor, or a lesser one that ATEN_CPU_CAPABILITY
// names.
#ifdef KERNELS_X86
template <class Kernels>
const Kernels& choose(const Kernels& portable, const Kernels& avx2, const Kernels& avx512) {
  static const std::string capability = at::get_cpu_capability();
  return capability == "AVX512" ? avx512 : capability == "AVX2" ? avx2 : portable;
}
#endif

// Memory for one thread's tasks, kept for the next call: the first access to new memory often takes longer than a task.
inline void* scratch(size_t bytes) {
  constexpr size_t kKept = 8 << 20;
  thread_local c10::DataPtr memory;
  thread_local size_t size = 0;
  if (bytes > size || size > kKept) {
    memory.clear();
    size = 0;
    memory = c10::GetAllocator(at::kCPU)->allocate(bytes);
    size = bytes;
  }
  return memory.get();
}

// Runs every task. Each thread has its own scratch memory.
template <class Kernel, class Params>
void run(const Kernel& kernel, const Params& p, int64_t tasks) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    void* const memory = scratch(kernel.scratch_bytes(p));
    for (int64_t task = begin; task < end; ++task) kernel.run(p, task, memory);
  });
}

// out[i][j] = sum over k of partials[i][k][j], for i < outer and k < count. The sum is in double precision and in the
// order of k, so it does not depend on the threads.
template <class Partial>
at::Tensor sum(const at::Tensor& partials, int64_t outer, int64_t count, at::Tensor out) {
  if (count == 1) return out.copy_(partials.view(out.sizes()));
  const int64_t inner = outer ? out.numel() / outer : 0;
  const at::Tensor totals = at::empty({outer, inner}, out.options().dtype(at::kDouble));
  const Partial* from = partials.const_data_ptr<Partial>();
  double* to = totals.mutable_data_ptr<double>();
  at::parallel_for(0, outer * inner, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t i = index / inner, j = index % inner;
      double total = 0;
      for (int64_t k = 0; k < count; ++k) total += from[(i * count + k) * inner + j];
      to[index] = total;
    }
  });
  return out.copy_(totals.view(out.sizes()));
}

}  // namespace host
