// The kernels of this package, without PyTorch. Each function launches one or more and returns cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace selective_scan {

cudaError_t launch_forward(const Params& p, Dtype dtype, cudaStream_t stream);
cudaError_t launch_backward(const Params& p, Dtype dtype, cudaStream_t stream);

// `dtype` is the type of the activations. Results have this type, or the states' type if `in_state_dtype`.
cudaError_t launch_sums(const Sums& sums, Dtype dtype, cudaStream_t stream);

}  // namespace selective_scan
