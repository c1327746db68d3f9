// The kernels' launches, free of PyTorch. Each returns cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace selective_scan {

cudaError_t launch_forward(const Params& p, Dtype dtype, cudaStream_t stream);
cudaError_t launch_backward(const Params& p, Dtype dtype, cudaStream_t stream);

// to[o, i] = sum over t of terms[o, t, i]; `terms` in the state's dtype of `dtype`, `to` in `dtype`.
cudaError_t launch_sum(const void* terms, void* to, int64_t outer, int64_t count, int64_t inner, Dtype dtype,
                       cudaStream_t stream);

}  // namespace selective_scan
