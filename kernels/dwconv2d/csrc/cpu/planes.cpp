// The operators on the CPU: arguments, memory, threads and the choice of an instruction set.
#include "planes.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../check.h"
#include "host.h"

namespace dwconv2d {
namespace {

using Bias = std::optional<Tensor>;

constexpr int64_t kStripBytes = 320 * 1024;  // of a strip with its margins, for the L2 cache
constexpr int64_t kTargetTasks = 16;         // for the threads
constexpr int64_t kLeastStripRows = 16;
constexpr int kDilations[] = {1, 3, 5};

const Kernels& kernels() {
#ifdef KERNELS_X86
  return host::choose(kPortable, kAvx2, kAvx512);
#else
  return kPortable;
#endif
}

ElementTypes element_types_of(const Tensor& in, const Tensor& activation) {
  switch (activation.scalar_type()) {
    case at::kDouble: return kFloat64;
    case at::kHalf: return in.scalar_type() == at::kHalf ? kFloat16 : kFloat32WithFloat16;
    case at::kBFloat16: return in.scalar_type() == at::kBFloat16 ? kBFloat16 : kFloat32WithBFloat16;
    default: return kFloat32;
  }
}

// Planes (B, D, H, W) or (B, D, N, H, W).
View planes(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.dim() == 5 ? t.stride(2) : 0, t.stride(-2), t.stride(-1)};
}

// C, (B, N, H, W).
View per_state(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), 0, t.stride(1), t.stride(2), t.stride(3)}; }

View per_channel(const Tensor& t) { return {t.const_data_ptr(), 0, t.stride(0)}; }

// Taps in the order of their rows, and weights for each channel.
struct Taps {
  Pattern pattern;
  std::vector<int> rows, columns;
  Tensor weights;  // (taps, channels and more)

  void add(int row, int column) {
    rows.push_back(row);
    columns.push_back(column);
  }

  void allocate(const Tensor& like, at::ScalarType dtype, int64_t channels) {
    constexpr int64_t kMostLanes = 16;  // kernels load whole vectors
    const int64_t pitch = (channels + kMostLanes - 1) / kMostLanes * kMostLanes;
    weights = at::zeros({int64_t(rows.size()), pitch}, like.options().dtype(dtype));
  }
};

// The 25 taps of state fusion, and the index of each kernel's taps among them. All kernels share the centre.
struct FusionTapTable {
  std::vector<int> rows, columns;
  int index[3][9];

  FusionTapTable() {
    for (int row = -5; row <= 5; ++row) {
      for (int column = -5; column <= 5; ++column) {
        bool used = false;
        for (int k = 0; k < 3; ++k) {
          const int d = kDilations[k];
          const bool here = row % d == 0 && column % d == 0 && std::abs(row) <= d && std::abs(column) <= d;
          if (here) index[k][(row / d + 1) * 3 + column / d + 1] = rows.size();
          used |= here;
        }
        if (!used) continue;
        rows.push_back(row);
        columns.push_back(column);
      }
    }
  }
};

const FusionTapTable& fusion_taps() {
  static const FusionTapTable taps;
  return taps;
}

using Weights = std::array<Tensor, 3>;

template <class S>
void merge(Taps& taps, const Weights& weights, const Tensor& alpha, int64_t channels) {
  const Tensor factors = alpha.contiguous();
  S* to = taps.weights.mutable_data_ptr<S>();
  const int64_t pitch = taps.weights.size(1);
  for (int k = 0; k < 3; ++k) {
    const Tensor dense = weights[k].contiguous();
    const S *from = dense.const_data_ptr<S>(), factor = factors.const_data_ptr<S>()[k];
    for (int i = 0; i < 9; ++i) {
      S* const row = to + fusion_taps().index[k][i] * pitch;
      for (int64_t d = 0; d < channels; ++d) row[d] += factor * from[d * 9 + i];
    }
  }
}

Taps fusion_weights(const Tensor& h, const Weights& weights, const Tensor& alpha) {
  Taps taps{kFusion, fusion_taps().rows, fusion_taps().columns, {}};
  taps.allocate(h, h.scalar_type(), h.size(1));
  h.scalar_type() == at::kDouble ? merge<double>(taps, weights, alpha, h.size(1))
                                 : merge<float>(taps, weights, alpha, h.size(1));
  return taps;
}

Taps conv_weights(const Tensor& weight, int64_t dilation, const Sizes& sizes) {
  const int height = sizes.kernel_height, width = sizes.kernel_width;
  Taps taps{height == 3 && width == 3 && dilation == 1 ? kSquare3 : kAny, {}, {}, {}};
  const int clipped = std::min(dilation, std::max(sizes.height, sizes.width));  // larger ones give the same result
  for (int i = 0; i < height; ++i)
    for (int j = 0; j < width; ++j) taps.add(clipped * (i - height / 2), clipped * (j - width / 2));
  taps.allocate(weight, at::promoteTypes(weight.scalar_type(), at::kFloat), weight.size(0));
  taps.weights.slice(1, 0, weight.size(0)).copy_(weight.reshape({weight.size(0), height * width}).t());
  return taps;
}

Params params_of(const Sizes& sizes, const Taps& taps, bool zeros) {
  Params p{};
  p.batch = sizes.batch, p.channels = sizes.channels, p.states = sizes.states;
  p.height = sizes.height, p.width = sizes.width;
  p.zeros = zeros;
  p.pattern = taps.pattern;
  p.taps = taps.rows.size(), p.tap_rows = taps.rows.data(), p.tap_columns = taps.columns.data();
  for (int k = 0; k < p.taps; ++k) {
    p.reach_rows = std::max(p.reach_rows, std::abs(taps.rows[k]));
    p.reach_columns = std::max(p.reach_columns, std::abs(taps.columns[k]));
    p.distinct_rows += k == 0 || taps.rows[k] != taps.rows[k - 1];
  }
  p.weights = taps.weights.const_data_ptr(), p.weight_pitch = taps.weights.size(1);
  return p;
}

// A strip with its margins should stay in the L2 cache, and there should be tasks for several threads. The choice must
// not depend on the number of threads.
void choose_strips(Params& p, const Kernel& kernel) {
  const int64_t row_bytes = (p.width + 2 * p.reach_columns) * kernel.pixel_bytes;
  const int64_t fitting = kStripBytes / row_bytes - 2 * p.reach_rows;
  const int64_t blocks = std::max<int64_t>(1, p.batch * p.channel_blocks(kernel.channels));
  const int64_t strips = std::max<int64_t>(1, kTargetTasks / blocks);
  const int64_t shared = (p.height + strips - 1) / strips;
  p.strip_rows = std::min({p.height, std::max(fitting, kLeastStripRows), std::max(shared, kLeastStripRows)});
  p.strips = (p.height + p.strip_rows - 1) / p.strip_rows;
}

int64_t tasks(const Params& p, const Kernel& kernel) { return p.batch * p.channel_blocks(kernel.channels) * p.strips; }

// Whether `fusion_rows` can compute it, and faster than the kernel whose lanes are channels. It goes down
// columns: short columns do not pay off, and planes that are not in a cache would be read in a bad order.
bool takes_rows(const Params& p, ElementTypes types) {
  constexpr int64_t kLeastHeight = 24, kMostElements = 2 << 20;
  const auto has_rows = [](const View& v) { return !v.data || v.column == 1; };
  return kernels().fusion_rows.run && p.pattern == kFusion && types == kFloat32 && p.width >= kRowsWidth &&
         p.height >= kLeastHeight && p.batch * p.channels * p.states * p.height * p.width <= kMostElements &&
         has_rows(p.in) && has_rows(p.C) && has_rows(p.x) && has_rows(p.out);
}

void run_forward(Params& p, ElementTypes types, const Tensor& out) {
  p.out = planes(out);
  const Kernel& kernel = takes_rows(p, types) ? kernels().fusion_rows : kernels().forward[types];
  choose_strips(p, kernel);
  host::run(kernel, p, tasks(p, kernel));
}

// Returns the gradients of the taps' weights and, in the last row, of D or the bias, (taps + 1, D); and C's gradient if
// there is a C.
std::pair<Tensor, Tensor> run_backward(Params& p, ElementTypes types, const Tensor& grad_in, const Tensor* C) {
  const Kernel& kernel = kernels().backward[types];
  choose_strips(p, kernel);
  p.grad_in = planes(grad_in);
  const bool in_double = types == kFloat64;
  const auto options = grad_in.options().dtype(in_double ? at::kDouble : at::kFloat);
  const int64_t strips = p.batch * p.strips, channel_blocks = p.channel_blocks(kernel.channels);
  const Tensor weights = at::empty({strips, p.taps + 1, p.channels}, options);
  p.grad_weights = weights.mutable_data_ptr();
  Tensor partials_of_C;
  if (C) {
    partials_of_C = at::empty({p.batch, p.states, channel_blocks, p.height, p.width}, options);
    p.grad_C = partials_of_C.mutable_data_ptr();
  }
  host::run(kernel, p, tasks(p, kernel));
  const auto sum = in_double ? host::sum<double> : host::sum<float>;
  const Tensor grad_weights = sum(weights, 1, strips, at::empty({p.taps + 1, p.channels}, options));
  if (!C) return {grad_weights, {}};
  const Tensor grad_C = at::empty(C->sizes(), C->options());
  return {grad_weights, sum(partials_of_C, p.batch * p.states, channel_blocks, grad_C)};
}

// ----- dilated_dwconv2d

Params conv_params(const Sizes& sizes, const Taps& taps, const Tensor& x, c10::string_view padding_mode) {
  Params p = params_of(sizes, taps, padding_mode == "zeros");
  p.in = planes(x);
  return p;
}

Tensor dilated_dwconv2d(const Tensor& x, const Tensor& weight, const Bias& bias, int64_t dilation,
                        c10::string_view padding_mode) {
  const Sizes sizes = check_conv_inputs(x, weight, bias, dilation, padding_mode);
  const Tensor y = empty_laid_out_as(x);
  const Taps taps = conv_weights(weight, dilation, sizes);
  Params p = conv_params(sizes, taps, x, padding_mode);
  if (bias) p.bias = per_channel(*bias);
  run_forward(p, element_types_of(x, x), y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dilated_dwconv2d_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t dilation, c10::string_view padding_mode) {
  const Sizes sizes = check_conv_inputs(x, weight, {}, dilation, padding_mode);
  check_grad(grad, x);
  const Tensor grad_x = empty_laid_out_as(x);
  const Taps taps = conv_weights(weight, dilation, sizes);
  Params p = conv_params(sizes, taps, x, padding_mode);
  p.grad = planes(grad);
  const Tensor grads = run_backward(p, element_types_of(x, x), grad_x, nullptr).first;
  const Tensor grad_weight = at::empty(weight.sizes(), weight.options());
  grad_weight.view({sizes.channels, p.taps}).copy_(grads.slice(0, 0, p.taps).t());
  return {grad_x, grad_weight, at::empty({sizes.channels}, weight.options()).copy_(grads.select(0, p.taps))};
}

// ----- state fusion

// Computes the gradients of the three kernels and of alpha from those of the 25 taps.
template <class S>
void unmerge(const Tensor& taps, const Weights& weights, const Tensor& alpha, const Weights& grads,
             const Tensor& grad_alpha) {
  const int64_t channels = taps.size(1);
  const Tensor factors = alpha.contiguous();
  for (int k = 0; k < 3; ++k) {
    const Tensor dense = weights[k].contiguous();
    const S *weight = dense.const_data_ptr<S>(), *grad = taps.const_data_ptr<S>();
    const S factor = factors.const_data_ptr<S>()[k];
    S* to = grads[k].mutable_data_ptr<S>();
    double sums[9] = {};
    for (int64_t d = 0; d < channels; ++d, ++grad, weight += 9, to += 9) {
      for (int i = 0; i < 9; ++i) {
        const S g = grad[fusion_taps().index[k][i] * channels];
        to[i] = factor * g;
        sums[i] += double(weight[i]) * g;
      }
    }
    double sum = 0;
    for (double part : sums) sum += part;
    grad_alpha.mutable_data_ptr<S>()[k] = sum;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> unmerge(const Tensor& taps, const Weights& weights, const Tensor& alpha) {
  const auto like = [](const Tensor& t) { return at::empty(t.sizes(), t.options()); };
  const Weights grads = {like(weights[0]), like(weights[1]), like(weights[2])};
  const Tensor grad_alpha = like(alpha);
  alpha.scalar_type() == at::kDouble ? unmerge<double>(taps, weights, alpha, grads, grad_alpha)
                                     : unmerge<float>(taps, weights, alpha, grads, grad_alpha);
  return {grads[0], grads[1], grads[2], grad_alpha};
}

Tensor state_fusion(const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5,
                    const Tensor& alpha) {
  const Sizes sizes = check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha);
  const Tensor fused = at::empty(h.sizes(), h.options());
  const Taps taps = fusion_weights(h, {weight3, weight3_d3, weight3_d5}, alpha);
  Params p = params_of(sizes, taps, false);
  p.in = planes(h);
  run_forward(p, element_types_of(h, h), fused);
  return fused;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> state_fusion_backward(
    const Tensor& grad, const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5,
    const Tensor& alpha) {
  const Sizes sizes = check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha);
  check_grad(grad, h);
  const Weights weights = {weight3, weight3_d3, weight3_d5};
  const Tensor grad_h = at::empty(h.sizes(), h.options());
  const Taps taps = fusion_weights(h, weights, alpha);
  Params p = params_of(sizes, taps, false);
  p.in = planes(h);
  p.grad = planes(grad);
  const Tensor grads = run_backward(p, element_types_of(h, h), grad_h, nullptr).first;
  return std::tuple_cat(std::tuple(grad_h), unmerge(grads, weights, alpha));
}

Params output_params(const Sizes& sizes, const Taps& taps, const Tensor& h, const Tensor& C, const Tensor& D,
                     const Tensor& x) {
  Params p = params_of(sizes, taps, false);
  p.in = planes(h);
  p.C = per_state(C);
  p.D = per_channel(D);
  p.x = planes(x);
  return p;
}

Tensor state_fusion_output(const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5,
                           const Tensor& alpha, const Tensor& C, const Tensor& D, const Tensor& x) {
  const Sizes sizes = check_output_inputs(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x);
  const Tensor y = empty_laid_out_as(x);
  const Taps taps = fusion_weights(h, {weight3, weight3_d3, weight3_d5}, alpha);
  Params p = output_params(sizes, taps, h, C, D, x);
  run_forward(p, element_types_of(h, x), y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> state_fusion_output_backward(
    const Tensor& grad, const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5,
    const Tensor& alpha, const Tensor& C, const Tensor& D, const Tensor& x) {
  const Sizes sizes = check_output_inputs(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x);
  check_grad(grad, x);
  const Weights weights = {weight3, weight3_d3, weight3_d5};
  const Tensor grad_h = at::empty(h.sizes(), h.options()), grad_x = empty_laid_out_as(x);
  const Taps taps = fusion_weights(h, weights, alpha);
  Params p = output_params(sizes, taps, h, C, D, x);
  p.grad = planes(grad);
  p.grad_x = planes(grad_x);
  const auto [grads, grad_C] = run_backward(p, element_types_of(h, x), grad_h, &C);
  const Tensor grad_D = grads.select(0, p.taps).clone();
  return std::tuple_cat(std::tuple(grad_h), unmerge(grads, weights, alpha), std::tuple(grad_C, grad_D, grad_x));
}

}  // namespace

TORCH_LIBRARY_IMPL(dwconv2d, CPU, m) {
  m.impl("dilated_dwconv2d", &dilated_dwconv2d);
  m.impl("dilated_dwconv2d_backward", &dilated_dwconv2d_backward);
  m.impl("state_fusion", &state_fusion);
  m.impl("state_fusion_backward", &state_fusion_backward);
  m.impl("state_fusion_output", &state_fusion_output);
  m.impl("state_fusion_output_backward", &state_fusion_output_backward);
}

}  // namespace dwconv2d
