#include "launch.cuh"
#include "kernels.h"
#include "scan_kernel.cuh"

namespace selective_scan {

cudaError_t launch_forward(const Params& p, Dtype dtype, cudaStream_t stream) {
  return with_instance(p.plan, dtype, [&](auto instance) {
    using I = decltype(instance);
    return launch(scan_forward<typename I::Input, I::kItems, I::kFlat>, p.blocks(), p.plan.threads,
                  Layout<typename I::Input>(p.plan, false).total, stream, p);
  });
}

}  // namespace selective_scan
