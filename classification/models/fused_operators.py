"""When one operator may stand for several modules, as on a GPU, and two functions that save launches and memory."""

import os
from collections.abc import Sequence

import torch
from dwconv2d.loading import TRITON_INSTALLED, autocast_dtype
from selective_scan import selective_scan_state
from selective_scan.loading import call as call_operator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

USE_FUSED = os.environ.get("SPATIALMAMBA_FUSED_OPERATORS", "1") != "0"


def has_fused_kernels(x: Tensor) -> bool:
    """Whether the operators that join several modules have kernels where x is: on a GPU, in Triton.

    With SPATIALMAMBA_FUSED_OPERATORS=0 in the environment, a GPU calls the modules too. `torch.fx` traces the modules.
    """
    return not isinstance(x, torch.fx.Proxy) and x.is_cuda and TRITON_INSTALLED and USE_FUSED


def fusible(
    x: Tensor,
    convolutions: Sequence[nn.Module] = (),
    norms: Sequence[nn.Module] = (),
    linears: Sequence[nn.Module] = (),
) -> bool:
    """Whether one operator may stand for these modules: it has kernels, and calling the modules does no more.

    A module is called as it is if it has a hook, lacks a parameter, or is of another type or has another `forward`, as
    adapters and tools for interpretation make it, or if its parameters are of another type, as quantisation makes them.
    """
    if not has_fused_kernels(x) or any(GLOBAL_HOOKS):
        return False
    of_each_kind = ((nn.Conv2d, convolutions), (nn.LayerNorm, norms), (nn.Linear, linears))
    return all(_is_plain(module, kind) for kind, modules in of_each_kind for module in modules)


def fusible_mlp(x: Tensor, fc1: nn.Module, act: nn.Module, fc2: nn.Module) -> bool:
    """Whether `dwconv2d.mlp` may stand for these modules, and has a kernel that moves less memory than they do."""
    if not fusible(x, linears=(fc1, fc2)) or type(act) is not nn.GELU or act.approximate != "none" or has_hooks(act):
        return False
    is_narrow = max(fc1.in_features, fc2.out_features) <= MLP_CHANNELS
    return is_narrow and (autocast_dtype(x) or x.dtype) in MLP_DTYPES and _has_matrix_units(x.device.index)


MLP_CHANNELS = 128  # with more, PyTorch's matrix products should be faster: modelled, not measured
MLP_DTYPES = (torch.float16, torch.bfloat16)


@torch.compiler.assume_constant_result
def _has_matrix_units(device: int | None) -> bool:
    """Whether Triton multiplies 16 bits well on a GPU: from sm_80 on. Without a GPU, tensors are fake: assume so."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    # Read the module's dictionary: its attributes take the host longer, and this runs in each call of the model.
    if type(module) is not kind or has_hooks(module):
        return False
    own = module.__dict__
    if type(module) is nn.Conv2d and tuple(map(own.get, GEOMETRY)) not in KEEPS_SIZE:
        return False
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    return type(weight) in PLAIN_TENSORS and type(bias) in PLAIN_TENSORS and bias.dim() == 1


# Those of PyTorch's own tracing among them. Other subclasses, as quantisation makes them, do not know our operators.
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)
GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
# What the operators compute. Tools change it in a model that is ready, for circular padding or a smaller output stride.
KEEPS_SIZE = (((3, 3), (1, 1), (1, 1), (1, 1), "zeros"), ((1, 1), (1, 1), (0, 0), (1, 1), "zeros"))


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's `forward`, apart from hooks of all modules."""
    own = module.__dict__
    return "forward" in own or "_conv_forward" in own or any(map(own.get, HOOKS))


# Entries of a module's dictionary that hold hooks, or that `Module.compile` sets.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
# Those of all modules, as torch.nn.modules.module.register_module_forward_hook and its like add them.
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class LinearReLU(torch.autograd.Function):
    """ReLU(x W^T + b) of rows x (M, C). cuBLAS applies bias and ReLU as it stores the product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias):
        return torch._addmm_activation(bias, x, weight.t())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], output)

    @staticmethod
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        return grad @ weight, grad.t() @ x, grad.sum(0)


class ProjectedScan(torch.autograd.Function):
    """States of x (B, D, L) whose step size is W r: r (B, R, L), W (D, R). Arguments as of `selective_scan_state`.

    The backward pass computes W r again. R is D / 32, so autograd keeps one tensor of D channels less.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, r, W, A_logs, B, delta_bias):
        return selective_scan_state(x, product(W, r), A_logs, B, delta_bias, delta_softplus=True, A_is_log=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, r, W, *others = ctx.saved_tensors
        inputs = grad, x, product(W, r), *others, True, True  # as in `forward`: softplus, logarithms of -A
        dx, d_delta, *others = call_operator("selective_scan_state_backward", *inputs)
        return dx, product(W.t(), d_delta), torch.bmm(d_delta, r.transpose(1, 2)).sum(0), *others


def product(weight: Tensor, planes: Tensor) -> Tensor:
    """weight (E, D) times planes (B, D, L) -> (B, E, L), contiguous. `@` would transpose the planes."""
    return torch.bmm(weight.expand(len(planes), -1, -1), planes)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU of a linear layer of tokens (B, H, W, C), in one kernel on a GPU. Autocast applies as to `F.linear`."""
    x = x.to(autocast_dtype(x) or x.dtype)
    flat = apply(LinearReLU, x.flatten(0, 2), cast(weight, x), cast(bias, x))
    return flat.unflatten(0, x.shape[:3])


def apply(function: type[torch.autograd.Function], *inputs: Tensor) -> Tensor:
    # Without gradients only its forward: torch.jit can neither look into `apply` nor save it.
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(*inputs)


def cast(x: Tensor, like: Tensor) -> Tensor:
    return x if x.dtype == like.dtype else x.to(like.dtype)  # `to` would return x too, but takes longer
