// Depthwise convolutions and their gradients without tiles: a thread computes each result from global memory. These
// kernels take any taps, planes of any size, and double precision.
#pragma once

#include "elements.cuh"
#include "plan.h"
#include "taps.cuh"

namespace dwconv2d {

constexpr int kDirectThreads = 128;
constexpr int kUnmergeThreads = 1024;  // the launch has only three blocks

__device__ __forceinline__ int64_t global_index() { return int64_t(blockIdx.x) * kDirectThreads + threadIdx.x; }

// An element of a tensor of planes. `index` counts row after row, state after state, and channel (or channel block)
// after channel.
struct Pixel {
  int64_t batch;
  int channel, state, row, column;
  int64_t offset;  // in its plane

  __device__ __forceinline__ Pixel(int64_t index, int channels, int states, const Params& p) {
    const int64_t rows = index / p.width, planes = rows / p.height, outer = planes / states;
    column = int(index - rows * p.width);
    row = int(rows - planes * p.height);
    offset = int64_t(row) * p.width + column;
    state = int(planes - outer * states);
    batch = outer / channels;
    channel = int(outer - batch * channels);
  }
};

// The position in the plane that a tap reads, or -1 for a zero outside.
__device__ __forceinline__ int position_read(int position, int size, bool zeros) {
  const int inside = min(max(position, 0), size - 1);
  return zeros && inside != position ? -1 : inside;
}

template <typename Taps, typename Input, typename Activation, typename State = StateOf<Activation>>
__device__ __forceinline__ State convolve_at(const Params& p, const Input* plane, int channel, int row, int column) {
  const Taps taps{p};
  State sum = 0;
  for (int a = 0; a < taps.rows(); ++a) {
    const int y = position_read(row + taps.row(a), p.height, p.zeros);
    if (y < 0) continue;
    const Input* const from = plane + int64_t(y) * p.width;
    for (int b = 0; b < taps.columns(a); ++b) {
      const int x = position_read(column + taps.column(a, b), p.width, p.zeros);
      if (x >= 0) sum += taps.template weight<State, Activation>(channel, a, b) * widen(from[x]);
    }
  }
  return sum;
}

template <typename Taps, typename Input, typename Activation, bool kOutputEquation>
__global__ void __launch_bounds__(kDirectThreads) direct_forward(const Params p) {
  using State = StateOf<Activation>;
  const Pixel me(global_index(), p.channels, kOutputEquation ? 1 : p.states, p);
  if (me.batch >= p.batch) return;
  const auto convolved = [&](int n) {
    const Input* const plane = at<Input>(p.input, me.batch, me.channel, n);
    return convolve_at<Taps, Input, Activation>(p, plane, me.channel, me.row, me.column);
  };
  State sum;
  if constexpr (kOutputEquation) {
    sum = static_cast<const State*>(p.D)[me.channel] * widen(at<Activation>(p.x, me.batch, me.channel, 0)[me.offset]);
    for (int n = 0; n < p.states; ++n) sum += widen(at<Activation>(p.C, me.batch, 0, n)[me.offset]) * convolved(n);
  } else {
    sum = convolved(me.state);
    if (p.bias) sum += widen(static_cast<const Activation*>(p.bias)[me.channel]);
  }
  narrow(sum, at<Activation>(p.result, me.batch, me.channel, me.state)[me.offset]);
}

// The positions whose tap at an offset reads `target`.
struct Range {
  int first, last;

  __device__ __forceinline__ Range(int target, int offset, int size, bool zeros) {
    first = !zeros && target == 0 ? 0 : max(target - offset, 0);
    last = !zeros && target == size - 1 ? size - 1 : min(target - offset, size - 1);
  }
};

template <typename Taps, typename Input, typename Activation, bool kOutputEquation>
__global__ void __launch_bounds__(kDirectThreads) direct_adjoint(const Params p) {
  using State = StateOf<Activation>;
  const Pixel me(global_index(), p.channels, p.states, p);
  if (me.batch >= p.batch) return;
  const Activation* const grad = at<Activation>(p.grad, me.batch, me.channel, kOutputEquation ? 0 : me.state);
  const Activation* const C = kOutputEquation ? at<Activation>(p.C, me.batch, 0, me.state) : nullptr;
  const Taps taps{p};
  State sum = 0;
  for (int a = 0; a < taps.rows(); ++a) {
    const Range rows(me.row, taps.row(a), p.height, p.zeros);
    if (rows.first > rows.last) continue;
    for (int b = 0; b < taps.columns(a); ++b) {
      const Range columns(me.column, taps.column(a, b), p.width, p.zeros);
      State of_tap = 0;
      for (int y = rows.first; y <= rows.last; ++y) {
        State of_row = 0;
        for (int x = columns.first; x <= columns.last; ++x) {
          const int64_t pixel = int64_t(y) * p.width + x;
          if constexpr (kOutputEquation) {
            of_row += widen(grad[pixel]) * widen(C[pixel]);
          } else {
            of_row += widen(grad[pixel]);
          }
        }
        of_tap += of_row;
      }
      if (columns.first <= columns.last) sum += taps.template weight<State, Activation>(me.channel, a, b) * of_tap;
    }
  }
  narrow(sum, at<Input>(p.grad_input, me.batch, me.channel, me.state)[me.offset]);
  if (kOutputEquation && me.state == 0) {
    const State D = static_cast<const State*>(p.D)[me.channel];
    narrow(D * widen(grad[me.offset]), at<Activation>(p.grad_x, me.batch, me.channel, 0)[me.offset]);
  }
}

// Partial sums of the gradients of the taps, and of D or the bias. A thread computes one, for one channel and slice of
// an image.
template <typename Taps, typename Input, typename Activation, bool kOutputEquation>
__global__ void __launch_bounds__(kDirectThreads) direct_gradients(const Params p) {
  using State = StateOf<Activation>;
  const int tap_count = p.taps(), numbers = tap_count + (p.partials_D_or_bias ? 1 : 0);
  const int64_t index = global_index(), row = index / numbers, slice_of_all = row / p.channels;
  const int64_t batch = slice_of_all / p.slices;
  if (batch >= p.batch) return;
  const int tap = int(index - row * numbers), channel = int(row - slice_of_all * p.channels);
  const int64_t first = (slice_of_all - batch * p.slices) * kSlice, last = min(first + kSlice, p.pixels());

  const bool is_tap = tap < tap_count;
  const Taps taps{p};
  const int a = is_tap ? taps.row_of(tap) : 0, b = is_tap ? tap - taps.tap(a, 0) : 0;
  const int row_offset = taps.row(a), column_offset = taps.column(a, b);
  State sum = 0;
  for (int n = 0; n < (is_tap ? p.states : 1); ++n) {
    const Activation* const grad = at<Activation>(p.grad, batch, channel, kOutputEquation ? 0 : n);
    const Input* const plane = at<Input>(p.input, batch, channel, n);
    State of_state = 0;
    for (int64_t pixel = first; pixel < last; ++pixel) {
      State term = widen(grad[pixel]);
      if (is_tap) {
        const int from_y = int(pixel / p.width), from_x = int(pixel - int64_t(from_y) * p.width);
        const int y = position_read(from_y + row_offset, p.height, p.zeros);
        const int x = position_read(from_x + column_offset, p.width, p.zeros);
        if (y < 0 || x < 0) continue;
        if constexpr (kOutputEquation) term *= widen(at<Activation>(p.C, batch, 0, n)[pixel]);
        term *= widen(plane[int64_t(y) * p.width + x]);
      } else if constexpr (kOutputEquation) {
        term *= widen(at<Activation>(p.x, batch, channel, 0)[pixel]);
      }
      of_state += term;
    }
    sum += of_state;
  }
  if (is_tap) {
    static_cast<State*>(p.partials_taps)[row * tap_count + tap] = sum;
  } else {
    static_cast<State*>(p.partials_D_or_bias)[row] = sum;
  }
}

// Partial sums of C's gradient: over a block of channels.
template <typename Input, typename Activation>
__global__ void __launch_bounds__(kDirectThreads) direct_C_gradient(const Params p) {
  using State = StateOf<Activation>;
  const int64_t index = global_index();
  const Pixel me(index, p.plan.channel_blocks, p.states, p);
  if (me.batch >= p.batch) return;
  const int first = me.channel * kChannelBlock, last = min(first + kChannelBlock, p.channels);
  State sum = 0;
  for (int channel = first; channel < last; ++channel) {
    const Input* const plane = at<Input>(p.input, me.batch, channel, me.state);
    const State fused = convolve_at<FusionStencil, Input, Activation>(p, plane, channel, me.row, me.column);
    sum += widen(at<Activation>(p.grad, me.batch, channel, 0)[me.offset]) * fused;
  }
  static_cast<State*>(p.partials_C)[index] = sum;
}

// Computes the gradients of the fusion's kernels (D, 9) and of alpha from those of the 25 taps (D, 25). Each block
// computes those of one kernel and its factor.
template <typename State>
__global__ void __launch_bounds__(kUnmergeThreads)
    unmerge_taps(const Params p, const State* taps, State* grad_weight3, State* grad_weight3_d3, State* grad_weight3_d5,
                 State* grad_alpha) {
  State* const sums = shared_at<State>(0);
  const int k = blockIdx.x, dilation = 2 * k + 1;
  State* const to = k == 0 ? grad_weight3 : k == 1 ? grad_weight3_d3 : grad_weight3_d5;
  const State* const weights = static_cast<const State*>(p.weights[k]);
  const State alpha = static_cast<const State*>(p.alpha)[k];
  State sum = 0;
  for (int64_t i = threadIdx.x; i < int64_t(p.channels) * 9; i += kUnmergeThreads) {
    const int64_t channel = i / 9;
    const int row = int(i - channel * 9) / 3 - 1, column = int(i - channel * 9) % 3 - 1;
    const State grad = taps[channel * kFusionTaps + FusionStencil::tap_at(row * dilation, column * dilation)];
    to[i] = alpha * grad;
    sum += weights[i] * grad;
  }
  sums[threadIdx.x] = sum;
  for (int half = kUnmergeThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < unsigned(half)) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) grad_alpha[k] = sums[0];
}

}  // namespace dwconv2d
