#include "instances.cuh"
#include "launch.cuh"
#include "launch.h"

namespace dwconv2d {

cudaError_t launch_fusion_gradients(const Params& p, cudaStream_t stream) {
  return with_tiled_fusion(p, [&](auto instance) {
    using I = decltype(instance);
    return launch(tiled_gradients<typename I::Taps, typename I::Element, typename I::Input, I::kOutput>, p.blocks(),
                  p.plan.threads, p.plan.shared, stream, p);
  });
}

}  // namespace dwconv2d
