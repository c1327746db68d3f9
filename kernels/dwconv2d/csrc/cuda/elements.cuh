// Element types, shared memory and sums.
//
// selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.
#pragma once

#include <type_traits>

#ifdef __CUDACC__
#include "device.cuh"
#endif
#include "types.h"

namespace gpu {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The type of the states, and of the computation, for a type of activations.
template <typename T>
using StateOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Half x) { return half_to_float(x.bits); }
__device__ __forceinline__ float widen(BFloat16 x) { return float_of_bits(uint32_t(x.bits) << 16); }

__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, Half& to) { to.bits = uint16_t(to_halves(x, 0)); }
__device__ __forceinline__ void narrow(float x, BFloat16& to) { to.bits = uint16_t(to_bfloat16s(x, 0)); }

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// Calls function(T()) with T the type of a tensor of this dtype.
template <typename Function>
auto with_type(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kDouble: return function(double());
    case Dtype::kFloat: return function(float());
    case Dtype::kHalf: return function(Half());
    default: return function(BFloat16());
  }
}

constexpr size_t padded(size_t bytes) { return (bytes + 15) / 16 * 16; }

template <typename T>
__device__ __forceinline__ T* shared_at(size_t offset) {
  return reinterpret_cast<T*>(shared_memory() + offset);
}

constexpr int kSumThreads = 224;

// Computes up to three sums. The order of additions depends only on the sizes, so results repeat to the bit.
template <typename State, typename Output>
__global__ void __launch_bounds__(kSumThreads) sum_partials(Sums sums) {
  constexpr int kSlices = kSumThreads / kWarp;
  int64_t block = blockIdx.x;
  Sum sum = sums.first;
  if (block >= sum.blocks()) {
    block -= sum.blocks();
    sum = sums.second;
    if (block >= sum.blocks()) {
      block -= sum.blocks();
      sum = sums.third;
    }
  }
  const State* const partials = static_cast<const State*>(sum.partials);
  State* const parts = shared_at<State>(0);
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t output = block * kWarp + lane, o = output / sum.inner, i = output - o * sum.inner;
  State total = 0;
  if (o < sum.outer) {
    for (int64_t k = slice; k < sum.count; k += kSlices) total += partials[(o * sum.count + k) * sum.inner + i];
  }
  parts[threadIdx.x] = total;
  __syncthreads();
  if (slice == 0 && o < sum.outer) {
    for (int k = 1; k < kSlices; ++k) total += parts[k * kWarp + lane];
    if (sum.in_state_dtype) {
      static_cast<State*>(sum.to)[output] = total;
    } else {
      narrow(total, static_cast<Output*>(sum.to)[output]);
    }
  }
}

}  // namespace gpu
