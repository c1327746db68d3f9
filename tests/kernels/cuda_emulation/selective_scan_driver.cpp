// The CUDA kernels of selective_scan on a host, behind two C functions for ctypes. Allocation and the order of the
// launches follow csrc/cuda/scan.cpp.
#include "emulation.h"
// After it:
#include "scan_kernel.cuh"

namespace selective_scan {
namespace {

using emulation::Guarded;
using emulation::guarded;

template <typename I>
void forward(const Params& p, emulation::Order order) {
  emulation::launch(p.blocks(), p.plan.threads, Layout<typename I::Input>(p.plan, false).total, order,
                    [&] { scan_forward<typename I::Input, I::kItems, I::kFlat>(p); });
}

template <typename I>
void backward(const Params& p, emulation::Order order) {
  emulation::launch(p.blocks(), p.plan.threads, Layout<typename I::Input>(p.plan, true).total, order,
                    [&] { scan_backward<typename I::Input, I::kItems, I::kFlat>(p); });
}

template <typename State, typename Output>
void add_up(const Sums& sums, emulation::Order order) {
  emulation::launch(sums.blocks(), kSumThreads, kSumThreads * sizeof(State), order,
                    [&] { sum_partials<State, Output>(sums); });
}

// Rounds enough to matter take more rows than a host has time for.
void plan_with_rounds(Params& p, Dtype dtype, bool is_backward, int rounds) {
  make_plan(p, dtype, is_backward);
  if (rounds > 0 && one_state_kernel(p.plan.items, p.plan.flat)) set_rounds(p.plan, rounds);
}

View view(const void* const* pointers, const int64_t* strides, int i) {
  return {pointers[i], strides[4 * i], strides[4 * i + 1], strides[4 * i + 2], strides[4 * i + 3]};
}

Params make_params(const int64_t* sizes, const void* const* inputs, const int64_t* strides) {
  Params p;
  p.batch = sizes[0], p.channels = int(sizes[1]), p.states = int(sizes[2]), p.length = int(sizes[3]);
  p.groups = int(sizes[4]), p.softplus = sizes[5], p.A_is_log = sizes[7];
  View* const views[] = {&p.u, &p.delta, &p.A, &p.B, &p.bias, &p.grad};
  for (int i = 0; i < 6; ++i) *views[i] = view(inputs, strides, i);
  return p;
}

}  // namespace
}  // namespace selective_scan

using namespace selective_scan;

// sizes: batch, channels, states, length, groups, softplus, rounds (0: the plan's), A_is_log. inputs and strides: u,
// delta, A, B, bias, grad, by batch, channel, state and token. Returns an error's message or null.
extern "C" const char* emulated_forward(
    int dtype, int order, const int64_t* sizes, const void* const* inputs, const int64_t* strides, void* h) {
  return guarded([&] {
    Params p = make_params(sizes, inputs, strides);
    p.h = h;
    plan_with_rounds(p, Dtype(dtype), false, int(sizes[6]));
    with_instance(p.plan, Dtype(dtype), [&](auto instance) {
      forward<decltype(instance)>(p, emulation::Order(order));
    });
  });
}

// outputs: gradients of u, delta, A, B, bias.
extern "C" const char* emulated_backward(
    int dtype, int order, const int64_t* sizes, const void* const* inputs, const int64_t* strides, void** outputs) {
  return guarded([&] {
    Params p = make_params(sizes, inputs, strides);
    p.grad_u = outputs[0];
    p.grad_delta = outputs[1];
    const auto turn = emulation::Order(order);
    plan_with_rounds(p, Dtype(dtype), true, int(sizes[6]));
    const int64_t rows = p.batch * p.channels;
    with_instance(p.plan, Dtype(dtype), [&](auto instance) {
      using I = decltype(instance);
      using Input = typename I::Input;
      using State = StateOf<typename I::Input>;
      Guarded boundaries(size_t(rows) * p.states * p.plan.chunks * sizeof(State));
      Guarded partials_A(rows * p.states * sizeof(State)), partials_bias(rows * sizeof(State));
      Guarded partials_B(size_t(p.blocks()) * p.states * p.length * sizeof(State));
      p.boundaries = boundaries.data();
      p.partials_A = partials_A.data();
      p.partials_bias = partials_bias.data();
      p.partials_B = partials_B.data();
      if (p.plan.chunks > 1) forward<I>(boundary_pass(p), turn);
      backward<I>(p, turn);
      const int64_t images = p.batch * p.groups, tokens = int64_t(p.states) * p.length;
      const Sums sums{{p.partials_A, outputs[2], 1, p.batch, int64_t(p.channels) * p.states, true},
                      {p.partials_bias, outputs[4], 1, p.batch, p.channels, true},
                      {p.partials_B, outputs[3], images, p.plan.row_blocks, tokens, false}};
      add_up<State, Input>(sums, turn);
      for (const Guarded* memory : {&boundaries, &partials_A, &partials_bias, &partials_B}) memory->check();
    });
  });
}

// items, rows, threads per row, threads, rounds, chunks, flat
extern "C" void emulated_plan(int dtype, int backward, const int64_t* sizes, const int64_t* strides, int64_t* numbers) {
  const void* const aligned_but_null[6] = {};
  Params p = make_params(sizes, aligned_but_null, strides);
  make_plan(p, Dtype(dtype), backward);
  const Plan& plan = p.plan;
  const int64_t values[] = {plan.items,  plan.rows,   plan.threads_per_row, plan.threads,
                            plan.rounds, plan.chunks, plan.flat};
  std::copy(std::begin(values), std::end(values), numbers);
}
