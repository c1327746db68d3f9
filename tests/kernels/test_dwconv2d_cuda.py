"""The CUDA kernels of dwconv2d, run on the host: compiled against an emulation of blocks and warps.

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
from dwconv2d import plane_reference as reference

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "dwconv2d" / "csrc" / "cuda"
FUSION, OUTPUT, CONV = range(3)
FORWARD, ADJOINT, GRADIENTS = range(3)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ORDERS = {"ascending": 0, "descending": 1, "random": 2}
MODES = ["replicate", "zeros"]
MARGIN = 64  # elements around an output that must stay as they are
WEIGHTS = ("weight3", "weight3_d3", "weight3_d5")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated CUDA kernels with")
    path = tmp_path_factory.mktemp("cuda_emulation") / "emulated.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fPIC", "-shared", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, HERE / "cuda_emulation" / "dwconv2d_driver.cpp", "-o", path], check=True)
    library = ctypes.CDLL(path)
    library.emulated_forward.restype = library.emulated_backward.restype = ctypes.c_char_p
    return library


@pytest.fixture
def emulated(library):
    """`emulated(operation, order="ascending", rounds=0)`: an operator with the emulated kernels, differentiable."""

    def operator(operation, order="ascending", rounds=0):
        def run(dilation=1, padding_mode="replicate", **tensors):
            options = operation, dilation, padding_mode == "zeros", rounds, ORDERS[order]
            return Emulated.apply(library, options, tuple(tensors), *tensors.values())

        return run

    return operator


class Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, options, names, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.library, ctx.options, ctx.names = library, options, names
        inputs = dict(zip(names, tensors, strict=True))
        like = inputs.get("x", inputs.get("h"))
        return call(library.emulated_forward, inputs, options, [like])[0]

    @staticmethod
    def backward(ctx, grad):
        inputs = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        conv = ctx.options[0] == CONV
        names = ["x" if conv else "h", None if conv else "x"]
        names += ["weight", None, None, None, "bias", None] if conv else [*WEIGHTS, "alpha", "D", "C"]
        missing = grad.new_empty(inputs["x"].shape[1]) if conv else None  # a gradient for a bias that there is not
        likes = [missing if name == "bias" else inputs.get(name) for name in names]
        grads = call(ctx.library.emulated_backward, inputs | dict(grad=grad), ctx.options, likes)
        found = dict(zip(names, grads, strict=True))
        return None, None, None, *(found[name] for name in ctx.names)


def call(function, inputs, options, likes):
    """The outputs, allocated full of NaN between margins that must stay as they are."""
    buffers = [None if t is None else t.new_full((t.numel() + 2 * MARGIN,), -77) for t in likes]
    for buffer in buffers:
        if buffer is not None:
            buffer[MARGIN:-MARGIN] = torch.nan
    results = [None if t is None else b[MARGIN:-MARGIN].view(t.shape) for b, t in zip(buffers, likes, strict=True)]
    addresses = (ctypes.c_void_p * len(results))(*[None if t is None else t.data_ptr() for t in results])
    numbers, strides = describe(inputs, options)
    pointers = (ctypes.c_void_p * 10)(*[None if t is None else t.data_ptr() for t in arguments(inputs)])
    error = function(options[-1], numbers, pointers, strides, addresses)
    assert error is None, error.decode()
    for buffer in buffers:
        if buffer is not None:
            assert buffer[:MARGIN].eq(-77).all(), "written before an output"
            assert buffer[-MARGIN:].eq(-77).all(), "written after an output"
    return results


def arguments(inputs):
    """In the driver's order: what is convolved, grad, C, x, three kernels, alpha, D, bias."""
    conv = "weight" in inputs
    planes = [inputs["x"], inputs.get("grad"), None, None] if conv else [inputs.get(n) for n in ("h", "grad", "C", "x")]
    weights = [inputs["weight"], None, None] if conv else [inputs[n] for n in WEIGHTS]
    return [*planes, *weights, *(inputs.get(n) for n in ("alpha", "D", "bias"))]


def describe(inputs, options):
    """Numbers and strides as C arrays."""
    operation, dilation, zeros, rounds, _ = options
    convolved, grad, C, x, weight, *_ = arguments(inputs)
    batch, channels, *states, height, width = convolved.shape
    dtype = DTYPE_CODES[(convolved if x is None else x).dtype]
    numbers = [operation, dtype, batch, channels, *(states or [1]), height, width, *weight.shape[2:]]
    strides = [*strides_of(convolved, "bcs"), *strides_of(grad, "bcs"), *strides_of(C, "bs"), *strides_of(x, "bc")]
    return (ctypes.c_int64 * 12)(*numbers, dilation, zeros, rounds), (ctypes.c_int64 * 12)(*strides)


def strides_of(tensor, dims):
    """By batch, channel and state; 0 for a dimension that the tensor does not have, and for one of size 1."""
    if tensor is None:
        return 0, 0, 0
    dims = zip(dims, tensor.stride()[:-2], tensor.shape[:-2], strict=False)
    found = {d: stride for d, stride, size in dims if size > 1}
    return [found.get(d, 0) for d in "bcs"]


# ----- inputs


def noise(*shape, dtype):
    return 1 + torch.randn(shape, dtype=dtype)


def make_conv_inputs(batch, channels, height, width, kernel=(3, 3), bias=True, dtype=torch.float32):
    inputs = dict(x=noise(batch, channels, height, width, dtype=dtype), weight=noise(channels, 1, *kernel, dtype=dtype))
    return inputs | (dict(bias=noise(channels, dtype=dtype)) if bias else {})


def make_fusion_inputs(batch, channels, height, width, states=None, dtype=torch.float32):
    dtype = torch.promote_types(dtype, torch.float32)
    weights = {name: noise(channels, 1, 3, 3, dtype=dtype) for name in WEIGHTS}
    h = noise(batch, channels, *([states] if states else []), height, width, dtype=dtype)
    return dict(h=h, **weights, alpha=noise(3, dtype=dtype) / 30)


def make_output_inputs(batch, channels, height, width, states=None, dtype=torch.float32):
    inputs = make_fusion_inputs(batch, channels, height, width, states, dtype)
    return inputs | dict(
        C=noise(batch, states or 1, height, width, dtype=dtype),
        D=noise(channels, dtype=inputs["h"].dtype),
        x=noise(batch, channels, height, width, dtype=dtype),
    )


OPERATORS = {
    CONV: (make_conv_inputs, reference.dilated_dwconv2d),
    FUSION: (make_fusion_inputs, reference.state_fusion),
    OUTPUT: (make_output_inputs, reference.state_fusion_output),
}

# batch, channels, height, width
SIZES = [
    (1, 1, 1, 1),
    (3, 3, 1, 1),
    (1, 3, 2, 9),
    (2, 3, 6, 8),
    (2, 40, 7, 7),
    (1, 130, 7, 7),
    (2, 5, 8, 9),
    (1, 3, 7, 12),
    (2, 33, 14, 14),
    (1, 4, 13, 20),
    (1, 9, 28, 28),
    (1, 3, 25, 40),
    (1, 3, 56, 56),
    (1, 1, 23, 150),
    (1, 2, 150, 9),
    (1, 2, 120, 130),
]
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "B{}-D{}-{}x{}".format(*s))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_size
@each_dtype
def test_output(compare, emulated, size, dtype):
    compare(emulated(OUTPUT), reference.state_fusion_output, make_output_inputs(*size, dtype=dtype))


@each_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fusion(compare, emulated, size, dtype):
    compare(emulated(FUSION), reference.state_fusion, make_fusion_inputs(*size, dtype=dtype))


@pytest.mark.parametrize("mode", MODES)
@each_size
@each_dtype
def test_conv(compare, emulated, size, dtype, mode):
    compare(emulated(CONV), reference.dilated_dwconv2d, make_conv_inputs(*size, dtype=dtype), padding_mode=mode)


@pytest.mark.parametrize("states", [1, 2, 16])
@pytest.mark.parametrize("size", [(2, 3, 3, 4), (2, 5, 7, 7), (1, 3, 14, 16), (1, 2, 60, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states(compare, emulated, size, states, dtype):
    compare(emulated(OUTPUT), reference.state_fusion_output, make_output_inputs(*size, states, dtype))
    compare(emulated(FUSION), reference.state_fusion, make_fusion_inputs(*size, states))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(2, 5, 7, 7), (1, 3, 8, 19), (1, 2, 30, 125)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (11, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tuned_kernels(compare, emulated, kernel, size, mode, dtype):
    inputs = make_conv_inputs(*size, kernel=kernel, dtype=dtype)
    compare(emulated(CONV), reference.dilated_dwconv2d, inputs, padding_mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dilation", [1, 2, 5, 2**31 - 1])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 5), (5, 1), (9, 9), (11, 11)], ids=str)
def test_other_kernels(compare, emulated, kernel, dilation, mode):
    """On planes smaller and larger than a window; the reference pads, and is given a dilation that reaches as far."""
    for size in [(2, 3, 11, 4), (1, 3, 16, 17)]:
        inputs = make_conv_inputs(*size, kernel=kernel, bias=dilation % 2 == 0)
        exact = functools.partial(reference.dilated_dwconv2d, dilation=min(dilation, 17))
        run = functools.partial(emulated(CONV), dilation=dilation)
        compare(run, lambda exact=exact, **kwargs: exact(**kwargs), inputs, padding_mode=mode)


@pytest.mark.parametrize("operation", [CONV, FUSION, OUTPUT], ids=["conv", "fusion", "output"])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 5, 7, 7), (2, 4, 14, 14), (2, 2, 12, 130)], ids=str)
@pytest.mark.parametrize("view", ["every_second_image", "other_channels", "expanded", "misaligned"])
def test_views(check, evaluate, emulated, operation, size, view):
    """Planes stay contiguous: of others csrc/cuda/planes.cpp makes copies."""
    make, exact = OPERATORS[operation]
    views = {
        "every_second_image": lambda t: torch.stack([t, torch.full_like(t, math.nan)], 1)[:, 0],
        "other_channels": lambda t: torch.cat([torch.full_like(t, math.nan), t], 1)[:, t.shape[1] :],
        "expanded": lambda t: t[:1, :1].expand(t.shape),
        "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    }
    make_view = views[view]
    inputs = {n: make_view(t) if n in ("h", "x", "C") else t for n, t in make(*size).items()}
    grad = make_view(noise(*inputs.get("x", inputs.get("h")).shape, dtype=torch.float32))
    _, actual = evaluate(emulated(operation), inputs, {}, grad)
    _, expected = evaluate(exact, {n: t.double() for n, t in inputs.items()}, {}, grad.double())
    for name in expected:
        check(actual[name], expected[name], name)


@pytest.mark.parametrize("order", ["descending", "random"])
@pytest.mark.parametrize("operation", [CONV, FUSION, OUTPUT], ids=["conv", "fusion", "output"])
@pytest.mark.parametrize(
    "size", [(2, 5, 7, 7), (1, 9, 14, 14), (1, 3, 16, 30), (1, 2, 56, 56), (1, 1, 70, 120)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_blocks_in_any_order(evaluate, emulated, operation, size, order, dtype):
    make, _ = OPERATORS[operation]
    options = dict(padding_mode="zeros") if operation == CONV else {}
    for states in [None] if operation == CONV else [None, 2]:
        inputs = make(*size, dtype=dtype) if states is None else make(*size, states, dtype)
        grad, expected = evaluate(emulated(operation), inputs, options)
        _, actual = evaluate(emulated(operation, order), inputs, options, grad)
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("size", [(2, 5, 28, 28), (1, 7, 56, 56), (1, 300, 7, 7)], ids=str)
def test_rounds(compare, emulated, size, rounds):
    """Several sets of planes a block, the last block with fewer."""
    compare(emulated(OUTPUT, rounds=rounds), reference.state_fusion_output, make_output_inputs(*size))


@pytest.mark.parametrize("operation", [CONV, FUSION, OUTPUT], ids=["conv", "fusion", "output"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("size", [(2, 6, 2, 3), (2, 6, 7, 7), (2, 6, 9, 16)], ids=str)
def test_infinities_stay_in_their_plane(evaluate, emulated, operation, value, size):
    """Planes of a block share its memory, not values: only sums over channels or images may have them."""
    make, _ = OPERATORS[operation]
    inputs = make(*size)
    name = "x" if operation == CONV else "h"
    spoilt = inputs | {name: inputs[name].clone()}
    spoilt[name][0, 2] = value
    grad, expected = evaluate(emulated(operation), inputs, {})
    _, actual = evaluate(emulated(operation), spoilt, {}, grad)
    others = torch.ones(2, 6, dtype=torch.bool)
    others[0, 2] = False
    assert torch.equal(actual["value"][others], expected["value"][others])
    assert not actual["value"][0, 2].isfinite().any()
    assert torch.equal(actual[f"gradient of {name}"], expected[f"gradient of {name}"])
    weight = "gradient of weight" if operation == CONV else "gradient of weight3"
    assert torch.equal(actual[weight][[0, 1, 3, 4, 5]], expected[weight][[0, 1, 3, 4, 5]])


def plan_of(library, operation, inputs, pass_):
    numbers, strides = describe(inputs, (operation, 1, False, 0, 0))
    results = (ctypes.c_int64 * 9)()
    library.emulated_plan(pass_, numbers, strides, results)
    names = "tiled", "rows", "columns", "planes", "busy", "threads", "shared", "conflicts", "rounds"
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize("pass_", [FORWARD, ADJOINT, GRADIENTS], ids=["forward", "adjoint", "gradients"])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plan_suits_the_models_sizes(library, channels, size, dtype, pass_):
    """The layers of Spatial-Mamba at 224 x 224: whole planes, no idle lane, no bank conflict, little shared memory."""
    inputs = {n: t.to("meta") for n, t in make_output_inputs(1, channels, size, size, dtype=dtype).items()}
    plan = plan_of(library, OUTPUT, inputs | dict(grad=inputs["x"]), pass_)
    assert plan["tiled"]
    assert plan["rows"] == plan["columns"] == size
    assert plan["busy"] == plan["threads"] >= 64
    assert plan["conflicts"] == 1
    assert plan["shared"] <= (64 if dtype == torch.float32 else 48) * 1024


@pytest.mark.parametrize("size", [(200, 320), (201, 321), (7, 5000), (3000, 4000)], ids=str)
@pytest.mark.parametrize("operation", [CONV, FUSION, OUTPUT], ids=["conv", "fusion", "output"])
def test_plan_of_large_planes(library, operation, size):
    inputs = {n: t.to("meta") for n, t in OPERATORS[operation][0](1, 3, *size).items()}
    for pass_ in (FORWARD, ADJOINT, GRADIENTS):
        plan = plan_of(library, operation, inputs | dict(grad=inputs["x" if operation == CONV else "h"]), pass_)
        assert plan["tiled"]
        assert plan["shared"] <= 64 * 1024
        assert plan["threads"] <= 128
