// GPU functions that C++ does not have. tests/kernels/cuda_emulation has functions of the same names for a host.
//
// selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace gpu {

// The relative error is about 2^-22, even next to 1. Results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// NaN if x is NaN; fmax would drop the NaN.
__device__ __forceinline__ float max_or_nan(float x, float y) {
#if __CUDA_ARCH__ >= 800
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x < y ? y : x;
#endif
}
__device__ __forceinline__ double max_or_nan(double x, double y) { return x < y ? y : x; }

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Converts two numbers at once. The first goes into the lower half.
__device__ __forceinline__ uint32_t to_halves(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return __half_as_ushort(pair.x) | uint32_t(__half_as_ushort(pair.y)) << 16;
}
__device__ __forceinline__ uint32_t to_bfloat16s(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return __bfloat16_as_ushort(pair.x) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
}

// Returns x but hides its value from the compiler, so that the compiler moves no computation from x out of its loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The value of the lane `distance` to the left (kUp) or right, or the lane's own value if there is no such lane.
template <bool kUp, typename T>
__device__ __forceinline__ T shuffle(T value, int distance) {
  constexpr unsigned kAll = 0xffffffff;
  return kUp ? __shfl_up_sync(kAll, value, distance) : __shfl_down_sync(kAll, value, distance);
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Copies from global to shared memory. Both addresses are aligned to the size of the copy, which is complete after
// `wait_for_copies`.
__device__ __forceinline__ void copy_16_bytes_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#else
  *static_cast<int4*>(to) = *static_cast<const int4*>(from);
#endif
}
__device__ __forceinline__ void copy_4_bytes_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
#else
  *static_cast<int*>(to) = *static_cast<const int*>(from);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace gpu
