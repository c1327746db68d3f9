"""What the kernel tests share: one tolerance table, one comparison with an exact reference, and awkward views."""

import math

import pytest
import torch
import torch.nn.functional as F

# Largest relative L2 error of values and of gradients. Results of 16 bits are held to ROUNDINGS times the error that
# rounding the exact result makes.
TOLERANCE = {torch.float64: (1e-14, 5e-14), torch.float32: (1e-6, 5e-6)}
ROUNDINGS = 1.2

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.movedim(min(1, t.dim() - 1), -1).contiguous().movedim(-1, min(1, t.dim() - 1)),
    "transposed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "every_second": lambda t: torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0],
    "offset": lambda t: F.pad(t, (1, 2) * t.dim(), value=math.nan)[(slice(1, -2),) * t.dim()],
    "misaligned": lambda t: F.pad(t.flatten(), (1, 0), value=math.nan)[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
    "one_number": lambda t: t.flatten()[0].expand(t.shape),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    """A function from a tensor to a view of the same shape; all but "expanded" and "one_number" keep its values."""
    return LAYOUTS[request.param]


@pytest.fixture
def layouts():
    """All of these functions, by name."""
    return LAYOUTS


@pytest.fixture(autouse=True)
def threads():
    """`torch.set_num_threads`, 1 at first: on tensors this small a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def is_dense(t):
    """Whether t's elements lie next to each other, in whatever order of its dimensions."""
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).is_contiguous()


def _check(actual, exact, name="value"):
    assert actual.shape == exact.shape, name
    assert is_dense(actual), f"{name} has strides {actual.stride()}"
    exact = exact.detach().double()
    error = (actual.detach().double() - exact).norm()
    if actual.dtype in TOLERANCE:
        allowed = TOLERANCE[actual.dtype][name != "value"] * exact.norm()
    else:
        allowed = ROUNDINGS * (exact.to(actual.dtype).double() - exact).norm()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _evaluate(operator, inputs, options, grad=None):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    value = operator(**leaves, **options)
    # Around 1, and so are the tests' inputs: sums that nearly cancel would leave only rounding errors to compare.
    grad = 1 + torch.randn_like(value) if grad is None else grad
    grads = torch.autograd.grad(value, list(leaves.values()), grad)
    return grad, {"value": value, **{f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}}


def _compare(operator, exact, inputs, grad=None, **options):
    grad, actual = _evaluate(operator, inputs, options, grad)
    _, expected = _evaluate(exact, {name: t.double() for name, t in inputs.items()}, options, grad.double())
    for name in expected:
        _check(actual[name], expected[name], name)


@pytest.fixture
def check():
    """`check(actual, exact, name="value")`: one result within tolerance; any other name means a gradient."""
    return _check


@pytest.fixture
def evaluate():
    """`evaluate(operator, inputs, options, grad=None)` -> the gradient fed back, and value and gradients by name."""
    return _evaluate


@pytest.fixture
def compare():
    """`compare(operator, exact, inputs, grad=None, **options)`: value and gradients against `exact` in float64."""
    return _compare
