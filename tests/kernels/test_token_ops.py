"""The operators between tokens and planes: values and gradients against float64, on every backend."""

import pytest
import torch
import torch.nn.functional as F
from dwconv2d import depthwise_residual_norm, depthwise_silu
from kernel_backends import GPU, running_on
from selective_scan import norm_gate

BACKENDS = ["reference", *(["reference_on_cuda"] if GPU else []), "triton"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Images, height, width, channels: odd ones, a single pixel, channels that fill no tile, planes that fill several.
SIZES = {"1x1": (1, 1, 1, 10), "5x7": (2, 5, 7, 6), "odd": (3, 7, 7, 24), "wide": (1, 9, 16, 96), "even": (2, 12, 8, 64)}
EPS = 1e-5


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running_on(request.param, "dwconv2d"), running_on(request.param, "selective_scan"):
        yield request.param


def each_dtype(function):
    return pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))(function)


def each_size(function):
    return pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)(function)


def planes(tokens):
    return tokens.permute(0, 3, 1, 2)


def tokens(planes):
    return planes.permute(0, 2, 3, 1)


def exact_silu(x, weight, bias):
    return F.silu(F.conv2d(planes(x), weight, bias, padding=1, groups=x.shape[3]))


def exact_norm(x, weight, bias, norm_weight, norm_bias, update=None, scale=None, r=None):
    """With `r` as it was rounded, which n is the norm of."""
    s = x if update is None else x + (1 if scale is None else scale[:, None, None, None]) * update
    exact = s + tokens(F.conv2d(planes(s), weight, bias, padding=1, groups=x.shape[3]))
    rounded = exact if r is None else exact + (r.double() - exact).detach()
    return exact, F.layer_norm(rounded, x.shape[3:], norm_weight, norm_bias, EPS)


def exact_gate(y, z, weight, bias):
    return F.layer_norm(tokens(y), y.shape[1:2], weight, bias, EPS) * F.silu(z)


def parameters(channels, dtype):
    """In float32 beside 16-bit tokens, as under autocast."""
    wide = torch.promote_types(dtype, torch.float32)

    def random(*shape):
        return 1 + torch.randn(*shape, dtype=wide)

    return dict(weight=random(channels, 1, 3, 3), bias=random(channels)), dict(
        norm_weight=random(channels), norm_bias=random(channels)
    )


def half_of_a_projection(images, height, width, channels, dtype):
    """Tokens as the second half of a tensor of twice the channels."""
    return (1 + torch.randn(images, height, width, 2 * channels, dtype=dtype))[..., channels:]


def differentiate(outputs, inputs, grads):
    return torch.autograd.grad(outputs, list(inputs.values()), grads)


def leaves(inputs, dtype=None):
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in inputs.items()}


def compare(check, operator, exact, inputs):
    """Value and gradients of an operator with one result."""
    actual, wide = leaves(inputs), leaves(inputs, torch.float64)
    value, expected = operator(**actual), exact(**wide)
    assert value.is_contiguous()
    check(value, expected)
    grad = 1 + torch.randn_like(value)
    found = differentiate(value, actual, grad)
    for name, a, b in zip(inputs, found, differentiate(expected, wide, grad.double()), strict=True):
        check(a, b, f"gradient of {name}")


def compare_norm(check, inputs, scale=None):
    actual, wide = leaves(inputs), leaves(inputs, torch.float64)
    r, n = depthwise_residual_norm(**actual, eps=EPS, scale=scale)
    expected = exact_norm(**wide, scale=None if scale is None else scale.double(), r=r.detach())
    check(r, expected[0], "value")
    check(n, expected[1], "value")
    grads = [1 + torch.randn_like(t) for t in (r, n)]
    found = differentiate((r, n), actual, grads)
    exact = differentiate(expected, wide, [grad.double() for grad in grads])
    for name, a, b in zip(inputs, found, exact, strict=True):
        check(a, b, f"gradient of {name}")


@each_dtype
@each_size
def test_silu(backend, check, size, dtype):
    convolution, _ = parameters(size[3], dtype)
    compare(check, depthwise_silu, exact_silu, dict(x=half_of_a_projection(*size, dtype), **convolution))


@each_dtype
@each_size
def test_gate(backend, check, size, dtype):
    images, height, width, channels = size
    _, norm = parameters(channels, dtype)
    y = 1 + torch.randn(images, channels, height, width, dtype=dtype)
    z = half_of_a_projection(*size, dtype)
    compare(check, norm_gate, exact_gate, dict(y=y, z=z, weight=norm["norm_weight"], bias=norm["norm_bias"]))


@pytest.mark.parametrize("update", [None, "update", "scaled"])
@each_dtype
@each_size
def test_norm(backend, check, size, dtype, update):
    if size[3] == 1:
        pytest.skip("the norm of a single channel is its bias")
    convolution, norm = parameters(size[3], dtype)
    inputs = dict(x=half_of_a_projection(*size, dtype), **convolution, **norm)
    if update:
        inputs["update"] = torch.randn(size, dtype=dtype)
    # As stochastic depth draws them: kept images are scaled up, dropped ones are 0.
    scale = torch.tensor([1.25, 0, 1.25], dtype=dtype)[: size[0]] if update == "scaled" else None
    compare_norm(check, inputs, scale)
