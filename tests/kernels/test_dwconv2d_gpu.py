"""What the operators promise on a GPU beyond their numbers; test_dwconv2d.py compares those there too."""

import pytest
import torch
from dwconv2d import backends, dilated_dwconv2d, state_fusion, state_fusion_output

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FORWARDS = {"conv": dilated_dwconv2d, "fusion": state_fusion, "output": state_fusion_output}
BACKWARDS = {
    "conv": torch.ops.dwconv2d.dilated_dwconv2d_backward,
    "fusion": torch.ops.dwconv2d.state_fusion_backward,
    "output": torch.ops.dwconv2d.state_fusion_output_backward,
}
each_operator = pytest.mark.parametrize("name", FORWARDS)
# Without tiles, many planes a block, few, and several tiles a plane.
each_size = pytest.mark.parametrize("size", [5, 14, 56, 120])


def make_inputs(name, batch=2, channels=24, height=14, width=14, dtype=torch.float32):
    def random(*shape, dtype=torch.float32):
        return torch.rand(*shape, dtype=dtype, device="cuda")

    x = random(batch, channels, height, width, dtype=dtype)
    if name == "conv":
        return [x, random(channels, 1, 3, 3, dtype=dtype)]
    weights = [*(random(channels, 1, 3, 3) for _ in range(3)), random(3)]
    h = random(batch, channels, height, width)
    if name == "fusion":
        return [h, *weights]
    return [h, *weights, random(batch, 1, height, width, dtype=dtype), random(channels), x]


def run(name, inputs):
    y = FORWARDS[name](*inputs)
    return y, *BACKWARDS[name](torch.ones_like(y), *inputs)


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_the_compiled_kernels_are_selected():
    assert backends(torch.ones(1, device="cuda"))["selected"] == "cuda"


@each_size
@each_operator
def test_current_stream(name, size):
    """On a stream of its own the kernel waits for what came before on it."""
    inputs, stream = make_inputs(name, height=size, width=size), torch.cuda.Stream()
    expected = run(name, inputs)
    late = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for to, source in zip(late, inputs, strict=True):
            to.copy_(source)
        actual = run(name, late)
    stream.synchronize()
    assert_equal(actual, expected)


@each_size
@each_operator
def test_cuda_graph(name, size):
    """Captured once, replayed on other numbers."""
    inputs, others = (make_inputs(name, height=size, width=size) for _ in range(2))
    expected = run(name, others)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(name, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(name, inputs)
    for to, source in zip(inputs, others, strict=True):
        to.copy_(source)
    graph.replay()
    assert_equal(actual, expected)


def last_of(name, inputs):
    """The last image and the last two channels."""
    first, *weights = inputs
    if name == "conv":
        return [first[-1:, -2:], *(t[-2:] for t in weights)]
    *kernels, alpha = weights[:4]
    last = [first[-1:, -2:], *(t[-2:] for t in kernels), alpha]
    if name == "output":
        C, D, x = weights[4:]
        last += [C[-1:], D[-2:], x[-1:, -2:]]
    return last


def assert_last_is_alike(name, inputs):
    """By the gradients for planes too; others are sums."""
    alone = run(name, last_of(name, inputs))
    together = run(name, inputs)
    for k in (0, 1, -1) if name == "output" else (0, 1):
        assert torch.equal(together[k][-1:, -2:], alone[k])


@each_operator
def test_more_elements_than_32_bits_count(name):
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("takes 45 GiB")
    inputs = make_inputs(name, 700, 1024, 56, 56, torch.bfloat16)
    assert inputs[0].numel() > 2**31
    assert_last_is_alike(name, inputs)


@pytest.mark.parametrize("shape", [(70_000, 2), (1, 70_000)], ids=["images", "channels"])
@pytest.mark.parametrize("size", [3, 7])
@each_operator
def test_more_images_or_channels_than_16_bits_count(name, size, shape):
    assert_last_is_alike(name, make_inputs(name, *shape, size, size))


@pytest.mark.parametrize(
    ("index", "name"), [(1, "weight3"), (2, "weight3_d3"), (3, "weight3_d5"), (4, "alpha"), (5, "C"), (6, "D")]
)
def test_inputs_on_two_devices(index, name):
    inputs = make_inputs("output")
    inputs[index] = inputs[index].cpu()
    with pytest.raises(ValueError, match=rf"^{name} is on cpu"):
        state_fusion_output(*inputs)
