// A launch whose dynamic shared memory may exceed the 48 KiB that need no permission.
#pragma once

#include "launch.h"
#include "scan_kernel.cuh"

namespace selective_scan {

template <typename Kernel, typename... Args>
cudaError_t launch(Kernel* kernel, int64_t blocks, int threads, size_t shared, cudaStream_t stream, Args... args) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<unsigned(blocks), threads, shared, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace selective_scan
