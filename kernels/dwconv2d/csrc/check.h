// Checks of the compiled kernels' arguments. The messages are those of dwconv2d/plane_reference.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

namespace dwconv2d {

using at::Tensor;

// The sizes of planes and, for `dilated_dwconv2d`, of the kernel.
struct Sizes {
  int64_t batch, channels, states, height, width;
  int64_t kernel_height = 0, kernel_width = 0;
};

// A Python tuple, as in the messages of the reference.
inline std::string tuple(at::IntArrayRef sizes) {
  std::string text = "(";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf: return "torch.float16";
    case at::kBFloat16: return "torch.bfloat16";
    case at::kFloat: return "torch.float32";
    case at::kDouble: return "torch.float64";
    default: return c10::toString(dtype);
  }
}

inline bool holds_zero(at::IntArrayRef sizes) {
  for (int64_t size : sizes)
    if (size == 0) return true;
  return false;
}

inline void check_shape(const char* name, const Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be ", tuple(sizes), ", got shape ", tuple(t.sizes()));
}

inline void check_float(const char* name, const Tensor& t) {
  const at::ScalarType dtype = t.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble, name,
                   " must be float16, bfloat16, float32 or float64, got ", dtype_name(dtype));
}

using Named = std::initializer_list<std::pair<const char*, const Tensor*>>;

inline void check_like(const char* reference_name, const Tensor& reference, at::ScalarType dtype, Named tensors) {
  for (const auto& [name, t] : tensors) {
    TORCH_CHECK_TYPE(t->scalar_type() == dtype, name, " must be ", dtype_name(dtype), " when ", reference_name, " is ",
                     dtype_name(reference.scalar_type()), ", got ", dtype_name(t->scalar_type()));
    TORCH_CHECK_VALUE(t->device() == reference.device(), name, " is on ", t->device(), " but ", reference_name,
                      " is on ", reference.device());
  }
}

inline Sizes check_conv_inputs(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                               int64_t dilation, c10::string_view padding_mode) {
  TORCH_CHECK_VALUE(x.dim() == 4 && !holds_zero(x.sizes().slice(1)),
                    "x must be (batch, channels, height, width), where only batch may be 0, got shape ",
                    tuple(x.sizes()));
  const int64_t channels = x.size(1);
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1 && weight.size(2) % 2 == 1 &&
                        weight.size(3) % 2 == 1,
                    "weight must be (channels=", channels, ", 1, kernel height, kernel width) with an odd kernel, ",
                    "got shape ", tuple(weight.sizes()));
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == channels), "bias must be (channels=", channels,
                    ",), got shape ", tuple(bias->sizes()));
  const int64_t radius = std::max(weight.size(2), weight.size(3)) / 2;
  TORCH_CHECK_VALUE(dilation >= 1 && (radius == 0 || dilation <= INT32_MAX / radius),
                    "dilation must be at least 1, with all taps less than 2^31 away, got ", dilation);
  TORCH_CHECK_VALUE(padding_mode == "replicate" || padding_mode == "zeros",
                    "padding_mode must be one of ('replicate', 'zeros'), got '", padding_mode, "'");
  check_float("x", x);
  check_like("x", x, x.scalar_type(), {{"weight", &weight}});
  if (bias) check_like("x", x, x.scalar_type(), {{"bias", &*bias}});
  return {x.size(0), channels, 1, x.size(2), x.size(3), weight.size(2), weight.size(3)};
}

inline Sizes check_fusion_inputs(const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3,
                                 const Tensor& weight3_d5, const Tensor& alpha) {
  TORCH_CHECK_VALUE((h.dim() == 4 || h.dim() == 5) && !holds_zero(h.sizes().slice(1)),
                    "h must be (batch, channels, height, width) or (batch, channels, states, height, width), ",
                    "where only batch may be 0, got shape ", tuple(h.sizes()));
  const int64_t channels = h.size(1);
  const Named weights = {{"weight3", &weight3}, {"weight3_d3", &weight3_d3}, {"weight3_d5", &weight3_d5}};
  for (const auto& [name, weight] : weights) {
    const bool fits = weight->dim() == 4 && weight->sizes() == at::IntArrayRef({channels, 1, 3, 3});
    TORCH_CHECK_VALUE(fits, name, " must be (channels=", channels, ", 1, 3, 3), got shape ", tuple(weight->sizes()));
  }
  TORCH_CHECK_VALUE(alpha.dim() == 1 && alpha.size(0) == 3, "alpha must be (3,), got shape ", tuple(alpha.sizes()));
  const at::ScalarType state = h.scalar_type();
  TORCH_CHECK_TYPE(state == at::kFloat || state == at::kDouble,
                   "h must be float32 or float64, states are never 16-bit, got ", dtype_name(state));
  check_like("h", h, state, weights);
  check_like("h", h, state, {{"alpha", &alpha}});
  return {h.size(0), channels, h.dim() == 5 ? h.size(2) : 1, h.size(-2), h.size(-1)};
}

inline Sizes check_output_inputs(const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3,
                                 const Tensor& weight3_d5, const Tensor& alpha, const Tensor& C, const Tensor& D,
                                 const Tensor& x) {
  const Sizes s = check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha);
  TORCH_CHECK_VALUE(C.sizes() == at::IntArrayRef({s.batch, s.states, s.height, s.width}), "C must be (batch=", s.batch,
                    ", states=", s.states, ", height=", s.height, ", width=", s.width, "), got shape ",
                    tuple(C.sizes()));
  TORCH_CHECK_VALUE(D.sizes() == at::IntArrayRef({s.channels}), "D must be (channels=", s.channels,
                    ",), got shape ", tuple(D.sizes()));
  TORCH_CHECK_VALUE(x.sizes() == at::IntArrayRef({s.batch, s.channels, s.height, s.width}), "x must be (batch=",
                    s.batch, ", channels=", s.channels, ", height=", s.height, ", width=", s.width, "), got shape ",
                    tuple(x.sizes()));
  check_float("x", x);
  TORCH_CHECK_TYPE((x.scalar_type() == at::kDouble) == (h.scalar_type() == at::kDouble),
                   "x must be float64 exactly if h is, got ", dtype_name(x.scalar_type()), " with ",
                   dtype_name(h.scalar_type()), " states");
  check_like("h", h, h.scalar_type(), {{"D", &D}});
  check_like("x", x, x.scalar_type(), {{"C", &C}});
  check_like("h", h, x.scalar_type(), {{"x", &x}});
  return s;
}

// A backward operator's `grad` must have the shape, dtype and device of the forward operator's result.
inline void check_grad(const Tensor& grad, const Tensor& like) {
  check_shape("grad", grad, like.sizes());
  check_like("the result", like, like.scalar_type(), {{"grad", &grad}});
}

// An empty result that is laid out as `like`: channels-last if `like` is, else contiguous.
inline Tensor empty_laid_out_as(const Tensor& like) {
  return at::empty(like.sizes(), like.options().memory_format(like.suggest_memory_format()));
}

}  // namespace dwconv2d
