// The kernels' parameters: sizes, strided views, and how the rows are divided among blocks and threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "types.h"

namespace selective_scan {

using namespace gpu;

// A tensor with strides in elements. Dimensions that it does not have, and dimensions of size 1, have stride 0.
struct View {
  const void* data = nullptr;
  int64_t batch = 0, channel = 0, state = 0, token = 0;  // for B, `channel` is the group
  // How a tile is loaded: with lanes along rows instead of tokens, and with 16 bytes at once.
  bool along_rows = false, wide = false;
};

// A row is one channel of one image. A block works on `rows` rows of one (image, group). `threads_per_row` threads hold
// a row, with `items` consecutive tokens each; a block processes longer rows in `chunks`. A block may process several
// such sets of rows, in `rounds`.
struct Plan {
  int items = 0, rows = 0, threads_per_row = 0, threads = 0, rounds = 1, channels_per_group = 0;
  int sets = 0, row_blocks = 0;  // sets of rows, and blocks, per (image, group)
  int chunks = 1;
  bool flat = false;  // every tile of u, delta, grad and the outputs is one run of memory in units of 16 bytes
  Divisor by_threads_per_row, by_row_blocks, by_groups;

  constexpr int chunk_tokens() const { return threads_per_row * items; }
};

struct Params {
  int64_t batch = 0;
  int channels = 0, states = 0, length = 0, groups = 0;
  bool softplus = false, A_is_log = false;  // if A_is_log, the rates are -exp(A)
  View u, delta, A, B, bias, grad;  // bias.data is null without a bias, grad.data in the forward pass
  // Forward: the states (B, D, N, L), or null if only `boundaries` are wanted.
  void* h = nullptr;
  // (B, D, N, chunks), if a row of the backward pass has several chunks. Slot c has the h that enters chunk c. After
  // the backward pass has visited chunk c, it has the mu that leaves it to the left: mu_t = a_t lambda_t is what token t
  // passes to token t - 1. Slot 0 is not used.
  void* boundaries = nullptr;
  void *grad_u = nullptr, *grad_delta = nullptr;  // (B, D, L)
  // Partial sums of the other gradients, still to be summed over images or row blocks.
  void* partials_A = nullptr;     // (B, D, N)
  void* partials_bias = nullptr;  // (B, D)
  void* partials_B = nullptr;     // (B, G, row_blocks, N, L)
  Plan plan;

  int64_t blocks() const { return batch * groups * plan.row_blocks; }
};

constexpr int kMaxThreads = 224;
constexpr int kManyItems = 14, kFewItems = 7;  // 3136 = 224 * 14, 784 = 56 * 14, 196 = 14 * 14, 49 = 7 * 7

// Whether a kernel is for one state alone. Only a kernel of few items, not flat, takes several states.
constexpr bool one_state_kernel(int items, bool flat) { return items == kManyItems || flat; }

// 14 items leave no registers for a loop over states, and neither do items of double precision.
inline int best_items(const Params& p, Dtype dtype) {
  const bool many = p.states == 1 && dtype != Dtype::kDouble;
  return many && (p.length % kManyItems == 0 || p.length > 16 * kFewItems) ? kManyItems : kFewItems;
}

// The fewest rows with which lanes along channels use whole 32-byte sectors, or 1 if lanes run along tokens.
inline int rows_per_sector(const Params& p, Dtype dtype) {
  const auto by_channel = [](const View& view) { return view.channel == 1 && view.token != 1; };
  const bool channels_last = by_channel(p.u) && by_channel(p.delta);
  return channels_last ? std::min(32 / size_of(dtype), p.channels / p.groups) : 1;
}

// The number of rows that leaves the fewest idle lanes in all blocks of one group.
inline int best_rows(int threads_per_row, int channels, int multiple) {
  const int most = std::max(std::min(kMaxThreads / threads_per_row, channels), multiple);
  int best = multiple;
  int64_t least = INT64_MAX;
  for (int rows = multiple; rows <= most; rows += multiple) {
    const int64_t warps = int64_t(ceil_div(channels, rows)) * ceil_div(rows * threads_per_row, kWarp);
    if (warps <= least) {
      best = rows;
      least = warps;
    }
  }
  return best;
}

// A power of two, at most `most`, and so small that there are enough blocks for the largest GPUs.
inline int best_rounds(const Params& p, const Plan& plan, int most) {
  int rounds = 1;
  while (2 * rounds <= std::min(most, plan.sets) && p.batch * p.groups * plan.sets >= 2048 * rounds) rounds *= 2;
  return rounds;
}

inline void set_rounds(Plan& plan, int rounds) {
  plan.rounds = rounds;
  plan.row_blocks = ceil_div(plan.sets, rounds);
  plan.by_row_blocks = Divisor(plan.row_blocks);
}

// Whether every load of a view starts at a multiple of 16 bytes, which are `unit` elements. Loads of one state start
// `channel_step` channels apart.
inline bool starts_at_units(const View& view, int unit, int64_t channel_step) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.batch % unit == 0 && view.state % unit == 0 &&
         view.channel * channel_step % unit == 0;
}

// Whether `Plan::flat` holds. The outputs are new allocations, so they need no check. There must be one state.
inline bool is_flat(const Params& p, const Plan& plan, Dtype dtype) {
  const int unit = 16 / size_of(dtype);
  const bool one_row = plan.rows == 1;
  const bool whole_row = p.length % unit == 0 && plan.chunk_tokens() % unit == 0;
  const bool whole_set = plan.chunk_tokens() == p.length && plan.channels_per_group % plan.rows == 0 &&
                         plan.rows * p.length % unit == 0;
  const auto fits = [&](const View& view) {
    return view.token == 1 && (one_row || view.channel == p.length) && starts_at_units(view, unit, plan.rows);
  };
  return p.states == 1 && dtype != Dtype::kDouble && (one_row ? whole_row : whole_set) && fits(p.u) && fits(p.delta) &&
         (p.grad.data == nullptr || fits(p.grad));
}

inline void choose_access(View& view, int size, int rows, int tokens, const Plan& plan) {
  const int unit = 16 / size;
  view.along_rows = rows > 1 && view.channel < view.token;
  // Along rows, loads start at multiples of `rows` channels within a group. `whole_units` checks `rows`, so only the
  // starts of groups remain.
  const int64_t channel_step = view.along_rows ? plan.channels_per_group : 1;
  const int64_t chunk_step = plan.chunks > 1 ? plan.chunk_tokens() * view.token : 0;
  const bool starts = starts_at_units(view, unit, channel_step) && chunk_step % unit == 0;
  const bool wide_along_tokens = view.token == 1 && (rows == 1 || plan.chunk_tokens() % unit == 0) && tokens >= unit;
  const bool whole_units = rows % unit == 0 && channel_step % unit == 0;
  const bool wide_along_rows = view.channel == 1 && view.token % unit == 0 && whole_units;
  view.wide = starts && (view.along_rows ? wide_along_rows : wide_along_tokens);
}

// Chooses p.plan and how p.u, p.delta, p.B and p.grad are loaded.
inline void make_plan(Params& p, Dtype dtype, bool backward) {
  Plan& plan = p.plan;
  plan = Plan();
  plan.channels_per_group = p.channels / p.groups;
  plan.items = best_items(p, dtype);

  const int multiple = rows_per_sector(p, dtype);
  const int most_threads = kMaxThreads / multiple;
  plan.chunks = ceil_div(p.length, most_threads * plan.items);
  plan.threads_per_row = ceil_div(ceil_div(p.length, plan.chunks), plan.items);
  if (plan.chunks > 1) {
    // Chunks start at a multiple of 16 bytes if lanes along tokens load 16 bytes at once.
    const int whole = multiple > 1 ? 2 : 8;
    plan.threads_per_row = std::min(most_threads, ceil_div(plan.threads_per_row, whole) * whole);
    plan.chunks = ceil_div(p.length, plan.chunk_tokens());
    plan.rows = multiple;
  } else {
    plan.rows = best_rows(plan.threads_per_row, plan.channels_per_group, multiple);
  }
  plan.threads = ceil_div(plan.rows * plan.threads_per_row, kWarp) * kWarp;
  plan.sets = ceil_div(plan.channels_per_group, plan.rows);
  plan.flat = is_flat(p, plan, dtype);
  // In the forward pass, a block's first instructions and B's tile serve several rounds. In the backward pass,
  // several rounds also share the block's sum for B's gradient, so that fewer sums are written.
  const int most_rounds = backward ? std::max(1, 8 / plan.rows) : 4;
  set_rounds(plan, one_state_kernel(plan.items, plan.flat) ? best_rounds(p, plan, most_rounds) : 1);

  plan.by_threads_per_row = Divisor(plan.threads_per_row);
  plan.by_groups = Divisor(p.groups);
  for (View* view : {&p.u, &p.delta}) choose_access(*view, size_of(dtype), plan.rows, p.length, plan);
  choose_access(p.grad, std::max(4, size_of(dtype)), plan.rows, p.length, plan);
  choose_access(p.B, size_of(dtype), 1, p.length, plan);
}

// The forward pass before a backward pass, over the same chunks. It computes the states that enter them.
inline Params boundary_pass(Params p) {
  set_rounds(p.plan, 1);
  p.h = nullptr;
  return p;
}

}  // namespace selective_scan
