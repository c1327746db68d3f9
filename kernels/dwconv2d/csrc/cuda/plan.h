// The kernels' parameters: sizes, planes in memory, and how planes are divided among blocks and threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "types.h"

namespace dwconv2d {

using namespace gpu;

enum class Operation { kFusion, kOutputEquation, kConv };

// The backward pass has two: kAdjoint computes the gradients of the input and x, and kGradients those of the taps, of D
// or the bias, and of C.
enum class Pass { kForward, kAdjoint, kGradients };

// What is contiguous in a block's part of a tensor: each row, each plane, or all planes together.
enum class Run { kRow, kPlane, kPlanes };

// A tensor of contiguous planes. The strides between planes are in elements, and 0 for a dimension that the tensor does
// not have.
struct Planes {
  const void* data = nullptr;
  int64_t batch = 0, channel = 0, state = 0;
  Run run = Run::kRow;
  int move = 1;  // elements to move at once
};

constexpr int kUnit = 7;  // a thread owns 7 rows of 7 pixels; 7 divides 56, 28, 14 and 7
constexpr int kFusionTaps = 25, kFusionReach = 5;  // of the dilations 1, 3 and 5; `FusionStencil` places them
constexpr int kMaxThreads = 128;
constexpr int kMaxColumnUnits = 16;                              // in a tile
constexpr int kMuchShared = 48 * 1024, kMostShared = 64 * 1024;  // bytes per block: preferred and hard limit

// Rows or columns of a plane, which are divided into tiles, and each tile into units. The last tile ends with the
// plane, and the last unit ends with its tile. So all are whole, and some positions are in two.
struct Axis {
  int size = 0, tile = 0, tiles = 1, units = 0;

  constexpr int start(int k) const { return k < tiles - 1 ? k * tile : size - tile; }
  constexpr int first(int unit) const { return unit < units - 1 ? unit * kUnit : tile - kUnit; }
  // The first position that is in no earlier tile or unit.
  constexpr int owned(int k, int unit) const {
    const int by_tile = k * tile, by_unit = start(k) + unit * kUnit;
    return by_tile > by_unit ? by_tile : by_unit;
  }
};

// A thread's plane in its block, and its units in that plane's tile.
struct Position {
  int plane, row_unit, column_unit;
};

// A block works on one tile of `planes` planes, which are consecutive channels of one image. `threads_per_plane`
// threads hold a plane. For the gradients, a block may process several such sets of planes, in `rounds`.
struct Plan {
  bool tiled = false;  // otherwise, a thread computes each result from global memory
  Axis rows, columns;
  int reach = 0;  // of the taps
  int planes = 0, threads_per_plane = 0, threads = 0;
  int sets = 0, rounds = 1;  // of planes: sets per tile of an image, and rounds of a block
  int channel_blocks = 0;    // blocks per tile of an image, or without tiles partial sums of C's gradient per pixel
  // In shared memory, convolved planes have `frame` rows of zeros, 0 or 1, above and below; reads beyond are clamped. Their first column is at a multiple
  // of `alignment`, after at least `frame` columns of zeros.
  int frame = 0, alignment = 1, pitch = 0, plane_pitch = 0;
  bool row_units_outermost = false;  // in the order of threads; otherwise planes are
  // Byte offsets in shared memory. It starts with the convolved planes, which results or products for C's gradient
  // replace. `grad` comes after them, so it is also their size.
  static constexpr int convolved = 0, results = 0, products = 0;
  int grad = 0, x = 0, C = 0, sums = 0, thread_sums = 0, shared = 0;
  Divisor by_column_units, by_planes, by_row_units, by_channel_blocks;
  Divisor by_tiles, by_tile_columns, by_tile_pixels, by_columns;

  constexpr int tiles() const { return rows.tiles * columns.tiles; }
  constexpr int tile_pixels() const { return rows.tile * columns.tile; }
  constexpr Position position(int thread) const {
    const int outer = by_column_units.divide(thread), column_unit = thread - outer * columns.units;
    const int outermost = row_units_outermost ? by_planes.divide(outer) : by_row_units.divide(outer);
    const int middle = outer - outermost * (row_units_outermost ? planes : rows.units);
    return row_units_outermost ? Position{middle, outermost, column_unit} : Position{outermost, middle, column_unit};
  }
};

struct Params {
  Operation operation = Operation::kFusion;
  // Of x and C, of h for the fusion alone, or of all tensors of a convolution. States are double if it is, else float.
  Dtype dtype = Dtype::kFloat;
  int64_t batch = 0;
  int channels = 0, states = 1, height = 0, width = 0;
  int kernel_height = 0, kernel_width = 0, dilation = 1;  // of the convolution
  bool zeros = false;                                     // its padding, instead of replicated borders
  // `input` is convolved, and `grad` is the gradient of the result. Only the output equation has C and x.
  Planes input, grad, C, x;
  // Contiguous parameters: the fusion's kernels by dilation, or the convolution's kernel. Missing ones are null.
  const void *weights[3] = {}, *alpha = nullptr, *D = nullptr, *bias = nullptr;
  Planes result, grad_input, grad_x;
  // Partial sums of the other gradients, still to be summed over slices of images or over channel blocks.
  // `partials_D_or_bias` is null without either.
  void *partials_taps = nullptr, *partials_D_or_bias = nullptr;  // (B, slices, D, taps) and (B, slices, D)
  void* partials_C = nullptr;                                    // (B, channel blocks, N, H, W)
  int slices = 1;  // of an image: its tiles, or without tiles runs of kSlice positions
  Plan plan;

  constexpr bool has_output_equation() const { return operation == Operation::kOutputEquation; }
  constexpr int taps() const { return operation == Operation::kConv ? kernel_height * kernel_width : kFusionTaps; }
  constexpr int64_t pixels() const { return int64_t(height) * width; }
  // With tiles: bytes of an element of the input, and of the planes that a pass convolves. The adjoint convolves grad,
  // or grad C_n, in float.
  int input_bytes() const { return operation == Operation::kConv ? size_of(dtype) : 4; }
  int convolved_bytes(Pass pass) const { return pass == Pass::kAdjoint ? 4 : input_bytes(); }
  constexpr int64_t blocks() const { return batch * plan.tiles() * plan.channel_blocks; }
};

// ----- which kernels

// Whether there is a kernel for tiles. There are kernels for float states, for the fusion's taps and for square kernels
// of these sizes.
inline bool has_tiles(const Params& p) {
  const int k = p.kernel_height;
  const bool square = k == p.kernel_width && (k == 3 || k == 5 || k == 7 || k == 11) && p.dilation == 1;
  return p.dtype != Dtype::kDouble && std::min(p.height, p.width) >= kUnit &&
         (p.operation != Operation::kConv || square);
}

// The number of taps whose weights a thread holds at a time: one row of a large kernel, or all taps of others.
constexpr int kLargestWhole = 5;
inline int taps_at_once(const Params& p) {
  return p.operation == Operation::kConv && p.kernel_height > kLargestWhole ? p.kernel_width : p.taps();
}

// ----- how planes are moved

// Elements in 16 bytes, elements in 4 bytes, or 1: the largest that divides all offsets. It need not divide the offsets
// of single planes in a run of planes.
inline int widest_move(const Planes& planes, int size, std::initializer_list<int64_t> lengths) {
  int64_t bits = reinterpret_cast<uintptr_t>(planes.data) / size | planes.batch | planes.state;
  if (planes.run != Run::kPlanes) bits |= planes.channel;
  for (int64_t length : lengths) bits |= length;
  for (int move : {16 / size, 4 / size}) {
    if (bits % move == 0) return move;
  }
  return 1;
}

// For planes that have the same layout in shared memory as in global memory, row after row. A block has `count` planes.
inline void choose_access(Planes& planes, int size, int count, const Params& p) {
  if (p.plan.tiles() > 1) {
    planes.run = Run::kRow;
    const Axis& columns = p.plan.columns;
    planes.move = widest_move(planes, size, {p.width, columns.tile, columns.start(columns.tiles - 1)});
  } else if (count > 1 && planes.channel == p.pixels()) {
    planes.run = Run::kPlanes;
    planes.move = widest_move(planes, size, {count * p.pixels(), p.channels % count * p.pixels()});
  } else {
    planes.run = Run::kPlane;
    planes.move = widest_move(planes, size, {p.pixels()});
  }
}

// ----- the plan

inline Axis split(int size, int most_units) {
  Axis axis;
  axis.size = size;
  axis.units = ceil_div(size, kUnit);
  const int tiles = ceil_div(axis.units, most_units);
  axis.units = ceil_div(axis.units, tiles);
  axis.tile = tiles == 1 ? size : axis.units * kUnit;
  axis.tiles = ceil_div(size, axis.tile);
  return axis;
}

// Rows or columns of shared memory that hold any tile and its surroundings.
inline int extent(const Axis& axis, const Plan& plan, int alignment) {
  const int most = ceil_div(axis.tile + 2 * plan.reach + alignment - 1, alignment) * alignment;
  return axis.tiles == 1 ? axis.size + 2 * plan.frame * alignment : most;
}

inline int padded_to_16(int64_t bytes) { return int(ceil_div<int64_t>(bytes, 16) * 16); }

inline void lay_out(Plan& plan, const Params& p, Pass pass) {
  const int activation_bytes = size_of(p.dtype), input_bytes = p.input_bytes();
  const bool equation = p.has_output_equation(), gradients = pass == Pass::kGradients;
  const int64_t planes = plan.planes, pixels = plan.tile_pixels();
  plan.threads = ceil_div(plan.planes * plan.threads_per_plane, kWarp) * kWarp;

  // Results replace the convolved planes, or x.
  const int64_t convolved = planes * plan.plane_pitch * p.convolved_bytes(pass);
  const int64_t grad = gradients ? planes * pixels * activation_bytes : 0;
  const int64_t x = equation && pass != Pass::kAdjoint ? planes * pixels * activation_bytes : 0;
  const int64_t C = equation && pass != Pass::kAdjoint ? pixels * activation_bytes : 0;
  // In the forward pass, each thread's sums over states; for the gradients, sums over channels.
  const bool sums_over_states = equation && p.states > 1 && pass == Pass::kForward;
  const int64_t forward_sums = sums_over_states ? kUnit * kUnit * plan.threads * 4 : 0;
  const int64_t sums = plan.rounds > 1 ? pixels * 4 : forward_sums;
  const int64_t thread_sums = gradients ? (taps_at_once(p) + 1) * plan.threads * 4 : 0;

  plan.grad = padded_to_16(std::max(convolved, planes * pixels * input_bytes));
  plan.C = plan.grad + padded_to_16(grad);
  plan.sums = plan.C + padded_to_16(C);
  plan.x = plan.thread_sums = plan.sums + padded_to_16(sums);  // which replace x when it is no longer needed
  plan.shared = plan.x + padded_to_16(std::max(x, thread_sums));
}

// Sets pitches without padding.
inline void pack(Plan& plan) {
  plan.pitch = extent(plan.columns, plan, plan.alignment);
  plan.plane_pitch = extent(plan.rows, plan, 1) * plan.pitch;
}

// The plane, row and column at which the lanes of a block's first warp begin to read.
struct Lanes {
  int count = 0, planes[kWarp], rows[kWarp], columns[kWarp];

  explicit Lanes(const Plan& plan) : count(std::min(kWarp, plan.planes * plan.threads_per_plane)) {
    for (int lane = 0; lane < count; ++lane) {
      const Position position = plan.position(lane);
      planes[lane] = position.plane;
      rows[lane] = plan.rows.first(position.row_unit);
      columns[lane] = plan.columns.first(position.column_unit);
    }
  }

  // The most lanes that read from one bank of shared memory, among all lanes or those in the first plane.
  int conflicts(const Plan& plan, int size, bool all) const {
    int words[kWarp] = {}, before = -1, most = 0;
    for (int lane = 0; lane < count; ++lane) {
      if (!all && planes[lane] > 0) continue;
      const int word = (planes[lane] * plan.plane_pitch + rows[lane] * plan.pitch + columns[lane]) * size / 4;
      if (word != before) most = std::max(most, ++words[word % kWarp]);
      before = word;
    }
    return most;
  }
};

// Pads rows, then planes, so that fewer lanes read from the same bank.
inline void spread_over_banks(Params& p, Pass pass) {
  Plan& plan = p.plan;
  const int size = p.convolved_bytes(pass);
  const Lanes lanes(plan);
  const int rows = extent(plan.rows, plan, 1), pitch = plan.pitch;
  const auto search = [&](int most, bool planes) {
    Plan best = plan;
    int fewest = lanes.conflicts(plan, size, planes);
    for (int k = 1; k < most && fewest > 1; ++k) {
      Plan tried = plan;
      if (!planes) tried.pitch = pitch + k * plan.alignment;
      tried.plane_pitch = rows * tried.pitch + (planes ? k * plan.alignment : 0);
      lay_out(tried, p, pass);
      const int found = lanes.conflicts(tried, size, planes);
      if (found < fewest && tried.shared <= kMostShared) {
        best = tried;
        fewest = found;
      }
    }
    plan = best;
  };
  search(16, /*planes=*/false);
  if (plan.planes > 1) search(kWarp, /*planes=*/true);
}

// A power of two, at most 8, and so small that there are enough blocks for the largest GPUs.
inline int best_rounds(const Params& p) {
  const Plan& plan = p.plan;
  if (!p.has_output_equation() || p.states > 1) return 1;
  int rounds = 1;
  while (2 * rounds <= std::min(8, plan.sets) && p.batch * plan.tiles() * plan.sets >= 2048 * rounds) rounds *= 2;
  return rounds;
}

inline void set_rounds(Params& p, int rounds) {
  p.plan.rounds = rounds;
  lay_out(p.plan, p, Pass::kGradients);
  // `make_plan` has found room for one round. If it found none, the launch fails: to try one round again would not end.
  if (rounds > 1 && p.plan.shared > kMostShared) set_rounds(p, 1);
}

// Chooses how the input is loaded into shared memory.
inline void choose_input(Params& p) {
  const int bytes = p.input_bytes();
  if (p.plan.frame == 0 && p.plan.tiles() == 1) {
    choose_access(p.input, bytes, p.plan.planes, p);
    p.plan.alignment = 1;
  } else {
    p.input.run = Run::kRow;
    p.plan.alignment = p.input.move = widest_move(p.input, bytes, {p.width});
  }
}

// Chooses how the adjoint loads the result's gradient into shared memory. For the output equation, the same loop reads
// C and writes x's gradient, so all three move as many elements at once.
inline void choose_grad(Params& p) {
  const int bytes = size_of(p.dtype);
  p.plan.alignment = 1;
  choose_access(p.grad, bytes, p.plan.planes, p);
  if (p.has_output_equation()) choose_access(p.grad_x, bytes, p.plan.planes, p);
  const bool alike = !p.has_output_equation() || (p.grad_x.run == p.grad.run && p.grad_x.move == p.grad.move);
  if (alike && p.grad.run == Run::kPlanes && p.grad.move == 16 / bytes) return;  // `load_grad_run`

  // A region begins and ends at any column of its plane if there are several tiles side by side.
  const int64_t columns = p.plan.columns.tiles == 1 ? p.width : 1;
  p.grad.run = p.grad_x.run = Run::kRow;
  p.grad.move = widest_move(p.grad, bytes, {columns});
  for (const Planes* planes : {&p.C, &p.grad_x}) {
    if (p.has_output_equation()) p.grad.move = std::min(p.grad.move, widest_move(*planes, bytes, {columns}));
  }
}

// Chooses as many planes as there are threads for, or fewer if they take too much shared memory. The sets are as equal
// as possible.
inline void choose_planes(Params& p, Pass pass) {
  Plan& plan = p.plan;
  const int most = plan.tiles() == 1 ? std::min(kMaxThreads / plan.threads_per_plane, p.channels) : 1;
  for (int planes = most;; planes = ceil_div(planes, 2)) {
    plan.sets = ceil_div(p.channels, planes);
    plan.planes = ceil_div(p.channels, plan.sets);
    pass == Pass::kAdjoint ? choose_grad(p) : choose_input(p);
    pack(plan);
    lay_out(plan, p, pass);
    if (planes == 1 || plan.shared <= kMuchShared) return;
  }
}

// Without tiles, one thread sums over kSlice positions for a tap's gradient, or over kChannelBlock channels for C's.
constexpr int kSlice = 512, kChannelBlock = 32;

// Chooses p.plan, p.slices, and how planes are moved.
inline void make_plan(Params& p, Pass pass) {
  Plan& plan = p.plan;
  plan = Plan();
  p.slices = int(ceil_div<int64_t>(p.pixels(), kSlice));
  plan.channel_blocks = ceil_div(p.channels, kChannelBlock);
  plan.tiled = has_tiles(p);
  if (!plan.tiled) return;

  plan.reach = p.operation == Operation::kConv ? p.kernel_height / 2 : kFusionReach;
  plan.frame = pass == Pass::kAdjoint || p.zeros;
  plan.row_units_outermost = pass == Pass::kAdjoint;
  plan.columns = split(p.width, kMaxColumnUnits);
  for (int row_units = kMaxThreads / plan.columns.units; row_units > 0; --row_units) {
    plan.rows = split(p.height, row_units);
    plan.threads_per_plane = plan.rows.units * plan.columns.units;
    choose_planes(p, pass);
    if (plan.shared <= kMostShared) break;
  }
  plan.by_column_units = Divisor(plan.columns.units);
  plan.by_planes = Divisor(plan.planes);
  plan.by_row_units = Divisor(plan.rows.units);
  const bool as_in_memory = pass != Pass::kAdjoint && p.input.run != Run::kRow;
  if (!as_in_memory) spread_over_banks(p, pass);

  if (pass == Pass::kGradients) set_rounds(p, best_rounds(p));
  plan.channel_blocks = ceil_div(plan.sets, plan.rounds);
  plan.by_channel_blocks = Divisor(plan.channel_blocks);
  plan.by_tiles = Divisor(plan.tiles());
  plan.by_tile_columns = Divisor(plan.columns.tiles);
  plan.by_tile_pixels = Divisor(plan.tile_pixels());
  plan.by_columns = Divisor(plan.columns.tile);
  if (pass != Pass::kAdjoint) {
    const int bytes = size_of(p.dtype);
    choose_access(p.x, bytes, plan.planes, p);
    choose_access(p.grad, bytes, plan.planes, p);
    choose_access(p.result, p.operation == Operation::kFusion ? p.input_bytes() : bytes, plan.planes, p);
    choose_access(p.C, bytes, 1, p);
  }
  choose_access(p.grad_input, p.input_bytes(), plan.planes, p);
  if (pass == Pass::kGradients) p.slices = plan.tiles();
}

}  // namespace dwconv2d
