// Depthwise convolutions and their gradients, tile by tile, in CUDA C++ that a host compiler also accepts
// (tests/kernels/cuda_emulation).
//
// A thread owns 7 x 7 pixels of one plane and holds their sums in registers. It reads each row of the convolved plane
// once: 7 columns, and those within reach to the left and right. It adds the row to every output row that the row
// reaches. All loops are unrolled, so that sums, weights and values of the row are in registers.
//
// Borders are handled by addresses. The rows and columns that a thread reads are clamped: to the plane, which
// replicates its borders, or to a frame of zeros around it. So planes have the same layout in shared memory as in
// global memory, and are one run of memory where possible. Lanes are 7 columns apart, so they read without bank
// conflicts at widths of 56, 28, 14 and 7.
//
// The adjoint of replicate padding adds what falls outside the plane to its borders. Before the weights are applied,
// this is a sum of the border's neighbours inside the plane. The kernel sums columns in registers. It sums rows by
// reading them again, in the few warps at the border (`fold_rows`).
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "plan.h"
#include "taps.cuh"

namespace dwconv2d {

// ----- the positions of a block and a thread

struct Block {
  int batch, tile, row_tile, column_tile, channel_block;
  int row, column;  // of the tile's first position

  __device__ __forceinline__ explicit Block(const Params& p) {
    const Plan& plan = p.plan;
    const int image_tile = plan.by_channel_blocks.divide(blockIdx.x);
    channel_block = blockIdx.x - image_tile * plan.channel_blocks;
    batch = plan.by_tiles.divide(image_tile);
    tile = image_tile - batch * plan.tiles();
    row_tile = plan.by_tile_columns.divide(tile);
    column_tile = tile - row_tile * plan.columns.tiles;
    row = plan.rows.start(row_tile);
    column = plan.columns.start(column_tile);
  }
};

// The planes of one round of a block.
struct Set {
  int channel, count;

  __device__ __forceinline__ Set(const Params& p, const Block& block, int round)
      : channel((block.channel_block * p.plan.rounds + round) * p.plan.planes),
        count(min(p.plan.planes, p.channels - channel)) {}
};

struct Thread {
  int index;
  Position position;
  bool mine;        // whether it has a plane; if not, it reads the first one, and its results are not used
  int row, column;  // of its first pixel, in the tile
  int first_pixel;  // its index in a dense tile of the set

  // Opaque, because computing these numbers again is cheaper than keeping them in registers.
  __device__ __forceinline__ Thread(const Plan& plan, const Set& set)
      : index(opaque(threadIdx.x)), position(plan.position(index)) {
    mine = index < plan.planes * plan.threads_per_plane && position.plane < set.count;
    if (!mine) position.plane = 0;
    row = plan.rows.first(position.row_unit);
    column = plan.columns.first(position.column_unit);
    first_pixel = position.plane * plan.tile_pixels() + row * plan.columns.tile + column;
  }
};

// The part of a plane that a tile and its surroundings cover. `top` and `left` may be in the frame.
struct Region {
  int top, left, bottom, right;

  __device__ __forceinline__ Region(const Params& p, const Block& block) {
    const Plan& plan = p.plan;
    const int mask = ~(plan.alignment - 1);
    top = max(block.row - plan.reach, -plan.frame);
    left = max(block.column - plan.reach, -plan.frame) & mask;
    bottom = min(block.row + plan.rows.tile + plan.reach, p.height);
    right = min((block.column + plan.columns.tile + plan.reach + plan.alignment - 1) & mask, p.width);
  }
};

// ----- between global and shared memory

struct Box {
  int planes, rows, columns;
};

// Visits a thread's elements of a box. Each step is as many elements as there are threads.
struct Walk {
  int plane, row, column;
  Box box, step;

  // Opaque. Otherwise, the compiler would do these divisions of every walk first and keep the results in registers.
  __device__ __forceinline__ explicit Walk(const Box& box) : box(box), step(split(opaque(blockDim.x))) {
    const Box start = split(opaque(threadIdx.x));
    plane = start.planes;
    row = start.rows;
    column = start.columns;
  }
  __device__ __forceinline__ Box split(int i) const {
    const int rows = i / box.columns, planes = rows / box.rows;
    return {planes, rows - planes * box.rows, i - rows * box.columns};
  }
  __device__ __forceinline__ bool done() const { return plane >= box.planes; }
  __device__ __forceinline__ void next() {
    column += step.columns;
    row += step.rows;
    plane += step.planes;
    if (column >= box.columns) {
      column -= box.columns;
      ++row;
    }
    if (row >= box.rows) {
      row -= box.rows;
      ++plane;
    }
  }
};

// Moves kWidth elements to or from global memory. A move from global memory is complete after `wait_for_copies`.
template <int kWidth, bool kStore, typename T>
__device__ __forceinline__ void move_packed(T* shared, T* global) {
  using Packed = Pack<T, kWidth>;
  if constexpr (kStore) {
    *reinterpret_cast<Packed*>(global) = *reinterpret_cast<const Packed*>(shared);
  } else if constexpr (sizeof(Packed) == 16) {
    copy_16_bytes_async(shared, global);
  } else if constexpr (sizeof(Packed) == 4) {
    copy_4_bytes_async(shared, global);
  } else {
    *shared = *global;
  }
}

struct Pitch {
  int64_t row, plane;
};

template <int kWidth, bool kStore, typename T>
__device__ __forceinline__ void move_box(T* shared, Pitch inside, T* global, Pitch outside, const Box& box) {
  if (box.planes == 1 && box.rows == 1) {
#pragma unroll 4
    for (int i = threadIdx.x * kWidth; i < box.columns; i += blockDim.x * kWidth) {
      move_packed<kWidth, kStore>(shared + i, global + i);
    }
    return;
  }
#pragma unroll 1
  for (Walk walk({box.planes, box.rows, box.columns / kWidth}); !walk.done(); walk.next()) {
    const int column = walk.column * kWidth;
    move_packed<kWidth, kStore>(shared + int(walk.plane * inside.plane + walk.row * inside.row) + column,
                              global + walk.plane * outside.plane + walk.row * outside.row + column);
  }
}

template <bool kStore, typename T>
__device__ __forceinline__ void move_box(
    T* shared, Pitch inside, T* global, Pitch outside, const Box& box, int move) {
  constexpr int kWide = 16 / sizeof(T), kWord = 4 / sizeof(T);
  if (move == kWide) {
    move_box<kWide, kStore>(shared, inside, global, outside, box);
  } else if (move == kWord) {
    move_box<kWord, kStore>(shared, inside, global, outside, box);
  } else {
    move_box<1, kStore>(shared, inside, global, outside, box);
  }
}

// Moves a tile of a set's planes without its surroundings, row after row. Planes in shared memory are `pitch` apart.
template <bool kStore, typename T>
__device__ __forceinline__ void move_tile(
    const Params& p, const Block& block, const Planes& planes, T* global, T* shared, int count, int pitch) {
  const Plan& plan = p.plan;
  if (planes.run == Run::kRow) {
    const Box box{count, plan.rows.tile, plan.columns.tile};
    T* const from = global + int64_t(block.row) * p.width + block.column;
    move_box<kStore>(shared, {plan.columns.tile, pitch}, from, {p.width, planes.channel}, box, planes.move);
  } else {
    const int pixels = plan.tile_pixels();  // the tile is the plane
    const Box box = planes.run == Run::kPlanes ? Box{1, 1, count * pixels} : Box{count, 1, pixels};
    move_box<kStore>(shared, {0, pitch}, global, {0, planes.channel}, box, planes.move);
  }
}

template <typename T>
__device__ __forceinline__ void load_tile(
    const Params& p, const Block& block, const Planes& planes, int channel, int count, int state, T* shared) {
  move_tile<false>(p, block, planes, at<T>(planes, block.batch, channel, state), shared, count, p.plan.tile_pixels());
}

template <typename T>
__device__ __forceinline__ void store_tile(
    const Params& p, const Block& block, const Planes& planes, const Set& set, int state, T* shared) {
  T* const to = at<T>(planes, block.batch, set.channel, state);
  move_tile<true>(p, block, planes, to, shared, set.count, p.plan.tile_pixels());
}

// Fills the memory of the convolved planes with zeros. The frame keeps them.
__device__ __forceinline__ void fill_with_zeros(const Plan& plan) {
  using Packed = Pack<float, 4>;
  Packed* const memory = shared_at<Packed>(plan.convolved);
#pragma unroll 1
  for (int i = threadIdx.x; i < plan.grad / int(sizeof(Packed)); i += blockDim.x) memory[i] = Packed{};
  __syncthreads();
}

// Loads the input of a set of planes, with the tile's surroundings.
template <typename Input>
__device__ __forceinline__ void load_input(const Params& p, const Block& block, const Set& set, int state) {
  const Plan& plan = p.plan;
  Input* const shared = shared_at<Input>(plan.convolved);
  Input* const global = at<Input>(p.input, block.batch, set.channel, state);
  if (p.input.run != Run::kRow) {
    move_tile<false>(p, block, p.input, global, shared, set.count, plan.plane_pitch);
    return;
  }
  if (plan.frame) fill_with_zeros(plan);
  const Region region(p, block);
  const int row = max(region.top, 0), column = max(region.left, 0);
  const Box box{set.count, region.bottom - row, region.right - column};
  move_box<false>(shared + (row - region.top) * plan.pitch + column - region.left, {plan.pitch, plan.plane_pitch},
                  global + int64_t(row) * p.width + column, {p.width, p.input.channel}, box, p.input.move);
}

// ----- between shared memory and registers

// The part of the convolved plane that one thread reads.
template <typename T, int kReach>
class Window {
 public:
  bool top, bottom, left, right;  // whether its pixels end at this border of a replicated plane

  __device__ __forceinline__ Window(const Params& p, const Block& block, const Thread& me) {
    const Plan& plan = p.plan;
    const Region region(p, block);
    const int row = block.row + me.row, column = block.column + me.column;
    row_ = row - region.top;
    low_ = -plan.frame - region.top;
    high_ = p.height - 1 + plan.frame - region.top;
    pitch_ = opaque(plan.pitch * int(sizeof(T)));  // otherwise all rows' addresses would be kept in registers
    top = !p.zeros && row == 0;
    bottom = !p.zeros && row == p.height - kUnit;
    left = !p.zeros && column == 0;
    right = !p.zeros && column == p.width - kUnit;
    const int zero = me.position.plane * plan.plane_pitch - region.left, last = p.width - 1 + plan.frame;
    own_ = (zero + column) * int(sizeof(T));
#pragma unroll
    for (int k = 0; k < kReach; ++k) {
      halo_[k] = (zero + max(column - kReach + k, -plan.frame)) * int(sizeof(T));
      halo_[kReach + k] = (zero + min(column + kUnit + k, last)) * int(sizeof(T));
    }
  }

  // A copy of the window, so that values that are read again take no registers in between.
  __device__ __forceinline__ Window again() const {
    Window window = *this;
    window.pitch_ = opaque(pitch_);
    return window;
  }

  // Reads the row that is `offset` below the thread's first.
  __device__ __forceinline__ void read(int offset, float (&values)[kUnit + 2 * kReach]) const {
    const int row = min(max(row_ + offset, low_), high_) * pitch_;
#pragma unroll
    for (int k = 0; k < kReach; ++k) {
      values[k] = widen(*shared_at<T>(row + halo_[k]));
      values[kReach + kUnit + k] = widen(*shared_at<T>(row + halo_[kReach + k]));
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) values[kReach + j] = widen(shared_at<T>(row + own_)[j]);
  }

 private:
  int own_, halo_[2 * kReach];  // byte offsets in shared memory of columns in the region's first row
  int row_, low_, high_;        // from that row on: the thread's first row, and the limits of what it may read
  int pitch_;
};

// A row of a window. With kFold, left[k] belongs to the thread's first column, and right[k] to its last one. If that
// column is the plane's border, they are the sum of the border and the next k columns inside, which the adjoint adds to
// the border. Otherwise, they are the value k columns further inside alone.
template <int kReach, bool kFold>
struct Row {
  float values[kUnit + 2 * kReach];
  float left[kFold ? kReach + 1 : 1], right[kFold ? kReach + 1 : 1];

  template <typename T>
  __device__ __forceinline__ Row(const Window<T, kReach>& window, int offset) {
    window.read(offset, values);
    if constexpr (kFold) {
      constexpr int kFirst = kReach, kLast = kReach + kUnit - 1;
      float from_left = values[kFirst], from_right = values[kLast];
#pragma unroll
      for (int k = 1; k <= kReach; ++k) {
        from_left += values[kFirst + k];
        from_right += values[kLast - k];
        left[k] = window.left ? from_left : values[kFirst + k];
        right[k] = window.right ? from_right : values[kLast - k];
      }
    }
  }
  // The value that column j of the thread reads at an offset.
  __device__ __forceinline__ float at(int j, int offset) const {
    if (kFold && j == 0 && offset > 0) return left[offset];
    if (kFold && j == kUnit - 1 && offset < 0) return right[-offset];
    return values[kReach + j + offset];
  }
};

using Square = float[kUnit][kUnit];

// Calls function(m) for each m from kFirst to kLast as a constant. Compilers do not unroll a loop of this length.
template <int kFirst, int kLast, typename Function>
__device__ __forceinline__ void for_each_constant(Function function) {
  function(std::integral_constant<int, kFirst>());
  if constexpr (kFirst < kLast) for_each_constant<kFirst + 1, kLast>(function);
}

// The rows of its window that a part of the stencil reads for a thread's pixels.
template <typename Stencil, typename Function>
__device__ __forceinline__ void for_each_row(Function function) {
  for_each_constant<-Stencil::kRowReach, kUnit - 1 + Stencil::kRowReach>(function);
}

// sums += the taps of row a of a part, applied to a row.
template <typename Stencil, bool kFold>
__device__ __forceinline__ void add_taps(const Row<Stencil::kReach, kFold>& row, int a,
                                         const float (&weights)[Stencil::kPartTaps], float (&sums)[kUnit]) {
#pragma unroll
  for (int b = 0; b < Stencil::columns(a); ++b) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) sums[j] += weights[Stencil::tap(a, b)] * row.at(j, Stencil::column(a, b));
  }
}

// Adds to the first and last row what falls above and below the plane: for a row of taps that reaches r rows into the
// plane, these are the r rows nearest to the border.
template <typename Stencil, typename T>
__device__ __forceinline__ void fold_rows(const Window<T, Stencil::kReach>& window, int part_row,
                                          const float (&weights)[Stencil::kPartTaps], Square& sums) {
  if (window.top) {
#pragma unroll 1
    for (int m = 0; m < Stencil::kReach; ++m) {
      const Row<Stencil::kReach, true> row(window, m);
#pragma unroll
      for (int a = 0; a < Stencil::kPartRows; ++a) {
        if (part_row + Stencil::row(a) > m) add_taps<Stencil, true>(row, a, weights, sums[0]);
      }
    }
  }
  if (window.bottom) {
#pragma unroll 1
    for (int m = 0; m < Stencil::kReach; ++m) {
      const Row<Stencil::kReach, true> row(window, kUnit - 1 - m);
#pragma unroll
      for (int a = 0; a < Stencil::kPartRows; ++a) {
        if (part_row + Stencil::row(a) < -m) add_taps<Stencil, true>(row, a, weights, sums[kUnit - 1]);
      }
    }
  }
}

// Loads the weights of a channel for a part of the stencil. For the adjoint, they are mirrored about the centre.
template <typename Stencil, typename Activation, bool kMirrored>
__device__ __forceinline__ void load_weights(const Params& p, int channel, int part,
                                             float (&weights)[Stencil::kPartTaps]) {
  constexpr int kTaps = Stencil::kPartTaps;
  float inside[kTaps];
  Stencil::template load<Activation>(p, channel, kMirrored ? Stencil::kParts - 1 - part : part, inside);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) weights[tap] = inside[kMirrored ? kTaps - 1 - tap : tap];
}

// sums += the convolution of the thread's window, or its adjoint. `first_weights` are those of the first part.
template <typename Stencil, bool kAdjoint, typename Activation, typename T>
__device__ __forceinline__ void convolve(const Params& p, int channel, const Window<T, Stencil::kReach>& window,
                                         const float (&first_weights)[Stencil::kPartTaps], Square& sums) {
  float weights[Stencil::kPartTaps];
#pragma unroll
  for (int tap = 0; tap < Stencil::kPartTaps; ++tap) weights[tap] = first_weights[tap];
#pragma unroll 1
  for (int part = 0; part < Stencil::kParts; ++part) {
    if (part > 0) load_weights<Stencil, Activation, kAdjoint>(p, channel, part, weights);
    const int part_row = Stencil::part_row(part);
    for_each_row<Stencil>([&](auto m) {
      const Row<Stencil::kReach, kAdjoint> row(window, part_row + m);
#pragma unroll
      for (int a = 0; a < Stencil::kPartRows; ++a) {
        const int i = m - Stencil::row(a);
        if (0 <= i && i < kUnit) add_taps<Stencil, kAdjoint>(row, a, weights, sums[i]);
      }
    });
    if constexpr (kAdjoint) fold_rows<Stencil>(window, part_row, weights, sums);
  }
}

// sums[tap] += sum over the thread's pixels of grad times the value that the tap reads, for the taps of a part.
template <typename Stencil, typename T>
__device__ __forceinline__ void correlate(const Window<T, Stencil::kReach>& window, int part_row, const Square& grad,
                                          float (&sums)[Stencil::kPartTaps]) {
  for_each_row<Stencil>([&](auto m) {
    const Row<Stencil::kReach, false> row(window, part_row + m);
#pragma unroll
    for (int a = 0; a < Stencil::kPartRows; ++a) {
      const int i = m - Stencil::row(a);
      if (i < 0 || i >= kUnit) continue;
#pragma unroll
      for (int b = 0; b < Stencil::columns(a); ++b) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) sums[Stencil::tap(a, b)] += grad[i][j] * row.at(j, Stencil::column(a, b));
      }
    }
  });
}

// Calls function(i, j, k) for the thread's pixels. k is the index of row i and column j in a dense tile, counted from
// the thread's first pixel.
template <typename Function>
__device__ __forceinline__ void for_each_pixel(const Plan& plan, Function function) {
  const int pitch = opaque(plan.columns.tile);
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) function(i, j, i * pitch + j);
  }
}

// ----- forward

// The result of the convolution plus a bias, or of the output equation y = sum_n C_n h'_n + D x. Here and below, the
// second number of the launch bounds is the number of blocks on a multiprocessor that a thread's registers leave room
// for.
template <typename Stencil, typename Input, typename Activation, bool kOutputEquation>
__global__ void __launch_bounds__(kMaxThreads, 4) tiled_forward(const Params p) {
  const Plan& plan = p.plan;
  const Block block(p);
  const Set set(p, block, 0);
  const Thread me(plan, set);
  const int channel = set.channel + me.position.plane;
  Activation* const x_tile = shared_at<Activation>(plan.x);
  Activation* const C_tile = shared_at<Activation>(plan.C);

  float weights[Stencil::kPartTaps];
  load_weights<Stencil, Activation, false>(p, channel, 0, weights);
  const float bias = p.bias ? widen(static_cast<const Activation*>(p.bias)[channel]) : 0.0f;
#pragma unroll 1
  for (int n = 0; n < p.states; ++n) {
    load_input<Input>(p, block, set, n);
    if constexpr (kOutputEquation) {
      load_tile(p, block, p.C, 0, 1, n, C_tile);
      if (n == 0) load_tile(p, block, p.x, set.channel, set.count, 0, x_tile);
    }
    wait_for_copies();
    __syncthreads();
    Square sums;
    for_each_pixel(plan, [&](int i, int j, int) { sums[i][j] = bias; });
    const Window<Input, Stencil::kReach> window(p, block, me);
    convolve<Stencil, false, Activation>(p, channel, window, weights, sums);

    Activation* const result = (kOutputEquation ? x_tile : shared_at<Activation>(plan.results)) + me.first_pixel;
    const bool last = n + 1 == p.states;
    if constexpr (kOutputEquation) {
      const Activation* const C = C_tile + me.row * plan.columns.tile + me.column;
      float* const before = shared_at<float>(plan.sums) + me.index * kUnit * kUnit;  // the thread's sums over states
      const float D = static_cast<const float*>(p.D)[channel];
      for_each_pixel(plan, [&](int i, int j, int k) { sums[i][j] *= widen(C[k]); });
      if (n == 0) {
        for_each_pixel(plan, [&](int i, int j, int k) { sums[i][j] += D * widen(result[k]); });
      } else {
        for_each_pixel(plan, [&](int i, int j, int) { sums[i][j] += before[i * kUnit + j]; });
      }
      if (!last) for_each_pixel(plan, [&](int i, int j, int) { before[i * kUnit + j] = sums[i][j]; });
    }
    __syncthreads();  // all threads have read what the results replace
    if (kOutputEquation && !last) continue;
    if (me.mine) for_each_pixel(plan, [&](int i, int j, int k) { narrow(sums[i][j], result[k]); });
    __syncthreads();
    store_tile(p, block, p.result, set, kOutputEquation ? 0 : n,
               kOutputEquation ? x_tile : shared_at<Activation>(plan.results));
    if (!last) __syncthreads();
  }
}

// ----- backward

// Loads the gradient of the convolution's result, with zeros around it: `grad`, or grad C_n for the output equation.
// For the latter, it also writes x's gradient, D grad.
template <int kWidth, typename Activation, bool kOutputEquation>
__device__ __forceinline__ void load_grad(const Params& p, const Block& block, const Set& set, int state) {
  using Packed = Pack<Activation, kWidth>;
  const Plan& plan = p.plan;
  const Region region(p, block);
  const int top = max(region.top, 0), left = max(region.left, 0);
  const Box box{set.count, region.bottom - top, (region.right - left) / kWidth};
  const Activation* const grad = at<Activation>(p.grad, block.batch, set.channel, kOutputEquation ? 0 : state);
#pragma unroll 1
  for (Walk walk(box); !walk.done(); walk.next()) {
    const int row = top + walk.row, column = left + walk.column * kWidth;
    const int64_t pixel = int64_t(row) * p.width + column;
    const Packed packed = *reinterpret_cast<const Packed*>(grad + walk.plane * p.grad.channel + pixel);
    float values[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = widen(packed.values[k]);
    if constexpr (kOutputEquation) {
      const bool inside = block.row <= row && row < block.row + plan.rows.tile && block.column <= column &&
                          column < block.column + plan.columns.tile;
      if (state == 0 && inside) {
        const int channel = set.channel + walk.plane;
        const float D = static_cast<const float*>(p.D)[channel];
        Packed grad_x;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) narrow(D * values[k], grad_x.values[k]);
        *reinterpret_cast<Packed*>(at<Activation>(p.grad_x, block.batch, channel, 0) + pixel) = grad_x;
      }
      const Packed C = *reinterpret_cast<const Packed*>(at<Activation>(p.C, block.batch, 0, state) + pixel);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] *= widen(C.values[k]);
    }
    float* const to = shared_at<float>(plan.convolved) + walk.plane * plan.plane_pitch +
                      (row - region.top) * plan.pitch + column - region.left;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to[k] = values[k];
  }
}

// The same for whole planes that are one run of memory. It reads 16 bytes at once, wherever rows and planes begin.
template <typename Activation, bool kOutputEquation>
__device__ __forceinline__ void load_grad_run(const Params& p, const Block& block, const Set& set, int state) {
  constexpr int kWidth = 16 / sizeof(Activation);
  using Packed = Pack<Activation, kWidth>;
  const Plan& plan = p.plan;
  const int pixels = plan.tile_pixels(), width = plan.columns.tile;
  const Activation* const grad = at<Activation>(p.grad, block.batch, set.channel, kOutputEquation ? 0 : state);
  const Activation* const C = kOutputEquation ? at<Activation>(p.C, block.batch, 0, state) : nullptr;
  Activation* const grad_x = kOutputEquation ? at<Activation>(p.grad_x, block.batch, set.channel, 0) : nullptr;
  const float* const D = kOutputEquation ? static_cast<const float*>(p.D) + set.channel : nullptr;
#pragma unroll 2
  for (int i = threadIdx.x * kWidth; i < set.count * pixels; i += blockDim.x * kWidth) {
    const Packed packed = *reinterpret_cast<const Packed*>(grad + i);
    int plane = plan.by_tile_pixels.divide(i), pixel = i - plane * pixels;
    int row = plan.by_columns.divide(pixel), column = pixel - row * width;
    Packed scaled;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      float value = widen(packed.values[k]);
      if constexpr (kOutputEquation) {
        narrow(D[plane] * value, scaled.values[k]);
        value *= widen(C[pixel]);
      }
      const int offset = plane * plan.plane_pitch + (row + plan.frame) * plan.pitch + column + plan.frame;
      shared_at<float>(plan.convolved)[offset] = value;
      ++pixel;
      if (++column == width) {
        column = 0;
        ++row;
      }
      if (pixel == pixels) {
        pixel = row = 0;
        if (plane + 1 < set.count) ++plane;  // otherwise the pack ends here
      }
    }
    if constexpr (kOutputEquation) {
      if (state == 0) *reinterpret_cast<Packed*>(grad_x + i) = scaled;
    }
  }
}

// Computes the gradient of the input, and for the output equation that of x.
template <typename Stencil, typename Input, typename Activation, bool kOutputEquation>
__global__ void __launch_bounds__(kMaxThreads, 4) tiled_adjoint(const Params p) {
  constexpr int kWide = 16 / sizeof(Activation), kWord = 4 / sizeof(Activation);
  const Plan& plan = p.plan;
  const Block block(p);
  const Set set(p, block, 0);
  Input* const results = shared_at<Input>(plan.results);

#pragma unroll 1
  for (int n = 0; n < p.states; ++n) {
    fill_with_zeros(plan);
    if (p.grad.run == Run::kPlanes) {
      load_grad_run<Activation, kOutputEquation>(p, block, set, n);
    } else if (p.grad.move == kWide) {
      load_grad<kWide, Activation, kOutputEquation>(p, block, set, n);
    } else if (p.grad.move == kWord) {
      load_grad<kWord, Activation, kOutputEquation>(p, block, set, n);
    } else {
      load_grad<1, Activation, kOutputEquation>(p, block, set, n);
    }
    Square sums = {};
    {
      const Thread me(plan, set);
      const int channel = set.channel + me.position.plane;
      float weights[Stencil::kPartTaps];
      load_weights<Stencil, Activation, true>(p, channel, 0, weights);
      __syncthreads();
      const Window<float, Stencil::kReach> window(p, block, me);
      convolve<Stencil, true, Activation>(p, channel, window, weights, sums);
    }
    __syncthreads();
    const Thread me(plan, set);
    if (me.mine) for_each_pixel(plan, [&](int i, int j, int k) { narrow(sums[i][j], results[me.first_pixel + k]); });
    __syncthreads();
    store_tile(p, block, p.grad_input, set, n, results);
    if (n + 1 < p.states) __syncthreads();
  }
}

// Adds up `thread_sums` (numbers, threads) over the threads of each plane and calls store(plane, number, sum).
template <int kNumbers, typename Function>
__device__ __forceinline__ void add_threads(const Plan& plan, const float* thread_sums, int planes, Function store) {
  int lanes = 1;  // lanes per sum; each lane adds at least four threads' sums
  while (lanes < kWarp && 8 * lanes <= plan.threads_per_plane) lanes *= 2;
  const int lane = threadIdx.x % lanes, sums = planes * kNumbers;
#pragma unroll 1
  for (int first = 0; first < sums; first += blockDim.x / lanes) {
    const int index = first + threadIdx.x / lanes, plane = index / kNumbers, number = index - plane * kNumbers;
    float sum = 0;
    if (index < sums) {
      const float* const from = thread_sums + number * plan.threads + plane * plan.threads_per_plane;
#pragma unroll 1
      for (int i = lane; i < plan.threads_per_plane; i += lanes) sum += from[i];
    }
#pragma unroll 1
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += shuffle<false>(sum, distance);
    if (lane == 0 && index < sums) store(plane, number, sum);
  }
}

// A block's partial sums of C's gradient: the sum of the planes' tiles of `products`, over planes and rounds.
template <int kWidth>
__device__ __forceinline__ void sum_planes(const Params& p, const Block& block, const float* products, int planes,
                                           int state, bool first_round, bool last_round) {
  using Packed = Pack<float, kWidth>;
  const Plan& plan = p.plan;
  const int64_t partial = int64_t(block.batch) * plan.channel_blocks + block.channel_block;
  float* const to = static_cast<float*>(p.partials_C) + (partial * p.states + state) * p.pixels();
  float* const before = shared_at<float>(plan.sums);
#pragma unroll 1
  for (int k = threadIdx.x * kWidth; k < plan.tile_pixels(); k += blockDim.x * kWidth) {
    Packed sum = {};
    if (!first_round) sum = *reinterpret_cast<const Packed*>(before + k);
#pragma unroll 1
    for (int plane = 0; plane < planes; ++plane) {
      const Packed product = *reinterpret_cast<const Packed*>(products + plane * plan.tile_pixels() + k);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum.values[i] += product.values[i];
    }
    if (!last_round) {
      *reinterpret_cast<Packed*>(before + k) = sum;
    } else if (plan.tiles() == 1) {
      *reinterpret_cast<Packed*>(to + k) = sum;
    } else if constexpr (kWidth == 1) {
      const int row = k / plan.columns.tile, column = k - row * plan.columns.tile;
      to[int64_t(block.row + row) * p.width + block.column + column] = sum.values[0];
    }
  }
}

__device__ __forceinline__ void sum_planes(const Params& p, const Block& block, const float* products, int planes,
                                           int state, bool first_round, bool last_round) {
  if (p.plan.tiles() == 1 && p.plan.tile_pixels() % 4 == 0) {
    sum_planes<4>(p, block, products, planes, state, first_round, last_round);
  } else {
    sum_planes<1>(p, block, products, planes, state, first_round, last_round);
  }
}

// Reads the gradient of the convolution's result for a thread's pixels, and adds to the gradient of D or the bias.
// Outputs that are in two tiles or units count once.
template <bool kOutputEquation, typename Activation>
__device__ __forceinline__ void read_grad(const Params& p, const Block& block, const Thread& me, int state,
                                          const Activation* grad_tile, Square& grad, float& D_or_bias) {
  const Plan& plan = p.plan;
  const Activation* const my_grad = grad_tile + me.first_pixel;
  const Activation* const x = shared_at<Activation>(plan.x) + me.first_pixel;
  const Activation* const C = shared_at<Activation>(plan.C) + me.row * plan.columns.tile + me.column;
  const int skip_rows = plan.rows.owned(opaque(block.row_tile), me.position.row_unit) - block.row - me.row;
  const int skip_columns =
      plan.columns.owned(opaque(block.column_tile), me.position.column_unit) - block.column - me.column;
  for_each_pixel(plan, [&](int i, int j, int k) {
    grad[i][j] = i >= skip_rows && j >= skip_columns ? widen(my_grad[k]) : 0.0f;
    if (state == 0) D_or_bias += kOutputEquation ? grad[i][j] * widen(x[k]) : grad[i][j];
    if constexpr (kOutputEquation) grad[i][j] *= widen(C[k]);
  });
}

// Sums what the threads of each plane have for the gradients of a part's taps, and of D or the bias, and stores these
// partial sums. Sets `taps` to 0 for the next part.
template <typename Stencil>
__device__ __forceinline__ void store_partials(const Params& p, const Block& block, const Set& set, const Thread& me,
                                               int part, float (&taps)[Stencil::kPartTaps], float D_or_bias) {
  constexpr int kPartTaps = Stencil::kPartTaps;
  const Plan& plan = p.plan;
  float* const thread_sums = shared_at<float>(plan.thread_sums);
#pragma unroll
  for (int tap = 0; tap < kPartTaps; ++tap) {
    thread_sums[tap * plan.threads + me.index] = taps[tap];
    taps[tap] = 0;
  }
  thread_sums[kPartTaps * plan.threads + me.index] = D_or_bias;
  __syncthreads();
  add_threads<kPartTaps + 1>(plan, thread_sums, set.count, [&](int plane, int number, float sum) {
    const int64_t slice = int64_t(opaque(block.batch)) * p.slices + block.tile;
    const int64_t row = slice * p.channels + set.channel + plane;
    if (number < kPartTaps) {
      static_cast<float*>(p.partials_taps)[row * Stencil::kTaps + part * kPartTaps + number] = sum;
    } else if (p.partials_D_or_bias && part == 0) {
      static_cast<float*>(p.partials_D_or_bias)[row] = sum;
    }
  });
}

// Computes partial sums of the gradients of the taps, of D or the bias, and of C.
template <typename Stencil, typename Input, typename Activation, bool kOutputEquation>
__global__ void __launch_bounds__(kMaxThreads, 3) tiled_gradients(const Params p) {
  const Plan& plan = p.plan;
  const Block block(p);
  Activation* const grad_tile = shared_at<Activation>(plan.grad);

#pragma unroll 1
  for (int round = 0; round < plan.rounds; ++round) {
    const Set set(p, block, round);
    if (set.count <= 0) break;
    const bool last_round = round + 1 == plan.rounds || set.channel + set.count == p.channels;
    const Thread me(plan, set);
    const int channel = set.channel + me.position.plane;
    float taps[Stencil::kPartTaps] = {}, D_or_bias = 0;

#pragma unroll 1
    for (int n = 0; n < p.states; ++n) {
      load_input<Input>(p, block, set, n);
      if (!kOutputEquation || n == 0) load_tile(p, block, p.grad, set.channel, set.count, n, grad_tile);
      if constexpr (kOutputEquation) {
        if (n == 0) load_tile(p, block, p.x, set.channel, set.count, 0, shared_at<Activation>(plan.x));
        if (p.states > 1 || round == 0) load_tile(p, block, p.C, 0, 1, n, shared_at<Activation>(plan.C));
      }
      wait_for_copies();
      __syncthreads();

      Square grad;
      read_grad<kOutputEquation>(p, block, me, n, grad_tile, grad, D_or_bias);
      const Window<Input, Stencil::kReach> window(p, block, me);
#pragma unroll 1
      for (int part = 0; part < Stencil::kParts; ++part) {
        correlate<Stencil>(window, Stencil::part_row(part), grad, taps);
        if (n + 1 < p.states) continue;  // only the fusion has several states, and it has one part
        if (kOutputEquation) __syncthreads();  // x has been read, so the threads' sums may replace it
        store_partials<Stencil>(p, block, set, me, part, taps, D_or_bias);
        if (part + 1 < Stencil::kParts) __syncthreads();
      }

      if constexpr (kOutputEquation) {
        float* const products = shared_at<float>(plan.products);
        float weights[Stencil::kPartTaps];
        load_weights<Stencil, Activation, false>(p, opaque(channel), 0, weights);
        Square fused = {};
        convolve<Stencil, false, Activation>(p, channel, window.again(), weights, fused);
        __syncthreads();
        if (me.mine) {
          for_each_pixel(plan, [&](int i, int j, int k) {
            products[me.first_pixel + k] = fused[i][j] * widen(grad_tile[me.first_pixel + k]);
          });
        }
        __syncthreads();
        sum_planes(p, block, products, set.count, n, round == 0, last_round);
      }
      __syncthreads();
    }
  }
}

}  // namespace dwconv2d
