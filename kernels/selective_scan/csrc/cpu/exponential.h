// exp, expm1, log1p and abs of vectors, alone or several at once. As in simd.h, everything has internal linkage.
#pragma once

#include <math.h>

#include "simd.h"

namespace simd {
namespace {

// Several vectors that are computed side by side. A single one would wait for the result of each instruction before the
// next, because exp and log1p are long chains.
template <class V, int K>
struct Several {
  V v[K];
};

// As many vectors as have registers; double precision calls functions of the C library.
template <class S>
constexpr int kSeveral = sizeof(S) == 8 ? 1 : VECTOR_BYTES == 64 ? 4 : 2;
template <class S>
using Vecs = Several<Vec<S>, kSeveral<S>>;

template <class S>
INLINE Vecs<S> load_vecs(const S* p) {
  Vecs<S> vecs;
  for (int i = 0; i < kSeveral<S>; ++i) vecs.v[i] = load(p + i * kLanes<S>);
  return vecs;
}
template <class S>
INLINE void store_vecs(S* p, const Vecs<S>& vecs) {
  for (int i = 0; i < kSeveral<S>; ++i) store(p + i * kLanes<S>, vecs.v[i]);
}

// Calls `f` for each vector.
template <class V, int K, class F>
INLINE Several<V, K> map(Several<V, K> a, F f) {
  for (int i = 0; i < K; ++i) a.v[i] = f(a.v[i]);
  return a;
}
template <class V, int K, class F>
INLINE Several<V, K> map(Several<V, K> a, const Several<V, K>& b, F f) {
  for (int i = 0; i < K; ++i) a.v[i] = f(a.v[i], b.v[i]);
  return a;
}

#define FOR_EACH(op)                                                                       \
  template <class V, int K>                                                                \
  INLINE Several<V, K> operator op(Several<V, K> a, const Several<V, K>& b) {              \
    return map(a, b, [](V x, V y) { return x op y; });                                     \
  }                                                                                        \
  template <class V, int K, class B>                                                       \
  INLINE Several<V, K> operator op(Several<V, K> a, B b) {                                 \
    return map(a, [b](V x) { return x op b; });                                            \
  }                                                                                        \
  template <class V, int K>                                                                \
  INLINE Several<V, K> operator op(float a, Several<V, K> b) {                             \
    return map(b, [a](V y) { return a op y; });                                            \
  }
FOR_EACH(+)
FOR_EACH(-)
FOR_EACH(*)
#undef FOR_EACH

// Computes exp(x) and exp(x) - 1. For x = k ln 2 + r and p = exp(r) - 1, the latter is 2^k p + 2^k - 1. `half_scale` is
// 2^k / 2, so that k = 128 is representable.
template <int K>
INLINE void exp_expm1(Several<Floats, K> x, Several<Floats, K>& exp, Several<Floats, K>& expm1) {
  x = map(x, [](Floats x) {
    const Floats lowest = Floats{} - 87.5f, highest = Floats{} + 89.0f;
    x = x < lowest ? lowest : x;  // comparisons with NaN are false, so a NaN stays
    return x > highest ? highest : x;
  });
  // Adding 1.5 * 2^23 rounds to an integer and leaves that integer in the lowest bits.
  const float magic = 0x1.8p23f;
  const auto shifted = x * 0x1.715476p0f + magic;
  const auto k = shifted - magic;
  const auto r = (x - k * 0x1.62e4p-1f) - k * 0x1.7f7d1cp-20f;  // ln 2 in two parts; the first product is exact
  auto q = r * 0x1.6d1270p-10f + 0x1.120cd4p-7f;  // (exp(r) - 1 - r) / r^2, to 2e-8 of exp(r) - 1
  q = q * r + 0x1.555518p-5f;
  q = q * r + 0x1.5554dcp-3f;
  q = q * r + 0.5f;
  const auto p = r * r * q + r;
  const auto half_scale = map(shifted, [](Floats s) { return (Floats)(((Ints)s << 23) + (126 << 23)); });
  exp = 2.0f * (half_scale * p + half_scale);
  expm1 = 2.0f * (half_scale * p + (half_scale - 0.5f));
}

// log(1 + y) for y in [0, 1], with a relative error of 3e-8.
template <int K>
INLINE Several<Floats, K> log1p(const Several<Floats, K>& y) {
  auto q = y * -0x1.24b298p-8f + 0x1.9d455ap-6f;
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
template <int K>
INLINE void exp_expm1(const Several<Doubles, K>& x, Several<Doubles, K>& exp, Several<Doubles, K>& expm1) {
  exp = map(x, each<::exp>);
  expm1 = map(x, each<::expm1>);
}
template <int K>
INLINE Several<Doubles, K> log1p(const Several<Doubles, K>& x) {
  return map(x, each<::log1p>);
}
INLINE Doubles abs(Doubles x) { return each<::fabs>(x); }

template <class V, int K>
INLINE Several<V, K> exp(const Several<V, K>& x) {
  Several<V, K> exp, expm1;
  exp_expm1(x, exp, expm1);
  return exp;
}
template <class V>
INLINE V exp(V x) {
  return exp(Several<V, 1>{{x}}).v[0];
}

}  // namespace
}  // namespace simd
