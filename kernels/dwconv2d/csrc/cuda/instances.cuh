// Chooses the kernel for a call.
#pragma once

#include "direct_kernel.cuh"
#include "tiled_kernel.cuh"

namespace dwconv2d {

// The template arguments of a kernel: its taps, the type of the input and of its gradient, the type of the other
// activations (the result, C, x and their gradients), and whether it computes the output equation.
template <typename T, typename I, typename A, bool kHasOutputEquation>
struct Instance {
  using Taps = T;
  using Input = I;
  using Activation = A;
  static constexpr bool kOutputEquation = kHasOutputEquation;
};

// Calls `function` with an Instance.
template <typename Function>
auto with_tiled_fusion(const Params& p, Function function) {
  if (!p.has_output_equation()) return function(Instance<FusionStencil, float, float, false>());
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

template <typename Activation, typename Function>
auto with_direct(const Params& p, Function function) {
  using State = StateOf<Activation>;
  if (p.has_output_equation()) return function(Instance<FusionStencil, State, Activation, true>());
  if (p.operation == Operation::kConv) return function(Instance<ConvTaps, Activation, Activation, false>());
  return function(Instance<FusionStencil, State, State, false>());
}

template <typename Function>
auto with_direct(const Params& p, Function function) {
  return with_type(p.dtype, [&](auto activation) { return with_direct<decltype(activation)>(p, function); });
}

// The number of threads of the kernels without tiles: one for each result.
inline int64_t direct_results(const Params& p, Pass pass) {
  const int64_t planes = p.batch * p.channels;
  const int64_t states = pass == Pass::kForward && p.has_output_equation() ? 1 : p.states;
  if (pass != Pass::kGradients) return planes * states * p.pixels();
  return planes * p.slices * (p.taps() + (p.partials_D_or_bias ? 1 : 0));
}

}  // namespace dwconv2d
