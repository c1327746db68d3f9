// Types that the host and the kernels share.
//
// selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.
#pragma once

#include <cstdint>

namespace gpu {

constexpr int kWarp = 32;

enum class Dtype { kFloat, kDouble, kHalf, kBFloat16 };

inline int size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// to[o, i] = sum over k < count of partials[o, k, i]. `partials` have the states' dtype, and so does `to` if
// `in_state_dtype`.
struct Sum {
  const void* partials = nullptr;
  void* to = nullptr;
  int64_t outer = 0, count = 0, inner = 0;
  bool in_state_dtype = false;

  constexpr int64_t blocks() const { return ceil_div<int64_t>(outer * inner, kWarp); }
};

// The sums of one launch.
struct Sums {
  Sum first, second, third;

  constexpr int64_t blocks() const { return first.blocks() + second.blocks() + third.blocks(); }
};

// Division by a number known on the host: n / by = n * factor >> shift for 0 <= n < 2^31 (Granlund and Montgomery,
// Division by invariant integers using multiplication, 1994).
struct Divisor {
  uint32_t factor = 0;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(int by) {
    int bits = 0;
    while (int64_t(1) << bits < by) ++bits;
    shift = 31 + bits;
    factor = uint32_t((uint64_t(1) << shift) / by + 1);
  }
  constexpr int divide(int n) const { return int(uint64_t(n) * factor >> shift); }
};

}  // namespace gpu
