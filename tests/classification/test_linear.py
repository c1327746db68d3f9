"""Linear layers and 1x1 convolutions by oneDNN against PyTorch's own, whichever way they take."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from classification.models import linear as module
from classification.models.linear import FEW_NUMBERS, FEW_TOKENS, PointwiseConv2d, linear

MANY = FEW_NUMBERS // 16 + 1  # tokens of 16 channels
SHAPES = [(0, 6), (2, 0, 6), (6,), (5, 6), (1, 3, 4, 6), (MANY, 16), (3, 1, MANY, 16), (FEW_TOKENS - 1, 200)]


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def leaves_of(shape: tuple[int, ...], out: int, dtype: torch.dtype, bias: bool) -> list[Tensor]:
    """Two x, of which the second is used, weight and perhaps bias."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, *shape, dtype=dtype), torch.randn(out, shape[-1], dtype=dtype)]
    return leaves + ([torch.randn(out, dtype=dtype)] if bias else [])


def evaluate(function: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Value and gradients, of tokens that are a view."""
    x, *weights = (leaf.clone().requires_grad_() for leaf in leaves)
    y = function(x.unbind()[1], *weights)
    return y, *torch.autograd.grad(y.square().sum(), (x, *weights))


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}  # of the largest number


def agree(actual: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    """`actual` with what F.linear has for the leaves in float64."""
    exact = evaluate(F.linear, [leaf.double() for leaf in leaves])
    for a, e in zip(actual, exact, strict=True):
        assert a.shape == e.shape
        assert a.dtype == leaves[0].dtype
        largest = e.abs().max().item() if e.numel() else 0
        torch.testing.assert_close(a.double(), e, rtol=0, atol=TOLERANCE[a.dtype] * largest)


def operators(call: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return {event.key for event in profiled.key_averages()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("out", [3, 6, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_linear_is_linear(shape, out, dtype, bias, threads):
    leaves = leaves_of(shape, out, dtype, bias)
    agree(evaluate(linear, leaves), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(0, 6, 5, 3), (1, 6, 1, 1), (2, 6, 5, 3), (3, 6, 8, 17)], ids=str)
def test_pointwise_convolution_is_one(size, layout, dtype, threads):
    conv = PointwiseConv2d(6, 9).to(dtype)
    expected = nn.Conv2d(6, 9, 1).to(dtype)
    expected.load_state_dict(conv.state_dict())
    x, results = torch.randn(size, dtype=dtype).contiguous(memory_format=layout), []
    for layer in (conv, expected):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, *layer.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(result[:2] for result in results), strict=True):
        assert a.stride() == b.stride()


@pytest.mark.skipif(not module.ONEDNN, reason="PyTorch is built without oneDNN")
def test_onednn_convolves(threads):
    """PyTorch would not have it convolve 1x1 on one thread by itself."""
    x, weight, conv = torch.randn(MANY, 16), torch.randn(32, 16), PointwiseConv2d(16, 32)
    for call in (lambda: linear(x, weight), lambda: conv(torch.randn(2, 16, 40, 20))):
        assert "aten::mkldnn_convolution" in operators(call)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_compiled_it_is_one_operator(bias, threads):
    leaves = leaves_of((3, MANY, 16), 8, torch.float32, bias)
    if module.ONEDNN:
        x, *weights = leaves
        torch.library.opcheck(
            torch.ops.spatialmamba.linear.default, (x[1].requires_grad_(), *weights, *[None] * (not bias))
        )
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True)
    agree(evaluate(compiled, leaves), leaves)
    assert ("spatialmamba::linear" in operators(lambda: compiled(leaves[0][1], *leaves[1:]))) == module.ONEDNN


def test_autocast_is_pytorchs():
    x, weight = torch.randn(MANY, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (linear, torch.compile(linear, fullgraph=True)):
            assert function(x, weight).dtype == torch.bfloat16


def test_exported_graphs_say_linear_and_convolution():
    model = nn.Sequential(PointwiseConv2d(3, 16), nn.Flatten(2), module.Linear(2000, 8)).eval()
    exported = torch.export.export(model, (torch.randn(2, 3, 40, 50),))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"aten.conv2d.default", "aten.linear.default"} <= called
    convolutions = [node for node in exported.graph.nodes if "conv2d" in str(node.target)]
    assert len(convolutions) == 1
    assert 2 not in convolutions[0].args  # no dilation


def test_linear_of_other_channels_is_pytorchs_error():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(MANY, 16), torch.randn(8, 17))
