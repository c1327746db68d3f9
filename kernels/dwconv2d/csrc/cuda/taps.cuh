// Addresses of planes, the taps of a convolution, and their weights.
//
// A stencil's taps are divided into parts, so that the weights of a part fit in registers. A part of a large kernel is
// one row of taps. Rows of a part and columns of a row are numbered from 0. Taps are numbered row after row. In this
// order, every stencil mirrors itself about its centre.
#pragma once

#include "elements.cuh"
#include "plan.h"

namespace dwconv2d {

template <typename T>
__device__ __forceinline__ T* at(const Planes& planes, int64_t batch, int64_t channel, int64_t state) {
  return static_cast<T*>(const_cast<void*>(planes.data)) + batch * planes.batch + channel * planes.channel +
         state * planes.state;
}

// The state fusion's 25 taps: squares of 3 x 3 with dilations 1, 3 and 5 around a common centre.
struct FusionStencil {
  static constexpr int kReach = kFusionReach, kTaps = kFusionTaps;
  static constexpr int kParts = 1, kPartRows = 7, kPartTaps = kTaps, kRowReach = kReach;

  static constexpr int row(int a) { return a < 3 ? 2 * a - 5 : a == 3 ? 0 : 2 * a - 7; }
  static constexpr int columns(int a) { return a == 3 ? 7 : 3; }
  static constexpr int column(int a, int b) { return a == 3 ? row(b) : (b - 1) * dilation_of(row(a), 0); }
  static constexpr int tap(int a, int b) { return 3 * a + b + (a > 3 ? 4 : 0); }
  static constexpr int part_row(int) { return 0; }

  // The dilation of the kernel that has a tap at an offset; 0 for the centre, which all three have.
  static constexpr int dilation_of(int row, int column) {
    const int y = row < 0 ? -row : row, x = column < 0 ? -column : column;
    return y > x ? y : x;
  }
  // The index, in the kernel of this dilation, of the tap at an offset that the dilation divides.
  static constexpr int kernel_index(int row, int column, int dilation) {
    return 3 * (row / dilation + 1) + column / dilation + 1;
  }

  // The number of the tap at an offset.
  static constexpr int tap_at(int row, int column) {
    const int a = index(row);
    return tap(a, a == 3 ? index(column) : column / dilation_of(row, 0) + 1);
  }
  static constexpr int index(int offset) { return offset < 0 ? (offset + 5) / 2 : offset == 0 ? 3 : (offset + 7) / 2; }

  // The sum of alpha times the weight, over the kernels that have this tap.
  template <typename State>
  static __device__ __forceinline__ State weight(const Params& p, int channel, int a, int b) {
    const int y = row(a), x = column(a, b), own = dilation_of(y, x);
    State sum = 0;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int dilation = 2 * k + 1;
      if (own != 0 && own != dilation) continue;
      const State* const kernel = static_cast<const State*>(p.weights[k]) + int64_t(channel) * 9;
      sum += static_cast<const State*>(p.alpha)[k] * kernel[kernel_index(y, x, dilation)];
    }
    return sum;
  }

  template <typename Activation>
  static __device__ __forceinline__ void load(const Params& p, int channel, int, float (&weights)[kPartTaps]) {
#pragma unroll
    for (int a = 0; a < kPartRows; ++a) {
#pragma unroll
      for (int b = 0; b < columns(a); ++b) weights[tap(a, b)] = weight<float>(p, channel, a, b);
    }
  }

  // One tap at a time, for the kernels without tiles.
  const Params& p;

  static constexpr int rows() { return kPartRows; }
  static constexpr int row_of(int tap) { return tap < 9 ? tap / 3 : tap < 16 ? 3 : (tap - 4) / 3; }

  template <typename State, typename Activation>
  __device__ __forceinline__ State weight(int channel, int a, int b) const {
    return weight<State>(p, channel, a, b);
  }
};

template <int kSize>
struct SquareStencil {
  static constexpr bool kWhole = kSize <= kLargestWhole;
  static constexpr int kReach = kSize / 2, kTaps = kSize * kSize;
  static constexpr int kParts = kWhole ? 1 : kSize, kPartRows = kWhole ? kSize : 1, kPartTaps = kPartRows * kSize;
  static constexpr int kRowReach = kWhole ? kReach : 0;

  static constexpr int row(int a) { return kWhole ? a - kReach : 0; }
  static constexpr int columns(int) { return kSize; }
  static constexpr int column(int, int b) { return b - kReach; }
  static constexpr int tap(int a, int b) { return a * kSize + b; }
  static constexpr int part_row(int part) { return kWhole ? 0 : part - kReach; }

  template <typename Activation>
  static __device__ __forceinline__ void load(const Params& p, int channel, int part, float (&weights)[kPartTaps]) {
    const int64_t first = int64_t(channel) * kTaps + part * kPartTaps;
    const Activation* const from = static_cast<const Activation*>(p.weights[0]) + first;
#pragma unroll
    for (int tap = 0; tap < kPartTaps; ++tap) weights[tap] = widen(from[tap]);
  }
};

// The taps of any other convolution, one at a time.
struct ConvTaps {
  const Params& p;

  __device__ __forceinline__ int rows() const { return p.kernel_height; }
  __device__ __forceinline__ int columns(int) const { return p.kernel_width; }
  __device__ __forceinline__ int row(int a) const { return offset(a - p.kernel_height / 2); }
  __device__ __forceinline__ int column(int, int b) const { return offset(b - p.kernel_width / 2); }
  __device__ __forceinline__ int row_of(int tap) const { return tap / p.kernel_width; }
  __device__ __forceinline__ int tap(int a, int b) const { return a * p.kernel_width + b; }

  template <typename State, typename Activation>
  __device__ __forceinline__ State weight(int channel, int a, int b) const {
    return widen(static_cast<const Activation*>(p.weights[0])[int64_t(channel) * p.taps() + tap(a, b)]);
  }

 private:
  // All offsets beyond any plane give the same result.
  __device__ __forceinline__ int offset(int taps) const {
    constexpr int64_t kMost = 1 << 30;
    const int64_t offset = int64_t(taps) * p.dilation;
    return int(min(max(offset, -kMost), kMost));
  }
};

}  // namespace dwconv2d
