// Chooses the kernel for a call.
#pragma once

#include "direct_kernel.cuh"
#include "tiled_kernel.cuh"

namespace dwconv2d {

// The template arguments of a kernel: its taps, the type of the convolved planes, the type of the result, C and x, and
// whether it computes the output equation.
template <typename SomeTaps, typename ElementOfInput, typename InputType, bool kHasOutput>
struct Instance {
  using Taps = SomeTaps;
  using Element = ElementOfInput;
  using Input = InputType;
  static constexpr bool kOutput = kHasOutput;
};

// Calls `function` with an Instance.
template <typename Function>
auto with_tiled_fusion(const Params& p, Function function) {
  if (!p.has_output()) return function(Instance<FusionStencil, float, float, false>());
  switch (p.dtype) {
    case Dtype::kHalf: return function(Instance<FusionStencil, float, Half, true>());
    case Dtype::kBFloat16: return function(Instance<FusionStencil, float, BFloat16, true>());
    default: return function(Instance<FusionStencil, float, float, true>());
  }
}

template <int kSize, typename Function>
auto with_tiled_square(const Params& p, Function function) {
  using Stencil = SquareStencil<kSize>;
  switch (p.dtype) {
    case Dtype::kHalf: return function(Instance<Stencil, Half, Half, false>());
    case Dtype::kBFloat16: return function(Instance<Stencil, BFloat16, BFloat16, false>());
    default: return function(Instance<Stencil, float, float, false>());
  }
}

template <typename Function>
auto with_tiled_conv(const Params& p, Function function) {
  switch (p.kernel_height) {
    case 3: return with_tiled_square<3>(p, function);
    case 5: return with_tiled_square<5>(p, function);
    case 7: return with_tiled_square<7>(p, function);
    default: return with_tiled_square<11>(p, function);
  }
}

template <typename Input, typename Function>
auto with_direct(const Params& p, Function function) {
  using State = typename StateOf<Input>::type;
  if (p.has_output()) return function(Instance<FusionTaps, State, Input, true>());
  if (p.operation == Operation::kConv) return function(Instance<ConvTaps, Input, Input, false>());
  return function(Instance<FusionTaps, State, State, false>());
}

template <typename Function>
auto with_direct(const Params& p, Function function) {
  switch (p.dtype) {
    case Dtype::kDouble: return with_direct<double>(p, function);
    case Dtype::kFloat: return with_direct<float>(p, function);
    case Dtype::kHalf: return with_direct<Half>(p, function);
    default: return with_direct<BFloat16>(p, function);
  }
}

// The number of threads of the kernels without tiles: one for each result.
inline int64_t direct_results(const Params& p, Pass pass) {
  const int64_t planes = p.batch * p.channels, states = pass == Pass::kForward && p.has_output() ? 1 : p.states;
  if (pass != Pass::kGradients) return planes * states * p.pixels();
  return planes * p.slices * (p.taps() + (p.terms_other ? 1 : 0));
}

}  // namespace dwconv2d
