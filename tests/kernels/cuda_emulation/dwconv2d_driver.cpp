// The CUDA kernels of dwconv2d on a host, behind two C functions for ctypes. Allocation and the order of the launches
// follow csrc/cuda/planes.cpp.
#include "emulation.h"
// After it:
#include "instances.cuh"

namespace dwconv2d {
namespace {

using emulation::Guarded;
using emulation::guarded;
using emulation::Order;

template <typename Instance>
void run_tiled(const Params& p, Pass pass, Order order) {
  using Taps = typename Instance::Taps;
  using Input = typename Instance::Input;
  using Activation = typename Instance::Activation;
  emulation::launch(p.blocks(), p.plan.threads, p.plan.shared, order, [&] {
    if (pass == Pass::kForward) return tiled_forward<Taps, Input, Activation, Instance::kOutputEquation>(p);
    if (pass == Pass::kAdjoint) return tiled_adjoint<Taps, Input, Activation, Instance::kOutputEquation>(p);
    return tiled_gradients<Taps, Input, Activation, Instance::kOutputEquation>(p);
  });
}

template <typename Kernel>
void launch_threads(int64_t threads, Order order, Kernel kernel) {
  emulation::launch(ceil_div<int64_t>(threads, kDirectThreads), kDirectThreads, 0, order, kernel);
}

template <typename Instance>
void run_direct(const Params& p, Pass pass, Order order) {
  using Taps = typename Instance::Taps;
  using Input = typename Instance::Input;
  using Activation = typename Instance::Activation;
  launch_threads(direct_results(p, pass), order, [&] {
    if (pass == Pass::kForward) return direct_forward<Taps, Input, Activation, Instance::kOutputEquation>(p);
    if (pass == Pass::kAdjoint) return direct_adjoint<Taps, Input, Activation, Instance::kOutputEquation>(p);
    return direct_gradients<Taps, Input, Activation, Instance::kOutputEquation>(p);
  });
  if constexpr (Instance::kOutputEquation) {
    const int64_t partials = p.batch * p.plan.channel_blocks * p.states * p.pixels();
    if (pass == Pass::kGradients) launch_threads(partials, order, [&] { direct_C_gradient<Input, Activation>(p); });
  }
}

void run(const Params& p, Pass pass, Order order) {
  const auto tiled = [&](auto instance) { run_tiled<decltype(instance)>(p, pass, order); };
  const auto direct = [&](auto instance) { run_direct<decltype(instance)>(p, pass, order); };
  if (!p.plan.tiled) return with_direct(p, direct);
  return p.operation == Operation::kConv ? with_tiled_conv(p, tiled) : with_tiled_fusion(p, tiled);
}

void add_up(const Sums& sums, Dtype dtype, Order order) {
  with_type(dtype, [&](auto activation) {
    using Output = decltype(activation);
    using State = StateOf<Output>;
    emulation::launch(sums.blocks(), kSumThreads, kSumThreads * sizeof(State), order,
                      [&] { sum_partials<State, Output>(sums); });
  });
}

template <typename State>
void unmerge(const Params& p, void* taps, void** to, Order order) {
  State* const states[] = {static_cast<State*>(to[0]), static_cast<State*>(to[1]), static_cast<State*>(to[2])};
  emulation::launch(3, kUnmergeThreads, kUnmergeThreads * sizeof(State), order, [&] {
    unmerge_taps(p, static_cast<const State*>(taps), states[0], states[1], states[2], static_cast<State*>(to[3]));
  });
}

Planes contiguous(void* data, const Params& p, int states) {
  const int64_t pixels = p.pixels();
  Planes planes;
  planes.data = data;
  planes.batch = p.batch > 1 ? p.channels * states * pixels : 0;
  planes.channel = p.channels > 1 ? states * pixels : 0;
  planes.state = states > 1 ? pixels : 0;
  return planes;
}

// The plan of a pass, with more rounds over channels than a host has planes for.
void plan_with_rounds(Params& p, Pass pass, int rounds) {
  make_plan(p, pass);
  if (pass != Pass::kGradients || !p.plan.tiled || rounds == 0) return;
  set_rounds(p, rounds);
  p.plan.channel_blocks = ceil_div(p.plan.sets, p.plan.rounds);
  p.plan.by_channel_blocks = Divisor(p.plan.channel_blocks);
}

Params make_params(const int64_t* numbers, const void* const* inputs, const int64_t* strides) {
  Params p;
  p.operation = Operation(numbers[0]);
  p.dtype = Dtype(numbers[1]);
  p.batch = numbers[2];
  p.channels = int(numbers[3]), p.states = int(numbers[4]), p.height = int(numbers[5]), p.width = int(numbers[6]);
  p.kernel_height = int(numbers[7]), p.kernel_width = int(numbers[8]), p.dilation = int(numbers[9]);
  p.zeros = numbers[10];
  Planes* const planes[] = {&p.input, &p.grad, &p.C, &p.x};
  for (int i = 0; i < 4; ++i) {
    planes[i]->data = inputs[i];
    planes[i]->batch = strides[3 * i], planes[i]->channel = strides[3 * i + 1], planes[i]->state = strides[3 * i + 2];
  }
  for (int k = 0; k < 3; ++k) p.weights[k] = inputs[4 + k];
  p.alpha = inputs[7], p.D = inputs[8], p.bias = inputs[9];
  return p;
}

}  // namespace
}  // namespace dwconv2d

using namespace dwconv2d;

// numbers: operation, dtype, batch, channels, states, height, width, kernel height and width, dilation, zeros, rounds
// (0: the plan's). inputs: what is convolved, grad, C, x, with strides by batch, channel and state; three kernels,
// alpha, D, bias. Returns an error's message or null.
extern "C" const char* emulated_forward(
    int order, const int64_t* numbers, const void* const* inputs, const int64_t* strides, void** outputs) {
  return guarded([&] {
    Params p = make_params(numbers, inputs, strides);
    p.result = contiguous(outputs[0], p, p.has_output_equation() ? 1 : p.states);
    make_plan(p, Pass::kForward);
    run(p, Pass::kForward, Order(order));
  });
}

// outputs: gradients of what is convolved, x, three kernels (the convolution's is the first), alpha, D or bias, C.
extern "C" const char* emulated_backward(
    int order, const int64_t* numbers, const void* const* inputs, const int64_t* strides, void** outputs) {
  return guarded([&] {
    Params p = make_params(numbers, inputs, strides);
    const auto turn = Order(order);
    p.grad_input = contiguous(outputs[0], p, p.states);
    p.grad_x = contiguous(outputs[1], p, 1);
    plan_with_rounds(p, Pass::kAdjoint, int(numbers[11]));
    run(p, Pass::kAdjoint, turn);

    plan_with_rounds(p, Pass::kGradients, int(numbers[11]));
    const Dtype state = p.dtype == Dtype::kDouble ? Dtype::kDouble : Dtype::kFloat;
    const bool conv = p.operation == Operation::kConv;
    const int64_t slices = p.batch * p.slices, taps = int64_t(p.channels) * p.taps();
    Guarded partials_taps(slices * taps * size_of(state)), partials_D_or_bias(slices * p.channels * size_of(state));
    Guarded partials_C(p.batch * p.plan.channel_blocks * p.states * p.pixels() * size_of(state));
    Guarded grad_taps(taps * size_of(state));
    p.partials_taps = partials_taps.data();
    p.partials_D_or_bias = p.operation == Operation::kFusion ? nullptr : partials_D_or_bias.data();
    p.partials_C = partials_C.data();
    run(p, Pass::kGradients, turn);

    Sums sums;
    sums.first = {p.partials_taps, conv ? outputs[2] : grad_taps.data(), 1, slices, taps, !conv};
    if (p.partials_D_or_bias) sums.second = {p.partials_D_or_bias, outputs[6], 1, slices, p.channels, !conv};
    if (p.has_output_equation()) {
      sums.third = {p.partials_C, outputs[7], p.batch, p.plan.channel_blocks, p.states * p.pixels(), false};
    }
    add_up(sums, p.dtype, turn);
    if (!conv && state == Dtype::kDouble) unmerge<double>(p, grad_taps.data(), outputs + 2, turn);
    if (!conv && state == Dtype::kFloat) unmerge<float>(p, grad_taps.data(), outputs + 2, turn);
    for (const Guarded* memory : {&partials_taps, &partials_D_or_bias, &partials_C, &grad_taps}) memory->check();
  });
}

// tiled, tile rows and columns, planes, threads with outputs, threads, bytes of shared memory, conflicts, rounds
extern "C" void emulated_plan(int pass, const int64_t* numbers, const int64_t* strides, int64_t* results) {
  const void* const aligned_but_null[10] = {};
  Params p = make_params(numbers, aligned_but_null, strides);
  const int of_result = p.has_output_equation() ? 1 : p.states;
  p.result = contiguous(nullptr, p, of_result);
  p.grad_input = contiguous(nullptr, p, p.states);
  p.grad_x = contiguous(nullptr, p, 1);
  make_plan(p, Pass(pass));
  const Plan& plan = p.plan;
  const int conflicts = plan.tiled ? Lanes(plan).conflicts(plan, p.convolved_bytes(Pass(pass)), true) : 0;
  const int busy = plan.planes * plan.threads_per_plane;
  const int64_t values[] = {plan.tiled,   plan.rows.tile, plan.columns.tile, plan.planes, busy,
                            plan.threads, plan.shared,    conflicts,         plan.rounds};
  std::copy(std::begin(values), std::end(values), results);
}
