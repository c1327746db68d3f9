"""The CUDA kernels of the state scan, run on the host: compiled against an emulation of blocks and warps.

It finds wrong indices, missing barriers and lost accuracy. It does not know the GPU's memory model or its limits.
"""

import ctypes
import functools
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from selective_scan import scan_reference as reference

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "selective_scan" / "csrc" / "cuda"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ORDERS = {"ascending": 0, "descending": 1, "random": 2}
MARGIN = 64  # elements around an output that must stay as they are


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated CUDA kernels with")
    path = tmp_path_factory.mktemp("cuda_emulation") / "emulated.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-shared", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, HERE / "cuda_emulation" / "selective_scan_driver.cpp", "-o", path], check=True)
    library = ctypes.CDLL(path)
    library.emulated_forward.restype = library.emulated_backward.restype = ctypes.c_char_p
    return library


@pytest.fixture
def scan(library):
    """The operator with the emulated kernels, differentiable; `order` is that of blocks and threads."""

    def run(u, delta, A, B, delta_bias=None, delta_softplus=False, A_is_log=False, order="ascending", rounds=0):
        options = int(delta_softplus), rounds, int(A_is_log), ORDERS[order]
        return EmulatedScan.apply(u, delta, A, B, delta_bias, library, options)

    return run


class EmulatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, bias, library, options):
        ctx.save_for_backward(u, delta, A, B, bias)
        ctx.library, ctx.options = library, options
        shape = (*u.shape[:2], A.shape[1], u.shape[2])
        (h,) = call(library.emulated_forward, [u, delta, A, B, bias, None], options, [(shape, A.dtype)])
        return h

    @staticmethod
    def backward(ctx, grad):
        u, delta, A, B, bias = inputs = ctx.saved_tensors
        outputs = [(t.shape, t.dtype) for t in (u, delta, A, B)] + [(A.shape[:1], A.dtype)]
        grads = call(ctx.library.emulated_backward, [*inputs, grad], ctx.options, outputs)
        return (*grads[:4], None if bias is None else grads[4], None, None)


def call(function, inputs, options, outputs):
    """The outputs, allocated full of NaN between margins that must stay as they are."""
    *numbers, order = options
    buffers = [torch.full((math.prod(shape) + 2 * MARGIN,), -77, dtype=dtype) for shape, dtype in outputs]
    for buffer in buffers:
        buffer[MARGIN:-MARGIN] = torch.nan
    results = [b[MARGIN:-MARGIN].view(shape) for b, (shape, _) in zip(buffers, outputs, strict=True)]
    pointers = (ctypes.c_void_p * 6)(*[None if t is None else t.data_ptr() for t in inputs])
    addresses = (ctypes.c_void_p * len(results))(*[t.data_ptr() for t in results])
    target = addresses if len(results) > 1 else ctypes.c_void_p(addresses[0])
    sizes, strides = describe(inputs, *numbers)
    error = function(DTYPE_CODES[inputs[0].dtype], order, sizes, pointers, strides, target)
    assert error is None, error.decode()
    for buffer in buffers:
        assert buffer[:MARGIN].eq(-77).all(), "written before an output"
        assert buffer[-MARGIN:].eq(-77).all(), "written after an output"
    return results


def describe(inputs, softplus=0, rounds=0, A_is_log=0):
    """Sizes, and the strides of every input by batch, channel, state and token, as C arrays."""
    u, _, A, B, *_ = inputs
    groups = B.shape[1] if B.dim() == 4 else 1
    sizes = [*u.shape[:2], A.shape[1], u.shape[2], groups, softplus, rounds, A_is_log]
    dims = ["bct", "bct", "cs", "bcst" if B.dim() == 4 else "bst", "c", "bcst"]
    strides = [stride for t, d in zip(inputs, dims, strict=True) for stride in strides_of(t, d)]
    return (ctypes.c_int64 * 8)(*sizes), (ctypes.c_int64 * 24)(*strides)


def strides_of(tensor, dims):
    """0 for a dimension that the tensor does not have, and for one of size 1."""
    found = (
        {} if tensor is None else {d: s for d, s, n in zip(dims, tensor.stride(), tensor.shape, strict=True) if n > 1}
    )
    return [found.get(d, 0) for d in "bcst"]


class ReferenceScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.inputs = inputs
        return reference.selective_scan_state(*inputs)

    @staticmethod
    def backward(ctx, grad):
        grads = reference.selective_scan_state_backward(grad, *ctx.inputs)
        return (*grads[:4], None if ctx.inputs[4] is None else grads[4], None, None)


def exact_scan(u, delta, A, B, delta_bias=None, delta_softplus=False, A_is_log=False):
    """The specification, whose own tests compare it with the recurrence token by token."""
    return ReferenceScan.apply(u, delta, A, B, delta_bias, delta_softplus, A_is_log)


def make_inputs(batch, channels, states, length, groups=None, bias=True, softplus=True, dtype=torch.float32):
    state = torch.promote_types(dtype, torch.float32)
    delta = torch.randn(batch, channels, length, dtype=dtype)
    inputs = dict(
        u=1 + torch.randn(batch, channels, length, dtype=dtype),
        delta=delta if softplus else delta.abs(),
        A=-2 * torch.rand(channels, states, dtype=state),
        B=1 + torch.randn(batch, *([groups] if groups else []), states, length, dtype=dtype),
    )
    return inputs | (dict(delta_bias=torch.rand(channels, dtype=state)) if bias else {})


def channels_last(inputs):
    """u and delta as a linear layer leaves them."""
    swapped = {name: inputs[name].mT.contiguous().mT for name in ("u", "delta")}
    return inputs | swapped


# batch, channels, states, length, groups of B
SIZES = [
    (2, 24, 1, 1, None),
    (1, 8, 16, 2, 4),
    (2, 24, 1, 7, 1),
    (2, 3, 2, 31, 3),
    (2, 100, 1, 49, None),
    (2, 8, 1, 63, 2),
    (2, 40, 1, 196, 2),
    (1, 8, 2, 196, None),
    (2, 24, 1, 197, 3),
    (1, 24, 1, 784, None),
    (2, 3, 1, 1000, None),
    (1, 8, 2, 1023, 8),
    (1, 4, 16, 250, 2),
    (1, 3, 2, 2049, None),
    (1, 1, 1, 2049, None),
    (2, 3, 1, 3136, None),
    (1, 16, 1, 3585, 2),
]


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "B{}-D{}-N{}-L{}-G{}".format(*s))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(compare, scan, size, dtype, layout):
    inputs = make_inputs(*size, dtype=dtype)
    inputs = channels_last(inputs) if layout == "channels_last" else inputs
    compare(scan, exact_scan, inputs, delta_softplus=True)


def test_plan_wastes_no_lane_on_the_models_sizes(library):
    """The layers of Spatial-Mamba at 224 x 224, both layouts: 224 threads of full items, channels a divisor of rows."""
    for channels, length, rows in [(64, 3136, 1), (128, 784, 4), (256, 196, 16), (512, 49, 32)]:
        u = torch.empty(2, channels, length, device="meta", dtype=torch.bfloat16)
        A, B = torch.empty(channels, 1, device="meta"), torch.empty(2, 1, length, device="meta", dtype=u.dtype)
        for layout in (u, u.mT.contiguous().mT):
            numbers = (ctypes.c_int64 * 7)()
            library.emulated_plan(DTYPE_CODES[u.dtype], 0, *describe([layout, layout, A, B, None, None]), numbers)
            items, found, per_row, threads, _, chunks, flat = numbers
            assert threads == found * per_row == 224
            assert chunks * per_row * items == length
            assert flat == (layout is u)
            assert found == rows if layout is u else found >= 16


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "no_softplus"])
@pytest.mark.parametrize(("states", "length"), [(1, 196), (1, 49), (2, 33)])
@pytest.mark.parametrize("is_log", [True, False], ids=["A_is_log", "A"])
def test_options(compare, scan, groups, bias, softplus, states, length, is_log):
    inputs = make_inputs(2, 24, states, length, groups, bias, softplus)
    if is_log:  # rates from 0.1 to 5
        inputs["A"] = torch.empty_like(inputs["A"]).uniform_(-2.3, 1.6)
    compare(scan, exact_scan, inputs, delta_softplus=softplus, A_is_log=is_log)


@pytest.mark.parametrize(("states", "length"), [(1, 196), (1, 3200), (2, 63)])
def test_views(check, evaluate, scan, layout, states, length):
    inputs = make_inputs(2, 16, states, length, groups=2)
    views = {name: layout(t) for name, t in inputs.items()}
    exact = {name: t.double() for name, t in views.items()}
    grad = layout(1 + torch.randn(2, 16, states, length))
    _, actual = evaluate(scan, views, dict(delta_softplus=True), grad)
    _, expected = evaluate(exact_scan, exact, dict(delta_softplus=True), grad.double())
    for name in expected:
        check(actual[name], expected[name], name)


@pytest.mark.parametrize("order", ["descending", "random"])
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("size", [(1, 4, 1, 3136, 2), (1, 3, 1, 6300, None), (2, 40, 1, 196, 2), (1, 6, 3, 1600, 2)])
def test_threads_and_blocks_in_any_order(evaluate, scan, size, last, order):
    inputs = make_inputs(*size, dtype=torch.bfloat16)
    inputs = channels_last(inputs) if last else inputs
    grad, expected = evaluate(scan, inputs, dict(delta_softplus=True))
    _, actual = evaluate(scan, inputs, dict(delta_softplus=True, order=order), grad)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("rounds", [2, 4])
@pytest.mark.parametrize(
    "size", [(2, 6, 1, 784, 2), (1, 7, 1, 3136, None), (1, 80, 1, 56, None), (1, 5, 1, 3200, None)]
)
def test_rounds(compare, scan, size, rounds):
    """Several sets of rows per block, the last block with fewer."""
    compare(functools.partial(scan, rounds=rounds), exact_scan, make_inputs(*size), delta_softplus=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_row(compare, scan, dtype):
    compare(scan, exact_scan, make_inputs(1, 2, 1, 64521, dtype=dtype), delta_softplus=True)


SLOW = {
    "one": lambda r: torch.full_like(r, 1e-3),
    "varied": lambda r: 1e-3 * (0.5 + r),
    "slower": lambda r: torch.full_like(r, 1e-4),
    "faster": lambda r: torch.full_like(r, 1e-2),
}


@pytest.mark.parametrize("steps", SLOW)
@pytest.mark.parametrize(("states", "length"), [(1, 3136), (2, 1600), (1, 9000)])
def test_slow_decays(compare, scan, steps, states, length):
    """A state that a thousand steps hardly forget, although the emulated exp2 is off by up to 1.2e-7, always down."""
    inputs = make_inputs(1, 3, states, length, bias=False)
    inputs |= dict(delta=SLOW[steps](torch.rand(1, 3, length)), A=torch.full((3, states), -1.0))
    compare(scan, exact_scan, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("states", "length"), [(1, 784), (2, 63)])
def test_stiff_decays(compare, scan, states, length, dtype):
    """Steps from 0, where the state stays, to delta |A| = 1e4, where nothing of it is left."""
    inputs = make_inputs(2, 3, states, length, bias=False, dtype=dtype)
    steps = torch.tensor([0, 1e-3, 1, 30, 90, 300, 1e4])
    inputs["delta"] = steps[torch.randint(len(steps), inputs["delta"].shape)].to(dtype)
    inputs["A"] = -torch.rand_like(inputs["A"]).clamp(0.5)
    inputs["u"] = inputs["u"] / inputs["delta"].clamp(1)
    compare(scan, exact_scan, inputs)


@pytest.mark.parametrize(("states", "length"), [(1, 196), (2, 63)])
def test_little_is_carried_over(compare, scan, states, length):
    """Decays of e^-6 to e^-10: A's gradient is of what they leave, which a difference of states would not show."""
    inputs = make_inputs(2, 3, states, length, bias=False)
    inputs |= dict(delta=6 + 4 * torch.rand(2, 3, length), A=torch.full((3, states), -1.0))
    compare(scan, exact_scan, inputs)


@pytest.mark.parametrize("size", [(2, 4, 1, 197), (1, 3, 1, 3200), (2, 5, 1, 10), (2, 5, 2, 33)])
def test_bias_beyond_the_tokens(compare, scan, size):
    """Tiles have places without a token; the bias alone, -100 of a step near 0, would let the state there explode."""
    inputs = make_inputs(*size)
    inputs |= dict(delta=100 + torch.rand_like(inputs["delta"]), A=torch.full_like(inputs["A"], -1))
    compare(scan, exact_scan, inputs | dict(delta_bias=torch.full_like(inputs["delta_bias"], -100)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("s", "step"), [(-700, 2), (-50, 1 / 8), (20, 1 / 16), (50, 1 / 8), (700, 2)])
def test_softplus_far_from_zero(compare, scan, s, step, dtype):
    inputs = make_inputs(2, 6, 1, 196, dtype=dtype)
    inputs["delta"] = s / 2 + step * torch.randint(-8, 8, inputs["delta"].shape).to(dtype)
    inputs["delta_bias"] = torch.full_like(inputs["delta_bias"], s / 2)
    scale = 1e4 if s < 0 else 1 / 16
    inputs["u"], inputs["B"] = scale * inputs["u"], scale * inputs["B"]
    inputs["A"] = inputs["A"] / max(s, 1)
    compare(scan, exact_scan, inputs, delta_softplus=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["u", "delta"])
@pytest.mark.parametrize(("states", "length"), [(1, 196), (2, 33), (1, 3200)])
def test_infinities_stay_in_their_row(evaluate, scan, states, length, name, value):
    """Rows of a block share warps, not values; what a sum over rows must contain is B's gradient alone."""
    inputs = make_inputs(1, 4, states, length, bias=False)
    spoilt = inputs | {name: inputs[name].index_fill(1, torch.tensor(1), value)}
    grad, expected = evaluate(scan, inputs, dict(delta_softplus=True))
    _, actual = evaluate(scan, spoilt, dict(delta_softplus=True), grad)
    for result in ("value", "gradient of u", "gradient of delta"):
        assert torch.equal(actual[result][:, [0, 2, 3]], expected[result][:, [0, 2, 3]]), result
    assert torch.equal(actual["gradient of A"][[0, 2, 3]], expected["gradient of A"][[0, 2, 3]])
    if math.isnan(value):
        assert actual["value"][:, 1].isnan().all()


def test_steps_of_zero_keep_the_state(scan):
    """Steps of 0 after the first neither forget nor add: every state is B u of the first, and so every gradient's."""
    u = torch.full((1, 1, 3136), 3.0, requires_grad=True)
    delta = torch.zeros(1, 1, 3136).index_fill(2, torch.tensor(0), 1)
    h = scan(u, delta, -torch.ones(1, 1), torch.full((1, 1, 3136), 2.0))
    assert h.eq(6).all()
    h.sum().backward()
    assert torch.equal(u.grad, 2 * 3136 * delta)
