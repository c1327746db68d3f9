#include "launch.cuh"
#include "kernels.h"
#include "scan_kernel.cuh"

namespace selective_scan {

cudaError_t launch_backward(const Params& p, Dtype dtype, cudaStream_t stream) {
  return with_instance(p.plan, dtype, [&](auto instance) {
    using I = decltype(instance);
    return launch(scan_backward<typename I::Input, I::kItems, I::kFlat>, p.blocks(), p.plan.threads,
                  Layout<typename I::Input>(p.plan, true).total, stream, p);
  });
}

cudaError_t launch_sums(const Sums& sums, Dtype dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto activation) { return launch_sums_of<decltype(activation)>(sums, stream); });
}

}  // namespace selective_scan
