// Vectors of VECTOR_BYTES, scratch memory, and tiles of (tokens, lanes): lanes are channels.
//
// selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.
//
// Each file that is compiled for one instruction set includes this header once. Everything here has internal linkage,
// and nothing uses a function of the standard library's templates: the linker keeps one of several copies of an inline
// function, and this copy may have instructions that the machine does not have.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#ifndef VECTOR_BYTES
#error "define VECTOR_BYTES before this header"
#endif

namespace simd {
namespace {

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

// ----- element types

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

INLINE float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
// A multiplication moves the exponent. It is exact and makes subnormal numbers normal.
INLINE float widen(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // infinity and NaN keep an exponent of ones
  const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  return bits_to_float(finite | special | uint32_t(x.bits & 0x8000) << 16);
}

INLINE void narrow(float x, float& y) { y = x; }
INLINE void narrow(double x, double& y) { y = x; }
// Round to nearest, ties to even.
INLINE void narrow(float x, BFloat16& y) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  y.bits = nan ? bits >> 16 | 0x40 : rounded;
}
INLINE void narrow(float x, Half& y) {
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffff;
  // Below 2^-14, float16 has steps of 2^-24, like float32 just above 1/2. So adding 1/2 rounds.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  y.bits = (magnitude >= 0x477ff000 ? large : finite) | (bits >> 16 & 0x8000);
}

// The type of the states, and of the computation, for a type of activations.
template <class T>
using State = decltype(widen(T()));

// ----- vectors

template <class S>
struct Simd {
  typedef S type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class S>
using Vec = typename Simd<S>::type;
template <class S>
constexpr int kLanes = VECTOR_BYTES / sizeof(S);

using Floats = Vec<float>;
using Doubles = Vec<double>;
using Ints = Vec<int32_t>;

template <class S>
INLINE Vec<S> load(const S* p) {
  Vec<S> v;
  memcpy(&v, p, VECTOR_BYTES);
  return v;
}
template <class S>
INLINE void store(S* p, Vec<S> v) {
  memcpy(p, &v, VECTOR_BYTES);
}

// Memory for one task, in pieces of whole vectors. A kernel's pieces are in one struct, whose constructor takes them
// from a Scratch. If the Scratch starts at address 0, the constructor only adds up bytes: `bytes_of` uses that. So the
// memory of a kernel cannot be smaller than what the kernel takes.
struct Scratch {
  uintptr_t next;

  // Room for numbers of type S that fill so many vectors.
  template <class S>
  INLINE S* take(int64_t vectors) {
    S* const piece = (S*)next;
    next += vectors * VECTOR_BYTES;
    return piece;
  }
  // Room for `count` objects.
  template <class T>
  INLINE T* take_objects(int64_t count) {
    return (T*)take<char>((count * sizeof(T) + VECTOR_BYTES - 1) / VECTOR_BYTES);
  }
};

template <class Memory, class Params>
int64_t bytes_of(const Params& p) {
  Scratch scratch{0};
  Memory(p, scratch);
  return scratch.next;
}

// ----- transposition

// Exchanges the lanes of `a` whose index has the bit Step with the lanes of `b` whose index does not. log2(lanes)
// rounds of exchanges transpose a square of vectors.
#if defined(__clang__) || __GNUC__ >= 12
template <int Step, class V, int... I>
INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  const V first = __builtin_shufflevector(a, b, (I & Step ? n + I - Step : I)...);
  b = __builtin_shufflevector(a, b, (I & Step ? n + I : I + Step)...);
  a = first;
}
template <int Step, class S>
INLINE void exchange(Vec<S>& a, Vec<S>& b) {
  exchange<Step>(a, b, std::make_integer_sequence<int, kLanes<S>>());
}
#else  // GCC 11, the compiler of Ubuntu 22.04
template <int Step, class S>
INLINE void exchange(Vec<S>& a, Vec<S>& b) {
  decltype(a < b) upper, lower;  // integers as wide as S
  for (int j = 0; j < kLanes<S>; ++j) {
    upper[j] = j & Step ? kLanes<S> + j - Step : j;
    lower[j] = j & Step ? kLanes<S> + j : j + Step;
  }
  const Vec<S> first = __builtin_shuffle(a, b, upper);
  b = __builtin_shuffle(a, b, lower);
  a = first;
}
#endif

template <class S, int Step = kLanes<S> / 2>
INLINE void transpose(Vec<S> (&rows)[kLanes<S>]) {
  for (int i = 0; i < kLanes<S>; ++i)
    if (!(i & Step)) exchange<Step, S>(rows[i], rows[i | Step]);
  if constexpr (Step > 1) transpose<S, Step / 2>(rows);
}

// ----- tiles: tokens of up to kLanes channels; the channels of a token are adjacent
//
// A call processes a whole tile, so it is not inlined. Inlining would double the size of its callers and the time to
// compile them. Squares of W tokens are transposed. The last square may overlap the one before, so that it is whole.

// Channels that do not exist become zero.
template <class T, class S>
NOINLINE void load_tile(S* tile, const T* p, int64_t stride_d, int64_t stride_l, int channels, int64_t tokens) {
  constexpr int W = kLanes<S>;
  if (channels == W && stride_d == 1) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int j = 0; j < W; ++j) tile[t * W + j] = widen(p[t * stride_l + j]);
  } else if (channels == W && stride_l == 1 && tokens >= W) {
    for (int64_t square_start = 0; square_start < tokens; square_start += W) {
      const int64_t t = square_start + W <= tokens ? square_start : tokens - W;
      S square[W][W];
      Vec<S> rows[W];
      for (int j = 0; j < W; ++j)
        for (int i = 0; i < W; ++i) square[j][i] = widen(p[j * stride_d + t + i]);
      for (int j = 0; j < W; ++j) rows[j] = load(square[j]);
      transpose<S>(rows);
      for (int i = 0; i < W; ++i) store(tile + (t + i) * W, rows[i]);
    }
  } else {
    for (int64_t t = 0; t < tokens; ++t)
      for (int j = 0; j < W; ++j) tile[t * W + j] = j < channels ? widen(p[j * stride_d + t * stride_l]) : S(0);
  }
}

template <class T, class S>
NOINLINE void store_tile(T* p, const S* tile, int64_t stride_d, int64_t stride_l, int channels, int64_t tokens) {
  constexpr int W = kLanes<S>;
  if (channels == W && stride_d == 1) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int j = 0; j < W; ++j) narrow(tile[t * W + j], p[t * stride_l + j]);
  } else if (channels == W && stride_l == 1 && tokens >= W) {
    for (int64_t square_start = 0; square_start < tokens; square_start += W) {
      const int64_t t = square_start + W <= tokens ? square_start : tokens - W;
      S square[W][W];
      Vec<S> rows[W];
      for (int i = 0; i < W; ++i) rows[i] = load(tile + (t + i) * W);
      transpose<S>(rows);
      for (int j = 0; j < W; ++j) store(square[j], rows[j]);
      for (int j = 0; j < W; ++j)
        for (int i = 0; i < W; ++i) narrow(square[j][i], p[j * stride_d + t + i]);
    }
  } else {
    for (int64_t t = 0; t < tokens; ++t)
      for (int j = 0; j < channels; ++j) narrow(tile[t * W + j], p[j * stride_d + t * stride_l]);
  }
}

// Adds a vector to sums in double precision, one for each lane.
template <class S>
INLINE void add_lanes(double* sums, Vec<S> v) {
  for (int j = 0; j < kLanes<S>; ++j) sums[j] += v[j];
}

// Sums the lanes of each token, always in the order of the channels.
template <class S>
NOINLINE void sum_lanes(S* sums, const S* tile, int64_t tokens) {
  constexpr int W = kLanes<S>;
  int64_t t = 0;
  for (; t + W <= tokens; t += W) {
    Vec<S> rows[W];
    for (int i = 0; i < W; ++i) rows[i] = load(tile + (t + i) * W);
    transpose<S>(rows);
    Vec<S> sum = rows[0];
    for (int j = 1; j < W; ++j) sum += rows[j];
    store(sums + t, sum);
  }
  for (; t < tokens; ++t) {
    S sum = tile[t * W];
    for (int j = 1; j < W; ++j) sum += tile[t * W + j];
    sums[t] = sum;
  }
}

}  // namespace
}  // namespace simd
