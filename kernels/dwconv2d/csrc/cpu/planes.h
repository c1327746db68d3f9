// The interface between planes.cpp, which sees tensors, and the kernels, which are compiled once per instruction set.
//
// All operators are one computation on planes, with some parts left out:
//
//   conv_n(p) = sum over taps k of weight_k in_n(p + offset_k)         in_n padded beyond the plane
//   out(p)    = sum_n C_n(p) conv_n(p) + D x(p)                        state_fusion_output: the output equation
//   out_n(p)  = conv_n(p) + bias                                       dilated_dwconv2d, state_fusion
#pragma once

#include <cstdint>

namespace dwconv2d {

// A tensor (batch, channels, states, height, width) and its strides in elements. `data` is null if there is no tensor.
struct View {
  const void* data = nullptr;
  int64_t batch = 0, channel = 0, state = 0, row = 0, column = 0;
};

// Arrangements of taps that have their own code: a 3x3 window without dilation, and state fusion.
enum Pattern { kAny, kSquare3, kFusion };

struct Params {
  int64_t batch, channels, states, height, width;
  bool zeros;  // pad planes by zeros, or else by their nearest border value

  Pattern pattern;
  int taps;
  const int *tap_rows, *tap_columns;  // offset of each tap; taps of one row are adjacent
  int distinct_rows;                  // number of rows that have taps
  int reach_rows, reach_columns;      // largest absolute offset
  const void* weights;                // (taps, weight_pitch) of the computation's type, zeros after the last channel
  int64_t weight_pitch;

  View in, C, x, bias, D;
  View out;  // for the forward pass

  // For the backward pass: the gradient of `out`, and the results.
  View grad, grad_in, grad_x;
  // Partial sums in the computation's type. grad_C is (batch, states, channel blocks, height, width), still to be summed
  // over channel blocks. grad_weights is (batch, strips, taps + 1, channels), still to be summed over batch and strips;
  // after the taps comes D or the bias.
  void *grad_C, *grad_weights;

  // A strip is the rows of a plane that are processed at once. A task is one strip of `Kernel::channels` channels: as
  // many as fit in a vector, or two for `fusion_rows`. Its results do not depend on the thread that runs it.
  int64_t strip_rows, strips;

  int64_t channel_blocks(int64_t of_task) const { return (channels + of_task - 1) / of_task; }
};

struct Kernel {
  int64_t channels, pixel_bytes;  // channels of a task, and bytes of a pixel of all of them
  int64_t (*scratch_bytes)(const Params&);
  void (*run)(const Params&, int64_t task, void* scratch);
};

// The type of `in`, then the type of the other activations.
enum ElementTypes { kFloat32, kFloat64, kFloat16, kBFloat16, kFloat32WithFloat16, kFloat32WithBFloat16, kElementTypes };

constexpr int64_t kRowsWidth = 24;

struct Kernels {
  Kernel forward[kElementTypes], backward[kElementTypes];
  // Forward pass of state fusion, for float32 planes with contiguous rows of at least kRowsWidth. `run` may be null.
  Kernel fusion_rows;
};

extern const Kernels kPortable;
#ifdef KERNELS_X86
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace dwconv2d
