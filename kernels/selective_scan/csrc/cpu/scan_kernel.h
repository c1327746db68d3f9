// Forward and backward pass of the state scan for one vector length.
//
// Lanes are channels, and the loops run over tokens, so the recurrence needs no scan across lanes. The gradient
// lambda_t = grad_t + exp(dt_{t+1} A) lambda_{t+1} is the same recurrence from the other end.
#pragma once

#include "scan.h"
#include "simd.h"

namespace selective_scan {
namespace {

using namespace simd;

// `factor` is exp(dt A), and `change` is exp(dt A) - 1. `factor` is accurate if little of the state is left, and
// `change` if little is taken away.
template <class S>
struct Decay {
  Vec<S> factor, change;

  static INLINE Decay of(Vec<S> x) {
    const auto e = exponential(x);
    return {exp(e), expm1(e)};
  }
};

// A state that may decay so slowly that it lasts for thousands of tokens. In h + (change h + b), the sum in brackets is
// small and so is its rounding error, and `rest` keeps what the sum rounds away (Kahan, 1965). If a step takes more
// than half of the state, the old state and its rounding errors may be far larger than the new state. Then factor h + b
// is accurate.
template <class S>
struct Running {
  Vec<S> value, rest;

  INLINE void step(const Decay<S>& decay, Vec<S> b) {
    const Vec<S> added = decay.change * value + b + rest;
    const Vec<S> slow = value + added, fast = decay.factor * value + b;
    const auto loses = decay.factor < S(0.5);
    rest = loses ? Vec<S>{} : added - (slow - value);
    value = loses ? fast : slow;
  }
};

// Memory for one task, in pieces: (tokens, lanes) tiles and (states, lanes) rows.
struct Scratch {
  char* next;

  template <class S>
  INLINE S* take(int64_t vectors) {
    S* piece = (S*)next;
    next += vectors * VECTOR_BYTES;
    return piece;
  }
};

template <class S>
INLINE Vec<S> softplus(Vec<S> s, Vec<S>& sigmoid) {
  const Vec<S> zero = {};
  const Vec<S> y = exp(-abs(s));
  sigmoid = (s > zero ? zero + 1 : y) / (1 + y);
  return (s < zero ? zero : s) + log1p(y);
}

// What a task reads: its place in the problem, and A and the bias with a lane for each channel.
template <class T>
struct Task {
  using S = typename State<T>::type;
  static constexpr int W = kLanes<S>;

  const Problem& p;
  int64_t batch, group, block, channel;
  int channels;  // fewer than W in the last block of a group
  S *A, *bias;

  INLINE Task(const Problem& p, int64_t task, Scratch& scratch) : p(p) {
    const int64_t blocks = p.blocks(W), per_group = p.channels / p.groups;
    block = task % blocks;
    group = task / blocks % p.groups;
    batch = task / blocks / p.groups;
    channel = group * per_group + block * W;
    const int64_t left = per_group - block * W;
    channels = left < W ? left : W;
    A = scratch.take<S>(p.states);
    bias = scratch.take<S>(1);
    for (int64_t n = 0; n < p.states; ++n) {
      for (int j = 0; j < W; ++j) A[n * W + j] = j < channels ? A_at(channel + j, n) : S(0);
      if (p.A_is_log) store(A + n * W, -exp(load(A + n * W)));
    }
    for (int j = 0; j < W; ++j)
      bias[j] = j < channels && p.bias ? ((const S*)p.bias)[(channel + j) * p.bias_stride] : S(0);
  }

  INLINE S A_at(int64_t d, int64_t n) const { return ((const S*)p.A)[d * p.A_strides[0] + n * p.A_strides[1]]; }

  INLINE int tokens(int64_t chunk) const {
    const int64_t left = p.length - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  }

  INLINE void load_activation(S* tile, const void* data, const int64_t (&strides)[3], int64_t chunk) const {
    const T* first = (const T*)data + batch * strides[0] + channel * strides[1] + chunk * kChunk * strides[2];
    load_tile(tile, first, strides[1], strides[2], channels, tokens(chunk));
  }

  INLINE void store_activation(void* data, const int64_t (&strides)[3], const S* tile, int64_t chunk) const {
    T* first = (T*)data + batch * strides[0] + channel * strides[1] + chunk * kChunk * strides[2];
    store_tile(first, tile, strides[1], strides[2], channels, tokens(chunk));
  }

  INLINE void load_B(S* row, int64_t n, int64_t chunk) const {
    const int64_t(&s)[4] = p.B_strides;
    const T* first = (const T*)p.B + batch * s[0] + group * s[1] + n * s[2] + chunk * kChunk * s[3];
    for (int t = 0; t < tokens(chunk); ++t) row[t] = widen(first[t * s[3]]);
  }

  INLINE void load_grad(S* tile, int64_t n, int64_t chunk) const {
    const int64_t(&s)[4] = p.grad_strides;
    const S* first = (const S*)p.grad + batch * s[0] + channel * s[1] + n * s[2] + chunk * kChunk * s[3];
    load_tile(tile, first, s[1], s[3], channels, tokens(chunk));
  }

  // Loads dt and dt u of a chunk, and the derivative of softplus if `sigmoid` is not null.
  INLINE void load_steps(S* dt, S* drive, S* u, S* sigmoid, int64_t chunk) const {
    load_activation(u, p.u, p.u_strides, chunk);
    load_activation(dt, p.delta, p.delta_strides, chunk);
    const Vec<S> shift = load(bias);
    for (int t = 0; t < tokens(chunk); ++t) {
      Vec<S> step = load(dt + t * W) + shift, slope = Vec<S>{} + 1;
      if (p.softplus) step = softplus<S>(step, slope);
      store(dt + t * W, step);
      store(drive + t * W, step * load(u + t * W));
      if (sigmoid) store(sigmoid + t * W, slope);
    }
  }
};

template <class T>
int64_t forward_scratch(const Problem& p) {
  return VECTOR_BYTES * (p.states * (1 + 2) + 1 + kChunk * 4);
}

template <class T>
void forward(const Problem& p, int64_t index, void* memory) {
  Scratch scratch{(char*)memory};
  const Task<T> task(p, index, scratch);
  using S = typename Task<T>::S;
  constexpr int W = Task<T>::W;
  S *dt = scratch.take<S>(kChunk), *drive = scratch.take<S>(kChunk), *states = scratch.take<S>(kChunk);
  S *u = states, *B = scratch.take<S>(kChunk / W);
  Running<S>* carries = (Running<S>*)scratch.take<S>(2 * p.states);
  memset((void*)carries, 0, p.states * sizeof(Running<S>));

  for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) {
    const int tokens = task.tokens(chunk);
    task.load_steps(dt, drive, u, nullptr, chunk);
    for (int64_t n = 0; n < p.states; ++n) {
      const Vec<S> A = load(task.A + n * W);
      Running<S> h = carries[n];
      task.load_B(B, n, chunk);
      for (int t = 0; t < tokens; ++t) {
        h.step(Decay<S>::of(load(dt + t * W) * A), load(drive + t * W) * B[t]);
        store(states + t * W, h.value);
      }
      carries[n] = h;
      S* out = (S*)p.h + ((task.batch * p.channels + task.channel) * p.states + n) * p.length + chunk * kChunk;
      store_tile(out, states, p.states * p.length, 1, task.channels, tokens);
    }
  }
}

// Computes the state before each chunk, (chunks, states, lanes).
template <class T, class S>
INLINE void scan_carries(const Task<T>& task, S* carries, S* dt, S* drive, S* u, S* B) {
  constexpr int W = Task<T>::W;
  const int64_t states = task.p.states;
  memset(carries, 0, states * VECTOR_BYTES);
  for (int64_t chunk = 0; chunk + 1 < task.p.chunks(); ++chunk, carries += states * W) {
    task.load_steps(dt, drive, u, nullptr, chunk);
    for (int64_t n = 0; n < states; ++n) {
      const Vec<S> A = load(task.A + n * W);
      Running<S> h{load(carries + n * W), {}};
      task.load_B(B, n, chunk);
      for (int t = 0; t < kChunk; ++t)
        h.step(Decay<S>::of(load(dt + t * W) * A), load(drive + t * W) * B[t]);
      store(carries + (states + n) * W, h.value);
    }
  }
}

template <class T>
int64_t backward_scratch(const Problem& p) {
  return VECTOR_BYTES * (p.states * (1 + 4 + 2 + p.chunks()) + 1 + kChunk * 12);
}

// lambda and the decay of the token after the current ones.
template <class S>
struct Later {
  Running<S> lambda;
  Decay<S> decay;
};

template <class S>
INLINE void add_lanes(double* sums, Vec<S> v) {
  for (int j = 0; j < kLanes<S>; ++j) sums[j] += v[j];
}

template <class T>
void backward(const Problem& p, int64_t index, void* memory) {
  Scratch scratch{(char*)memory};
  const Task<T> task(p, index, scratch);
  using S = typename Task<T>::S;
  constexpr int W = Task<T>::W;
  S *dt = scratch.take<S>(kChunk), *drive = scratch.take<S>(kChunk), *u = scratch.take<S>(kChunk);
  S *sigmoid = scratch.take<S>(kChunk), *grad_drive = scratch.take<S>(kChunk), *grad_s = scratch.take<S>(kChunk);
  S *carried = scratch.take<S>(kChunk), *grad = scratch.take<S>(kChunk);
  Decay<S>* decays = (Decay<S>*)scratch.take<S>(kChunk * 2);
  S *products = scratch.take<S>(kChunk), *B = scratch.take<S>(kChunk / W), *sums = scratch.take<S>(kChunk / W);
  S* carries = scratch.take<S>(p.states * p.chunks());
  Later<S>* laters = (Later<S>*)scratch.take<S>(4 * p.states);
  memset((void*)laters, 0, p.states * sizeof(Later<S>));
  double* grad_A = (double*)scratch.take<S>(p.states * 2);
  double grad_bias[W] = {};
  memset(grad_A, 0, p.states * W * sizeof(double));

  scan_carries(task, carries, dt, drive, u, B);
  for (int64_t chunk = p.chunks() - 1; chunk >= 0; --chunk) {
    const int tokens = task.tokens(chunk);
    task.load_steps(dt, drive, u, sigmoid, chunk);
    memset(grad_drive, 0, tokens * VECTOR_BYTES);
    memset(grad_s, 0, tokens * VECTOR_BYTES);
    for (int64_t n = 0; n < p.states; ++n) {
      const Vec<S> A = load(task.A + n * W);
      task.load_B(B, n, chunk);
      task.load_grad(grad, n, chunk);

      Running<S> h{load(carries + (chunk * p.states + n) * W), {}};
      for (int t = 0; t < tokens; ++t) {
        decays[t] = Decay<S>::of(load(dt + t * W) * A);
        store(carried + t * W, decays[t].factor * h.value);  // h_t - dt B u would lose digits
        h.step(decays[t], load(drive + t * W) * B[t]);
      }

      Later<S> later = laters[n];
      Vec<S> grad_An = {};
      for (int t = tokens - 1; t >= 0; --t) {
        later.lambda.step(later.decay, load(grad + t * W));
        later.decay = decays[t];
        const Vec<S> lambda = later.lambda.value, through = lambda * load(carried + t * W);
        store(grad_drive + t * W, load(grad_drive + t * W) + lambda * B[t]);
        store(grad_s + t * W, load(grad_s + t * W) + through * A);
        grad_An += through * load(dt + t * W);
        store(products + t * W, lambda * load(drive + t * W));
      }
      laters[n] = later;
      add_lanes<S>(grad_A + n * W, grad_An);

      sum_lanes(sums, products, tokens);
      const int64_t row = ((task.batch * p.groups + task.group) * p.blocks(W) + task.block) * p.states + n;
      memcpy((S*)p.grad_B + row * p.length + chunk * kChunk, sums, tokens * sizeof(S));
    }

    Vec<S> grad_bias_chunk = {};
    for (int t = 0; t < tokens; ++t) {
      const Vec<S> from_drive = load(grad_drive + t * W);
      const Vec<S> from_step = (from_drive * load(u + t * W) + load(grad_s + t * W)) * load(sigmoid + t * W);
      grad_bias_chunk += from_step;
      store(grad_s + t * W, from_step);
      store(grad_drive + t * W, from_drive * load(dt + t * W));
    }
    add_lanes<S>(grad_bias, grad_bias_chunk);
    task.store_activation(p.grad_u, p.grad_u_strides, grad_drive, chunk);
    task.store_activation(p.grad_delta, p.grad_delta_strides, grad_s, chunk);
  }

  for (int j = 0; j < task.channels; ++j) {
    const int64_t row = task.batch * p.channels + task.channel + j;
    p.grad_bias[row] = grad_bias[j];
    for (int64_t n = 0; n < p.states; ++n)
      p.grad_A[row * p.states + n] = grad_A[n * W + j] * (p.A_is_log ? task.A[n * W + j] : S(1));
  }
}

template <class T>
constexpr Kernel kForward = {kLanes<typename State<T>::type>, forward_scratch<T>, forward<T>};
template <class T>
constexpr Kernel kBackward = {kLanes<typename State<T>::type>, backward_scratch<T>, backward<T>};

constexpr Kernels kKernels = {
    {kForward<float>, kForward<double>, kForward<Half>, kForward<BFloat16>},
    {kBackward<float>, kBackward<double>, kBackward<Half>, kBackward<BFloat16>},
};

}  // namespace
}  // namespace selective_scan
