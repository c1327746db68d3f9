// Autograd functions in C++: they save what the backward pass needs and call the backward operators. They replace those
// in selective_scan/scan_ops.py and gate_ops.py, because Python would make a GPU wait.
#include "autograd.h"

namespace selective_scan {
namespace {

using namespace gradients;

class Scan : public Function<Scan> {
  using OptionalTensor = std::optional<Tensor>;
  using Forward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, bool, bool);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, bool, bool);

 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                        const OptionalTensor& delta_bias, bool delta_softplus, bool A_is_log) {
    static const auto op = operator_named<Forward>("selective_scan::selective_scan_state");
    ctx->save_for_backward({u, delta, A, B, or_undefined(delta_bias)});
    ctx->saved_data["delta_softplus"] = delta_softplus;
    ctx->saved_data["A_is_log"] = A_is_log;
    return below_autograd(op, u, delta, A, B, delta_bias, delta_softplus, A_is_log);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = operator_named<Backward>("selective_scan::selective_scan_state_backward");
    const auto saved = ctx->get_saved_variables();
    const auto bias = if_defined(saved[4]);
    const bool softplus = ctx->saved_data["delta_softplus"].toBool(), is_log = ctx->saved_data["A_is_log"].toBool();
    const auto [grad_u, grad_delta, grad_A, grad_B, grad_bias] =
        backward_by(op, grads[0], saved[0], saved[1], saved[2], saved[3], bias, softplus, is_log);
    return {grad_u, grad_delta, grad_A, grad_B, bias ? grad_bias : Tensor(), Tensor(), Tensor()};
  }

  static Tensor run(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                    const OptionalTensor& delta_bias, bool delta_softplus, bool A_is_log) {
    return apply(u, delta, A, B, delta_bias, delta_softplus, A_is_log);
  }
};

// Of this operator, C++ has only the autograd function. Triton or plain PyTorch computes the result and the gradients.
class NormGate : public Function<NormGate> {
  using Forward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                              const Tensor&, const Tensor&, double);

 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& y, const Tensor& z, const Tensor& weight,
                        const Tensor& bias, double eps) {
    static const auto op = operator_named<Forward>("selective_scan::norm_gate");
    ctx->save_for_backward({y, z, weight, bias});
    ctx->saved_data["eps"] = eps;
    return below_autograd(op, y, z, weight, bias, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = operator_named<Backward>("selective_scan::norm_gate_backward");
    const auto saved = ctx->get_saved_variables();
    const double eps = ctx->saved_data["eps"].toDouble();
    const auto [grad_y, grad_z, grad_weight, grad_bias] =
        backward_by(op, grads[0], saved[0], saved[1], saved[2], saved[3], eps);
    return {grad_y, grad_z, grad_weight, grad_bias, Tensor()};
  }

  static Tensor run(const Tensor& y, const Tensor& z, const Tensor& weight, const Tensor& bias, double eps) {
    return apply(y, z, weight, bias, eps);
  }
};

TORCH_LIBRARY_IMPL(selective_scan, Autograd, m) {
  m.impl("selective_scan_state", &Scan::run);
  m.impl("norm_gate", &NormGate::run);
}

}  // namespace
}  // namespace selective_scan
