"""The operators on tokens: values and gradients against float64, on every backend."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from dwconv2d import depthwise_residual_norm, depthwise_silu, mlp
from kernel_backends import GPU, running_on
from selective_scan import norm_gate

BACKENDS = ["reference", *(["reference_on_cuda"] if GPU else []), "triton"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Images, height, width, channels: odd ones, a single pixel, channels that fill no tile, planes that fill several.
SIZES = {
    "1x1": (1, 1, 1, 10),
    "5x7": (2, 5, 7, 6),
    "odd": (3, 7, 7, 24),
    "wide": (1, 9, 16, 96),
    "even": (2, 12, 8, 64),
}
EPS = 1e-5


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running_on(request.param, "dwconv2d"), running_on(request.param, "selective_scan"):
        yield request.param


@pytest.fixture(autouse=True)
def _short_in_the_interpreter(request):
    """There the larger sizes take seconds: one of them, in one dtype."""
    case = request.node.name.partition("[triton-")[2]
    if not GPU and (case.startswith("even") or (case.startswith("wide") and "float32" not in case)):
        pytest.skip("too slow for Triton's interpreter")


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
@pytest.mark.float32_in_interpreter
def test_silu(backend, check, size, dtype):
    convolution, _ = parameters(size[3], dtype)
    compare(check, depthwise_silu, exact_silu, dict(x=half_of_a_projection(*size, dtype), **convolution))


@pytest.mark.parametrize("strides", ["alike", "others"])
@pytest.mark.parametrize("uses", [(0, 1, 2), (0, 2), (1,)], ids=["all", "two", "one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_silu_of_several_uses(backend, check, dtype, uses, strides):
    """Gradients of the results that are used are added before they are rounded: by the kernel if strides are alike."""
    size = SIZES["5x7"]
    convolution, _ = parameters(size[3], dtype)
    inputs = dict(x=half_of_a_projection(*size, dtype), **convolution)
    actual, wide = leaves(inputs), leaves(inputs, torch.float64)
    results = depthwise_silu(**actual, uses=3)
    for y in results:
        assert torch.equal(y, depthwise_silu(**inputs))
        assert y.data_ptr() == results[0].data_ptr()
    grads = [1 + torch.randn_like(y) for y in results]
    if strides == "others":
        grads[2] = planes(tokens(grads[2]).contiguous())
    grads = [grads[i] for i in uses]
    found = differentiate([results[i] for i in uses], actual, grads)
    total = sum(g.double() for g in grads)
    for name, a, b in zip(inputs, found, differentiate(exact_silu(**wide), wide, total), strict=True):
        check(a, b, f"gradient of {name}")


def test_silu_of_several_uses_refuses():
    _, arguments = example("silu", torch.float64)
    with pytest.raises(ValueError, match="uses must be 1, 2 or 3, got 4"):
        depthwise_silu(**arguments, uses=4)
    x = arguments.pop("x").requires_grad_()
    y = depthwise_silu(x, **arguments, uses=2)
    (grad,) = torch.autograd.grad(y[0].sum() + y[1].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@each_dtype
@each_size
@pytest.mark.float32_in_interpreter
def test_gate(backend, check, size, dtype):
    images, height, width, channels = size
    _, norm = parameters(channels, dtype)
    y = 1 + torch.randn(images, channels, height, width, dtype=dtype)
    z = half_of_a_projection(*size, dtype)
    compare(check, norm_gate, exact_gate, dict(y=y, z=z, weight=norm["norm_weight"], bias=norm["norm_bias"]))


def test_gate_of_one_plane_for_all_channels(backend, check):
    """A plane that is expanded has channels at a distance of 0."""
    y = torch.randn(2, 1, 3, 5).expand(2, 16, 3, 5)
    _, norm = parameters(16, torch.float32)
    inputs = dict(y=y, z=half_of_a_projection(2, 3, 5, 16, torch.float32))
    inputs |= dict(weight=norm["norm_weight"], bias=norm["norm_bias"])
    check(norm_gate(**inputs), exact_gate(**{name: t.double() for name, t in inputs.items()}))


@pytest.mark.parametrize("update", [None, "update", "scaled"])
@each_dtype
@each_size
@pytest.mark.float32_in_interpreter
def test_norm(backend, check, size, dtype, update):
    convolution, norm = parameters(size[3], dtype)
    inputs = dict(x=half_of_a_projection(*size, dtype), **convolution, **norm)
    if update:
        inputs["update"] = torch.randn(size, dtype=dtype)
    # As stochastic depth draws them: kept images are scaled up, dropped ones are 0.
    scale = torch.tensor([1.25, 0, 1.25], dtype=dtype)[: size[0]] if update == "scaled" else None
    compare_norm(check, inputs, scale)


def layers(inputs):
    """PyTorch's own layers."""
    hidden = F.gelu(F.linear(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"].to(inputs["x"].dtype)))
    return F.linear(hidden, inputs["fc2_weight"], inputs["fc2_bias"].to(hidden.dtype))


def exact_mlp(dtype, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """With hidden values rounded to `dtype`, as both the operator and separate layers round them."""
    hidden = F.gelu(F.linear(x, fc1_weight, fc1_bias))
    return F.linear(hidden + (hidden.to(dtype).double() - hidden).detach(), fc2_weight, fc2_bias)


def mlp_inputs(x, hidden, results, bias_dtype=None):
    def random(*shape, dtype=x.dtype):
        return torch.randn(*shape, dtype=dtype) / shape[-1] ** 0.5

    wide = bias_dtype or torch.promote_types(x.dtype, torch.float32)
    fc1 = dict(fc1_weight=random(hidden, x.shape[-1]), fc1_bias=random(hidden, dtype=wide))
    return dict(x=x, **fc1, fc2_weight=random(results, hidden), fc2_bias=random(results, dtype=wide))


def compare_mlp(check, inputs):
    """The value with float64; in 16 bits, the gradients with those of PyTorch's layers, which round as often."""
    actual, wide = leaves(inputs), leaves(inputs, torch.float64)
    value, expected = mlp(**actual), exact_mlp(inputs["x"].dtype, **wide)
    assert value.is_contiguous()
    check(value, expected)
    grad = 1 + torch.randn_like(value)
    found = differentiate(value, actual, grad)
    if value.dtype in (torch.float32, torch.float64):
        for name, a, b in zip(inputs, found, differentiate(expected, wide, grad.double()), strict=True):
            check(a, b, f"gradient of {name}")
        return
    separate = leaves(inputs)
    for name, a, b in zip(inputs, found, differentiate(layers(separate), separate, grad), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * b.abs().max().item(), msg=lambda s, name=name: name + s)


# Rows, channels, hidden channels, results: of one program and of several, and such that fill no block.
MLPS = {"1 row": (1, 3, 5, 2), "odd": (37, 24, 100, 17), "rows": (257, 64, 72, 128)}


@each_dtype
@pytest.mark.parametrize("size", MLPS.values(), ids=MLPS)
def test_mlp(backend, check, size, dtype):
    if backend == "triton" and not GPU and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    rows, channels, hidden, results = size
    compare_mlp(check, mlp_inputs(torch.randn(rows, channels, dtype=dtype), hidden, results))


@pytest.mark.skipif(GPU, reason="runs in Triton's interpreter")
def test_mlp_by_the_kernel(monkeypatch, check):
    """It runs for 16 bits and up to 128 channels, also for rows that lie apart. Otherwise, PyTorch's layers run."""
    from dwconv2d import mlp_triton

    launched = []
    launch = mlp_triton.launch
    monkeypatch.setattr(mlp_triton, "launch", lambda *args, **kwargs: launched.append(1) or launch(*args, **kwargs))
    inputs = mlp_inputs(torch.full((3, 8), math.inf, dtype=torch.float16), 40, 16)
    inputs = {name: t if name == "x" else 0.1 + t.abs() for name, t in inputs.items()}
    assert (mlp_triton.mlp(**inputs) == math.inf).all()  # not NaN
    launched.clear()
    for channels, dtype, expected in ((128, torch.float16, 1), (129, torch.float16, 0), (8, torch.float32, 0)):
        x = torch.randn(3, 5, 2 * channels, dtype=dtype)[..., channels:]
        inputs = mlp_inputs(x, 32, 16)
        found = mlp_triton.mlp(**inputs)
        assert len(launched) == expected
        if expected:
            check(found, exact_mlp(dtype, **{n: t.double() for n, t in inputs.items()}))
        else:
            assert torch.equal(found, layers(inputs))
        launched.clear()


def test_programs_of_several_tiles(check, monkeypatch):
    """A program takes several tiles where there are thousands of positions; here the last one's lie beyond them."""
    from dwconv2d import token_triton

    monkeypatch.setattr(token_triton, "tiles_of_a_program", lambda *_: 4)
    convolution, norm = parameters(24, torch.float32)
    inputs = dict(x=torch.randn(3, 7, 7, 24), update=torch.randn(3, 7, 7, 24), **convolution, **norm)
    with running_on("triton", "dwconv2d"):
        compare_norm(check, inputs, torch.tensor([1.25, 0, 1.25]))


@pytest.mark.parametrize("rows", [(1, 1), (255, 257), (600, 256)])
@pytest.mark.skipif(GPU, reason="runs in Triton's interpreter")
def test_sums_of_partial_sums(rows):
    """Of more rows than a program takes at once."""
    from dwconv2d import token_triton

    sums, norm_sums = (torch.randn(n, k, 11, dtype=torch.float64) for n, k in zip(rows, (10, 2), strict=True))
    weight, bias = sums.sum(0).split([9, 1])
    expected = [weight.t(), bias[0], *norm_sums.sum(0)]
    for given, count in ((None, 2), (norm_sums, 4)):
        for a, b in zip(token_triton._reduce_partials(sums, given), expected[:count], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ----- as PyTorch's operators


def example(name, dtype=torch.float32, channels=6):
    """Arguments of an operator as the model passes them, and the operator."""
    convolution, norm = parameters(channels, dtype)
    x, z = (half_of_a_projection(2, 5, 4, channels, dtype) for _ in range(2))
    if name == "silu":
        return torch.ops.dwconv2d.depthwise_silu.default, dict(x=x, **convolution)
    if name == "gate":
        y = torch.randn(2, channels, 5, 4, dtype=dtype)
        gate = dict(y=y, z=z, weight=norm["norm_weight"], bias=norm["norm_bias"], eps=EPS)
        return torch.ops.selective_scan.norm_gate.default, gate
    if name == "mlp":
        return torch.ops.dwconv2d.mlp.default, mlp_inputs(x, 10, 3)
    arguments = dict(x=x, **convolution, **norm, eps=EPS)
    if name != "norm":
        arguments["update"] = torch.randn(2, 5, 4, channels, dtype=dtype)
    if name == "norm, scaled":
        arguments["scale"] = torch.tensor([0, 1.25], dtype=dtype)
    return torch.ops.dwconv2d.depthwise_residual_norm.default, arguments


OPERATORS = ["silu", "gate", "mlp", "norm", "norm, update", "norm, scaled"]
PUBLIC = dict.fromkeys(OPERATORS, depthwise_residual_norm)
PUBLIC |= dict(silu=depthwise_silu, gate=norm_gate, mlp=mlp)
each_operator = pytest.mark.parametrize("name", OPERATORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_operator
def test_opcheck(backend, name, dtype):
    """Schema, fake kernel, autograd; the fake kernels of the backward operators too, by tracing through them."""
    operator, arguments = example(name, dtype)
    wanted = {n: t.clone().requires_grad_() if torch.is_tensor(t) and n != "scale" else t for n, t in arguments.items()}
    torch.library.opcheck(operator, (), wanted)


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "mlp"])
def test_opcheck_backward(backend, name, channels):
    """Strides and offsets of what it returns are those that its fake kernel promises, and no result shares memory."""
    _, arguments = example(name, channels=channels)
    x, weight, norm_weight = (arguments.get(n) for n in ("x", "weight", "norm_weight"))
    if name == "silu":
        grad = torch.randn(2, channels, 5, 4)
        backward, inputs = torch.ops.dwconv2d.depthwise_silu_backward.default, (grad, *arguments.values())
    elif name == "gate":
        grad = torch.randn(2, 5, 4, channels)
        backward, inputs = torch.ops.selective_scan.norm_gate_backward.default, (grad, *arguments.values())
    else:
        grads = torch.randn(3, 2, 5, 4, channels).unbind(0)
        backward = torch.ops.dwconv2d.depthwise_residual_norm_backward.default
        inputs = (*grads, x, weight, norm_weight, EPS, arguments.get("update"), arguments.get("scale"))
    torch.library.opcheck(backward, inputs, test_utils=("test_schema", "test_faketensor"))


@each_operator
def test_gradcheck(name):
    operator, arguments = example(name, torch.float64)
    names = [n for n, t in arguments.items() if torch.is_tensor(t) and n != "scale"]
    leaves = [arguments[n].clone().requires_grad_() for n in names]
    call = lambda *tensors: operator(**{**arguments, **dict(zip(names, tensors, strict=True))})  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    if name == "mlp":  # its gradient is made of PyTorch's operators
        assert torch.autograd.gradgradcheck(call, leaves)
        return
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.gradgradcheck(call, leaves)


@each_operator
def test_gradient_by_torch_func(name):
    operator, arguments = example(name)
    names = [n for n, t in arguments.items() if torch.is_tensor(t) and n != "scale"]
    leaves = [arguments[n].clone().requires_grad_() for n in names]

    def loss(call, tensors):
        found = call(**{**arguments, **dict(zip(names, tensors, strict=True))})
        return sum(t.square().sum() for t in ((found,) if torch.is_tensor(found) else found))

    found = torch.func.grad(lambda tensors: loss(PUBLIC[name], tensors))([arguments[n] for n in names])
    for a, b in zip(found, torch.autograd.grad(loss(operator, leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


@each_operator
def test_autocast(backend, name):
    """Activations and weights of products are cast; other parameters are not. A caller's own cast gives the same."""
    device = "cuda" if torch.get_default_device().type == "cuda" else "cpu"
    operator, arguments = example(name)
    cast = {"x", "y", "z", "update", "fc1_weight", "fc2_weight"}
    with torch.autocast(device, torch.bfloat16):
        found = PUBLIC[name](**arguments)
    expected = operator(**{n: t.bfloat16() if n in cast else t for n, t in arguments.items()})
    for a, b in zip(*((r,) if torch.is_tensor(r) else r for r in (found, expected)), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


BAD = {
    "silu x": ("silu", "x", lambda t: t[0], r"^x must be \(batch, height, width, channels\)"),
    "silu weight": ("silu", "weight", lambda t: t[1:], r"^weight must be \(6, 1, 3, 3\)"),
    "silu bias": ("silu", "bias", lambda t: t.double(), "^bias must be float64 exactly if x is"),
    "silu ints": ("silu", "x", lambda t: t.int(), "^x must be float16"),
    "silu sparse": ("silu", "weight", lambda t: t.to_sparse(), "^weight must be a dense tensor"),
    "silu number": ("silu", "bias", lambda t: 1.0, "^bias must be a tensor, got float"),
    "norm norm_bias": ("norm", "norm_bias", lambda t: t[None], r"^norm_bias must be \(6,\)"),
    "norm update": ("norm, update", "update", lambda t: t.half(), "^update must be torch.float32 as x is"),
    "norm scale": ("norm, scaled", "scale", lambda t: t[:1], r"^scale must be \(2,\)"),
    "norm scale alone": ("norm, scaled", "update", lambda t: None, "^scale is given without an update"),
    "gate z": ("gate", "z", lambda t: t.permute(0, 3, 1, 2), r"^z must be \(2, 5, 4, 6\)"),
    "gate z dtype": ("gate", "z", lambda t: t.half(), "^z must be torch.float32 as y is"),
    "gate y": ("gate", "y", lambda t: t[:, :0], r"^y must be \(batch, channels, height, width\)"),
    "mlp x": ("mlp", "x", lambda t: t[0, 0, 0], r"^x must be \(..., channels\)"),
    "mlp fc1_weight": ("mlp", "fc1_weight", lambda t: t[:, 1:], r"^fc1_weight must be \(10, 6\)"),
    "mlp fc1_bias": ("mlp", "fc1_bias", lambda t: t[0], r"^fc1_bias must be \(10,\)"),
    "mlp fc2_weight": ("mlp", "fc2_weight", lambda t: t.t(), r"^fc2_weight must be \(10, 10\)"),
    "mlp dtype": ("mlp", "fc2_weight", lambda t: t.half(), "^fc2_weight must be torch.float32 as x is"),
    "mlp fc2_bias": ("mlp", "fc2_bias", lambda t: t.to("meta"), "^fc2_bias is on meta but x is on cpu"),
    "gate bias": ("gate", "bias", lambda t: t.to("meta"), "^bias is on meta but y is on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    name, argument, spoil, message = BAD[case]
    _, arguments = example(name)
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises((ValueError, TypeError), match=message):
        PUBLIC[name](**arguments)


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
@pytest.mark.parametrize("spoil", [torch.flatten, lambda t: t[:, 0], lambda t: t[1:]], ids=["1d", "3d", "channels"])
def test_bad_weight_of_a_backward_operator(backend, spoil):
    """It has no bias to check, so the weight's shape must be checked on its own."""
    _, arguments = example("norm")
    x, weight, norm_weight = (arguments[name] for name in ("x", "weight", "norm_weight"))
    grads = torch.randn(3, *x.shape).unbind(0)
    with pytest.raises(ValueError, match=r"^weight must be \(6, 1, 3, 3\)"):
        torch.ops.dwconv2d.depthwise_residual_norm_backward(*grads, x, spoil(weight), norm_weight, EPS)


@each_operator
def test_empty_batch(backend, name):
    operator, arguments = example(name)
    images = {"x", "y", "z", "update", "scale"}
    inputs = {n: t[:0].requires_grad_(n != "scale") if n in images else t for n, t in arguments.items()}
    out = operator(**inputs)
    (out if torch.is_tensor(out) else out[1]).sum().backward()
    first = inputs["y" if name == "gate" else "x"]
    assert first.grad.shape == first.shape


def random_case(seed):
    """An operator with sizes, dtypes and layouts by chance."""
    rng = random.Random(seed)

    def pick(*of):
        return rng.choice(of)

    torch.manual_seed(seed)
    name = pick(*OPERATORS)
    # What a norm of very few channels hands back all but cancels: rounding errors would be all there is to compare.
    channels = pick(1, 3, 8, 17, 40) if name == "silu" else pick(12, 17, 32, 40)
    return name, (pick(1, 2, 3), pick(1, 2, 5, 8, 13), pick(1, 3, 4, 9, 16), channels), pick(*DTYPES), pick


@pytest.mark.parametrize("part", range(2))
def test_random_cases(request, backend, check, layouts, part):
    """`--random-cases 2000` for all that are asked of a release."""
    cases = request.config.getoption("--random-cases") // (20 if backend == "triton" and not GPU else 1)
    for seed in range(part, cases, 2):
        name, size, dtype, pick = random_case(seed)
        layout = layouts[pick("contiguous", "channels_last", "transposed", "every_second", "offset", "misaligned")]
        convolution, norm = parameters(size[3], dtype)
        if name == "silu":
            compare(
                check, depthwise_silu, exact_silu, dict(x=layout(1 + torch.randn(size, dtype=dtype)), **convolution)
            )
        elif name == "mlp":
            hidden, results, bias_dtype = pick(1, 7, 64, 130), pick(1, 5, 48), pick(None, dtype)
            if backend == "triton" and not GPU and dtype == torch.bfloat16:  # which its interpreter multiplies wrongly
                continue
            compare_mlp(check, mlp_inputs(layout(torch.randn(size, dtype=dtype)), hidden, results, bias_dtype))
        elif name == "gate":
            y = layout(1 + torch.randn(size[0], size[3], *size[1:3], dtype=dtype))
            inputs = dict(y=y, z=half_of_a_projection(*size, dtype))
            compare(check, norm_gate, exact_gate, dict(**inputs, weight=norm["norm_weight"], bias=norm["norm_bias"]))
        else:
            inputs = dict(x=layout(1 + torch.randn(size, dtype=dtype)), **convolution, **norm)
            if name != "norm":
                inputs["update"] = layout(torch.randn(size, dtype=dtype))
            scale = torch.tensor([1.25, 0, 0.5], dtype=dtype)[: size[0]] if name == "norm, scaled" else None
            compare_norm(check, inputs, scale)


# ----- launches


class _OnAGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)


class _Kernel:
    """Counts how often it is compiled, and keeps what its compiled forms were launched with."""

    arg_names = ("x", "n", "BLOCK", "EPS")

    def __init__(self):
        self.compiled, self.launched = 0, []

    def __getitem__(self, grid):
        def first_launch(*args, **constants):
            self.compiled += 1
            return _Compiled(self.launched)

        return first_launch


class _Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))

    def run(self, *args):
        assert args[3:9] == ("stream 0", "function", "metadata", None, None, None)
        self.launched.append((args[:3], args[9:]))


@pytest.mark.parametrize("bare", [False, True])
def test_launches_are_remembered_by_what_compilation_depends_on(bare, monkeypatch):
    from dwconv2d import launching

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: f"stream {device}", raising=False)
    monkeypatch.setattr(launching, "_TAKES_BARE_ARGUMENTS", bare)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_MOST", 5)
    kernel = _Kernel()

    def launch(x, n=3, **constants):
        launching.launch(kernel, 7, x.as_subclass(_OnAGpu), n, **{"BLOCK": 16, "EPS": 1e-5, "num_warps": 2} | constants)

    x = torch.zeros(64)
    assert x.data_ptr() % 16 == 0
    launch(x)
    launch(x)
    assert kernel.compiled == 1
    ((grid, (_, *rest)),) = kernel.launched
    assert grid == (7, 1, 1)
    assert rest == [3, 16, 1e-5]  # the constants, in the kernel's order, without what is none of its parameters
    others = [dict(x=x[1:]), dict(x=x.half()), dict(x=x, n=4), dict(x=x, BLOCK=32), dict(x=x, num_warps=4)]
    for i, other in enumerate(others):
        launch(**other)
        launch(**other)
        assert kernel.compiled == 2 + i
    launch(x)
    assert kernel.compiled == 2 + len(others)  # five of them are remembered, then all are forgotten
