// Forward pass of state fusion for planes with contiguous rows, with AVX-512. Lanes are columns.
//
// Nothing is transposed or copied. A vector of columns goes down the plane. Each row is loaded once, shifted to the
// seven columns that taps reach, and added to the output rows that it reaches. Eleven sums of output rows stay in
// registers.
#pragma once

#include <immintrin.h>

#include "planes_kernel.h"

namespace dwconv2d {
namespace {
namespace rows {

constexpr int kLanes = 16, kReach = 5, kSums = 2 * kReach + 1;
constexpr int kOffsets[] = {-5, -3, -1, 0, 1, 3, 5}, kCount = 7;  // of taps, along rows and along columns
constexpr int kTaps = 25, kWeightsHeld = 9;  // weights that stay in registers; 9 is the fastest of 7 to 13
static_assert(kRowsWidth >= kLanes + kReach, "the first 16 columns are not to need what is beyond the last");

// The number of the tap in each of the seven rows and columns, in the order of planes.cpp and of `Fusion`; -1 where
// there is none.
constexpr int kTap[kCount][kCount] = {
    {0, -1, -1, 1, -1, -1, 2},      {-1, 3, -1, 4, -1, 5, -1},      {-1, -1, 6, 7, 8, -1, -1},
    {9, 10, 11, 12, 13, 14, 15},    {-1, -1, 16, 17, 18, -1, -1},   {-1, 19, -1, 20, -1, 21, -1},
    {22, -1, -1, 23, -1, -1, 24},
};

constexpr bool is_in_the_order_of_fusion() {
  int k = 0;
  for (int i = 0; i < kCount; ++i) {
    for (int j = 0, c = 0; j < kCount; ++j) {
      const bool is_tap = c < Fusion::counts[i] && Fusion::columns[i][c] == kOffsets[j];
      if (kTap[i][j] != (is_tap ? k : -1)) return false;
      k += is_tap, c += is_tap;
    }
  }
  return k == kTaps;
}
static_assert(is_in_the_order_of_fusion(), "kTap and Fusion differ");

INLINE __mmask16 first_lanes(int64_t count) { return (1u << least(kLanes, most(0, count))) - 1; }

constexpr Ints kOneByOne = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr Ints kTwice = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};

INLINE Ints within(Ints columns, int width) {
  columns = columns < 0 ? Ints{} : columns;
  return columns < width ? columns : Ints{} + (width - 1);
}

// 16 columns. Those beyond the last column are copies of it.
struct Segment {
  int64_t offset;
  Ints lanes;

  INLINE Segment() = default;
  INLINE Segment(int64_t column, int64_t width) {
    offset = least(column, width - kLanes);
    lanes = within(int(column) + kOneByOne, width) - int(offset);
  }

  INLINE __m512 load(const float* row) const {
    return _mm512_permutexvar_ps((__m512i)lanes, _mm512_loadu_ps(row + offset));
  }
};

// Lanes n to n + 15 of `low` followed by `high`.
template <int n>
INLINE __m512 shift(__m512 low, __m512 high) {
  return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(high), _mm512_castps_si512(low), n));
}

// Rows of a plane, from a column on. `next` steps through them one by one, so that GCC does not keep several pointers.
struct Rows {
  float* data;
  int64_t stride;

  INLINE float* at(int64_t y) const { return data + y * stride; }
  INLINE void skip(int64_t rows) { data += rows * stride; }
  INLINE float* next() {
    float* const row = data;
    data += stride;
    asm volatile("" : "+r"(data));
    return row;
  }
};

// 16 columns of a plane, or its last ones. Left: they are the first. Right: taps reach beyond the last column.
// OutputEquation: the sums are multiplied by C, and D x is added.
template <bool Left, bool Right, bool OutputEquation>
struct ColumnBlock {
  Rows in;  // of column 0
  int64_t column;
  Segment here, next;      // only if Right
  __mmask16 has_next, has;  // existing lanes of the next columns and of these
  Rows C, x, out;
  __m512 D;

  INLINE void load(const float* row, __m512 (&shifted)[kCount]) const {
    __m512 before = Left ? _mm512_set1_ps(row[0]) : _mm512_loadu_ps(row + column - kLanes);
    if (!Left) asm("" : "+v"(before));  // makes GCC load once, not for each shift
    const __m512 same = Right ? here.load(row) : _mm512_loadu_ps(row + column);
    const __m512 after = Right ? next.load(row) : _mm512_maskz_loadu_ps(has_next, row + column + kLanes);
    shifted[0] = shift<kLanes - 5>(before, same);
    shifted[1] = shift<kLanes - 3>(before, same);
    shifted[2] = shift<kLanes - 1>(before, same);
    shifted[3] = same;
    shifted[4] = shift<1>(same, after);
    shifted[5] = shift<3>(same, after);
    shifted[6] = shift<5>(same, after);
  }

  INLINE void store(__m512 sum) {
    if (OutputEquation) {
      const __m512 skip = _mm512_mul_ps(D, _mm512_maskz_loadu_ps(has, x.next()));
      sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(has, C.next()), sum, skip);
    }
    _mm512_mask_storeu_ps(out.next(), has, sum);
  }
};

INLINE __m512 join(__m256 low, __m256 high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// The last columns of two planes, up to eight of each.
template <bool OutputEquation>
struct Ends {
  Rows in;  // of column 0
  int64_t offset;
  Ints lanes[kCount];
  __mmask8 has;
  Rows C, x, out;
  int64_t in_channel, x_channel, out_channel;  // from the first plane to the second
  __m512 D;

  INLINE void look_from(int64_t column, int64_t width) {
    offset = width - kLanes;
    has = first_lanes(width - column);
    const Ints second = kOneByOne < 8 ? Ints{} : Ints{} + kLanes;
    for (int i = 0; i < kCount; ++i)
      lanes[i] = within(int(column) + kOffsets[i] + kTwice, width) - int(offset) + second;
  }

  INLINE void load(const float* row, __m512 (&shifted)[kCount]) const {
    const __m512 first = _mm512_loadu_ps(row + offset);
    const __m512 second = _mm512_loadu_ps(row + in_channel + offset);
#pragma GCC unroll 7
    for (int i = 0; i < kCount; ++i) shifted[i] = _mm512_permutex2var_ps(first, (__m512i)lanes[i], second);
  }

  INLINE void store(__m512 sum) {
    if (OutputEquation) {
      const float* const from = x.next();
      const __m512 skip = join(_mm256_maskz_loadu_ps(has, from), _mm256_maskz_loadu_ps(has, from + x_channel));
      const __m256 numbers = _mm256_maskz_loadu_ps(has, C.next());
      sum = _mm512_fmadd_ps(join(numbers, numbers), sum, _mm512_mul_ps(D, skip));
    }
    float* const to = out.next();
    _mm256_mask_storeu_ps(to, has, _mm512_castps512_ps256(sum));
    // This does not extract 256 bits: GCC 12 fuses both steps into an instruction that accesses masked-out lanes.
    _mm512_mask_storeu_ps(to + out_channel - 8, has << 8, sum);
  }
};

// The rows of the plane, and those of the strip.
struct Strip {
  int64_t height, begin, rows;
};

// Goes down a strip. sums[j] belongs to the output row `input row + 5 - j`, and is stored when j is 10.
template <class Columns>
struct Descent {
  Columns columns;
  const int64_t height, begin, rows;  // of the plane, and of the strip
  const float* weights;
  __m512 held[kWeightsHeld], sums[kSums];

  INLINE Descent(const Columns& given, const Strip& strip, const float* weights)
      : columns(given), height(strip.height), begin(strip.begin), rows(strip.rows), weights(weights) {
    columns.C.skip(begin), columns.x.skip(begin), columns.out.skip(begin);
#pragma GCC unroll 25
    for (int k = 0; k < kWeightsHeld; ++k) held[k] = _mm512_load_ps(weights + k * kLanes);
#pragma GCC unroll 11
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_setzero_ps();
  }

  // Adds an input row, counted from five rows before the strip. Inner: all output rows it reaches are in the strip.
  template <bool Inner>
  INLINE void add(int64_t row) {
    __m512 shifted[kCount];
    if (Inner) {
      columns.load(columns.in.next(), shifted);
    } else {
      columns.load(columns.in.at(most(0, least(begin + row - kReach, height - 1))), shifted);
    }
#pragma GCC unroll 7
    for (int i = kCount - 1; i >= 0; --i) {
      const int64_t output = row - kReach - kOffsets[i];
      if (!Inner && (output < 0 || output >= rows)) continue;
      __m512& sum = sums[kOffsets[i] + kReach];
#pragma GCC unroll 7
      for (int j = 0; j < kCount; ++j) {
        const int k = kTap[i][j];
        if (k < 0) continue;
        const __m512 weight = k < kWeightsHeld ? held[k] : _mm512_load_ps(weights + k * kLanes);
        sum = k == 0 ? _mm512_mul_ps(weight, shifted[j]) : _mm512_fmadd_ps(weight, shifted[j], sum);
      }
    }
    if (Inner || row >= 2 * kReach) columns.store(sums[2 * kReach]);
#pragma GCC unroll 11
    for (int i = kSums - 1; i > 0; --i) sums[i] = sums[i - 1];
  }
};

template <class Columns>
NOINLINE void fuse(const Columns& columns, const Strip& strip, const float* weights) {
  Descent<Columns> descent(columns, strip, weights);
  const int64_t first = 2 * kReach, last = most(first, strip.rows);
  const Rows plane = descent.columns.in;
  for (int64_t row = 0; row < first; ++row) descent.template add<false>(row);
  descent.columns.in.skip(strip.begin + kReach);
#pragma GCC unroll 2  // the fastest of 1, 2, 3, 4 and 11, although with 11 no sums would move
  for (int64_t row = first; row < last; ++row) descent.template add<true>(row);
  descent.columns.in = plane;
  for (int64_t row = last; row < strip.rows + 2 * kReach; ++row) descent.template add<false>(row);
}

// A task: a strip of two channels. Their last columns share a vector if they fit.
struct Pair {
  const Params& p;
  int64_t batch, channel, channels;
  Strip strip;
  float* weights[3];  // (taps, lanes) of one channel, of the other, and of half a vector of each

  INLINE Rows rows_of(const View& v, int64_t c, int64_t n, int64_t column) const {
    if (!v.data) return {nullptr, 0};
    return {(float*)v.data + batch * v.batch + (channel + c) * v.channel + n * v.state + column, v.row};
  }

  // The rows that are added to the sums: x (with factor D) for the first state, then the sum over the states so far.
  INLINE Rows rows_to_add(int64_t c, int64_t n, int64_t column) const {
    return n == 0 ? rows_of(p.x, c, 0, column) : rows_of(p.out, c, 0, column);
  }
  INLINE Rows rows_of_out(int64_t c, int64_t n, int64_t column) const {
    return rows_of(p.out, c, p.C.data ? 0 : n, column);
  }
  INLINE float D(int64_t c, int64_t n) const {
    return n || !p.D.data ? 1 : ((const float*)p.D.data)[(channel + c) * p.D.channel];
  }

  template <bool OutputEquation, bool Left, bool Right>
  INLINE void block(int64_t c, int64_t n, int64_t column) const {
    ColumnBlock<Left, Right, OutputEquation> b;
    b.in = rows_of(p.in, c, n, 0);
    b.column = column;
    if (Right) b.here = Segment(column, p.width), b.next = Segment(column + kLanes, p.width);
    b.has_next = first_lanes(p.width - column - kLanes);
    b.has = first_lanes(p.width - column);
    b.C = rows_of(p.C, 0, n, column), b.x = rows_to_add(c, n, column), b.out = rows_of_out(c, n, column);
    b.D = _mm512_set1_ps(D(c, n));
    fuse(b, strip, weights[c]);
  }

  template <bool OutputEquation>
  INLINE void ends(int64_t n, int64_t column) const {
    Ends<OutputEquation> e;
    e.look_from(column, p.width);
    e.in = rows_of(p.in, 0, n, 0);
    e.C = rows_of(p.C, 0, n, column), e.x = rows_to_add(0, n, column), e.out = rows_of_out(0, n, column);
    e.in_channel = p.in.channel, e.out_channel = p.out.channel, e.x_channel = n == 0 ? p.x.channel : p.out.channel;
    e.D = join(_mm256_set1_ps(D(0, n)), _mm256_set1_ps(D(1, n)));
    fuse(e, strip, weights[2]);
  }

  template <bool OutputEquation>
  INLINE void run() const {
    const int64_t rest = p.width % kLanes, shared = channels == 2 && 0 < rest && rest <= 8 ? p.width - rest : p.width;
    for (int64_t n = 0; n < p.states; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t column = 0; column < shared; column += kLanes) {
          if (column == 0) {
            block<OutputEquation, true, false>(c, n, column);
          } else if (column + kLanes + kReach <= p.width) {
            block<OutputEquation, false, false>(c, n, column);
          } else {
            block<OutputEquation, false, true>(c, n, column);
          }
        }
      }
      if (shared < p.width) ends<OutputEquation>(n, shared);
    }
  }
};

inline int64_t scratch_bytes(const Params&) { return 3 * kTaps * kLanes * sizeof(float); }

inline void forward(const Params& p, int64_t task, void* scratch) {
  const int64_t strip = task % p.strips, block = task / p.strips % p.channel_blocks(2), begin = strip * p.strip_rows;
  Pair pair{p, task / p.strips / p.channel_blocks(2), 2 * block, least(2, p.channels - 2 * block),
            {p.height, begin, least(p.strip_rows, p.height - begin)}, {}};
  for (int i = 0; i < 3; ++i) pair.weights[i] = (float*)scratch + i * kTaps * kLanes;
  for (int k = 0; k < kTaps; ++k) {
    const float* const weight = (const float*)p.weights + k * p.weight_pitch + pair.channel;  // zero after the last
    const __m512 first = _mm512_set1_ps(weight[0]), second = _mm512_set1_ps(weight[1]);
    _mm512_store_ps(pair.weights[0] + k * kLanes, first);
    _mm512_store_ps(pair.weights[1] + k * kLanes, second);
    _mm512_store_ps(pair.weights[2] + k * kLanes, _mm512_mask_blend_ps(0xff00, first, second));
  }
  p.C.data ? pair.run<true>() : pair.run<false>();
}

constexpr Kernel kForward = {2, 2 * sizeof(float), scratch_bytes, forward};

}  // namespace rows
}  // namespace
}  // namespace dwconv2d
