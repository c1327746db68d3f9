"""Every test here runs once for each backend: the compiled kernels, plain PyTorch, and Triton's interpreter."""

import random
import zlib

import pytest
import torch
from dwconv2d import DilatedDWConv2d, backends, dilated_dwconv2d, state_fusion, state_fusion_output
from kernel_backends import BACKENDS, running_on
from kernel_backends import interpreted as is_interpreted
from torch import nn
from torch.autograd import forward_ad
from torch.library import opcheck

OPERATORS = {"conv": dilated_dwconv2d, "fusion": state_fusion, "output": state_fusion_output}
FORWARDS = {
    "conv": torch.ops.dwconv2d.dilated_dwconv2d,
    "fusion": torch.ops.dwconv2d.state_fusion,
    "output": torch.ops.dwconv2d.state_fusion_output,
}
BACKWARDS = {
    "conv": torch.ops.dwconv2d.dilated_dwconv2d_backward,
    "fusion": torch.ops.dwconv2d.state_fusion_backward,
    "output": torch.ops.dwconv2d.state_fusion_output_backward,
}
ACTIVATIONS = ("x", "C", "weight", "bias")  # what has x's dtype; all else has the states'
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
PLANES = [(1, 1, 1), (3, 1, 1), (8, 1, 7), (1, 2, 3), (24, 5, 5), (3, 11, 4), (8, 14, 14), (3, 25, 40)]
KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (11, 11), (3, 5), (5, 1)]
MODES = ["replicate", "zeros"]

each_operator = pytest.mark.parametrize("name", OPERATORS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_plane = pytest.mark.parametrize("plane", PLANES, ids=lambda p: "D{}-{}x{}".format(*p))
each_states = pytest.mark.parametrize("states", [None, 1, 2, 16], ids=lambda n: f"N{n}")


@pytest.fixture(scope="module", params=BACKENDS, autouse=True)
def backend(request):
    """The name of the backend that the operators run on while the test does."""
    with running_on(request.param, "dwconv2d"):
        yield request.param


@pytest.fixture
def interpreted(backend) -> bool:
    """Whether a program takes a tenth of a second, and sizes must be small."""
    return is_interpreted(backend)


@pytest.fixture
def sample(request, interpreted):
    """Leaves the interpreter, which takes seconds for a case, one in four of a test's cases."""
    names = request.node.name.partition("[")[2]
    if interpreted and zlib.crc32(names.encode()) % 4:
        pytest.skip("one case in four is enough for the interpreter")


@pytest.fixture
def large(interpreted):
    """Skips what would take Triton's interpreter minutes; its own random cases are small ones of the same kinds."""
    if interpreted:
        pytest.skip("too large for the interpreter")


def noise(*shape, dtype):
    return 1 + torch.randn(shape, dtype=dtype)


def make_conv_inputs(plane=(3, 5, 4), kernel=(3, 3), bias=True, dtype=torch.float32, batch=2):
    channels, height, width = plane
    inputs = dict(
        x=noise(batch, channels, height, width, dtype=dtype),
        weight=noise(channels, 1, *kernel, dtype=dtype),
    )
    return inputs | (dict(bias=noise(channels, dtype=dtype)) if bias else {})


def make_fusion_inputs(plane=(3, 5, 4), states=None, dtype=torch.float32, batch=2):
    """States and kernels for activations of `dtype`; alpha brings the sum of 27 taps to the size of one."""
    channels, height, width = plane
    dtype = torch.promote_types(dtype, torch.float32)
    weights = {name: noise(channels, 1, 3, 3, dtype=dtype) for name in ("weight3", "weight3_d3", "weight3_d5")}
    h = noise(batch, channels, *([states] if states else []), height, width, dtype=dtype)
    return dict(h=h, **weights, alpha=noise(3, dtype=dtype) / 30)


def make_output_inputs(plane=(3, 5, 4), states=None, dtype=torch.float32, batch=2):
    inputs = make_fusion_inputs(plane, states, dtype, batch)
    channels, height, width = plane
    return inputs | dict(
        C=noise(batch, states or 1, height, width, dtype=dtype),
        D=noise(channels, dtype=inputs["h"].dtype),
        x=noise(batch, channels, height, width, dtype=dtype),
    )


def make_inputs(name, **kwargs):
    return {"conv": make_conv_inputs, "fusion": make_fusion_inputs, "output": make_output_inputs}[name](**kwargs)


def exact_conv(x, weight, bias=None, dilation=1, padding_mode="replicate"):
    """One tap after the other, its place clamped to the plane or, for zeros, masked."""
    height, width = x.shape[-2:]
    kernel_height, kernel_width = weight.shape[2:]
    per_channel = (-1, *[1] * (x.dim() - 2))
    y = torch.zeros_like(x) if bias is None else bias.view(per_channel)
    for i in range(kernel_height):
        for j in range(kernel_width):
            rows = torch.arange(height)[:, None] + dilation * (i - kernel_height // 2)
            columns = torch.arange(width) + dilation * (j - kernel_width // 2)
            shifted = x[..., rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
            if padding_mode == "zeros":
                shifted = shifted * ((rows >= 0) & (rows < height) & (columns >= 0) & (columns < width))
            y = y + weight[:, 0, i, j].view(per_channel) * shifted
    return y


def exact_fusion(h, weight3, weight3_d3, weight3_d5, alpha):
    kernels = zip(alpha, (weight3, weight3_d3, weight3_d5), (1, 3, 5), strict=True)
    return sum(a * exact_conv(h, weight, dilation=dilation) for a, weight, dilation in kernels)


def exact_output(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x):
    fused = exact_fusion(h, weight3, weight3_d3, weight3_d5, alpha)
    fused = fused[:, :, None] if h.dim() == 4 else fused
    y = D[:, None, None] * x
    for n in range(C.shape[1]):
        y = y + C[:, n, None] * fused[:, :, n]
    return y


EXACT = {"conv": exact_conv, "fusion": exact_fusion, "output": exact_output}


def smaller(plane, states):
    """For an interpreter that takes a tenth of a second for each program: of the largest planes a part."""
    channels, height, width = plane
    few = states and min(states, 2)
    return (min(channels, 3), min(height, 14), min(width, 15)), few


# ----- values and gradients


@each_dtype
@pytest.mark.parametrize("mode", MODES)
@each_plane
@pytest.mark.float32_in_interpreter
def test_conv_planes(compare, sample, plane, mode, dtype):
    inputs = make_conv_inputs(plane, dtype=dtype)
    assert dilated_dwconv2d(**inputs).dtype == dtype
    compare(dilated_dwconv2d, exact_conv, inputs, dilation=2, padding_mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dilation", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "k{}x{}".format(*k))
def test_conv_kernels(compare, sample, kernel, dilation, mode):
    """On a plane smaller than most of the windows."""
    inputs = make_conv_inputs((3, 11, 4), kernel, bias=dilation % 2 == 0)
    compare(dilated_dwconv2d, exact_conv, inputs, dilation=dilation, padding_mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dilation", [4, 11, 12, 1000])
def test_conv_whose_taps_leave_the_plane(compare, dilation, mode):
    compare(dilated_dwconv2d, exact_conv, make_conv_inputs((3, 11, 4), (5, 3)), dilation=dilation, padding_mode=mode)


@each_dtype
@pytest.mark.long_in_interpreter
def test_conv_of_a_large_window(compare, dtype):
    compare(dilated_dwconv2d, exact_conv, make_conv_inputs((8, 14, 14), (11, 11), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_states
@each_plane
@pytest.mark.float32_in_interpreter
def test_fusion(compare, sample, plane, states, dtype, interpreted):
    plane, states = smaller(plane, states) if interpreted else (plane, states)
    compare(state_fusion, exact_fusion, make_fusion_inputs(plane, states, dtype))


@each_dtype
@each_states
@each_plane
@pytest.mark.float32_in_interpreter
def test_output(compare, sample, plane, states, dtype, interpreted):
    plane, states = smaller(plane, states) if interpreted else (plane, states)
    inputs = make_output_inputs(plane, states, dtype)
    assert state_fusion_output(**inputs).dtype == dtype
    compare(state_fusion_output, exact_output, inputs)


# Strips of rows, rows longer than a tile, a window wider than the plane, several blocks of channels.
LARGE = [(1, 70, 71), (2, 3, 1100), (3, 201, 321), (64, 31, 9), (1024, 7, 7), (24, 12, 40), (40, 56, 56)]


@pytest.mark.parametrize("plane", LARGE, ids=lambda p: "D{}-{}x{}".format(*p))
@pytest.mark.parametrize("name", OPERATORS)
def test_large_planes(compare, large, name, plane):
    compare(OPERATORS[name], EXACT[name], make_inputs(name, plane=plane, batch=1))


@pytest.mark.parametrize("width", range(24, 43))
def test_wide_planes(compare, large, width):
    """What is left of a row after whole vectors, of a plane after eleven rows at once, and of channels after pairs."""
    height = 24 + 5 * width % 11
    compare(state_fusion_output, exact_output, make_output_inputs((3, height, width)))
    compare(state_fusion_output, exact_output, make_output_inputs((2, height, width), states=2, batch=1))
    compare(state_fusion, exact_fusion, make_fusion_inputs((16, height, width), batch=1))
    compare(state_fusion, exact_fusion, make_fusion_inputs((1, height, width), states=3))


@pytest.mark.parametrize("height", range(24, 60, 5))
def test_wide_planes_in_strips(compare, large, height):
    """Strips of 16 rows, as few channels have; the last one has fewer, down to a single row."""
    compare(state_fusion_output, exact_output, make_output_inputs((1, height, 37), batch=1))
    compare(state_fusion_output, exact_output, make_output_inputs((2, 49, height), states=2, batch=1))


@pytest.mark.parametrize("name", ["fusion", "output"])
def test_views_of_wide_planes(check, evaluate, large, layout, name):
    inputs = make_inputs(name, plane=(3, 29, 35), states=2)
    views = {n: layout(t) for n, t in inputs.items()}
    grad = torch.ones_like(views.get("x", views["h"]))
    _, actual = evaluate(OPERATORS[name], views, {}, grad)
    _, expected = evaluate(EXACT[name], {n: t.double() for n, t in views.items()}, {}, grad.double())
    for result in expected:
        check(actual[result], expected[result], result)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("side", range(1, 13))
def test_small_planes(compare, sample, side, batch):
    """Every row and column is a border to some tap."""
    compare(state_fusion_output, exact_output, make_output_inputs((2, side, side), batch=batch))
    compare(state_fusion, exact_fusion, make_fusion_inputs((1, side, 13 - side), batch=batch))


@pytest.mark.parametrize("name", OPERATORS)
def test_sums_of_equal_numbers(compare, large, name):
    """Whose roundings all have one sign: what the mean of many pixels feeds back."""
    inputs = {n: torch.full_like(t, 0.7) for n, t in make_inputs(name, plane=(8, 56, 56), batch=2).items()}
    grad = torch.full_like(inputs.get("x", inputs.get("h")), 0.9)
    compare(OPERATORS[name], EXACT[name], inputs, grad)


@each_dtype
@each_operator
def test_backward_operator(check, evaluate, name, dtype):
    """Called by itself it has every input's dtype; the convolution's has a gradient for a bias it has not seen."""
    inputs = make_inputs(name, dtype=dtype)
    like = inputs.get("x", inputs.get("h"))
    grad = 1 + torch.randn_like(like)
    _, expected = evaluate(EXACT[name], {n: t.double() for n, t in inputs.items()}, {}, grad.double())
    seen = [t for n, t in inputs.items() if n != "bias"]
    for (n, t), actual in zip(inputs.items(), BACKWARDS[name](grad, *seen), strict=True):
        assert actual.dtype == t.dtype, n
        check(actual, expected[f"gradient of {n}"], n)


# ----- random cases


def random_case(seed: int, largest: int, layouts: dict):
    """Operator, inputs, options and gradient, of a random size, dtype and layout."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name, dtype = rng.choice(list(OPERATORS)), rng.choice(DTYPES)
    dtype = torch.promote_types(dtype, torch.float32) if name == "fusion" else dtype
    batch, channels = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3, 7, 8, 16, 17, 24, 33, 64])
    states = rng.choice([None, 1, 2, 5]) if name != "conv" else None
    most = max(1, largest // (batch * channels * (states or 1)))
    height = rng.randint(1, min(most, 40))
    width = rng.randint(1, max(1, min(most // height, 80)))
    options = {}
    if name == "conv":
        kernel = rng.choice([1, 3, 5, 7, 9, 11]), rng.choice([1, 3, 3, 5])
        inputs = make_conv_inputs((channels, height, width), kernel, rng.random() < 0.5, dtype, batch)
        options = dict(dilation=rng.randint(1, 4), padding_mode=rng.choice(MODES))
    else:
        inputs = make_inputs(name, plane=(channels, height, width), states=states, dtype=dtype, batch=batch)
    inputs = {n: rng.choice(list(layouts.values()))(t) for n, t in inputs.items()}
    grad = rng.choice(list(layouts.values()))(1 + torch.randn_like(inputs.get("x", inputs.get("h"))).contiguous())
    return name, inputs, options, grad


@pytest.mark.parametrize("part", range(4))
def test_random_cases(request, evaluate, check, layouts, interpreted, part):
    """`--random-cases 2000` for all that are asked of a release."""
    cases = request.config.getoption("--random-cases") // (20 if interpreted else 1)
    for seed in range(part, cases, 4):
        name, inputs, options, grad = random_case(seed, 600 if interpreted else 20000, layouts)
        _, actual = evaluate(OPERATORS[name], inputs, options, grad)
        _, expected = evaluate(EXACT[name], {n: t.double() for n, t in inputs.items()}, options, grad.double())
        for result in expected:
            check(actual[result], expected[result], result if result == "value" else f"{result} of case {seed}")


# ----- worked by hand


def plane_of(*rows):
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def test_conv_correlates_by_hand():
    """A kernel with its one tap above the centre brings each row down; it does not flip, as a convolution would."""
    x, weight = plane_of([1, 2], [3, 4], [5, 6]), plane_of([0, 1, 0], [0, 0, 0], [0, 0, 0])
    assert torch.equal(dilated_dwconv2d(x, weight), plane_of([1, 2], [1, 2], [3, 4]))
    assert torch.equal(dilated_dwconv2d(x, weight, padding_mode="zeros"), plane_of([0, 0], [1, 2], [3, 4]))
    assert torch.equal(dilated_dwconv2d(x, weight, dilation=2), plane_of([1, 2], [1, 2], [1, 2]))
    bias = torch.tensor([10.0], dtype=torch.float64)
    assert torch.equal(dilated_dwconv2d(x, weight, bias), plane_of([11, 12], [11, 12], [13, 14]))


def test_conv_of_a_row_by_hand():
    x, ones = plane_of([1, 2, 4]).requires_grad_(), torch.ones(1, 1, 1, 3, dtype=torch.float64)
    y = dilated_dwconv2d(x, ones)
    assert torch.equal(y, plane_of([1 + 1 + 2, 1 + 2 + 4, 2 + 4 + 4]))
    y.backward(plane_of([1, 10, 100]))
    assert torch.equal(x.grad, plane_of([1 + 1 + 10, 1 + 10 + 100, 10 + 100 + 100]))
    assert torch.equal(dilated_dwconv2d(x, ones, padding_mode="zeros"), plane_of([3, 7, 6]))


def test_fusion_of_one_pixel_by_hand():
    """Every tap reads the one pixel: h' = h sum_k alpha_k sum(W_k)."""
    inputs = make_fusion_inputs((2, 1, 1), dtype=torch.float64)
    inputs["h"] = torch.tensor([3.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1)
    for scale, weight in zip((1, 2, 3), ("weight3", "weight3_d3", "weight3_d5"), strict=True):
        inputs[weight] = torch.full((2, 1, 3, 3), scale, dtype=torch.float64)
    inputs["alpha"] = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    assert state_fusion(**inputs).flatten().tolist() == [3 * 9 * 321, 5 * 9 * 321]


def test_fusion_of_a_row_by_hand():
    """Kernels of ones triple the row and sum three columns: 4, 7, 10 at dilation 1; 6, 7, 9 beyond the borders."""
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    alpha = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    fused = state_fusion(plane_of([1, 2, 4]), ones, ones, ones, alpha)
    assert torch.equal(fused, 3 * plane_of([4 + 60 + 600, 7 + 70 + 700, 10 + 90 + 900]))


def test_output_of_one_pixel_by_hand():
    """y = C_0 h'_0 + C_1 h'_1 + D x, each h' nine times its h."""
    one = torch.ones(1, 1, 3, 3)
    h, C = torch.tensor([2.0, 3.0]).view(1, 1, 2, 1, 1), torch.tensor([5.0, 7.0]).view(1, 2, 1, 1)
    D, x = torch.tensor([11.0]), torch.tensor([13.0]).view(1, 1, 1, 1)
    y = state_fusion_output(h, one, one, one, torch.tensor([1.0, 0.0, 0.0]), C, D, x)
    assert y.item() == 5 * 18 + 7 * 27 + 11 * 13


# ----- layouts, transforms, tools


@pytest.mark.parametrize(
    "kwargs", [{}, pytest.param({"states": 2}, marks=pytest.mark.long_in_interpreter)], ids=["N1", "N2"]
)
@pytest.mark.parametrize("plane", [(1, 5, 4), (3, 1, 1), (3, 5, 4)], ids=lambda p: "D{}-{}x{}".format(*p))
@each_operator
def test_views(check, evaluate, sample, layout, name, plane, kwargs):
    inputs = make_inputs(name, plane=plane, **kwargs if name != "conv" else {})
    views = {n: layout(t) for n, t in inputs.items()}
    grad = layout(1 + torch.randn_like(inputs.get("x", inputs.get("h"))))
    _, actual = evaluate(OPERATORS[name], views, {}, grad)
    _, expected = evaluate(OPERATORS[name], {n: t.contiguous() for n, t in views.items()}, {}, grad.contiguous())
    for result in expected:
        check(actual[result], expected[result], result)


@pytest.mark.parametrize("plane", [(2, 1, 1), (2, 3, 2)], ids=["1x1", "3x2"])
@pytest.mark.parametrize("states", [None, 2], ids=["4d", "5d"])
@pytest.mark.parametrize("name", ["fusion", "output"])
@pytest.mark.long_in_interpreter
def test_gradcheck_fusion(interpreted, name, states, plane):
    inputs = make_inputs(name, plane=plane, states=states, dtype=torch.float64, batch=1)
    leaves = tuple(t.requires_grad_() for t in inputs.values())
    assert torch.autograd.gradcheck(OPERATORS[name], leaves, fast_mode=interpreted)


@pytest.mark.parametrize("plane", [(2, 1, 1), (2, 3, 2)], ids=["1x1", "3x2"])
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_conv(interpreted, mode, plane):
    inputs = make_conv_inputs(plane, (3, 5), dtype=torch.float64, batch=1)
    leaves = tuple(t.requires_grad_() for t in inputs.values())
    assert torch.autograd.gradcheck(dilated_dwconv2d, (*leaves, 2, mode), fast_mode=interpreted)


@pytest.mark.parametrize(
    ("layout", "plane", "dtype"),
    [
        pytest.param("contiguous", (3, 5, 4), torch.float32, id="contiguous"),
        pytest.param("channels_last", (3, 5, 4), torch.float32, id="channels_last"),
        pytest.param("contiguous", (1, 5, 4), torch.bfloat16, id="one_channel-bfloat16"),
        pytest.param("channels_last", (3, 1, 1), torch.bfloat16, id="one_pixel-bfloat16"),
    ],
    indirect=["layout"],
)
@each_operator
@pytest.mark.long_in_interpreter
def test_opcheck(layout, name, plane, dtype):
    inputs = {n: layout(t) for n, t in make_inputs(name, plane=plane, dtype=dtype).items()}
    grad = layout(1 + torch.randn_like(inputs.get("x", inputs.get("h"))))
    opcheck(BACKWARDS[name], (grad, *(t for n, t in inputs.items() if n != "bias")))
    opcheck(FORWARDS[name], tuple(t.requires_grad_() for t in inputs.values()))


@pytest.mark.parametrize("name", ["fusion", "output"])
@pytest.mark.long_in_interpreter
def test_opcheck_of_several_states(name):
    inputs = make_inputs(name, states=2)
    opcheck(BACKWARDS[name], (torch.randn_like(inputs.get("x", inputs["h"])), *inputs.values()))
    opcheck(FORWARDS[name], tuple(t.requires_grad_() for t in inputs.values()))


def test_opcheck_of_conv_options():
    inputs, options = make_conv_inputs(bias=False), dict(dilation=3, padding_mode="zeros")
    opcheck(BACKWARDS["conv"], (torch.randn_like(inputs["x"]), *inputs.values()), options)
    opcheck(FORWARDS["conv"], tuple(t.requires_grad_() for t in inputs.values()), options)


@pytest.mark.parametrize(
    ("layout", "plane"),
    [
        pytest.param("contiguous", (1, 5, 4), id="one_channel"),
        pytest.param("channels_last", (3, 1, 1), id="one_pixel"),
        pytest.param("channels_last", (3, 5, 4), id="channels_last"),
    ],
    indirect=["layout"],
)
@each_operator
def test_compile(check, evaluate, layout, name, plane):
    torch.compiler.reset()
    inputs = {n: layout(t) for n, t in make_inputs(name, plane=plane).items()}
    grad, expected = evaluate(OPERATORS[name], inputs, {})
    _, actual = evaluate(torch.compile(OPERATORS[name], fullgraph=True), inputs, {}, grad)
    for result in expected:
        check(actual[result], expected[result], result)


class Fusion(nn.Module):
    """The three operators in a row."""

    def __init__(self):
        super().__init__()
        inputs = make_output_inputs()
        self.kernels = nn.ParameterList([inputs[n] for n in ("weight3", "weight3_d3", "weight3_d5", "alpha")])
        self.D = nn.Parameter(inputs["D"])

    def forward(self, h, C, x):
        x = dilated_dwconv2d(x, self.kernels[0], dilation=2, padding_mode="zeros")
        return state_fusion_output(state_fusion(h, *self.kernels), *self.kernels, C, self.D, x)


def test_export(check):
    inputs, model = make_output_inputs(states=2), Fusion()
    args = inputs["h"], inputs["C"], inputs["x"]
    exported = torch.export.export(model, args)
    targets = {node.target for node in exported.graph.nodes}
    assert {op.default for op in FORWARDS.values()} <= targets
    check(exported.module()(*args), model(*args))


def assert_alike(fake, real):
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", ["conv", "output"])
def test_results_are_laid_out_as_x(name):
    inputs = make_inputs(name, plane=(3, 5, 4))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = inputs["x"].contiguous(memory_format=memory_format).requires_grad_()
        y = OPERATORS[name](**inputs | {"x": x})
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert y.is_contiguous(memory_format=memory_format)
        assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"], indirect=True)
@each_dtype
@each_operator
def test_meta_tensors(layout, name, dtype):
    """The fake kernels promise what the real ones do."""
    inputs = {n: layout(t) for n, t in make_inputs(name, dtype=dtype).items()}
    assert_alike(OPERATORS[name](**{n: t.to("meta") for n, t in inputs.items()}), OPERATORS[name](**inputs))
    args = inputs.get("x", inputs.get("h")), *(t for n, t in inputs.items() if n != "bias")
    for fake, real in zip(BACKWARDS[name](*(t.to("meta") for t in args)), BACKWARDS[name](*args), strict=True):
        assert_alike(fake, real)


# ----- the module


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), ((5, 3), 2)])
def test_module_is_a_depthwise_convolution(check, kernel, dilation, bias):
    """Its parameters are nn.Conv2d's, which computes the same."""
    ours = DilatedDWConv2d(6, kernel, dilation, bias, dtype=torch.float64)
    margins = tuple(dilation * (k // 2) for k in ours.kernel_size)
    theirs = nn.Conv2d(6, 6, ours.kernel_size, 1, margins, dilation, 6, bias, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    check(ours(x), theirs(x).detach())
    assert "padding_mode='zeros'" in repr(ours)
    bound = theirs.weight[0].numel() ** -0.5
    assert all(0 < p.abs().max() <= bound for p in ours.parameters())


NO_MODULE = [
    *(dict(kernel_size=size) for size in (4, 3.0, "33", (3, 3, 3))),
    *(dict(dilation=dilation) for dilation in (0, 1.5, True)),
    *(dict(channels=0), dict(padding_mode="reflect")),
]


@pytest.mark.parametrize("arguments", NO_MODULE, ids=str)
def test_module_of_no_such_size(arguments):
    name = "kernel_size" if "kernel_size" in arguments else next(iter(arguments))
    with pytest.raises(ValueError, match=name):
        DilatedDWConv2d(**dict(channels=4, kernel_size=3) | arguments)


def test_backends(backend):
    found = backends(torch.empty(1))
    never_compiled = [f"selected for {name}" for name in ("mlp", "depthwise_silu", "depthwise_residual_norm")]
    assert list(found) == ["cpu", "cuda", "triton", "reference", "selected", *never_compiled]
    if backend in ("cpu", "cuda"):
        assert found["selected"] == backend
    assert found["reference"] == "available"


# ----- autocast


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.long_in_interpreter)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("half", HALVES, ids=str)
@each_operator
def test_autocast(check, evaluate, name, half, compiled):
    """Activations pass through the autocast dtype; states and their kernels do not, nor what is computed inside."""
    torch.compiler.reset()
    inputs = make_inputs(name)
    operator = torch.compile(OPERATORS[name], fullgraph=True) if compiled else OPERATORS[name]
    with torch.autocast(torch.get_default_device().type, half):
        grad, actual = evaluate(operator, inputs, {})
    assert actual["value"].dtype == (torch.float32 if name == "fusion" else half)
    rounded = {n: (t.to(half) if n in ACTIVATIONS else t).double() for n, t in inputs.items()}
    _, expected = evaluate(EXACT[name], rounded, {}, grad.double())
    check(actual.pop("value"), expected["value"])
    for n, t in inputs.items():
        result = actual[f"gradient of {n}"]
        assert result.dtype == t.dtype
        check(result.to(half) if n in ACTIVATIONS else result, expected[f"gradient of {n}"], n)


@each_operator
def test_autocast_hides_no_wrong_dtype(name):
    inputs = make_inputs(name)
    for argument in inputs:
        for dtype in (torch.int64, torch.complex64, torch.float64):
            if dtype == torch.float64 and argument in ("x", "h"):
                continue  # then it is the others that do not fit
            with torch.autocast(torch.get_default_device().type, torch.bfloat16), pytest.raises(TypeError):
                OPERATORS[name](**inputs | {argument: inputs[argument].to(dtype)})


@each_operator
def test_autocast_leaves_float64_alone(compare, name):
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        compare(OPERATORS[name], EXACT[name], make_inputs(name, dtype=torch.float64))


# ----- edges, errors, repeatability


@each_operator
def test_empty_batch(evaluate, name):
    inputs = make_inputs(name, batch=0)
    _, results = evaluate(OPERATORS[name], inputs, {})
    assert results["value"].shape == (0, 3, 5, 4)
    for n, t in inputs.items():
        assert results[f"gradient of {n}"].shape == t.shape
        assert results[f"gradient of {n}"].eq(0).all()


def test_empty_batch_of_several_states(evaluate):
    _, results = evaluate(state_fusion, make_fusion_inputs(batch=0, states=2), {})
    assert results["value"].shape == (0, 3, 2, 5, 4)
    assert results["gradient of alpha"].eq(0).all()


@each_operator
def test_second_derivative_is_refused(name):
    inputs = make_inputs(name)
    first = next(iter(inputs.values())).requires_grad_()
    (grad,) = torch.autograd.grad(OPERATORS[name](**inputs).square().sum(), first, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@each_operator
def test_transforms_of_torch_func(name):
    """Gradients of each sample at once are those of one after the other."""
    samples = [make_inputs(name) for _ in range(3)]
    stacked = [torch.stack(tensors) for tensors in zip(*(inputs.values() for inputs in samples), strict=True)]
    places = tuple(range(len(stacked)))
    found = torch.func.vmap(torch.func.grad(lambda *t: OPERATORS[name](*t).square().sum(), places))(*stacked)
    for i, inputs in enumerate(samples):
        leaves = [t.requires_grad_() for t in inputs.values()]
        expected = torch.autograd.grad(OPERATORS[name](*leaves).square().sum(), leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[i], b)


@each_operator
def test_forward_mode_is_refused(name):
    """Also in torch.compile, whose tensors do not tell their tangents."""
    inputs = make_inputs(name)
    first, *others = inputs.values()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda t: OPERATORS[name](t, *others), (first,), (torch.ones_like(first),))
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: OPERATORS[name](t, *others) * 2, backend="eager")
    expected = compiled(first)
    with forward_ad.dual_level():
        assert torch.equal(compiled(first), expected)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            compiled(forward_ad.make_dual(first, torch.ones_like(first)))


@pytest.mark.parametrize("value", [None, [1.0], torch.eye(3).to_sparse()], ids=["None", "list", "sparse"])
@each_operator
def test_arguments_that_are_no_dense_tensors(name, value):
    inputs = make_inputs(name)
    for argument in inputs:
        if argument == "bias" and value is None:
            continue
        with pytest.raises(TypeError, match=rf"^{argument} must be a"):
            OPERATORS[name](**inputs | {argument: value})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@each_operator
def test_gradient_that_does_not_fit(name, device):
    inputs = {n: t.to(device) for n, t in make_inputs(name).items() if n != "bias"}
    like = inputs.get("x", inputs.get("h"))
    for error, grad in [(ValueError, like[:, :1]), (TypeError, like.double())]:
        with pytest.raises(error, match="grad"):
            BACKWARDS[name](grad, *inputs.values())


CONV_BAD = {
    "x_rank": (ValueError, r"^x\b", dict(x=torch.ones(3, 5, 4))),
    "x_no_channels": (ValueError, r"^x\b", dict(x=torch.ones(2, 0, 5, 4))),
    "x_no_rows": (ValueError, r"^x\b", dict(x=torch.ones(2, 3, 0, 4))),
    "x_integer": (TypeError, r"^x\b", dict(x=torch.ones(2, 3, 5, 4, dtype=torch.int32))),
    "weight_rank": (ValueError, r"^weight\b", dict(weight=torch.ones(3, 3, 3))),
    "weight_channels": (ValueError, r"^weight\b", dict(weight=torch.ones(2, 1, 3, 3))),
    "weight_dense": (ValueError, r"^weight\b", dict(weight=torch.ones(3, 3, 3, 3))),
    "weight_even_rows": (ValueError, r"^weight\b", dict(weight=torch.ones(3, 1, 2, 3))),
    "weight_even_columns": (ValueError, r"^weight\b", dict(weight=torch.ones(3, 1, 3, 4))),
    "weight_empty": (ValueError, r"^weight\b", dict(weight=torch.ones(3, 1, 0, 3))),
    "weight_dtype": (TypeError, r"^weight\b", dict(weight=torch.ones(3, 1, 3, 3).half())),
    "bias_shape": (ValueError, r"^bias\b", dict(bias=torch.ones(2))),
    "bias_rank": (ValueError, r"^bias\b", dict(bias=torch.ones(3, 1))),
    "bias_dtype": (TypeError, r"^bias\b", dict(bias=torch.ones(3).double())),
    "dilation_zero": (ValueError, r"^dilation\b", dict(dilation=0)),
    "dilation_huge": (ValueError, r"^dilation\b", dict(dilation=2**31)),
    "dilation_negative": (ValueError, r"^dilation\b", dict(dilation=-1)),
    "padding_mode": (ValueError, r"^padding_mode\b", dict(padding_mode="reflect")),
}
FUSION_BAD = {
    "h_rank_3": (ValueError, r"^h\b", dict(h=torch.ones(3, 5, 4))),
    "h_rank_6": (ValueError, r"^h\b", dict(h=torch.ones(2, 3, 1, 1, 5, 4))),
    "h_no_states": (ValueError, r"^h\b", dict(h=torch.ones(2, 3, 0, 5, 4))),
    "h_no_columns": (ValueError, r"^h\b", dict(h=torch.ones(2, 3, 5, 0))),
    "h_half": (TypeError, r"^h\b", dict(h=torch.ones(2, 3, 5, 4).half())),
    "h_integer": (TypeError, r"^h\b", dict(h=torch.ones(2, 3, 5, 4).int())),
    "weight3_channels": (ValueError, r"^weight3\b", dict(weight3=torch.ones(1, 1, 3, 3))),
    "weight3_size": (ValueError, r"^weight3\b", dict(weight3=torch.ones(3, 1, 5, 5))),
    "weight3_d3_rank": (ValueError, r"^weight3_d3\b", dict(weight3_d3=torch.ones(3, 3, 3))),
    "weight3_d5_size": (ValueError, r"^weight3_d5\b", dict(weight3_d5=torch.ones(3, 1, 3, 1))),
    "weight3_dtype": (TypeError, r"^weight3\b", dict(weight3=torch.ones(3, 1, 3, 3).bfloat16())),
    "weight3_d3_dtype": (TypeError, r"^weight3_d3\b", dict(weight3_d3=torch.ones(3, 1, 3, 3).double())),
    "weight3_d5_dtype": (TypeError, r"^weight3_d5\b", dict(weight3_d5=torch.ones(3, 1, 3, 3).half())),
    "alpha_shape": (ValueError, r"^alpha\b", dict(alpha=torch.ones(2))),
    "alpha_rank": (ValueError, r"^alpha\b", dict(alpha=torch.ones(3, 1))),
    "alpha_dtype": (TypeError, r"^alpha\b", dict(alpha=torch.ones(3).double())),
}
OUTPUT_BAD = FUSION_BAD | {
    "C_rank": (ValueError, r"^C\b", dict(C=torch.ones(2, 5, 4))),
    "C_states": (ValueError, r"^C\b", dict(C=torch.ones(2, 2, 5, 4))),
    "C_batch": (ValueError, r"^C\b", dict(C=torch.ones(1, 1, 5, 4))),
    "C_plane": (ValueError, r"^C\b", dict(C=torch.ones(2, 1, 4, 5))),
    "C_dtype": (TypeError, r"^C\b", dict(C=torch.ones(2, 1, 5, 4).half())),
    "D_shape": (ValueError, r"^D\b", dict(D=torch.ones(1))),
    "D_dtype": (TypeError, r"^D\b", dict(D=torch.ones(3).half())),
    "x_shape": (ValueError, r"^x\b", dict(x=torch.ones(2, 1, 5, 4))),
    "x_rank": (ValueError, r"^x\b", dict(x=torch.ones(2, 3, 1, 5, 4))),
    "x_integer": (TypeError, r"^x\b", dict(x=torch.ones(2, 3, 5, 4).int(), C=torch.ones(2, 1, 5, 4).int())),
    "x_double": (TypeError, r"^x\b", dict(x=torch.ones(2, 3, 5, 4).double(), C=torch.ones(2, 1, 5, 4).double())),
}
CALLS = {
    "forward": lambda name, inputs: OPERATORS[name](**inputs),
    "backward": lambda name, inputs: BACKWARDS[name](inputs.get("x", inputs.get("h")), **inputs),
    "fake": lambda name, inputs: FORWARDS[name](
        **{n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    ),
}
BAD = [
    pytest.param(call, name, *case, id=f"{name}-{case_id}-{call}")
    for name, cases in {"conv": CONV_BAD, "fusion": FUSION_BAD, "output": OUTPUT_BAD}.items()
    for case_id, case in cases.items()
    for call in CALLS
    if not (call == "backward" and "bias" in case[2])  # which the convolution's backward does not take
]


@pytest.mark.parametrize(("call", "name", "error", "message", "change"), BAD)
def test_bad_input(call, name, error, message, change):
    inputs = make_inputs(name) | change
    if call == "backward":
        inputs.pop("bias", None)
    with pytest.raises(error, match=message):
        CALLS[call](name, inputs)


@pytest.mark.parametrize("moved", ["weight3", "weight3_d3", "weight3_d5", "alpha", "C", "D", "x", "x+C"])
def test_inputs_on_two_devices(moved):
    inputs = make_output_inputs()
    named = {"x": "C", "x+C": "x"}.get(moved, moved)  # C is compared with x, and x with h
    with pytest.raises(ValueError, match=rf"^{named} is on"):
        FORWARDS["output"](**inputs | {name: inputs[name].to("meta") for name in moved.split("+")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_operator
def test_bitwise_repeatable(evaluate, threads, name, dtype, interpreted):
    """Across runs and numbers of threads; large enough for PyTorch to use them."""
    plane = (3, 7, 9) if interpreted else (32, 33, 31)
    inputs, results = make_inputs(name, plane=plane, batch=3, dtype=dtype), []
    grad = 1 + torch.randn_like(inputs.get("x", inputs.get("h")))
    for count in (1, 2, 2):
        threads(count)
        results.append(evaluate(OPERATORS[name], inputs, {}, grad)[1])
    for result, first in results[0].items():
        assert all(torch.equal(first, other[result]) for other in results[1:]), result
