"""Linear layers and 1x1 convolutions by oneDNN or MKL against PyTorch's own, whichever way they take."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

from classification.models import cpu, optimise_for_cpu, spatialmamba_micro, undo_optimise_for_cpu
from classification.models import linear as module
from classification.models.cpu import CpuDepthwiseConv2d, CpuLinear, CpuPointwiseConv2d
from classification.models.linear import FEW_NUMBERS, FEW_TOKENS, linear

MANY = FEW_NUMBERS // 16 + 1  # tokens of 16 channels
SHAPES = [(0, 6), (2, 0, 6), (6,), (5, 6), (1, 3, 4, 6), (MANY, 16), (3, 1, MANY, 16), (FEW_TOKENS - 1, 200)]

needs_onednn = pytest.mark.skipif(not module.ONEDNN, reason="PyTorch is built without oneDNN")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def mkl_leads(monkeypatch) -> Callable[[bool], None]:
    """Sets who multiplies: oneDNN in these tests, on Intel's processors too, unless a test says MKL."""

    def choose(mkl: bool) -> None:
        for part in (module, cpu):
            monkeypatch.setattr(part, "MKL_LEADS", mkl)

    choose(False)
    return choose


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def leaves_of(shape: tuple[int, ...], out: int, dtype: torch.dtype, bias: bool) -> list[Tensor]:
    """Two x, of which the second is used, weight and perhaps bias."""
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


def pointwise(channels_in: int, channels_out: int, bias: bool = True) -> nn.Module:
    return optimise_for_cpu(nn.Conv2d(channels_in, channels_out, 1, bias=bias))


def strides(t: Tensor) -> list[int]:
    """Those that matter."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


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


@pytest.mark.parametrize("how", ["eager", "compiled", "mkl"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(0, 6, 5, 3), (2, 6, 5, 3), (1, 6, 71, 73), (3, 6, 39, 31), (6, 6, 701)], ids=str)
def test_pointwise_convolution_is_one(size, layout, bias, how, threads, mkl_leads):
    """Values, gradients and layout, batched or not."""
    mkl_leads(how == "mkl")
    if len(size) == 3 and layout != torch.contiguous_format:
        pytest.skip("only batches have that layout")
    conv, plain = pointwise(6, 9, bias), nn.Conv2d(6, 9, 1, bias=bias)
    plain.load_state_dict(conv.state_dict())
    if how == "compiled":
        torch.compiler.reset()
        conv = torch.compile(conv, fullgraph=True, backend="aot_eager")
    x, results = torch.randn(size).contiguous(memory_format=layout), []
    for layer, dtype in ((conv, torch.float32), (plain, torch.float32), (plain, torch.float64)):
        leaf = x.to(dtype, memory_format=torch.preserve_format, copy=True).requires_grad_()
        y = layer.to(dtype)(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, *layer.parameters()))))
    ours, theirs, exact = results
    for a, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=0, atol=3e-6 * e.abs().max().item() if e.numel() else 0)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        assert strides(a) == strides(b)


@needs_onednn
def test_onednn_convolves(threads):
    """PyTorch would not have it convolve 1x1 on one thread by itself."""
    x, weight, conv = torch.randn(MANY, 16), torch.randn(32, 16), pointwise(16, 32)
    for call in (lambda: linear(x, weight), lambda: conv(torch.randn(2, 16, 40, 20))):
        assert "aten::mkldnn_convolution" in operators(call)


def test_mkl_multiplies_on_intels(mkl_leads, tmp_path, monkeypatch):
    """Tokens alone: planes of another layout would have to be copied."""
    mkl_leads(True)
    x, weight, conv, planes = torch.randn(MANY, 16), torch.randn(32, 16), pointwise(16, 32), torch.randn(2, 16, 40, 20)
    for call in (lambda: linear(x, weight), lambda: conv(planes.contiguous(memory_format=torch.channels_last))):
        called = operators(call)
        assert "aten::mkldnn_convolution" not in called
        assert {"aten::mm", "aten::addmm"} & called
    assert "aten::mm" not in operators(lambda: conv(planes))
    for text, intel in (("vendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False)):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
        assert module._on_intel() == intel


# ----- modules that are swapped


def test_modules_are_swapped_and_given_back(threads):
    """The model computes the same, in training too, with the same names and the same parameters."""
    plain = spatialmamba_micro(num_classes=7)
    fast = spatialmamba_micro(num_classes=7)
    fast.load_state_dict(plain.state_dict())
    parameters, types = dict(fast.named_parameters()), [type(m) for m in fast.modules()]
    assert optimise_for_cpu(optimise_for_cpu(fast)) is fast
    swapped = {type(m) for m in fast.modules()}
    assert {CpuLinear, CpuPointwiseConv2d, CpuDepthwiseConv2d} <= swapped
    assert not {nn.Linear} & swapped
    assert all(a is parameters[name] for name, a in fast.named_parameters())
    images = torch.randn(3, 3, 71, 93)
    for model in (plain, fast):
        model.train()(images).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5 * a.grad.abs().max().item() + 1e-7, msg=name)
    expected = plain.eval()(images)
    torch.testing.assert_close(fast.eval()(images), expected, rtol=1e-5, atol=1e-6)
    undo_optimise_for_cpu(fast)
    assert [type(m) for m in fast.modules()] == types
    torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="reflect"),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, stride=2),
        nn.Conv2d(6, 6, 3, padding=2, groups=6, dilation=2),
        nn.Conv2d(6, 6, 3, padding=1, groups=3),
        nn.Conv2d(6, 12, 3, padding=1, groups=6),
        nn.Conv2d(6, 4, 1, groups=2),
        nn.Conv2d(6, 4, 1, padding=1),
        nn.Conv2d(6, 4, 1, stride=2),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 6, 3, padding="same", groups=6),
        nn.Conv2d(6, 4, 1, padding="same"),
    ],
    ids=str,
)
def test_other_convolutions_are_themselves(conv):
    """Those that are swapped too do all that they did: unbatched planes and other dtypes included."""
    x = torch.randn(2, 6, 43, 41)
    expected, single, double = conv(x), conv(x[0]), copy.deepcopy(conv).double()(x.double())
    optimise_for_cpu(conv)
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conv(x[0]), single, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conv.double()(x.double()), double)


@pytest.mark.parametrize("changed", [{}, {"padding": 0}, {"padding": 2}, {"stride": 3}, {"kernel_size": 5}], ids=str)
def test_one_kind_of_strided_convolution_is_computed_in_strips(changed):
    conv = nn.Conv2d(6, 4, **{"kernel_size": 3, "stride": 2, "padding": 1} | changed)
    assert (type(optimise_for_cpu(conv)) is cpu.CpuStridedConv2d) == (not changed)


@pytest.mark.parametrize("width", [36, 37, 41, 48])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradient_of_a_strided_convolution_in_strips(bias, width, monkeypatch):
    """Of strips that end at the image's edge, before it and beyond it."""
    monkeypatch.setattr(cpu, "STRIP", 6)
    plain = nn.Conv2d(16, 5, 3, stride=2, padding=1, bias=bias)
    fast = optimise_for_cpu(copy.deepcopy(plain))
    x = torch.randn(2, 16, 23, width).to(memory_format=torch.channels_last)
    strips = operators(lambda: fast(x).sum().backward())
    assert ("_StridedConvolutionBackward" in strips) == module.ONEDNN
    fast.zero_grad()
    results = []
    for conv, dtype in ((plain.double(), torch.float64), (fast, torch.float32)):
        leaf = x.to(dtype).requires_grad_()
        y = conv(leaf)
        grad = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
        results.append([y, *torch.autograd.grad(y, [leaf, *conv.parameters()], grad)])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=3e-6 * exact.abs().max().item())
    leaf = x.clone().requires_grad_()
    y = fast(leaf)
    grads = torch.randn(2, *y.shape)
    batched = torch.autograd.grad(y, [leaf, fast.weight], grads, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        single = torch.autograd.grad(y, [leaf, fast.weight], grads[i], retain_graph=True)
        for one, expected in zip(batched, single, strict=True):
            torch.testing.assert_close(one[i], expected, rtol=1e-4, atol=1e-4)


# ----- compiled and exported


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_compiled_it_is_one_operator(bias, threads):
    leaves = leaves_of((3, MANY, 16), 8, torch.float32, bias)
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True)
    agree(evaluate(compiled, leaves), leaves)
    forward, backward = "spatialmamba::linear", "spatialmamba::linear_backward"
    called = operators(lambda: evaluate(compiled, leaves))
    assert ({forward, backward} <= called) == module.ONEDNN
    assert "aten::_slow_conv2d_backward" not in called


@needs_onednn
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_only_wanted_gradients_are_computed(wanted):
    leaves = leaves_of((MANY, 16), 8, torch.float32, True)
    leaves[0] = leaves[0][1]
    for i in wanted:
        leaves[i].requires_grad_()
    torch.library.opcheck(torch.ops.spatialmamba.linear.default, leaves)
    grads = []
    for function in (torch.ops.spatialmamba.linear, F.linear):
        grads.append(torch.autograd.grad(function(*leaves).square().sum(), [leaves[i] for i in wanted]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * b.abs().max().item())
    flags = [i in wanted for i in range(3)]
    computed = torch.ops.spatialmamba.linear_backward(torch.randn(MANY, 8), *leaves[:2], flags)
    assert [g.numel() > 0 for g in computed] == flags


def test_forward_mode_sees_linear(threads):
    """Compiled too, where the operator would have no tangent."""
    x, weight, bias = leaves_of((MANY, 16), 8, torch.float32, True)
    x, tangent = x.unbind()
    expected = F.linear(tangent, weight)
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    compiled(x, weight, bias)
    for function in (linear, compiled):
        with forward_ad.dual_level():
            out = function(forward_ad.make_dual(x, tangent), weight, bias)
            torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected)

    def derivative(x):
        return torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (tangent,))[1]

    for function in (derivative, torch.compile(derivative, backend="aot_eager")):
        torch.testing.assert_close(function(x), expected)


def test_autocast_is_pytorchs():
    x, weight = torch.randn(MANY, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (linear, torch.compile(linear, fullgraph=True, backend="aot_eager")):
            torch.testing.assert_close(function(x, weight), F.linear(x, weight), rtol=0, atol=0)


def test_exported_graphs_say_linear_and_convolution(threads):
    """No operator of ours, no dilation; with sizes that would be oneDNN's outside."""
    model = optimise_for_cpu(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(2), nn.Linear(2000, 2048))).eval()
    x = torch.randn(2, 3, 40, 50).contiguous(memory_format=torch.channels_last)
    exported = torch.export.export(model, (x,))
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == [
        "aten.conv2d.default",
        "aten.flatten.using_ints",
        "aten.linear.default",
    ]
    assert [2, 2] not in calls[0].args
    torch.testing.assert_close(exported.module()(x), model(x))


# ----- what only PyTorch's own layers can say


def test_linear_of_other_channels_is_pytorchs_error():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(MANY, 16), torch.randn(8, 17))
    with pytest.raises(RuntimeError, match="to have 16 channels"):
        pointwise(16, 8)(torch.randn(2, 17, 40, 40))


def test_weights_elsewhere_are_pytorchs_error():
    """Not numbers out of memory that nobody wrote."""
    x, weight, bias = torch.randn(MANY, 16), torch.randn(8, 16), torch.randn(8)
    for weights in ((weight.to("meta"), bias.to("meta")), (weight, bias.to("meta")), (weight.double(), bias)):
        with pytest.raises(RuntimeError, match=r"device|dtype"):
            linear(x, *weights)


def test_weights_of_other_kinds_are_pytorchs():
    class Quantised(Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen += function is F.linear
            return super().__torch_function__(function, types, args, kwargs or {})

    x, weight = torch.randn(MANY, 16), torch.randn(8, 16)
    expected = F.linear(x, weight)
    linear(x, weight.as_subclass(Quantised))
    assert Quantised.seen == 1
    torch.testing.assert_close(linear(x, weight.to_sparse()), expected)
    torch.testing.assert_close(linear(x, weight, torch.tensor(0.5)), expected + 0.5)
    assert linear(x, weight[:0]).shape == (MANY, 0)
