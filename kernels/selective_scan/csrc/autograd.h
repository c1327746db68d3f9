// Helpers to register an operator's autograd function in C++.
//
// selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.
//
// They are in C++ because a GPU would have to wait for the Python code of torch.library.register_autograd.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <utility>

namespace gradients {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Calls an operator without its gradient.
template <typename Operator, typename... Args>
auto below_autograd(const Operator& op, Args&&... args) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(std::forward<Args>(args)...);
}

// Calls a backward operator. With create_graph=True, grad mode is on, and the operator's own autograd kernel raises an
// error, because there is no second derivative. Otherwise, the call skips that kernel, which is faster.
template <typename Operator, typename... Args>
auto backward_by(const Operator& op, Args&&... args) {
  return at::GradMode::is_enabled() ? op.call(std::forward<Args>(args)...)
                                    : below_autograd(op, std::forward<Args>(args)...);
}

inline Tensor or_undefined(const std::optional<Tensor>& t) { return t ? *t : Tensor(); }
inline std::optional<Tensor> if_defined(const Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

}  // namespace gradients
