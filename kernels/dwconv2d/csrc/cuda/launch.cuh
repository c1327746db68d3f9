// Launches a kernel whose dynamic shared memory may exceed 48 KiB, the most that needs no opt-in.
//
// selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.
#pragma once

#include <cuda_runtime.h>

#include "elements.cuh"

namespace gpu {

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel* kernel, int64_t blocks, int threads, size_t shared, cudaStream_t stream, Args... args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {
    // Ask for all that the GPU has: if one thread asked for less, another thread's launch could fail.
    int device = 0, most = 0;
    auto error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(blocks), threads, shared, stream>>>(args...);
  return cudaGetLastError();
}

template <typename Output>
cudaError_t launch_sums_of(const Sums& sums, cudaStream_t stream) {
  using State = StateOf<Output>;
  return launch(sum_partials<State, Output>, sums.blocks(), kSumThreads, kSumThreads * sizeof(State), stream, sums);
}

}  // namespace gpu
