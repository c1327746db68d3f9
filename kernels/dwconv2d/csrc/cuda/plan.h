// The kernels' parameters: sizes, planes in memory, and how planes are divided among blocks and threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "types.h"

namespace dwconv2d {

using namespace gpu;

enum class Operation { kFusion, kOutput, kConv };
enum class Pass { kForward, kAdjoint, kGradients };

// The unit that is contiguous in a block's part of a tensor.
enum class Run { kRow, kPlane, kPlanes };

// A tensor of contiguous planes. The strides between planes are in elements, and 0 for a dimension that the tensor does
// not have.
struct Planes {
  const void* data = nullptr;
  int64_t batch = 0, channel = 0, state = 0;
  Run run = Run::kRow;
  int width = 1;  // elements to move at once
};

constexpr int kUnit = 7;  // a thread's outputs are 7 rows of 7 columns; 7 divides 56, 28, 14 and 7
constexpr int kMaxThreads = 128;
constexpr int kMaxGroups = 16;                                   // units of columns in a tile
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

// A thread's place in its block.
struct Place {
  int plane, strip, group;  // strip: unit of rows; group: unit of columns
};

// A block works on one tile of `planes` planes, which are consecutive channels of one image. `threads_per_plane`
// threads hold a plane. For the gradients, a block may process several such sets of planes, in `passes`.
struct Plan {
  bool tiled = false;  // otherwise, a thread computes each result from global memory
  Axis rows, columns;
  int reach = 0;  // of the taps
  int planes = 0, threads_per_plane = 0, threads = 0;
  int sets = 0, passes = 1, channel_blocks = 0;  // sets of planes, and blocks, per tile of an image
  // In shared memory, convolved planes have `frame` rows of zeros above and below. Their first column is at a multiple
  // of `unit`, after at least `frame` columns of zeros.
  int frame = 0, unit = 1, pitch = 0, plane_pitch = 0;
  bool strips_outermost = false;  // thread order: strip, plane, group; otherwise plane, strip, group
  // Byte offsets in shared memory. It starts with the convolved planes, products for the gradients, or results.
  int grad = 0, x = 0, C = 0, sums = 0, parts = 0, shared = 0;
  Divisor by_groups, by_planes, by_strips, by_channel_blocks, by_tiles, by_tile_columns, by_outputs, by_columns;

  constexpr int tiles() const { return rows.tiles * columns.tiles; }
  constexpr int outputs() const { return rows.tile * columns.tile; }
  constexpr Place place(int thread) const {
    const int outer = by_groups.divide(thread), group = thread - outer * columns.units;
    const int outermost = strips_outermost ? by_planes.divide(outer) : by_strips.divide(outer);
    const int middle = outer - outermost * (strips_outermost ? planes : rows.units);
    return strips_outermost ? Place{middle, outermost, group} : Place{outermost, middle, group};
  }
};

struct Params {
  Operation operation = Operation::kFusion;
  Dtype dtype = Dtype::kFloat;  // of x and C, or of all convolution tensors; states are double if it is, else float
  int64_t batch = 0;
  int channels = 0, states = 1, height = 0, width = 0;
  int kernel_height = 0, kernel_width = 0, dilation = 1;  // of the convolution
  bool zeros = false;                                     // its padding, instead of replicated borders
  // `input` is convolved, and `grad` is the gradient of the result. Only the fusion with output has C and x.
  Planes input, grad, C, x;
  // Contiguous parameters: the fusion's kernels by dilation, or the convolution's kernel. Missing ones are null.
  const void *kernels[3] = {}, *alpha = nullptr, *D = nullptr, *bias = nullptr;
  Planes result, grad_input, grad_x;
  // Terms of the other gradients, still to be summed over slices of images or over channel blocks. `terms_other` is for
  // D or the bias, or null without either.
  void *terms_taps = nullptr, *terms_other = nullptr;  // (B, slices, D, taps) and (B, slices, D)
  void* terms_C = nullptr;                             // (B, channel blocks, N, H, W)
  int slices = 1;
  Plan plan;

  constexpr bool has_output() const { return operation == Operation::kOutput; }
  constexpr int taps() const { return operation == Operation::kConv ? kernel_height * kernel_width : 25; }
  constexpr int64_t pixels() const { return int64_t(height) * width; }
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
inline int width_of(const Planes& planes, int size, std::initializer_list<int64_t> lengths) {
  int64_t bits = reinterpret_cast<uintptr_t>(planes.data) / size | planes.batch | planes.state;
  if (planes.run != Run::kPlanes) bits |= planes.channel;
  for (int64_t length : lengths) bits |= length;
  for (int width : {16 / size, 4 / size}) {
    if (bits % width == 0) return width;
  }
  return 1;
}

// For planes that have the same layout in shared memory as in global memory, row after row. A block has `count` planes.
inline void choose_access(Planes& planes, int size, int count, const Params& p, const Plan& plan) {
  if (plan.tiles() > 1) {
    planes.run = Run::kRow;
    const Axis& columns = plan.columns;
    planes.width = width_of(planes, size, {p.width, columns.tile, columns.start(columns.tiles - 1)});
  } else if (count > 1 && planes.channel == p.pixels()) {
    planes.run = Run::kPlanes;
    planes.width = width_of(planes, size, {count * p.pixels(), p.channels % count * p.pixels()});
  } else {
    planes.run = Run::kPlane;
    planes.width = width_of(planes, size, {p.pixels()});
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
inline int extent(const Axis& axis, const Plan& plan, int unit) {
  const int most = ceil_div(axis.tile + 2 * plan.reach + unit - 1, unit) * unit;
  return axis.tiles == 1 ? axis.size + 2 * plan.frame * unit : most;
}

inline int padded_to_16(int64_t bytes) { return int(ceil_div<int64_t>(bytes, 16) * 16); }

inline void lay_out(Plan& plan, const Params& p, Pass pass) {
  const int input = size_of(p.dtype), element = p.operation == Operation::kConv ? input : 4;
  const bool output = p.has_output(), gradients = pass == Pass::kGradients;
  const int64_t planes = plan.planes, outputs = plan.outputs();
  plan.threads = ceil_div(plan.planes * plan.threads_per_plane, kWarp) * kWarp;

  // Results replace the convolved planes, or x.
  const int64_t convolved = planes * plan.plane_pitch * (pass == Pass::kAdjoint ? 4 : element);
  const int64_t grad = gradients ? planes * outputs * input : 0;
  const int64_t x = output && pass != Pass::kAdjoint ? planes * outputs * input : 0;
  const int64_t C = output && pass != Pass::kAdjoint ? outputs * input : 0;
  // In the forward pass, each thread's sums over states; for the gradients, sums over channels.
  const int64_t forward_sums = output && p.states > 1 && pass == Pass::kForward ? kUnit * kUnit * plan.threads * 4 : 0;
  const int64_t sums = plan.passes > 1 ? outputs * 4 : forward_sums;
  const int64_t parts = gradients ? (taps_at_once(p) + 1) * plan.threads * 4 : 0;

  plan.grad = padded_to_16(std::max(convolved, planes * outputs * element));
  plan.C = plan.grad + padded_to_16(grad);
  plan.sums = plan.C + padded_to_16(C);
  plan.x = plan.parts = plan.sums + padded_to_16(sums);  // parts replace x when it is no longer needed
  plan.shared = plan.x + padded_to_16(std::max(x, parts));
}

// Sets pitches without padding.
inline void pack(Plan& plan) {
  plan.pitch = extent(plan.columns, plan, plan.unit);
  plan.plane_pitch = extent(plan.rows, plan, 1) * plan.pitch;
}

// The plane, row and column at which the lanes of a block's first warp begin to read.
struct Lanes {
  int count = 0, planes[kWarp], rows[kWarp], columns[kWarp];

  explicit Lanes(const Plan& plan) : count(std::min(kWarp, plan.planes * plan.threads_per_plane)) {
    for (int lane = 0; lane < count; ++lane) {
      const Place place = plan.place(lane);
      planes[lane] = place.plane;
      rows[lane] = plan.rows.first(place.strip);
      columns[lane] = plan.columns.first(place.group);
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
inline void spread_over_banks(Plan& plan, int size, const Params& p, Pass pass) {
  const Lanes lanes(plan);
  const int rows = extent(plan.rows, plan, 1), pitch = plan.pitch;
  const auto search = [&](int most, bool planes) {
    Plan best = plan;
    int fewest = lanes.conflicts(plan, size, planes);
    for (int k = 1; k < most && fewest > 1; ++k) {
      Plan tried = plan;
      if (!planes) tried.pitch = pitch + k * plan.unit;
      tried.plane_pitch = rows * tried.pitch + (planes ? k * plan.unit : 0);
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
inline int best_passes(const Params& p, const Plan& plan) {
  if (!p.has_output() || p.states > 1) return 1;
  int passes = 1;
  while (2 * passes <= std::min(8, plan.sets) && p.batch * plan.tiles() * plan.sets >= 2048 * passes) passes *= 2;
  return passes;
}

inline void set_passes(Plan& plan, const Params& p, int passes) {
  plan.passes = passes;
  lay_out(plan, p, Pass::kGradients);
  // `make_plan` has found room for one pass. If it found none, the launch fails. To try again would never end.
  if (passes > 1 && plan.shared > kMostShared) set_passes(plan, p, 1);
}

// Chooses how the input, or for the adjoint the result's gradient, is loaded into shared memory.
inline void choose_convolved(Params& p, Plan& plan, Pass pass, int size) {
  if (pass == Pass::kAdjoint) {
    const int64_t columns = plan.columns.tiles == 1 ? p.width : 1;
    const int bytes = size_of(p.dtype);
    plan.unit = 1;
    choose_access(p.grad, bytes, plan.planes, p, plan);
    if (p.has_output()) choose_access(p.grad_x, bytes, plan.planes, p, plan);
    const bool alike = !p.has_output() || (p.grad_x.run == p.grad.run && p.grad_x.width == p.grad.width);
    if (alike && p.grad.run == Run::kPlanes && p.grad.width == 16 / bytes) return;
    p.grad.run = p.grad_x.run = Run::kRow;
    p.grad.width = width_of(p.grad, bytes, {columns});
    for (const Planes* other : {&p.C, &p.grad_x}) {
      if (p.has_output()) p.grad.width = std::min(p.grad.width, width_of(*other, bytes, {columns}));
    }
  } else if (plan.frame == 0 && plan.tiles() == 1) {
    choose_access(p.input, size, plan.planes, p, plan);
    plan.unit = 1;
  } else {
    p.input.run = Run::kRow;
    plan.unit = p.input.width = width_of(p.input, size, {p.width});
  }
}

// Chooses as many planes as there are threads for, or fewer if they take too much shared memory. The sets are as equal
// as possible.
inline void choose_planes(Params& p, Plan& plan, Pass pass, int size) {
  const int most = plan.tiles() == 1 ? std::min(kMaxThreads / plan.threads_per_plane, p.channels) : 1;
  for (int planes = most;; planes = ceil_div(planes, 2)) {
    plan.sets = ceil_div(p.channels, planes);
    plan.planes = ceil_div(p.channels, plan.sets);
    choose_convolved(p, plan, pass, size);
    pack(plan);
    lay_out(plan, p, pass);
    if (planes == 1 || plan.shared <= kMuchShared) return;
  }
}

// Without tiles, one thread sums over kSlice positions for a tap's gradient, or over kChannelBlock channels for C's.
constexpr int kSlice = 512, kChannelBlock = 32;

// Chooses p.plan, p.slices, and how planes are moved.
inline void make_plan(Params& p, Pass pass) {
  Plan plan;
  p.slices = int(ceil_div<int64_t>(p.pixels(), kSlice));
  plan.channel_blocks = ceil_div(p.channels, kChannelBlock);
  plan.tiled = has_tiles(p);
  p.plan = plan;
  if (!plan.tiled) return;

  const bool conv = p.operation == Operation::kConv;
  const int input = size_of(p.dtype), element = conv ? input : 4, convolved = pass == Pass::kAdjoint ? 4 : element;
  plan.reach = conv ? p.kernel_height / 2 : 5;
  plan.frame = pass == Pass::kAdjoint || p.zeros;
  plan.strips_outermost = pass == Pass::kAdjoint;
  plan.columns = split(p.width, kMaxGroups);
  for (int strips = kMaxThreads / plan.columns.units; strips > 0; --strips) {
    plan.rows = split(p.height, strips);
    plan.threads_per_plane = plan.rows.units * plan.columns.units;
    choose_planes(p, plan, pass, convolved);
    if (plan.shared <= kMostShared) break;
  }
  plan.by_groups = Divisor(plan.columns.units);
  plan.by_planes = Divisor(plan.planes);
  plan.by_strips = Divisor(plan.rows.units);
  const bool as_in_memory = pass != Pass::kAdjoint && p.input.run != Run::kRow;
  if (!as_in_memory) spread_over_banks(plan, convolved, p, pass);

  if (pass == Pass::kGradients) set_passes(plan, p, best_passes(p, plan));
  plan.channel_blocks = ceil_div(plan.sets, plan.passes);
  plan.by_channel_blocks = Divisor(plan.channel_blocks);
  plan.by_tiles = Divisor(plan.tiles());
  plan.by_tile_columns = Divisor(plan.columns.tiles);
  plan.by_outputs = Divisor(plan.outputs());
  plan.by_columns = Divisor(plan.columns.tile);
  for (Planes* planes : {&p.x, &p.grad, &p.result}) {
    const bool of_states = planes == &p.result && p.operation == Operation::kFusion;
    if (pass != Pass::kAdjoint) choose_access(*planes, of_states ? element : input, plan.planes, p, plan);
  }
  choose_access(p.grad_input, element, plan.planes, p, plan);
  if (pass != Pass::kAdjoint) choose_access(p.C, input, 1, p, plan);
  if (pass == Pass::kGradients) p.slices = plan.tiles();
  p.plan = plan;
}

}  // namespace dwconv2d
