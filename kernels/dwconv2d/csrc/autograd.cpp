// Autograd functions in C++: they save what the backward pass needs and call the backward operators. They replace those
// in dwconv2d/plane_ops.py and token_ops.py, because Python would make a GPU wait. `dilated_dwconv2d` and
// `state_fusion`, which the models do not call, `mlp`, and `depthwise_silu` with several uses keep theirs in Python.
#include "autograd.h"

namespace dwconv2d {
namespace {

using namespace gradients;
using OptionalTensor = std::optional<Tensor>;

class StateFusionOutput : public Function<StateFusionOutput> {
  using Forward = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         const Tensor&, const Tensor&);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&);

 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3,
                        const Tensor& weight3_d5, const Tensor& alpha, const Tensor& C, const Tensor& D,
                        const Tensor& x) {
    static const auto op = operator_named<Forward>("dwconv2d::state_fusion_output");
    ctx->save_for_backward({h, weight3, weight3_d3, weight3_d5, alpha, C, D, x});
    return below_autograd(op, h, weight3, weight3_d3, weight3_d5, alpha, C, D, x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = operator_named<Backward>("dwconv2d::state_fusion_output_backward");
    const auto saved = ctx->get_saved_variables();
    const auto [grad_h, grad_weight3, grad_weight3_d3, grad_weight3_d5, grad_alpha, grad_C, grad_D, grad_x] =
        backward_by(op, grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7]);
    return {grad_h, grad_weight3, grad_weight3_d3, grad_weight3_d5, grad_alpha, grad_C, grad_D, grad_x};
  }

  static Tensor run(const Tensor& h, const Tensor& weight3, const Tensor& weight3_d3, const Tensor& weight3_d5,
                    const Tensor& alpha, const Tensor& C, const Tensor& D, const Tensor& x) {
    return apply(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x);
  }
};

// Of the next two operators, C++ has only the autograd function. Triton or plain PyTorch computes the rest.
class DepthwiseSilu : public Function<DepthwiseSilu> {
  using Forward = Tensor(const Tensor&, const Tensor&, const Tensor&);
  using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                      const OptionalTensor&, const OptionalTensor&);

 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias) {
    static const auto op = operator_named<Forward>("dwconv2d::depthwise_silu");
    ctx->save_for_backward({x, weight, bias});
    return below_autograd(op, x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = operator_named<Backward>("dwconv2d::depthwise_silu_backward");
    const auto saved = ctx->get_saved_variables();
    const auto [grad_x, grad_weight, grad_bias] =
        backward_by(op, grads[0], saved[0], saved[1], saved[2], std::nullopt, std::nullopt);
    return {grad_x, grad_weight, grad_bias};
  }

  static Tensor run(const Tensor& x, const Tensor& weight, const Tensor& bias) { return apply(x, weight, bias); }
};

class DepthwiseResidualNorm : public Function<DepthwiseResidualNorm> {
  using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                             double, const OptionalTensor&, const OptionalTensor&);
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
      const OptionalTensor&, const OptionalTensor&);

 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& bias,
                               const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                               const OptionalTensor& update, const OptionalTensor& scale) {
    static const auto op = operator_named<Forward>("dwconv2d::depthwise_residual_norm");
    const auto [r, n] = below_autograd(op, x, weight, bias, norm_weight, norm_bias, eps, update, scale);
    ctx->save_for_backward({r, x, weight, norm_weight, or_undefined(update), or_undefined(scale)});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["bias"] = bias.scalar_type();
    ctx->saved_data["norm_bias"] = norm_bias.scalar_type();
    return {r, n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = operator_named<Backward>("dwconv2d::depthwise_residual_norm_backward");
    const auto saved = ctx->get_saved_variables();
    const Tensor &r = saved[0], &x = saved[1], &weight = saved[2], &norm_weight = saved[3];
    const auto update = if_defined(saved[4]), scale = if_defined(saved[5]);
    const double eps = ctx->saved_data["eps"].toDouble();
    const auto [grad_s, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, grad_update] =
        backward_by(op, grads[0], grads[1], r, x, weight, norm_weight, eps, update, scale);
    const auto dtype_of = [&](const char* name) { return ctx->saved_data[name].toScalarType(); };
    return {grad_s,
            grad_weight.to(weight.scalar_type()),
            grad_bias.to(dtype_of("bias")),
            grad_norm_weight.to(norm_weight.scalar_type()),
            grad_norm_bias.to(dtype_of("norm_bias")),
            Tensor(),
            !update ? Tensor() : scale ? grad_update : grad_s,
            Tensor()};
  }

  static std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                        const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                                        const OptionalTensor& update, const OptionalTensor& scale) {
    const auto results = apply(x, weight, bias, norm_weight, norm_bias, eps, update, scale);
    return {results[0], results[1]};
  }
};

TORCH_LIBRARY_IMPL(dwconv2d, Autograd, m) {
  m.impl("state_fusion_output", &StateFusionOutput::run);
  m.impl("depthwise_silu", &DepthwiseSilu::run);
  m.impl("depthwise_residual_norm", &DepthwiseResidualNorm::run);
}

}  // namespace
}  // namespace dwconv2d
