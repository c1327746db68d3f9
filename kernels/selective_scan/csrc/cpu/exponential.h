// exp, expm1, log1p and abs of vectors. As in simd.h, everything has internal linkage.
#pragma once

#include <math.h>

#include "simd.h"

namespace simd {
namespace {

// exp(x) - 1 is 2^k p + 2^k - 1 for x = k ln 2 + r and p = exp(r) - 1. `half_scale` is 2^k / 2, so that k = 128 is
// representable.
struct Exponential {
  Floats p, half_scale;
};

INLINE Exponential exponential(Floats x) {
  const Floats zero = {}, lowest = zero - 87.5f, highest = zero + 89.0f;
  x = x < lowest ? lowest : x;  // comparisons with NaN are false, so a NaN stays
  x = x > highest ? highest : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the lowest bits.
  const float magic = 0x1.8p23f;
  const Floats shifted = x * 0x1.715476p0f + magic;
  const Floats k = shifted - magic;
  const Floats r = (x - k * 0x1.62e4p-1f) - k * 0x1.7f7d1cp-20f;  // ln 2 in two parts; the first product is exact
  Floats q = r * 0x1.6d1270p-10f + 0x1.120cd4p-7f;  // (exp(r) - 1 - r) / r^2, to 2e-8 of exp(r) - 1
  q = q * r + 0x1.555518p-5f;
  q = q * r + 0x1.5554dcp-3f;
  q = q * r + 0.5f;
  return {r * r * q + r, (Floats)(((Ints)shifted << 23) + (126 << 23))};
}

INLINE Floats exp(Exponential e) { return 2.0f * (e.half_scale * e.p + e.half_scale); }
INLINE Floats expm1(Exponential e) { return 2.0f * (e.half_scale * e.p + (e.half_scale - 0.5f)); }
INLINE Floats exp(Floats x) { return exp(exponential(x)); }

// log(1 + y) for y in [0, 1], with a relative error of 3e-8.
INLINE Floats log1p(Floats y) {
  Floats q = y * -0x1.24b298p-8f + 0x1.9d455ap-6f;
  q = q * y + -0x1.11708cp-4f;
  q = q * y + 0x1.d992bcp-4f;
  q = q * y + -0x1.448ee2p-3f;
  q = q * y + 0x1.969cb2p-3f;
  q = q * y + -0x1.ffb95cp-3f;
  q = q * y + 0x1.55540cp-2f;
  q = q * y + -0x1.fffffep-2f;
  return y * y * q + y;
}

INLINE Floats abs(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// Double precision is for gradient checks, so these functions call the C library for each lane.
template <double (*function)(double)>
INLINE Doubles each(Doubles x) {
  for (int j = 0; j < kLanes<double>; ++j) x[j] = function(x[j]);
  return x;
}
INLINE Doubles exponential(Doubles x) { return x; }  // so that exp(exponential(x)) compiles for both types
INLINE Doubles exp(Doubles x) { return each<::exp>(x); }
INLINE Doubles expm1(Doubles x) { return each<::expm1>(x); }
INLINE Doubles log1p(Doubles x) { return each<::log1p>(x); }
INLINE Doubles abs(Doubles x) { return each<::fabs>(x); }

}  // namespace
}  // namespace simd
