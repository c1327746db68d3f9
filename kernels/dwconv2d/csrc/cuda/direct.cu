#include "instances.cuh"
#include "launch.cuh"
#include "kernels.h"

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
    using I = decltype(instance);
    using Taps = typename I::Taps;
    using Input = typename I::Input;
    using Activation = typename I::Activation;
    constexpr bool kOutputEquation = I::kOutputEquation;
    if (pass == Pass::kForward) {
      return launch_threads(direct_forward<Taps, Input, Activation, kOutputEquation>, results, p, stream);
    }
    if (pass == Pass::kAdjoint) {
      return launch_threads(direct_adjoint<Taps, Input, Activation, kOutputEquation>, results, p, stream);
    }
    const auto error = launch_threads(direct_gradients<Taps, Input, Activation, kOutputEquation>, results, p, stream);
    if constexpr (kOutputEquation) {
      const int64_t partials = p.batch * p.plan.channel_blocks * p.states * p.pixels();
      return error ? error : launch_threads(direct_C_gradient<Input, Activation>, partials, p, stream);
    }
    return error;
  });
}

cudaError_t launch_sums(const Sums& sums, Dtype dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto activation) { return launch_sums_of<decltype(activation)>(sums, stream); });
}

cudaError_t launch_unmerge_taps(const Params& p, const void* taps, void* const (&weights)[3], void* alpha,
                                cudaStream_t stream) {
  const auto run = [&](auto zero) {
    using State = decltype(zero);
    const auto to = [](void* data) { return static_cast<State*>(data); };
    return launch(unmerge_taps<State>, 3, kUnmergeThreads, kUnmergeThreads * sizeof(State), stream, p,
                  static_cast<const State*>(taps), to(weights[0]), to(weights[1]), to(weights[2]), to(alpha));
  };
  return p.dtype == Dtype::kDouble ? run(0.0) : run(0.0f);
}

}  // namespace dwconv2d
