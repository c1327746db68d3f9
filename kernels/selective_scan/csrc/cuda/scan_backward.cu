#include "launch.cuh"
#include "launch.h"
#include "scan_kernel.cuh"

namespace selective_scan {

cudaError_t launch_backward(const Params& p, Dtype dtype, cudaStream_t stream) {
  return with_instance(p.plan, dtype, [&](auto instance) {
    using I = decltype(instance);
    return launch(scan_backward<typename I::Input, I::kItems, I::kOneState, I::kFlat>, p.blocks(), p.plan.threads,
                  Layout<typename I::Input>(p.plan, true).total, stream, p);
  });
}

cudaError_t launch_sums(const Sums& sums, Dtype dtype, cudaStream_t stream) {
  return with_instance(Plan(), dtype, [&](auto instance) {
    using Output = typename decltype(instance)::Input;
    using State = typename decltype(instance)::State;
    return launch_sums_of<State, Output>(sums, stream);
  });
}

}  // namespace selective_scan
