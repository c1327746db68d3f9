// The state scan and its gradient, in CUDA C++ that a host compiler also accepts (tests/kernels/cuda_emulation).
//
// Each thread owns `kItems` consecutive tokens of a row and reduces them to a step x -> value + 2^exponent x. Steps
// compose. A scan over them, by shuffles within a warp and through shared memory across warps, gives every thread the
// state that enters its tokens. Exponents are sums of dt A log2(e). So errors of decays are not multiplied along a row,
// and decays that underflow are ordinary zeros.
//
// A block's tile has the tokens of a chunk for each of its rows, row after row. So thread k owns the elements from
// k * kItems on, for every shape. With kItems of 7 or 14, these accesses have no bank conflicts.
#pragma once

#include <type_traits>

#include "elements.cuh"
#include "plan.h"

namespace selective_scan {

// ----- functions

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float exp2_of(float x) { return exp2_approx(x); }

// exp(x) for x <= 0, with a relative error of 2e-7 down to underflow. A first-order term corrects the rounding
// of x log2(e).
__device__ __forceinline__ float exp_of_negative(float x) {
  x = fmaxf(x, -104.0f);  // otherwise -inf would give inf - inf below
  const float power = x * float(kLog2e);
  const float y = exp2_approx(power);
  return fmaf(y, fmaf(power, -float(kLn2), x), y);
}
__device__ __forceinline__ double exp_of_negative(double x) { return exp(x); }

// log(1 + z) for 0 <= z <= 1, with a relative error of 1.4e-7: z times the minimax polynomial of log(1 + z) / z.
__device__ __forceinline__ float log1p_of(float z) {
  float y = 0.0052326940931379795f;
  y = fmaf(y, z, -0.029505237936973572f);
  y = fmaf(y, z, 0.07822595536708832f);
  y = fmaf(y, z, -0.13663245737552643f);
  y = fmaf(y, z, 0.19106006622314453f);
  y = fmaf(y, z, -0.2484298199415207f);
  y = fmaf(y, z, 0.3331909775733948f);
  y = fmaf(y, z, -0.4999949336051941f);
  y = fmaf(y, z, 0.9999999403953552f);
  return z * y;
}
__device__ __forceinline__ double log1p_of(double z) { return log1p(z); }

// A NaN passes through the first term.
template <typename State>
__device__ __forceinline__ State softplus(State s) {
  return max_or_nan(s, State(0)) + log1p_of(exp_of_negative(-fabs(s)));
}

template <typename State>
__device__ __forceinline__ State sigmoid(State s) {
  const State z = exp_of_negative(-fabs(s));
  return (s > 0 ? State(1) : z) * reciprocal(1 + z);
}

// ----- the positions of a thread and a block

struct Thread {
  int index, lane, warp;
  int row, position;  // row of the tile, and position among the threads of that row
  int per_row;
  int lanes_left, lanes_right;  // numbers of threads of the same row and warp on either side

  __device__ __forceinline__ explicit Thread(const Plan& plan) : index(threadIdx.x), per_row(plan.threads_per_row) {
    lane = index % kWarp;
    warp = index / kWarp;
    row = plan.by_threads_per_row.divide(index);
    position = index - row * per_row;
    lanes_left = min(lane, position);
    lanes_right = min(kWarp - 1 - lane, per_row - 1 - position);
  }
  __device__ __forceinline__ int first_warp() const { return (index - position) / kWarp; }
  __device__ __forceinline__ int last_warp() const { return (index - position + per_row - 1) / kWarp; }
};

// The rows of a block or of one of its rounds: consecutive channels of one group.
struct Rows {
  int batch, group, channel, count;

  __device__ __forceinline__ explicit Rows(const Params& p) {
    const int image_group = p.plan.by_row_blocks.divide(blockIdx.x);
    const int first = (blockIdx.x - image_group * p.plan.row_blocks) * p.plan.rounds * p.plan.rows;
    batch = p.plan.by_groups.divide(image_group);
    group = image_group - batch * p.groups;
    channel = group * p.plan.channels_per_group + first;
    count = min(p.plan.rounds * p.plan.rows, p.plan.channels_per_group - first);
  }
  __device__ __forceinline__ Rows of_round(const Params& p, int round) const {
    Rows rows = *this;
    rows.channel = channel + round * p.plan.rows;
    rows.count = min(p.plan.rows, count - round * p.plan.rows);
    return rows;
  }
};

// A block's current chunk, round and state in the forward pass, and the chunk's tokens. The forward pass is one loop
// over cursors instead of three loops, so that it can load the next cursor's inputs before it has stored its results.
struct Cursor {
  int chunk, round, state;
  int start, tokens;

  __device__ __forceinline__ Cursor(const Params& p, int chunk, int round, int state)
      : chunk(chunk), round(round), state(state), start(chunk * p.plan.chunk_tokens()) {
    tokens = min(p.plan.chunk_tokens(), p.length - start);
  }
  // At the next state, round or chunk.
  __device__ __forceinline__ Cursor next(const Params& p, const Rows& block, int states) const {
    Cursor next = *this;
    if (state + 1 < states) {
      next.state = state + 1;
    } else if ((round + 1) * p.plan.rows < block.count) {
      next.round = round + 1;
      next.state = 0;
    } else {
      next = Cursor(p, chunk + 1, 0, 0);
    }
    return next;
  }
};

template <typename T>
__device__ __forceinline__ const T* at(const View& view, int64_t batch, int64_t channel, int64_t state, int64_t token) {
  return static_cast<const T*>(view.data) + batch * view.batch + channel * view.channel + state * view.state +
         token * view.token;
}

// A of a channel and state, which is negative.
template <typename State>
__device__ __forceinline__ State rate_of(const Params& p, int channel, int state) {
  const State A = *at<State>(p.A, 0, channel, state, 0);
  return p.A_is_log ? -exp(A) : A;
}

// ----- shared memory

// Byte offsets of the arrays. `states` holds a tile of the output or of its gradient. The tails have, for each warp, the
// step that its threads' steps compose to, from the left or from the right. `parts` has each thread's sums for the
// gradients of A and of the bias.
template <typename Input>
struct Layout {
  using State = StateOf<Input>;
  size_t u, delta, B, states, left_tails, right_tails, parts, total;

  __device__ __host__ Layout(const Plan& plan, bool backward) {
    const size_t tile = plan.threads * plan.items, warps = plan.threads / kWarp;
    u = 0;
    delta = u + padded(tile * sizeof(Input));
    states = delta + padded(tile * sizeof(Input));
    B = states + padded(tile * sizeof(State));
    left_tails = B + padded(plan.chunk_tokens() * sizeof(Input));
    right_tails = left_tails + 2 * warps * sizeof(State);
    parts = right_tails + (backward ? 2 * warps * sizeof(State) : 0);
    total = parts + (backward ? 2 * plan.threads * sizeof(State) : 0);
  }
};

// ----- between global and shared memory

__device__ __forceinline__ bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Visits every `step`th element of a table of `width` columns, row after row, from element `start` on.
struct Walk {
  int row, column, row_step, column_step, width;

  __device__ __forceinline__ Walk(int start, int step, int width, bool one_row) : width(width) {
    row = one_row ? 0 : start / width;
    row_step = one_row ? 0 : step / width;
    column = start - row * width;
    column_step = step - row_step * width;
  }
  __device__ __forceinline__ void next() {
    row += row_step;
    column += column_step;
    if (column >= width) {
      column -= width;
      ++row;
    }
  }
};

// Loads with lanes along tokens, kWidth tokens at once.
template <int kWidth, typename T>
__device__ __forceinline__ void load_along_tokens(
    T* tile, const T* from, const View& view, int rows, int tokens, int pitch) {
  const int width = tokens / kWidth;
  Walk walk(threadIdx.x, blockDim.x, width, rows == 1);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * width; i += blockDim.x, walk.next()) {
    const int token = walk.column * kWidth;
    T* const to = tile + walk.row * pitch + token;
    const T* const source = from + walk.row * view.channel + token * view.token;
    if constexpr (kWidth > 1) {
      copy_16_bytes_async(to, source);
    } else {
      *to = *source;
    }
  }
}

// Loads with lanes along rows, kWidth rows at once. In the table that `Walk` visits, a row is a token.
template <int kWidth, typename T>
__device__ __forceinline__ void load_along_rows(
    T* tile, const T* from, const View& view, int rows, int tokens, int pitch) {
  const int width = rows / kWidth;
  Walk walk(threadIdx.x, blockDim.x, width, false);
#pragma unroll 1
  for (int i = threadIdx.x; i < tokens * width; i += blockDim.x, walk.next()) {
    const int row = walk.column * kWidth;
    const T* const source = from + row * view.channel + walk.row * view.token;
    const auto values = *reinterpret_cast<const Pack<T, kWidth>*>(source);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) tile[(row + k) * pitch + walk.row] = values.values[k];
  }
}

// The whole block loads `rows` x `tokens` elements into a tile whose rows are `pitch` apart. The load is complete after
// `wait_for_copies` and a barrier.
template <typename T>
__device__ __forceinline__ void load_tile(T* tile, const T* from, const View& view, int rows, int tokens, int pitch) {
  constexpr int kWidth = 16 / sizeof(T);
  if (view.along_rows) {
    if (view.wide) {
      load_along_rows<kWidth>(tile, from, view, rows, tokens, pitch);
    } else {
      load_along_rows<1>(tile, from, view, rows, tokens, pitch);
    }
    return;
  }
  const int whole = view.wide ? tokens / kWidth * kWidth : 0;
  if (whole > 0) load_along_tokens<kWidth>(tile, from, view, rows, whole, pitch);
  if (whole < tokens) {
    load_along_tokens<1>(tile + whole, from + whole * view.token, view, rows, tokens - whole, pitch);
  }
}

// Loads `count` elements that are adjacent in the tile and in memory, in units of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_run(T* tile, const T* from, int count) {
  constexpr int kWidth = 16 / sizeof(T);
  const int first = threadIdx.x * kWidth, step = blockDim.x * kWidth;
  tile += first;
  from += first;
#pragma unroll 1
  for (int left = count - first; left > 0; left -= step) {
    copy_16_bytes_async(tile, from);
    tile += step;
    from += step;
  }
}

// Loads one row, with zeros from `tokens` to `size`.
template <typename T>
__device__ __forceinline__ void load_row(T* tile, const T* from, const View& view, int tokens, int size) {
  constexpr int kWidth = 16 / sizeof(T);
  const int whole = view.wide ? tokens / kWidth * kWidth : 0;
  load_run(tile, from, whole);
#pragma unroll 1
  for (int i = whole + threadIdx.x; i < size; i += blockDim.x) tile[i] = i < tokens ? from[i * view.token] : T();
}

// Stores zeros where a tile lies outside the tensor: items whose u, B and grad are zero contribute nothing.
template <typename T>
__device__ __forceinline__ void fill_rest(T* tile, int rows, int tokens, const Plan& plan) {
  const int pitch = plan.chunk_tokens();
  if (rows == plan.rows && tokens == pitch) return;
  Walk walk(threadIdx.x, blockDim.x, pitch, false);
#pragma unroll 1
  for (int i = threadIdx.x; i < plan.rows * pitch; i += blockDim.x, walk.next()) {
    if (walk.row >= rows || walk.column >= tokens) tile[i] = T();
  }
}

// Loads a tile of the plan's size, with zeros where it lies outside the tensor.
template <bool kFlat, typename T>
__device__ __forceinline__ void load_and_fill_tile(
    T* tile, const T* from, const View& view, int rows, int tokens, const Plan& plan) {
  if constexpr (kFlat) {
    load_run(tile, from, rows * tokens);
  } else {
    load_tile(tile, from, view, rows, tokens, plan.chunk_tokens());
  }
  fill_rest(tile, rows, tokens, plan);
}

// Stores a warp's elements, from `begin` of the tile to `end`, if they lie in the tensor; kWidth of them at once.
template <int kWidth, typename T>
__device__ __forceinline__ void store_along_tokens(
    T* to, int64_t row_stride, const T* tile, int rows, int tokens, int pitch, int begin, int end) {
  using Unit = Pack<T, kWidth>;
  const int start = begin + int(threadIdx.x % kWarp) * kWidth;
  Walk walk(start, kWarp * kWidth, pitch, rows == 1);
#pragma unroll 1
  for (int i = start; i < end; i += kWarp * kWidth, walk.next()) {
    if (walk.row < rows && walk.column < tokens) {
      *reinterpret_cast<Unit*>(to + walk.row * row_stride + walk.column) = *reinterpret_cast<const Unit*>(tile + i);
    }
  }
}

// Stores the `size` elements of a tile that the warp's own threads have written, to rows `row_stride` apart.
template <bool kFlat, typename T>
__device__ __forceinline__ void store_tile(
    T* to, int64_t row_stride, const T* tile, int rows, int tokens, int pitch, int size) {
  constexpr int kWidth = 16 / sizeof(T);
  __syncwarp();
  const int begin = int(threadIdx.x / kWarp) * size;
  const int end = min(begin + size, rows == 1 ? tokens : rows * pitch);
  if constexpr (kFlat) {
    using Unit = Pack<T, kWidth>;
#pragma unroll 1
    for (int i = begin + int(threadIdx.x % kWarp) * kWidth; i < end; i += kWarp * kWidth) {
      *reinterpret_cast<Unit*>(to + i) = *reinterpret_cast<const Unit*>(tile + i);
    }
  } else if (aligned(to) && (rows == 1 || row_stride % kWidth == 0) && pitch % kWidth == 0 && tokens % kWidth == 0) {
    store_along_tokens<kWidth>(to, row_stride, tile, rows, tokens, pitch, begin, end);
  } else {
    store_along_tokens<1>(to, row_stride, tile, rows, tokens, pitch, begin, end);
  }
}

// ----- between shared memory and registers

// Two numbers in 32 bits, in the order of their addresses.
__device__ __forceinline__ void widen_pair(uint32_t bits, Half, float& first, float& second) {
  first = half_to_float(uint16_t(bits));
  second = half_to_float(uint16_t(bits >> 16));
}
__device__ __forceinline__ void widen_pair(uint32_t bits, BFloat16, float& first, float& second) {
  first = float_of_bits(bits << 16);
  second = float_of_bits(bits & 0xffff0000);
}

__device__ __forceinline__ uint32_t narrow_pair(float first, float second, Half) { return to_halves(first, second); }
__device__ __forceinline__ uint32_t narrow_pair(float first, float second, BFloat16) {
  return to_bfloat16s(first, second);
}

// Items that are read at once.
template <int kItems>
constexpr int kPackItems = kItems % 2 == 0 ? 2 : 1;

template <int kWidth, typename T, typename State>
__device__ __forceinline__ void read_pack(const T* tile, State* items) {
  if constexpr (kWidth == 2 && sizeof(T) == 2) {
    widen_pair(*reinterpret_cast<const uint32_t*>(tile), T(), items[0], items[1]);
  } else {
    const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(tile);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) items[k] = widen(pack.values[k]);
  }
}

template <int kWidth, typename T, typename State>
__device__ __forceinline__ void write_pack(T* tile, const State* items) {
  if constexpr (kWidth == 2 && sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(tile) = narrow_pair(items[0], items[1], T());
  } else {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) narrow(items[k], pack.values[k]);
    *reinterpret_cast<Pack<T, kWidth>*>(tile) = pack;
  }
}

template <int kItems, typename T, typename State>
__device__ __forceinline__ void read_items(const T* tile, State (&items)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; i += kPackItems<kItems>) read_pack<kPackItems<kItems>>(tile + i, items + i);
}

template <int kItems, typename T, typename State>
__device__ __forceinline__ void write_items(T* tile, const State (&items)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; i += kPackItems<kItems>) write_pack<kPackItems<kItems>>(tile + i, items + i);
}

// Computes dt = delta + bias, or softplus of the sum, in place. From `items` on, the tile lies outside the tensor, and
// dt is 0: with only the bias, a decay could overflow there, and the values from the right could be NaN.
template <int kItems, typename State>
__device__ __forceinline__ void step_sizes(State (&delta)[kItems], State bias, bool through_softplus, int items) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) delta[i] += bias;
  if (through_softplus) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) delta[i] = softplus(delta[i]);
  }
  if (items < kItems) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) delta[i] = i < items ? delta[i] : State(0);
  }
}

// ----- the scan across threads

// x -> value + 2^exponent x
template <typename State>
struct Step {
  State exponent, value;
};

template <typename State>
__device__ __forceinline__ State apply(const Step<State>& step, State x) {
  return step.value + exp2_of(step.exponent) * x;
}

// Composes the steps of `reach` lanes before this one with its own. With kUp, "before" is to the left.
template <bool kUp, typename State>
__device__ __forceinline__ Step<State> scan_warp(Step<State> step, int reach) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Step<State> before{shuffle<kUp>(step.exponent, distance), shuffle<kUp>(step.value, distance)};
    if (reach >= distance) {
      step.value = apply(step, before.value);
      step.exponent += before.exponent;
    }
  }
  return step;
}

// The composed steps of all lanes before this one, in its row and warp.
template <bool kUp, typename State>
__device__ __forceinline__ Step<State> steps_before(const Step<State>& scanned, int reach) {
  const Step<State> before{shuffle<kUp>(scanned.exponent, 1), shuffle<kUp>(scanned.value, 1)};
  return reach > 0 ? before : Step<State>{0, 0};
}

// The state that enters the thread's tokens from the left, given the state that enters the row's chunk.
template <typename State>
__device__ __forceinline__ State enter_from_left(
    const Thread& me, const Step<State>* tails, const Step<State>& before, State entering) {
  if (me.position > me.lane) {
#pragma unroll 1
    for (int warp = me.first_warp(); warp < me.warp; ++warp) entering = apply(tails[warp], entering);
  }
  return apply(before, entering);
}

template <typename State>
__device__ __forceinline__ State enter_from_right(
    const Thread& me, const Step<State>* tails, const Step<State>& before, State entering) {
  if (me.per_row - 1 - me.position > kWarp - 1 - me.lane) {
#pragma unroll 1
    for (int warp = me.last_warp(); warp > me.warp; --warp) entering = apply(tails[warp], entering);
  }
  return apply(before, entering);
}

// Adds up the `parts` of each row's threads. The sum of a row is stored in to[row * stride], or with `add` added to it.
template <typename State>
__device__ __forceinline__ void sum_parts(
    const Thread& me, const State* parts, const Plan& plan, int rows, bool add, State* to, int64_t stride) {
#pragma unroll 1
  for (int row = me.warp; row < rows; row += plan.threads / kWarp) {
    State sum = 0;
#pragma unroll 1
    for (int i = me.lane; i < me.per_row; i += kWarp) sum += parts[row * me.per_row + i];
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += shuffle<false>(sum, distance);
    if (me.lane == 0) to[row * stride] = add ? to[row * stride] + sum : sum;
  }
}

// ----- kernels

// Blocks that an SM should hold, which limits a thread's registers: the most for which no architecture spills.
template <typename Input, int kItems, bool kFlat>
constexpr int kBlocksPerSMForward = sizeof(Input) == 8 ? 1 : kFlat ? 4 : kItems == kManyItems ? 3 : 2;
template <typename Input, int kItems, bool kFlat>
constexpr int kBlocksPerSMBackward = sizeof(Input) == 8 ? 1 : kFlat && kItems == kFewItems ? 3 : 2;

// Loads what the forward pass needs at a cursor and did not need at the cursor before.
template <bool kFlat, typename Input>
__device__ __forceinline__ void load_inputs(
    const Params& p, const Rows& block, const Cursor& cursor, Input* u, Input* delta, Input* B) {
  const Rows rows = block.of_round(p, cursor.round);
  const int start = cursor.start, tokens = cursor.tokens;
  if (cursor.state == 0) {
    const Input* const from_u = at<Input>(p.u, block.batch, rows.channel, 0, start);
    const Input* const from_delta = at<Input>(p.delta, block.batch, rows.channel, 0, start);
    load_and_fill_tile<kFlat>(u, from_u, p.u, rows.count, tokens, p.plan);
    load_and_fill_tile<kFlat>(delta, from_delta, p.delta, rows.count, tokens, p.plan);
  }
  if (cursor.round == 0) {
    load_row(B, at<Input>(p.B, block.batch, block.group, cursor.state, start), p.B, tokens, p.plan.chunk_tokens());
  }
}

// A thread's items after a scan from a zero state: each item's state, and the exponent of the factor with which a state
// that enters the thread adds to it.
template <int kItems, typename State>
struct ScannedItems {
  State exponents[kItems], values[kItems];

  __device__ __forceinline__ Step<State> scan(
      const State (&dt)[kItems], const State (&dt_u)[kItems], const State (&B)[kItems], State rate) {
    Step<State> step{0, 0};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const State exponent = dt[i] * rate;
      step.exponent += exponent;
      step.value = exp2_of(exponent) * step.value + dt_u[i] * B[i];
      exponents[i] = step.exponent;
      values[i] = step.value;
    }
    return step;
  }
  __device__ __forceinline__ void add(State entering) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) values[i] += exp2_of(exponents[i]) * entering;
  }
};

// The forward pass. If `h` is null, it stores the states that enter each chunk in `boundaries` instead.
template <typename Input, int kItems, bool kFlat>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSMForward<Input, kItems, kFlat>) scan_forward(const Params p) {
  using State = StateOf<Input>;
  const Layout<Input> layout(p.plan, false);
  Input* const u_tile = shared_at<Input>(layout.u);
  Input* const delta_tile = shared_at<Input>(layout.delta);
  Input* const B_tile = shared_at<Input>(layout.B);
  State* const h_tile = shared_at<State>(layout.states);
  Step<State>* const tails = shared_at<Step<State>>(layout.left_tails);

  const Thread me(p.plan);
  const Rows block(p);
  const int first_item = me.index * kItems, pitch = p.plan.chunk_tokens();
  const int states = one_state_kernel(kItems, kFlat) ? 1 : p.states;
  State dt[kItems], dt_u[kItems];

  Cursor cursor(p, 0, 0, 0);
  load_inputs<kFlat>(p, block, cursor, u_tile, delta_tile, B_tile);
#pragma unroll 1
  while (cursor.chunk < p.plan.chunks) {
    wait_for_copies();
    __syncthreads();
    const Rows rows = block.of_round(p, cursor.round);
    const bool mine = me.row < rows.count;
    const int channel = rows.channel + (mine ? me.row : 0), n = cursor.state;
    if (n == 0) {
      const State bias = p.bias.data ? *at<State>(p.bias, 0, channel, 0, 0) : State(0);
      read_items(delta_tile + first_item, dt);
      step_sizes(dt, bias, p.softplus, mine ? cursor.tokens - me.position * kItems : 0);
      read_items(u_tile + first_item, dt_u);
#pragma unroll
      for (int i = 0; i < kItems; ++i) dt_u[i] *= dt[i];
    }

    const State rate = rate_of<State>(p, channel, n) * State(kLog2e);
    const int64_t row = (int64_t(block.batch) * p.channels + channel) * states + n;
    State entering = 0;
    if (mine && cursor.chunk > 0) {
      entering = p.h ? static_cast<State*>(p.h)[row * p.length + cursor.start - 1]
                     : static_cast<State*>(p.boundaries)[row * p.plan.chunks + cursor.chunk];
    }

    State B[kItems];
    read_items(B_tile + me.position * kItems, B);
    ScannedItems<kItems, State> items;
    const Step<State> step = scan_warp<true>(items.scan(dt, dt_u, B, rate), me.lanes_left);
    const Step<State> before = steps_before<true>(step, me.lanes_left);
    if (me.lane == kWarp - 1) tails[me.warp] = step;
    __syncthreads();

    // All threads have read their inputs, so the next ones may be loaded.
    const Cursor next = cursor.next(p, block, states);
    if (next.chunk < p.plan.chunks) load_inputs<kFlat>(p, block, next, u_tile, delta_tile, B_tile);

    items.add(enter_from_left(me, tails, before, entering));
    if (p.h) {
      write_items(h_tile + first_item, items.values);
      const int64_t first_row = (int64_t(block.batch) * p.channels + rows.channel) * states + n;
      State* const to = static_cast<State*>(p.h) + first_row * p.length + cursor.start;
      store_tile<kFlat>(to, int64_t(states) * p.length, h_tile, rows.count, cursor.tokens, pitch, kWarp * kItems);
    } else if (mine && me.position == me.per_row - 1 && cursor.chunk + 1 < p.plan.chunks) {
      static_cast<State*>(p.boundaries)[row * p.plan.chunks + cursor.chunk + 1] = items.values[kItems - 1];
    }
    cursor = next;
  }
}

// The two scans of the backward pass over a thread's items. Token t passes mu_t = a_t lambda_t to the token before it,
// so lambda_t = grad_t + mu_{t+1}. The steps of mu have the same exponents as those of h, but come from the other side.
template <int kItems, typename State>
struct BackwardItems {
  State decay[kItems];
  State drive_then_carried[kItems];  // dt B u; after `carry`, a_t h_{t-1}

  __device__ __forceinline__ Step<State> step_of_h(const State (&dt)[kItems], State rate) {
    Step<State> step{0, 0};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const State exponent = dt[i] * rate;
      decay[i] = exp2_of(exponent);
      step.exponent += exponent;
      step.value = decay[i] * step.value + drive_then_carried[i];
    }
    return step;
  }

  __device__ __forceinline__ State leaving_mu(const State (&grad)[kItems]) const {
    State mu = 0;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) mu = decay[i] * (grad[i] + mu);
    return mu;
  }

  // Replaces the drive by a_t h_{t-1}, computed as a product: h_t - drive_t would lose digits by cancellation.
  __device__ __forceinline__ void carry(State h) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const State carried = decay[i] * h;
      h = carried + drive_then_carried[i];
      drive_then_carried[i] = carried;
    }
  }
};

// The derivative of dt with respect to delta is sigmoid(factor * delta + offset). Without softplus, this is
// sigmoid(0 * delta + 200) = 1, so that items need no branch.
template <typename State>
struct Slope {
  State factor, offset;

  __device__ __forceinline__ Slope(bool through_softplus, State bias)
      : factor(through_softplus ? 1 : 0), offset(through_softplus ? bias : State(200)) {}
};

// Replaces an item's u and delta by their gradients, from the sums over n of lambda B and of lambda A a h.
template <typename State>
__device__ __forceinline__ void input_gradients(const Slope<State>& slope, State dt, State lambda_B,
                                                State lambda_A_carried, State& u_then_grad, State& delta_then_grad) {
  const State delta = delta_then_grad;
  delta_then_grad = (lambda_B * u_then_grad + lambda_A_carried) * sigmoid(slope.factor * delta + slope.offset);
  u_then_grad = lambda_B * dt;
}

// A thread's items in the tiles of the backward pass.
template <typename Input>
struct ItemTiles {
  Input *u, *delta;
  const Input* B;
  const StateOf<Input>* grad;
};

// Scans a thread's items of one state in both directions, from the h and mu that enter the row's chunk. Leaves a_t and
// a_t h_{t-1} in `items`, and returns the mu that enters them from the right.
template <typename Input, int kItems, typename State>
__device__ __forceinline__ State scan_both(
    const Thread& me, const ItemTiles<Input>& tiles, const State (&dt)[kItems], State A, State entering_h,
    State entering_mu, Step<State>* left_tails, Step<State>* right_tails, BackwardItems<kItems, State>& items) {
  State B_then_grad[kItems];
  read_items(tiles.u, items.drive_then_carried);
  read_items(tiles.B, B_then_grad);
#pragma unroll
  for (int i = 0; i < kItems; ++i) items.drive_then_carried[i] *= dt[i] * B_then_grad[i];
  const Step<State> own = items.step_of_h(dt, A * State(kLog2e));
  read_items(tiles.grad, B_then_grad);
  const Step<State> own_mu{own.exponent, items.leaving_mu(B_then_grad)};

  const Step<State> from_left = scan_warp<true>(own, me.lanes_left);
  const Step<State> from_right = scan_warp<false>(own_mu, me.lanes_right);
  const Step<State> before = steps_before<true>(from_left, me.lanes_left);
  const Step<State> after = steps_before<false>(from_right, me.lanes_right);
  if (me.lane == kWarp - 1) left_tails[me.warp] = from_left;
  if (me.lane == 0) right_tails[me.warp] = from_right;
  __syncthreads();
  items.carry(enter_from_left(me, left_tails, before, entering_h));
  return enter_from_right(me, right_tails, after, entering_mu);
}

// What a thread sums of one row of the tile: over n, lambda B and lambda A a h of each item; over its items, terms of
// the gradients of A and of the bias.
template <int kItems, typename State>
struct RowSums {
  State lambda_B[kItems] = {}, lambda_A_carried[kItems] = {};
  State grad_A = 0, grad_bias = 0;
};

// Goes through a thread's items of one state from the right and adds to the sums and to B's gradient. With one state,
// it also replaces u and delta by their gradients. Returns the mu that leaves the items to the left. Reads the inputs
// again, a pack at a time, instead of holding them in registers.
template <bool kOneState, typename Input, int kItems, typename State>
__device__ __forceinline__ State add_gradients(
    const ItemTiles<Input>& tiles, const BackwardItems<kItems, State>& items, const State (&dt)[kItems], State A, State mu,
    const Slope<State>& slope, RowSums<kItems, State>& sums, State (&grad_B)[kItems]) {
  constexpr int kWidth = kPackItems<kItems>;
#pragma unroll
  for (int i = kItems - kWidth; i >= 0; i -= kWidth) {
    State u[kWidth], B[kWidth], grad[kWidth], delta[kWidth];
    read_pack<kWidth>(tiles.u + i, u);
    read_pack<kWidth>(tiles.B + i, B);
    read_pack<kWidth>(tiles.grad + i, grad);
    if constexpr (kOneState) read_pack<kWidth>(tiles.delta + i, delta);
#pragma unroll
    for (int k = kWidth - 1; k >= 0; --k) {
      const int j = i + k;
      const State lambda = grad[k] + mu;
      mu = items.decay[j] * lambda;
      const State lambda_carried = lambda * items.drive_then_carried[j];
      sums.grad_A += lambda_carried * dt[j];
      sums.lambda_B[j] += lambda * B[k];
      sums.lambda_A_carried[j] += A * lambda_carried;
      const State to_B = lambda * (dt[j] * u[k]);
      grad_B[j] = kOneState ? grad_B[j] + to_B : to_B;
      if constexpr (kOneState) {
        input_gradients(slope, dt[j], sums.lambda_B[j], sums.lambda_A_carried[j], u[k], delta[k]);
        sums.grad_bias += delta[k];
      }
    }
    if constexpr (kOneState) {
      write_pack<kWidth>(tiles.u + i, u);
      write_pack<kWidth>(tiles.delta + i, delta);
    }
  }
  return mu;
}

// With several states: replaces u and delta by their gradients after the last state.
template <typename Input, int kItems, typename State>
__device__ __forceinline__ void finish_gradients(const ItemTiles<Input>& tiles, const State (&dt)[kItems],
                                                 const Slope<State>& slope, RowSums<kItems, State>& sums) {
  State u[kItems], delta[kItems];
  read_items(tiles.u, u);
  read_items(tiles.delta, delta);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    input_gradients(slope, dt[i], sums.lambda_B[i], sums.lambda_A_carried[i], u[i], delta[i]);
    sums.grad_bias += delta[i];
  }
  write_items(tiles.u, u);
  write_items(tiles.delta, delta);
}

// Sums the tile over its rows: one row block's partial sums of B's gradient.
template <typename State>
__device__ __forceinline__ void sum_rows(const State* tile, int rows, int tokens, int pitch, State* to) {
  for (int token = threadIdx.x; token < tokens; token += blockDim.x) {
    State sum = 0;
    for (int row = 0; row < rows; ++row) sum += tile[row * pitch + token];
    to[token] = sum;
  }
}

// The backward pass, with chunks from the last to the first. Its tiles of u and delta become those of their gradients,
// and with several states, that of grad becomes that of B's gradient. If there is one state, a block sums B's gradient
// over its rounds before it writes the sum.
template <typename Input, int kItems, bool kFlat>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSMBackward<Input, kItems, kFlat>)
    scan_backward(const Params p) {
  using State = StateOf<Input>;
  constexpr bool kOneState = one_state_kernel(kItems, kFlat);
  const Layout<Input> layout(p.plan, true);
  Input* const u_tile = shared_at<Input>(layout.u);
  Input* const delta_tile = shared_at<Input>(layout.delta);
  Input* const B_tile = shared_at<Input>(layout.B);
  State* const grad_tile = shared_at<State>(layout.states);
  Step<State>* const left_tails = shared_at<Step<State>>(layout.left_tails);
  Step<State>* const right_tails = shared_at<Step<State>>(layout.right_tails);
  State* const parts_A = shared_at<State>(layout.parts);
  State* const parts_bias = parts_A + p.plan.threads;

  const Thread me(p.plan);
  const Rows block(p);
  const int first_item = me.index * kItems, pitch = p.plan.chunk_tokens();
  const ItemTiles<Input> tiles{u_tile + first_item, delta_tile + first_item, B_tile + me.position * kItems,
                               grad_tile + first_item};
  const int states = kOneState ? 1 : p.states;

#pragma unroll 1
  for (int c = p.plan.chunks - 1; c >= 0; --c) {
    const int start = c * pitch, tokens = min(pitch, p.length - start);
    const bool last_chunk = c == p.plan.chunks - 1;
    State* const partials_B = static_cast<State*>(p.partials_B) + int64_t(blockIdx.x) * states * p.length + start;
    State grad_B[kItems] = {};

#pragma unroll 1
    for (int round = 0; round * p.plan.rows < block.count; ++round) {
      const Rows rows = block.of_round(p, round);
      const bool mine = me.row < rows.count;
      const int channel = rows.channel + (mine ? me.row : 0);
      const State bias = p.bias.data ? *at<State>(p.bias, 0, channel, 0, 0) : State(0);
      const int64_t first_row = int64_t(block.batch) * p.channels + rows.channel;
      const int64_t row = first_row + (mine ? me.row : 0);
      State* const partials_A = static_cast<State*>(p.partials_A) + first_row * states;
      const Input* const from_u = at<Input>(p.u, block.batch, rows.channel, 0, start);
      const Input* const from_delta = at<Input>(p.delta, block.batch, rows.channel, 0, start);
      load_and_fill_tile<kFlat>(u_tile, from_u, p.u, rows.count, tokens, p.plan);
      load_and_fill_tile<kFlat>(delta_tile, from_delta, p.delta, rows.count, tokens, p.plan);

      State dt[kItems];
      RowSums<kItems, State> sums;
      const Slope<State> slope(p.softplus, bias);
      for (int n = 0; n < states; ++n) {
        const State* const from_grad = at<State>(p.grad, block.batch, rows.channel, n, start);
        load_and_fill_tile<kFlat>(grad_tile, from_grad, p.grad, rows.count, tokens, p.plan);
        if (!kOneState || round == 0) {
          load_row(B_tile, at<Input>(p.B, block.batch, block.group, n, start), p.B, tokens, pitch);
        }
        wait_for_copies();
        __syncthreads();
        if (n == 0) {
          read_items(delta_tile + first_item, dt);
          step_sizes(dt, bias, p.softplus, mine ? tokens - me.position * kItems : 0);
        }

        const State A = rate_of<State>(p, channel, n);
        State* const boundary = static_cast<State*>(p.boundaries) + (row * states + n) * p.plan.chunks + c;
        const State entering_h = mine && c > 0 ? boundary[0] : State(0);
        // boundary[1] is the mu that the chunk to the right has left.
        const State entering_mu = mine && !last_chunk ? boundary[1] : State(0);

        BackwardItems<kItems, State> items;
        State mu = scan_both(me, tiles, dt, A, entering_h, entering_mu, left_tails, right_tails, items);
        sums.grad_A = 0;
        mu = add_gradients<kOneState>(tiles, items, dt, A, mu, slope, sums, grad_B);
        if (mine && me.position == 0 && c > 0) boundary[0] = mu;
        parts_A[me.index] = p.A_is_log ? sums.grad_A * A : sums.grad_A;

        if constexpr (!kOneState) {
          write_items(grad_tile + first_item, grad_B);
          __syncthreads();
          sum_rows(grad_tile, p.plan.rows, tokens, pitch, partials_B + int64_t(n) * p.length);
          sum_parts(me, parts_A, p.plan, rows.count, !last_chunk, partials_A + n, states);
          __syncthreads();
        }
      }

      if constexpr (!kOneState) finish_gradients(tiles, dt, slope, sums);
      parts_bias[me.index] = sums.grad_bias;
      const int64_t offset = first_row * p.length + start;
      Input* const to_u = static_cast<Input*>(p.grad_u) + offset;
      Input* const to_delta = static_cast<Input*>(p.grad_delta) + offset;
      store_tile<kFlat>(to_u, p.length, u_tile, rows.count, tokens, pitch, kWarp * kItems);
      store_tile<kFlat>(to_delta, p.length, delta_tile, rows.count, tokens, pitch, kWarp * kItems);
      __syncthreads();
      if constexpr (kOneState) sum_parts(me, parts_A, p.plan, rows.count, !last_chunk, partials_A, 1);
      State* const partials_bias = static_cast<State*>(p.partials_bias) + first_row;
      sum_parts(me, parts_bias, p.plan, rows.count, !last_chunk, partials_bias, 1);
    }

    if constexpr (kOneState) {
      write_items(grad_tile + first_item, grad_B);
      __syncthreads();
      sum_rows(grad_tile, p.plan.rows, tokens, pitch, partials_B);
      if (c > 0) __syncthreads();
    }
  }
}

// ----- the choice of a kernel

template <typename T, int kItemsOfThread, bool kIsFlat>
struct Instance {
  using Input = T;
  static constexpr int kItems = kItemsOfThread;
  static constexpr bool kFlat = kIsFlat;
};

// Calls `function` with the Instance to use. Only these combinations exist.
template <typename Input, typename Function>
auto with_instance(const Plan& plan, Function function) {
  if constexpr (!std::is_same_v<Input, double>) {
    if (plan.items == kManyItems) {
      return plan.flat ? function(Instance<Input, kManyItems, true>())
                       : function(Instance<Input, kManyItems, false>());
    }
    if (plan.flat) return function(Instance<Input, kFewItems, true>());
  }
  return function(Instance<Input, kFewItems, false>());
}

template <typename Function>
auto with_instance(const Plan& plan, Dtype dtype, Function function) {
  return with_type(dtype, [&](auto input) { return with_instance<decltype(input)>(plan, function); });
}

}  // namespace selective_scan
