#include "instances.cuh"
#include "launch.cuh"
#include "launch.h"

namespace dwconv2d {
namespace {

template <typename Kernel>
cudaError_t launch_threads(Kernel* kernel, int64_t threads, const Params& p, cudaStream_t stream) {
  return launch(kernel, ceil_div<int64_t>(threads, kDirectThreads), kDirectThreads, 0, stream, p);
}

}  // namespace

cudaError_t launch_direct(const Params& p, Pass pass, cudaStream_t stream) {
  const int64_t results = direct_results(p, pass);
  return with_direct(p, [&](auto instance) {
    using Taps = typename decltype(instance)::Taps;
    using Element = typename decltype(instance)::Element;
    using Input = typename decltype(instance)::Input;
    constexpr bool kOutput = decltype(instance)::kOutput;
    if (pass == Pass::kForward) {
      return launch_threads(direct_forward<Taps, Element, Input, kOutput>, results, p, stream);
    }
    if (pass == Pass::kAdjoint) {
      return launch_threads(direct_adjoint<Taps, Element, Input, kOutput>, results, p, stream);
    }
    const auto error = launch_threads(direct_gradients<Taps, Element, Input, kOutput>, results, p, stream);
    if constexpr (kOutput) {
      const int64_t terms = p.batch * p.plan.channel_blocks * p.states * p.pixels();
      return error ? error : launch_threads(direct_C_gradient<Element, Input>, terms, p, stream);
    }
    return error;
  });
}

cudaError_t launch_sums(const Sums& sums, Dtype dtype, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kDouble: return launch_sums_of<double, double>(sums, stream);
    case Dtype::kFloat: return launch_sums_of<float, float>(sums, stream);
    case Dtype::kHalf: return launch_sums_of<float, Half>(sums, stream);
    default: return launch_sums_of<float, BFloat16>(sums, stream);
  }
}

cudaError_t launch_distribute_taps(const Params& p, const void* taps, void* const (&kernels)[3], void* alpha,
                                   cudaStream_t stream) {
  const auto run = [&](auto zero) {
    using State = decltype(zero);
    const auto to = [](void* data) { return static_cast<State*>(data); };
    return launch(distribute_taps<State>, 3, kDistributeThreads, kDistributeThreads * sizeof(State), stream, p,
                  static_cast<const State*>(taps), to(kernels[0]), to(kernels[1]), to(kernels[2]), to(alpha));
  };
  return p.dtype == Dtype::kDouble ? run(0.0) : run(0.0f);
}

}  // namespace dwconv2d
