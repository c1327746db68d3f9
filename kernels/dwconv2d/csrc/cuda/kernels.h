// The kernels of this package, without PyTorch. Each function launches one or more and returns cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace dwconv2d {

cudaError_t launch_fusion(const Params& p, cudaStream_t stream);
cudaError_t launch_fusion_adjoint(const Params& p, cudaStream_t stream);
cudaError_t launch_fusion_gradients(const Params& p, cudaStream_t stream);
cudaError_t launch_conv(const Params& p, cudaStream_t stream);
cudaError_t launch_conv_adjoint(const Params& p, cudaStream_t stream);
cudaError_t launch_conv_gradients(const Params& p, cudaStream_t stream);

// Launches the kernels without tiles. With the output equation, the pass for the gradients also writes partials_C.
cudaError_t launch_direct(const Params& p, Pass pass, cudaStream_t stream);

inline cudaError_t launch_pass(const Params& p, Pass pass, cudaStream_t stream) {
  if (!p.plan.tiled) return launch_direct(p, pass, stream);
  const bool conv = p.operation == Operation::kConv;
  switch (pass) {
    case Pass::kForward: return conv ? launch_conv(p, stream) : launch_fusion(p, stream);
    case Pass::kAdjoint: return conv ? launch_conv_adjoint(p, stream) : launch_fusion_adjoint(p, stream);
    default: return conv ? launch_conv_gradients(p, stream) : launch_fusion_gradients(p, stream);
  }
}

// `dtype` is the type of the activations. Results have this type, or the states' type if `in_state_dtype`.
cudaError_t launch_sums(const Sums& sums, Dtype dtype, cudaStream_t stream);

// Computes the gradients of the three kernels and of alpha from those of the 25 taps (D, 25), in the states' dtype.
cudaError_t launch_unmerge_taps(const Params& p, const void* taps, void* const (&weights)[3], void* alpha,
                                cudaStream_t stream);

}  // namespace dwconv2d
