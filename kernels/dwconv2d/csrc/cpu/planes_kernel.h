// Depthwise convolution of planes, forward and backward, for one vector length.
//
// Lanes are channels, so a plane may have any width. A strip of the plane is copied into a buffer with margins. Every
// tap is then a pointer, and a few neighbouring pixels share each load of a weight.
#pragma once

#include "planes.h"
#include "simd.h"

namespace dwconv2d {
namespace {

using namespace simd;

constexpr int kPixels = VECTOR_BYTES == 64 ? 14 : 8;  // accumulators of a convolution, among 32 or 16 registers
constexpr int kTapsAtOnce = 8;  // accumulators of a weight's gradient
constexpr int64_t kColumns = 16;  // columns at once; few, so that all rows that taps reach stay in the L1 cache
constexpr int64_t kTilePixels = 1024;  // pixels to read, compute and write at once, or more if a row has more
constexpr int64_t kSumInFloat = 128;  // pixels after which a float sum is added to a double

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t clamp(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// A strip with margins on all sides. Its rows start at `first`, and each has `pitch` pixels.
template <class S>
struct Buffer {
  S* data;
  int64_t first, pitch;
  int margin;

  // The pixel of column 0.
  INLINE S* row(int64_t y) const { return data + ((y - first) * pitch + margin) * kLanes<S>; }
};

template <class S>
INLINE void fill(S* to, Vec<S> value, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i) store(to + i * kLanes<S>, value);
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Pixels of some rows, one after the other. They are in a tile, or in the tensor if the tensor already has vectors.
template <class S>
struct Pixels {
  S* data;
  int64_t step;

  INLINE auto get(int64_t i) const { return load(data + i * step); }
  template <class V>
  INLINE void set(int64_t i, V v) const {
    store(data + i * step, v);
  }
};

// A task's place in the problem. T is the type of `in`, U the type of the other activations.
template <class T, class U>
struct Task {
  using S = State<T>;
  static constexpr int W = kLanes<S>;

  const Params& p;
  int64_t batch, block, strip, channel;
  int64_t begin, end;  // rows of the strip
  int channels;        // fewer than W in the last block

  INLINE Task(const Params& p, int64_t task) : p(p) {
    strip = task % p.strips;
    block = task / p.strips % p.channel_blocks(W);
    batch = task / p.strips / p.channel_blocks(W);
    channel = block * W;
    channels = least(W, p.channels - channel);
    begin = strip * p.strip_rows;
    end = least(begin + p.strip_rows, p.height);
  }

  template <class V>
  INLINE const V* at(const View& v, int64_t n, int64_t y) const {
    return (const V*)v.data + batch * v.batch + channel * v.channel + n * v.state + y * v.row;
  }

  // The number of rows to read, compute and write at once.
  INLINE int64_t rows_at_once() const { return most(1, kTilePixels / p.width); }

  // The rows of the strip and, within the plane, of its margins: from the first to before the end.
  INLINE int64_t first_row() const { return most(0, begin - p.reach_rows); }
  INLINE int64_t end_row() const { return least(p.height, end + p.reach_rows); }

  // Reads `rows` rows of a view, of any strides, as a tile of (rows width, lanes).
  template <class V>
  INLINE void read(S* tile, const View& v, int64_t n, int64_t y, int64_t rows) const {
    const bool one_run = rows == 1 || v.row == p.width * v.column;
    const int64_t runs = one_run ? 1 : rows, tokens = one_run ? rows * p.width : p.width;
    for (int64_t i = 0; i < runs; ++i)
      load_tile(tile + i * tokens * W, at<V>(v, n, y + i), v.channel, v.column, channels, tokens);
  }

  template <class V>
  INLINE void write(const S* tile, const View& v, int64_t n, int64_t y, int64_t rows) const {
    const bool one_run = rows == 1 || v.row == p.width * v.column;
    const int64_t runs = one_run ? 1 : rows, tokens = one_run ? rows * p.width : p.width;
    for (int64_t i = 0; i < runs; ++i)
      store_tile(const_cast<V*>(at<V>(v, n, y + i)), tile + i * tokens * W, v.channel, v.column, channels, tokens);
  }

  // Whether `rows` rows of a view are vectors one after the other.
  template <class V>
  INLINE bool is_in_place(const View& v, int64_t rows) const {
    return kSame<V, S> && channels == W && v.channel == 1 && (rows == 1 || v.row == p.width * v.column);
  }

  // Rows of a view to read, in the tensor or copied to the tile.
  template <class V>
  INLINE Pixels<const S> rows_to_read(S* tile, const View& v, int64_t n, int64_t y, int64_t rows) const {
    if (is_in_place<V>(v, rows)) return {(const S*)at<V>(v, n, y), v.column};
    read<V>(tile, v, n, y, rows);
    return {tile, W};
  }

  // Rows of a view to write, in the tensor or in the tile, which `write_back` then copies to the tensor.
  template <class V>
  INLINE Pixels<S> rows_to_write(S* tile, const View& v, int64_t n, int64_t y, int64_t rows) const {
    if (is_in_place<V>(v, rows)) return {(S*)at<V>(v, n, y), v.column};
    return {tile, W};
  }

  template <class V>
  INLINE void write_back(const Pixels<S>& pixels, const S* tile, const View& v, int64_t n, int64_t y, int64_t rows) const {
    if (pixels.data == tile) write<V>(tile, v, n, y, rows);
  }

  // Reads C for each pixel of some rows. C is the same for all channels.
  INLINE void read_C(S* numbers, int64_t n, int64_t y, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      const U* from = (const U*)p.C.data + batch * p.C.batch + n * p.C.state + (y + i) * p.C.row;
      for (int64_t x = 0; x < p.width; ++x) numbers[i * p.width + x] = widen(from[x * p.C.column]);
    }
  }

  // One number for each channel, and zeros after the last.
  template <class V>
  INLINE Vec<S> per_channel(const View& v) const {
    S lanes[W] = {};
    for (int j = 0; j < channels && v.data; ++j) lanes[j] = widen(((const V*)v.data)[(channel + j) * v.channel]);
    return load(lanes);
  }

  INLINE Buffer<S> buffer(S* data) const {
    return {data, begin - p.reach_rows, p.width + 2 * p.reach_columns, p.reach_columns};
  }

  // Whether reading single rows is as fast as reading several at once.
  INLINE bool fills_vectors(const View& v) const { return v.channel == 1 || p.width >= 2 * W; }

  // Fills a row's margins with its border values or with zeros.
  INLINE void pad_row(const Buffer<S>& to, int64_t y, bool zeros) const {
    S *row = to.row(y), *end = row + p.width * W;
    const Vec<S> zero = {}, left = zeros ? zero : load(row), right = zeros ? zero : load(end - W);
    fill(row - to.margin * W, left, to.margin);
    fill(end, right, to.margin);
  }

  // Fills the rows beyond the plane with copies of the nearest row or with zeros.
  INLINE void pad_rows_beyond(const Buffer<S>& to, bool zeros) const {
    for (int64_t y = begin - p.reach_rows; y < end + p.reach_rows; ++y) {
      if (0 <= y && y < p.height) continue;
      S* row = to.row(y) - to.margin * W;
      if (zeros) {
        fill(row, Vec<S>{}, to.pitch);
      } else {
        memcpy(row, to.row(clamp(y, p.height)) - to.margin * W, to.pitch * VECTOR_BYTES);
      }
    }
  }

  // Reads the strip of in_n.
  INLINE void read_strip(const Buffer<S>& to, S* tile, int64_t n) const {
    const bool row_by_row = fills_vectors(p.in);
    const int64_t step = row_by_row ? 1 : rows_at_once();
    for (int64_t y = first_row(); y < end_row(); y += step) {
      const int64_t rows = least(step, end_row() - y);
      read<T>(row_by_row ? to.row(y) : tile, p.in, n, y, rows);
      for (int64_t i = 0; i < rows; ++i) {
        if (!row_by_row) memcpy(to.row(y + i), tile + i * p.width * W, p.width * VECTOR_BYTES);
        pad_row(to, y + i, p.zeros);
      }
    }
    pad_rows_beyond(to, p.zeros);
  }

  INLINE const S* weights(S* room) const {
    for (int k = 0; k < p.taps; ++k)
      memcpy(room + k * W, (const S*)p.weights + k * p.weight_pitch + channel, VECTOR_BYTES);
    return room;
  }
};

// What happens with sum(i), the convolution's sum of pixel i. out(i) is sum(i); or, for the output equation,
// C(i) * sum(i) + factor * other(i); or sum(i) * other(i).
template <class S>
struct Finish {
  enum { kSum, kOutputEquation, kMultiply } what;
  Pixels<S> out;
  const S* C = nullptr;
  Vec<S> factor = {};
  Pixels<const S> other = {};

  template <int PixelCount>
  INLINE void operator()(int64_t first, const Vec<S> (&sums)[PixelCount]) const {
    const auto to = out;  // local copies, which no store can change
    const auto from = other;
    if (what == kSum) {
      for (int j = 0; j < PixelCount; ++j) to.set(first + j, sums[j]);
    } else if (what == kOutputEquation) {
      const S* numbers = C + first;
      const Vec<S> multiple = factor;
      for (int j = 0; j < PixelCount; ++j) to.set(first + j, numbers[j] * sums[j] + multiple * from.get(first + j));
    } else {
      for (int j = 0; j < PixelCount; ++j) to.set(first + j, sums[j] * from.get(first + j));
    }
  }
};

// Any taps: the sums over k of weight_k * from(offset_k) for some neighbours.
struct Any {
  template <int Sign, int PixelCount, class S>
  static INLINE void add(Vec<S> (&sums)[PixelCount], const S* from, const int64_t* offsets, const S* weights,
                         int taps) {
    constexpr int W = kLanes<S>;
    for (int k = 0; k < taps; ++k) {
      const Vec<S> weight = load(weights + k * W);
      for (int i = 0; i < PixelCount; ++i) sums[i] += weight * load(from + offsets[k] + i * W);
    }
  }
};

// Taps that the compiler knows: values of a row that several taps need are loaded once. Sign is the sign of the
// columns, -1 in an adjoint.
template <class Taps>
struct Known {
  template <int Sign, int PixelCount, class S>
  static INLINE void add(Vec<S> (&sums)[PixelCount], const S* from, const int64_t* offsets, const S* weights, int) {
    constexpr int W = kLanes<S>;
#pragma GCC unroll 8
    for (int r = 0, k = 0; r < Taps::rows; k += Taps::counts[r++]) {
      const S* row = from + offsets[k] - Sign * Taps::columns[r][0] * W;
#pragma GCC unroll 32
      for (int j = -Taps::reach; j < PixelCount + Taps::reach; ++j) {
#pragma GCC unroll 8
        for (int c = 0; c < Taps::counts[r]; ++c) {
          const int i = j - Sign * Taps::columns[r][c];
          if (0 <= i && i < PixelCount) sums[i] += load(weights + (k + c) * W) * load(row + j * W);
        }
      }
    }
  }
};

struct Square3 {
  static constexpr int rows = 3, counts[] = {3, 3, 3}, columns[][3] = {{-1, 0, 1}, {-1, 0, 1}, {-1, 0, 1}}, reach = 1;
};
struct Fusion {
  static constexpr int rows = 7, counts[] = {3, 3, 3, 7, 3, 3, 3}, reach = 5;
  static constexpr int columns[][7] = {{-5, 0, 5}, {-3, 0, 3}, {-1, 0, 1}, {-5, -3, -1, 0, 1, 3, 5},
                                       {-1, 0, 1}, {-3, 0, 3}, {-5, 0, 5}};
};

template <class Taps, int Sign, int PixelCount, class S>
INLINE void convolve_pixels(const S* from, const int64_t* offsets, const S* weights, int taps, int pixels, Vec<S> start,
                            int64_t first, const Finish<S>& finish) {
  if (pixels == PixelCount) {
    Vec<S> sums[PixelCount];
    for (int i = 0; i < PixelCount; ++i) sums[i] = start;
    Taps::template add<Sign>(sums, from, offsets, weights, taps);
    finish(first, sums);
  } else if constexpr (PixelCount > 1) {
    convolve_pixels<Taps, Sign, PixelCount - 1>(from, offsets, weights, taps, pixels, start, first, finish);
  }
}

// Convolves all pixels of `rows` rows that are `pitch` apart. Columns are divided into blocks, and blocks into pieces,
// whose sizes differ by one at most.
template <class Taps, int Sign, class S>
NOINLINE void convolve(const S* from, int64_t pitch, const int64_t* offsets, const S* weights, int taps, int64_t rows,
                       int64_t width, Vec<S> start, const Finish<S>& finish) {
  int64_t begin = 0;
  for (int64_t blocks = (width + kColumns - 1) / kColumns; blocks > 0; --blocks) {
    const int64_t end = begin + (width - begin) / blocks;
    for (int64_t y = 0; y < rows; ++y) {
      int64_t x = begin;
      for (int64_t pieces = (end - begin + kPixels - 1) / kPixels; pieces > 0; --pieces) {
        const int pixels = (end - x) / pieces;
        convolve_pixels<Taps, Sign, kPixels>(from + (y * pitch + x) * kLanes<S>, offsets, weights, taps, pixels, start,
                                             y * width + x, finish);
        x += pixels;
      }
    }
    begin = end;
  }
}

template <int Sign, class S>
INLINE void convolve(const Params& p, const S* from, int64_t pitch, const int64_t* offsets, const S* weights,
                     int64_t rows, Vec<S> start, const Finish<S>& finish) {
  auto run = convolve<Any, 1, S>;  // whose offsets have the sign
  if constexpr (kSame<S, float>) {  // double precision is for gradient checks
    if (p.pattern == kSquare3) run = convolve<Known<Square3>, Sign, S>;
    if (p.pattern == kFusion) run = convolve<Known<Fusion>, Sign, S>;
  }
  run(from, pitch, offsets, weights, p.taps, rows, p.width, start, finish);
}

// The sizes of pieces of scratch memory, in vectors.
INLINE int64_t tile_vectors(const Params& p) { return most(kTilePixels, p.width); }
INLINE int64_t pitch_vectors(const Params& p) { return p.width + 2 * p.reach_columns; }
INLINE int64_t buffer_vectors(const Params& p) { return pitch_vectors(p) * (p.strip_rows + 2 * p.reach_rows); }

template <class S>
struct ConvolutionMemory {
  S *strip, *tile, *weights;
  int64_t* offsets;

  INLINE ConvolutionMemory(const Params& p, Scratch& scratch) {
    strip = scratch.take<S>(buffer_vectors(p));
    tile = scratch.take<S>(tile_vectors(p));
    weights = scratch.take<S>(p.taps);
    offsets = scratch.take_objects<int64_t>(p.taps);
  }
};

// What both passes use: a strip of `in`, the weights, and the offsets of the taps.
template <class T, class U>
struct Convolution {
  using S = State<T>;
  static constexpr int W = kLanes<S>;

  const Task<T, U> task;
  Buffer<S> in;
  S* tile;
  const S* weights;
  int64_t* offsets;  // of the taps, in elements of the buffer

  INLINE Convolution(const Params& p, int64_t index, const ConvolutionMemory<S>& memory) : task(p, index) {
    in = task.buffer(memory.strip);
    tile = memory.tile;
    weights = task.weights(memory.weights);
    offsets = memory.offsets;
    for (int k = 0; k < p.taps; ++k) offsets[k] = (p.tap_rows[k] * in.pitch + p.tap_columns[k]) * W;
  }

  // Computes start + conv_n for the pixels of `count` rows and passes the sums to `finish`, which counts pixels from 0.
  INLINE void convolve_rows(int64_t y, int64_t count, Vec<S> start, const Finish<S>& finish) const {
    convolve<1>(task.p, in.row(y), in.pitch, offsets, weights, count, start, finish);
  }
};

template <class S>
struct ForwardMemory {
  ConvolutionMemory<S> convolution;
  S *out, *x, *C;  // tiles
  S* sums;         // of a strip, if there are several states to sum over

  INLINE ForwardMemory(const Params& p, Scratch& scratch) : convolution(p, scratch) {
    out = scratch.take<S>(tile_vectors(p));
    x = scratch.take<S>(tile_vectors(p));
    C = scratch.take<S>(tile_vectors(p));
    sums = scratch.take<S>(p.C.data && p.states > 1 ? p.strip_rows * p.width : 0);
  }
};

template <class T, class U>
void forward(const Params& p, int64_t index, void* memory) {
  using S = typename Task<T, U>::S;
  constexpr int W = Task<T, U>::W;
  Scratch scratch{(uintptr_t)memory};
  const ForwardMemory<S> m(p, scratch);
  const Convolution<T, U> conv(p, index, m.convolution);
  const Task<T, U>& task = conv.task;
  const Vec<S> bias = task.template per_channel<U>(p.bias), D = task.template per_channel<S>(p.D);
  const int64_t step = task.rows_at_once();

  for (int64_t n = 0; n < p.states; ++n) {
    task.read_strip(conv.in, conv.tile, n);
    const bool first = n == 0, last = n + 1 == p.states;
    for (int64_t y = task.begin; y < task.end; y += step) {
      const int64_t rows = least(step, task.end - y);
      if (!p.C.data) {
        const Pixels<S> out = task.template rows_to_write<U>(m.out, p.out, n, y, rows);
        conv.convolve_rows(y, rows, bias, {Finish<S>::kSum, out});
        task.template write_back<U>(out, m.out, p.out, n, y, rows);
        continue;
      }
      const Pixels<S> sums = {m.sums + (y - task.begin) * p.width * W, W};
      const Pixels<const S> x = task.template rows_to_read<U>(m.x, p.x, 0, y, rows);
      const Pixels<const S> before = first ? x : Pixels<const S>{sums.data, sums.step};
      const Pixels<S> out = last ? task.template rows_to_write<U>(m.out, p.out, 0, y, rows) : sums;
      const Vec<S> factor = first ? D : Vec<S>{} + 1;
      task.read_C(m.C, n, y, rows);
      conv.convolve_rows(y, rows, Vec<S>{}, {Finish<S>::kOutputEquation, out, m.C, factor, before});
      if (last) task.template write_back<U>(out, m.out, p.out, 0, y, rows);
    }
  }
}

template <class S>
struct AdjointMemory {
  S *grad, *sums;
  int64_t *offsets, *border_offsets;

  INLINE AdjointMemory(const Params& p, Scratch& scratch) {
    grad = scratch.take<S>(buffer_vectors(p));
    sums = scratch.take<S>(p.distinct_rows * pitch_vectors(p));
    offsets = scratch.take_objects<int64_t>(p.taps);
    border_offsets = scratch.take_objects<int64_t>(p.taps);
  }
};

// The gradient of `in` is the same computation with taps that point the other way, except at a border that is
// replicated beyond the plane. There, the taps take sums of rows and, for the columns, sums within each row.
template <class T, class U>
struct Adjoint {
  using S = State<T>;
  static constexpr int W = kLanes<S>;

  const Convolution<T, U>& conv;
  const Task<T, U>& task;
  Buffer<S> grad;  // zeros beyond the plane
  S* sums;         // for each row of taps, the values that a border row takes
  int64_t *offsets, *border_offsets;

  INLINE Adjoint(const Convolution<T, U>& conv, const AdjointMemory<S>& memory) : conv(conv), task(conv.task) {
    grad = task.buffer(memory.grad);
    sums = memory.sums;
    offsets = memory.offsets;
    border_offsets = memory.border_offsets;
    for (int k = 0; k < task.p.taps; ++k) offsets[k] = -conv.offsets[k];
  }

  // Sums the rows whose tap, `offset` rows away, reads the border row y.
  INLINE void sum_rows(S* to, int64_t y, int offset) const {
    const Params& p = task.p;
    fill(to, Vec<S>{}, grad.pitch);
    const int64_t last = least(p.height, y + p.reach_rows + 1);
    for (int64_t from = most(0, y - p.reach_rows); from < last; ++from) {
      if (clamp(from + offset, p.height) != y) continue;
      const S* row = grad.row(from);
      S* sum = to + grad.margin * W;
      for (int64_t x = 0; x < p.width; ++x) store(sum + x * W, load(sum + x * W) + load(row + x * W));
    }
  }

  // Computes sums for the border row y, and the address at which each tap reads them, relative to row y of the
  // gradients.
  INLINE void aim_at_sums(int64_t y) const {
    const Params& p = task.p;
    S* sum = sums - grad.pitch * W;
    for (int k = 0; k < p.taps; ++k) {
      if (k == 0 || p.tap_rows[k] != p.tap_rows[k - 1]) sum_rows(sum += grad.pitch * W, y, p.tap_rows[k]);
      border_offsets[k] = sum + (grad.margin - p.tap_columns[k]) * W - grad.row(y);
    }
  }

  // Adds to the columns at the plane's borders what belongs to the columns beyond.
  INLINE void add_columns(const Pixels<S>& out, const S* row, const int64_t* offsets) const {
    const Params& p = task.p;
    Vec<S> left = {}, right = {};
    for (int k = 0; k < p.taps; ++k) {
      const bool is_left = p.tap_columns[k] < 0;
      const int64_t beyond = least(p.width, is_left ? -p.tap_columns[k] : p.tap_columns[k]);
      const S* from = row + offsets[k] + (p.tap_columns[k] + (is_left ? 0 : p.width - beyond)) * W;
      Vec<S> sum = {};
      for (int64_t i = 0; i < beyond; ++i) sum += load(from + i * W);
      (is_left ? left : right) += sum * load(conv.weights + k * W);
    }
    out.set(0, out.get(0) + left);
    out.set(p.width - 1, out.get(p.width - 1) + right);
  }

  // Computes rows of the gradient.
  INLINE void compute_rows(const Pixels<S>& out, int64_t begin, int64_t count) const {
    const Params& p = task.p;
    int64_t y = begin;
    while (y < begin + count) {
      const bool border = !p.zeros && (y == 0 || y == p.height - 1);
      const int64_t inner = p.zeros ? count : least(begin + count, p.height - 1) - y;
      const int64_t some = border ? 1 : inner;
      if (border) aim_at_sums(y);
      const int64_t* const taps = border ? border_offsets : offsets;
      const Pixels<S> to = {out.data + (y - begin) * p.width * out.step, out.step};
      convolve<-1>(p, grad.row(y), grad.pitch, taps, conv.weights, some, Vec<S>{}, Finish<S>{Finish<S>::kSum, to});
      for (int64_t i = 0; i < some && !p.zeros; ++i)
        add_columns({to.data + i * p.width * to.step, to.step}, grad.row(y + i), taps);
      y += some;
    }
  }
};

// Adds the contributions of the rows from `begin` to `end` to the gradients of the weights of `TapCount` taps. Here and
// below, some pixels are added up in S, and this result is added to `sums` in double precision.
template <int TapCount, class S>
INLINE void add_some_weight_gradients(double* sums, int tap, const int64_t* offsets, const Buffer<S>& in,
                                      const Buffer<S>& grad, int64_t begin, int64_t end, int64_t width) {
  constexpr int W = kLanes<S>;
  Vec<S> totals[TapCount] = {};
  int64_t pixels = 0;
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t last = least(width, first + kColumns);
    for (int64_t y = begin; y < end; ++y) {
      const S *const from = in.row(y), *const g = grad.row(y);
      for (int64_t x = first; x < last; ++x) {
        const Vec<S> gradient = load(g + x * W);
        for (int k = 0; k < TapCount; ++k) totals[k] += gradient * load(from + x * W + offsets[tap + k]);
      }
      pixels += last - first;
      if (pixels < kSumInFloat && (last < width || y + 1 < end)) continue;
      for (int k = 0; k < TapCount; ++k) {
        add_lanes<S>(sums + (tap + k) * W, totals[k]);
        totals[k] = Vec<S>{};
      }
      pixels = 0;
    }
  }
}

template <int TapCount = kTapsAtOnce, class S>
NOINLINE void add_weight_gradients(double* sums, int tap, int taps, const int64_t* offsets, const Buffer<S>& in,
                                   const Buffer<S>& grad, int64_t begin, int64_t end, int64_t width) {
  for (; tap + TapCount <= taps; tap += TapCount)
    add_some_weight_gradients<TapCount>(sums, tap, offsets, in, grad, begin, end, width);
  if constexpr (TapCount > 1) {
    if (tap < taps) add_weight_gradients<TapCount - 1>(sums, tap, taps, offsets, in, grad, begin, end, width);
  }
}

template <class S>
struct BackwardMemory {
  ConvolutionMemory<S> convolution;
  AdjointMemory<S> adjoint;
  S *tile, *other, *C_or_sums;  // tiles
  double* sums;                 // the gradients of the taps, then of D or the bias: (taps + 1, lanes)

  INLINE BackwardMemory(const Params& p, Scratch& scratch) : convolution(p, scratch), adjoint(p, scratch) {
    tile = scratch.take<S>(tile_vectors(p));
    other = scratch.take<S>(tile_vectors(p));
    C_or_sums = scratch.take<S>(tile_vectors(p));
    sums = scratch.take_objects<double>((p.taps + 1) * kLanes<S>);
  }
};

// The gradients of D and x, or of the bias.
template <class T, class U, class S>
INLINE void D_x_or_bias_gradients(const Task<T, U>& task, const BackwardMemory<S>& m) {
  const Params& p = task.p;
  const Vec<S> D = task.template per_channel<S>(p.D);
  const int64_t step = task.rows_at_once();
  for (int64_t y = task.begin; y < task.end; y += step) {
    const int64_t rows = least(step, task.end - y);
    const Pixels<const S> g = task.template rows_to_read<U>(m.tile, p.grad, 0, y, rows);
    const bool has_x = p.x.data;
    const Pixels<const S> x = has_x ? task.template rows_to_read<U>(m.other, p.x, 0, y, rows) : g;
    const Pixels<S> grad_x =
        has_x ? task.template rows_to_write<U>(m.tile, p.grad_x, 0, y, rows) : Pixels<S>{m.tile, kLanes<S>};
    for (int64_t begin = 0; begin < rows * p.width; begin += kSumInFloat) {
      const int64_t end = least(rows * p.width, begin + kSumInFloat);
      Vec<S> sum = {};
      for (int64_t i = begin; i < end; ++i) {  // g and grad_x may be the same tile: a pixel is read, then written
        const Vec<S> gradient = g.get(i);
        sum += has_x ? gradient * x.get(i) : gradient;
        if (has_x) grad_x.set(i, gradient * D);
      }
      add_lanes<S>(m.sums + p.taps * kLanes<S>, sum);
    }
    if (has_x) task.template write_back<U>(grad_x, m.tile, p.grad_x, 0, y, rows);
  }
}

// Reads the strip of the gradient of conv_n: grad, times C_n for the output equation.
template <class T, class U, class S>
INLINE void read_grad(const Task<T, U>& task, const Buffer<S>& grad, const BackwardMemory<S>& m, int64_t n) {
  constexpr int W = kLanes<S>;
  const Params& p = task.p;
  const int64_t step = task.rows_at_once();
  for (int64_t y = task.first_row(); y < task.end_row(); y += step) {
    const int64_t rows = least(step, task.end_row() - y);
    const Pixels<const S> g = task.template rows_to_read<U>(m.tile, p.grad, p.C.data ? 0 : n, y, rows);
    if (p.C.data) {
      task.read_C(m.C_or_sums, n, y, rows);
    } else {
      for (int64_t i = 0; i < rows * p.width; ++i) m.C_or_sums[i] = 1;
    }
    for (int64_t i = 0; i < rows; ++i) {
      S* row = grad.row(y + i);
      for (int64_t x = 0; x < p.width; ++x)
        store(row + x * W, m.C_or_sums[i * p.width + x] * g.get(i * p.width + x));
      task.pad_row(grad, y + i, true);
    }
  }
  task.pad_rows_beyond(grad, true);
}

// The gradient of C_n: the sum over the task's channels of grad conv_n.
template <class T, class U, class S>
INLINE void C_gradient(const Convolution<T, U>& conv, const BackwardMemory<S>& m, int64_t n) {
  const Task<T, U>& task = conv.task;
  const Params& p = task.p;
  const int64_t step = task.rows_at_once();
  for (int64_t y = task.begin; y < task.end; y += step) {
    const int64_t rows = least(step, task.end - y);
    const Pixels<const S> g = task.template rows_to_read<U>(m.other, p.grad, 0, y, rows);
    conv.convolve_rows(y, rows, Vec<S>{}, {Finish<S>::kMultiply, {m.tile, kLanes<S>}, nullptr, Vec<S>{}, g});
    sum_lanes(m.C_or_sums, m.tile, rows * p.width);
    const int64_t plane = (task.batch * p.states + n) * p.channel_blocks(kLanes<S>) + task.block;
    memcpy((S*)p.grad_C + (plane * p.height + y) * p.width, m.C_or_sums, rows * p.width * sizeof(S));
  }
}

template <class T, class U, class S>
INLINE void input_gradient(const Adjoint<T, U>& adjoint, const BackwardMemory<S>& m, int64_t n) {
  const Task<T, U>& task = adjoint.task;
  const Params& p = task.p;
  const int64_t step = task.rows_at_once();
  for (int64_t y = task.begin; y < task.end; y += step) {
    const int64_t rows = least(step, task.end - y);
    const Pixels<S> grad_in = task.template rows_to_write<T>(m.tile, p.grad_in, n, y, rows);
    adjoint.compute_rows(grad_in, y, rows);
    task.template write_back<T>(grad_in, m.tile, p.grad_in, n, y, rows);
  }
}

template <class T, class U>
void backward(const Params& p, int64_t index, void* memory) {
  using S = typename Task<T, U>::S;
  constexpr int W = Task<T, U>::W;
  Scratch scratch{(uintptr_t)memory};
  const BackwardMemory<S> m(p, scratch);
  const Convolution<T, U> conv(p, index, m.convolution);
  const Adjoint<T, U> adjoint(conv, m.adjoint);
  const Task<T, U>& task = conv.task;
  memset(m.sums, 0, (p.taps + 1) * W * sizeof(double));

  D_x_or_bias_gradients(task, m);
  for (int64_t n = 0; n < p.states; ++n) {
    task.read_strip(conv.in, conv.tile, n);
    read_grad(task, adjoint.grad, m, n);
    if (p.C.data) C_gradient(conv, m, n);
    add_weight_gradients(m.sums, 0, p.taps, conv.offsets, conv.in, adjoint.grad, task.begin, task.end, p.width);
    input_gradient(adjoint, m, n);
  }

  S* partials = (S*)p.grad_weights + (task.batch * p.strips + task.strip) * (p.taps + 1) * p.channels;
  for (int k = 0; k <= p.taps; ++k)
    for (int j = 0; j < task.channels; ++j) partials[k * p.channels + task.channel + j] = m.sums[k * W + j];
}

template <class T, class U>
constexpr Kernel kForward = {Task<T, U>::W, VECTOR_BYTES, bytes_of<ForwardMemory<typename Task<T, U>::S>, Params>,
                             forward<T, U>};
template <class T, class U>
constexpr Kernel kBackward = {Task<T, U>::W, VECTOR_BYTES, bytes_of<BackwardMemory<typename Task<T, U>::S>, Params>,
                              backward<T, U>};

constexpr Kernels kKernels = {
    {kForward<float, float>, kForward<double, double>, kForward<Half, Half>, kForward<BFloat16, BFloat16>,
     kForward<float, Half>, kForward<float, BFloat16>},
    {kBackward<float, float>, kBackward<double, double>, kBackward<Half, Half>, kBackward<BFloat16, BFloat16>,
     kBackward<float, Half>, kBackward<float, BFloat16>},
    {},
};

}  // namespace
}  // namespace dwconv2d
