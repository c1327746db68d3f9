// Checks of the compiled kernels' arguments. The messages are those of selective_scan/scan_reference.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

namespace selective_scan {

struct Sizes {
  int64_t batch, channels, states, length;
  int64_t groups;  // 1 if B has no group dimension
};

// A Python tuple, as in the messages of the reference.
inline std::string tuple(const at::Tensor& t) {
  std::string text = "(";
  for (int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + (t.dim() == 1 ? ",)" : ")");
}

inline at::ScalarType state_dtype(const at::Tensor& u) {
  return u.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
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

inline void check_dtype_and_device(const char* name, const at::Tensor& t, at::ScalarType dtype, const at::Tensor& u) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype_name(dtype), " when u is ",
                   dtype_name(u.scalar_type()), ", got ", dtype_name(t.scalar_type()));
  TORCH_CHECK_VALUE(t.device() == u.device(), name, " is on ", t.device(), " but u is on ", u.device());
}

inline Sizes check_shapes(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                          const std::optional<at::Tensor>& delta_bias) {
  TORCH_CHECK_VALUE(u.dim() == 3, "u must be (batch, channels, length), got shape ", tuple(u));
  const int64_t b = u.size(0), d = u.size(1), l = u.size(2);
  TORCH_CHECK_VALUE(delta.sizes() == u.sizes(), "delta must have u's shape ", tuple(u), ", got ", tuple(delta));
  TORCH_CHECK_VALUE(A.dim() == 2 && A.size(0) == d, "A must be (channels=", d, ", states), got shape ", tuple(A));
  const int64_t n = A.size(1);
  TORCH_CHECK_VALUE(d && n && l, "channels, states and length must be at least 1, got ", d, ", ", n, " and ", l);
  TORCH_CHECK_VALUE((B.dim() == 3 || B.dim() == 4) && B.size(0) == b && B.size(-2) == n && B.size(-1) == l,
                    "B must be (batch=", b, ", states=", n, ", length=", l,
                    ") or (batch, groups, states, length), got shape ", tuple(B));
  const int64_t g = B.dim() == 4 ? B.size(1) : 1;
  TORCH_CHECK_VALUE(g && d % g == 0, "B has ", g, " groups, which do not divide the ", d, " channels of u");
  TORCH_CHECK_VALUE(!delta_bias || (delta_bias->dim() == 1 && delta_bias->size(0) == d),
                    "delta_bias must be (channels=", d, ",), got shape ", tuple(*delta_bias));
  return {b, d, n, l, g};
}

// Throws ValueError or TypeError naming the first argument that does not fit the others.
inline Sizes check_inputs(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                          const std::optional<at::Tensor>& delta_bias) {
  const Sizes sizes = check_shapes(u, delta, A, B, delta_bias);
  const at::ScalarType dtype = u.scalar_type(), state = state_dtype(u);
  TORCH_CHECK_TYPE(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
                   "u must be float16, bfloat16, float32 or float64, got ",
                   dtype_name(dtype));
  check_dtype_and_device("delta", delta, dtype, u);
  check_dtype_and_device("A", A, state, u);
  check_dtype_and_device("B", B, dtype, u);
  if (delta_bias) check_dtype_and_device("delta_bias", *delta_bias, state, u);
  return sizes;
}

inline void check_grad(const at::Tensor& grad, const at::Tensor& u, const Sizes& sizes) {
  const bool fits = grad.dim() == 4 && grad.size(0) == sizes.batch && grad.size(1) == sizes.channels &&
                    grad.size(2) == sizes.states && grad.size(3) == sizes.length;
  TORCH_CHECK_VALUE(fits, "grad must be (", sizes.batch, ", ", sizes.channels, ", ", sizes.states, ", ", sizes.length,
                    "), got shape ", tuple(grad));
  check_dtype_and_device("grad", grad, state_dtype(u), u);
}

}  // namespace selective_scan
