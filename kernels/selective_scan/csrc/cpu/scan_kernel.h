// Forward and backward pass of the state scan for one vector length.
//
// Lanes are channels, and the loops run over tokens, so the recurrence needs no scan across lanes. The gradient
// lambda_t = grad_t + exp(dt_{t+1} A) lambda_{t+1} is the same recurrence from the other end.
#pragma once

#include "exponential.h"
#include "scan.h"
#include "simd.h"

namespace selective_scan {
namespace {

using namespace simd;

// `factor` is exp(dt A), and `factor_m1` is exp(dt A) - 1. `factor` is accurate if little of the state is left, and
// `factor_m1` if little is taken away.
template <class S>
struct Decay {
  Vec<S> factor, factor_m1;
};

// A state that may decay so slowly that it lasts for thousands of tokens. In h + (factor_m1 h + b), the sum in brackets
// is small and so is its rounding error, and `rest` keeps what the sum rounds away (Kahan, 1965). If a step takes more
// than half of the state, the old state and its rounding errors may be far larger than the new state. Then factor h + b
// is accurate.
template <class S>
struct Running {
  Vec<S> value, rest;

  INLINE void step(const Decay<S>& decay, Vec<S> b) {
    const Vec<S> added = decay.factor_m1 * value + b + rest;
    const Vec<S> slow = value + added, fast = decay.factor * value + b;
    const auto loses = decay.factor < S(0.5);
    rest = loses ? Vec<S>{} : added - (slow - value);
    value = loses ? fast : slow;
  }
};

template <class S>
INLINE Vecs<S> softplus(const Vecs<S>& s, Vecs<S>& sigmoid) {
  const Vecs<S> y = exp(map(s, [](Vec<S> s) { return -abs(s); }));
  sigmoid = map(s, y, [](Vec<S> s, Vec<S> y) { return (s > Vec<S>{} ? Vec<S>{} + 1 : y) / (1 + y); });
  return map(s, [](Vec<S> s) { return s < Vec<S>{} ? Vec<S>{} : s; }) + log1p(y);
}

// What a task reads: its part of the problem, and A and the bias, which have a lane for each channel.
template <class T>
struct Task {
  using S = State<T>;
  static constexpr int W = kLanes<S>;

  const Params& p;
  int64_t batch, group, block, channel;
  int channels;  // fewer than W in the last block of a group
  S *A, *bias;

  INLINE Task(const Params& p, int64_t task, S* A, S* bias) : p(p), A(A), bias(bias) {
    const int64_t blocks = p.channel_blocks(W), per_group = p.channels / p.groups;
    block = task % blocks;
    group = task / blocks % p.groups;
    batch = task / blocks / p.groups;
    channel = group * per_group + block * W;
    const int64_t left = per_group - block * W;
    channels = left < W ? left : W;
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
  INLINE void load_steps(S* dt, S* dt_u, S* u, S* sigmoid, int64_t chunk) const {
    load_activation(u, p.u, p.u_strides, chunk);
    load_activation(dt, p.delta, p.delta_strides, chunk);
    const Vec<S> shift = load(bias);
    for (int t = 0; t < tokens(chunk); t += kSeveral<S>) {
      Vecs<S> step = load_vecs(dt + t * W) + shift, slope = map(step, [](Vec<S>) { return Vec<S>{} + 1; });
      if (p.softplus) step = softplus<S>(step, slope);
      store_vecs(dt + t * W, step);
      store_vecs(dt_u + t * W, step * load_vecs(u + t * W));
      if (sigmoid) store_vecs(sigmoid + t * W, slope);
    }
  }
};

template <class S>
struct ForwardMemory {
  S *A, *bias;
  S *dt, *dt_u, *u, *h, *B;  // of a chunk
  Running<S>* carries;       // of each state

  INLINE ForwardMemory(const Params& p, Scratch& scratch) {
    A = scratch.take<S>(p.states);
    bias = scratch.take<S>(1);
    dt = scratch.take<S>(kChunk);
    dt_u = scratch.take<S>(kChunk);
    h = scratch.take<S>(kChunk);
    u = h;  // which is not needed after `load_steps`
    B = scratch.take<S>(kChunk / kLanes<S>);
    carries = scratch.take_objects<Running<S>>(p.states);
  }
};

template <class T>
void forward(const Params& p, int64_t index, void* memory) {
  using S = typename Task<T>::S;
  constexpr int W = Task<T>::W;
  Scratch scratch{(uintptr_t)memory};
  const ForwardMemory<S> m(p, scratch);
  const Task<T> task(p, index, m.A, m.bias);
  memset((void*)m.carries, 0, p.states * sizeof(Running<S>));

  for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) {
    const int tokens = task.tokens(chunk);
    task.load_steps(m.dt, m.dt_u, m.u, nullptr, chunk);
    for (int64_t n = 0; n < p.states; ++n) {
      const Vec<S> A = load(task.A + n * W);
      Running<S> h = m.carries[n];
      task.load_B(m.B, n, chunk);
      for (int first = 0; first < tokens; first += kSeveral<S>) {
        Vecs<S> factor, factor_m1;
        exp_expm1(load_vecs(m.dt + first * W) * A, factor, factor_m1);
        for (int i = 0, t = first; i < kSeveral<S>; ++i, ++t) {
          h.step({factor.v[i], factor_m1.v[i]}, load(m.dt_u + t * W) * m.B[t]);
          store(m.h + t * W, h.value);
        }
      }
      m.carries[n] = h;
      S* out = (S*)p.h + ((task.batch * p.channels + task.channel) * p.states + n) * p.length + chunk * kChunk;
      store_tile(out, m.h, p.states * p.length, 1, task.channels, tokens);
    }
  }
}

template <class S>
struct BackwardMemory {
  S *A, *bias;
  // Of a chunk. `carried` is a_t h_{t-1} of one state.
  S *dt, *dt_u, *u, *sigmoid, *grad_dt_u, *grad_s, *carried, *grad;
  Decay<S>* decays;
  S *products, *B, *sums;
  S* carries;  // the state before each chunk, (chunks, states, lanes)
  // Of each state: lambda and the decay of the token after the current chunk.
  Running<S>* later_lambdas;
  Decay<S>* later_decays;
  double* grad_A;  // (states, lanes)

  INLINE BackwardMemory(const Params& p, Scratch& scratch) {
    A = scratch.take<S>(p.states);
    bias = scratch.take<S>(1);
    dt = scratch.take<S>(kChunk);
    dt_u = scratch.take<S>(kChunk);
    u = scratch.take<S>(kChunk);
    sigmoid = scratch.take<S>(kChunk);
    grad_dt_u = scratch.take<S>(kChunk);
    grad_s = scratch.take<S>(kChunk);
    carried = scratch.take<S>(kChunk);
    grad = scratch.take<S>(kChunk);
    decays = scratch.take_objects<Decay<S>>(kChunk);
    products = scratch.take<S>(kChunk);
    B = scratch.take<S>(kChunk / kLanes<S>);
    sums = scratch.take<S>(kChunk / kLanes<S>);
    carries = scratch.take<S>(p.states * p.chunks());
    later_lambdas = scratch.take_objects<Running<S>>(p.states);
    later_decays = scratch.take_objects<Decay<S>>(p.states);
    grad_A = scratch.take_objects<double>(p.states * kLanes<S>);
  }
};

// Computes the state before each chunk.
template <class T, class S>
INLINE void scan_carries(const Task<T>& task, const BackwardMemory<S>& m) {
  constexpr int W = Task<T>::W;
  const int64_t states = task.p.states;
  S* carries = m.carries;
  memset(carries, 0, states * VECTOR_BYTES);
  for (int64_t chunk = 0; chunk + 1 < task.p.chunks(); ++chunk, carries += states * W) {
    task.load_steps(m.dt, m.dt_u, m.u, nullptr, chunk);
    for (int64_t n = 0; n < states; ++n) {
      const Vec<S> A = load(task.A + n * W);
      Running<S> h{load(carries + n * W), {}};
      task.load_B(m.B, n, chunk);
      for (int first = 0; first < kChunk; first += kSeveral<S>) {
        Vecs<S> factor, factor_m1;
        exp_expm1(load_vecs(m.dt + first * W) * A, factor, factor_m1);
        for (int i = 0, t = first; i < kSeveral<S>; ++i, ++t)
          h.step({factor.v[i], factor_m1.v[i]}, load(m.dt_u + t * W) * m.B[t]);
      }
      store(carries + (states + n) * W, h.value);
    }
  }
}

// Goes through a chunk of one state, forward for h and back for lambda. Adds to the gradients of dt u, of dt (in
// grad_s) and of A, and stores the chunk's partial sums of B's gradient.
template <class T, class S>
INLINE void scan_back(const Task<T>& task, const BackwardMemory<S>& m, int64_t n, int64_t chunk) {
  constexpr int W = Task<T>::W;
  const Params& p = task.p;
  const int tokens = task.tokens(chunk);
  const Vec<S> A = load(task.A + n * W);
  task.load_B(m.B, n, chunk);
  task.load_grad(m.grad, n, chunk);

  Running<S> h{load(m.carries + (chunk * p.states + n) * W), {}};
  for (int first = 0; first < tokens; first += kSeveral<S>) {
    Vecs<S> factor, factor_m1;
    exp_expm1(load_vecs(m.dt + first * W) * A, factor, factor_m1);
    for (int i = 0, t = first; i < kSeveral<S>; ++i, ++t) {
      const Decay<S> decay = {factor.v[i], factor_m1.v[i]};
      m.decays[t] = decay;
      store(m.carried + t * W, decay.factor * h.value);  // h_t - dt B u would lose digits
      h.step(decay, load(m.dt_u + t * W) * m.B[t]);
    }
  }

  Running<S> running = m.later_lambdas[n];
  Decay<S> decay = m.later_decays[n];  // of the token after t
  Vec<S> grad_An = {};
  for (int t = tokens - 1; t >= 0; --t) {
    running.step(decay, load(m.grad + t * W));
    decay = m.decays[t];
    const Vec<S> lambda = running.value, lambda_carried = lambda * load(m.carried + t * W);
    store(m.grad_dt_u + t * W, load(m.grad_dt_u + t * W) + lambda * m.B[t]);
    store(m.grad_s + t * W, load(m.grad_s + t * W) + lambda_carried * A);
    grad_An += lambda_carried * load(m.dt + t * W);
    store(m.products + t * W, lambda * load(m.dt_u + t * W));
  }
  m.later_lambdas[n] = running;
  m.later_decays[n] = decay;
  add_lanes<S>(m.grad_A + n * W, grad_An);

  sum_lanes(m.sums, m.products, tokens);
  const int64_t row = ((task.batch * p.groups + task.group) * p.channel_blocks(W) + task.block) * p.states + n;
  memcpy((S*)p.grad_B + row * p.length + chunk * kChunk, m.sums, tokens * sizeof(S));
}

// Replaces the gradients of dt u and of dt, now summed over the states, by those of u and of s = delta + bias, and
// stores them.
template <class T, class S>
INLINE void finish_chunk(const Task<T>& task, const BackwardMemory<S>& m, double* grad_bias, int64_t chunk) {
  constexpr int W = Task<T>::W;
  const Params& p = task.p;
  const int tokens = task.tokens(chunk);
  Vec<S> grad_bias_chunk = {};
  for (int t = 0; t < tokens; ++t) {
    const Vec<S> through_u = load(m.grad_dt_u + t * W);
    const Vec<S> grad_s = (through_u * load(m.u + t * W) + load(m.grad_s + t * W)) * load(m.sigmoid + t * W);
    grad_bias_chunk += grad_s;
    store(m.grad_s + t * W, grad_s);
    store(m.grad_dt_u + t * W, through_u * load(m.dt + t * W));
  }
  add_lanes<S>(grad_bias, grad_bias_chunk);
  task.store_activation(p.grad_u, p.grad_u_strides, m.grad_dt_u, chunk);
  task.store_activation(p.grad_delta, p.grad_delta_strides, m.grad_s, chunk);
}

template <class T>
void backward(const Params& p, int64_t index, void* memory) {
  using S = typename Task<T>::S;
  constexpr int W = Task<T>::W;
  Scratch scratch{(uintptr_t)memory};
  const BackwardMemory<S> m(p, scratch);
  const Task<T> task(p, index, m.A, m.bias);
  double grad_bias[W] = {};
  memset((void*)m.later_lambdas, 0, p.states * sizeof(Running<S>));
  memset((void*)m.later_decays, 0, p.states * sizeof(Decay<S>));
  memset(m.grad_A, 0, p.states * W * sizeof(double));

  scan_carries(task, m);
  for (int64_t chunk = p.chunks() - 1; chunk >= 0; --chunk) {
    task.load_steps(m.dt, m.dt_u, m.u, m.sigmoid, chunk);
    memset(m.grad_dt_u, 0, task.tokens(chunk) * VECTOR_BYTES);
    memset(m.grad_s, 0, task.tokens(chunk) * VECTOR_BYTES);
    for (int64_t n = 0; n < p.states; ++n) scan_back(task, m, n, chunk);
    finish_chunk(task, m, grad_bias, chunk);
  }

  for (int j = 0; j < task.channels; ++j) {
    const int64_t row = task.batch * p.channels + task.channel + j;
    p.grad_bias[row] = grad_bias[j];
    for (int64_t n = 0; n < p.states; ++n)
      p.grad_A[row * p.states + n] = m.grad_A[n * W + j] * (p.A_is_log ? task.A[n * W + j] : S(1));
  }
}

template <class T>
constexpr Kernel kForward = {Task<T>::W, bytes_of<ForwardMemory<typename Task<T>::S>, Params>, forward<T>};
template <class T>
constexpr Kernel kBackward = {Task<T>::W, bytes_of<BackwardMemory<typename Task<T>::S>, Params>, backward<T>};

constexpr Kernels kKernels = {
    {kForward<float>, kForward<double>, kForward<Half>, kForward<BFloat16>},
    {kBackward<float>, kBackward<double>, kBackward<Half>, kBackward<BFloat16>},
};

}  // namespace
}  // namespace selective_scan
