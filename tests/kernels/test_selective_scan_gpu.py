"""What the operators promise on a GPU beyond their numbers; test_selective_scan.py compares those there too."""

import pytest
import torch
from selective_scan import backends, selective_scan_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BACKWARD = torch.ops.selective_scan.selective_scan_state_backward


def make_inputs(batch=2, channels=24, length=196, dtype=torch.float32):
    def random(*shape, dtype=dtype):
        return torch.rand(*shape, dtype=dtype, device="cuda")

    return [
        *(random(batch, channels, length), random(batch, channels, length)),
        *(-random(channels, 1, dtype=torch.float32), random(batch, 1, length)),
        random(channels, dtype=torch.float32),
    ]


def run(inputs):
    h = selective_scan_state(*inputs, delta_softplus=True)
    return h, *BACKWARD(torch.ones_like(h), *inputs, True)


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_the_compiled_kernels_are_selected():
    assert backends(torch.ones(1, device="cuda"))["selected"] == "cuda"


def test_current_stream():
    """On a stream of its own the kernel waits for what came before on it."""
    inputs, stream = make_inputs(), torch.cuda.Stream()
    expected = run(inputs)
    late = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for to, source in zip(late, inputs, strict=True):
            to.copy_(source)
        actual = run(late)
    stream.synchronize()
    assert_equal(actual, expected)


def test_cuda_graph():
    """Captured once, replayed on other numbers."""
    inputs, others = make_inputs(), make_inputs()
    expected = run(others)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(inputs)
    for to, source in zip(inputs, others, strict=True):
        to.copy_(source)
    graph.replay()
    assert_equal(actual, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_elements_than_32_bits_count(layout):
    batch, channels, length = 700, 1024, 3136
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("takes 45 GiB")
    inputs = make_inputs(batch, channels, length, dtype=torch.bfloat16)
    assert inputs[0].numel() > 2**31
    if layout == "channels_last":
        inputs[:2] = (t.mT.contiguous().mT for t in inputs[:2])
    last = [t[-1:] if t.dim() == 3 else t for t in inputs]
    h, grad_u, grad_delta, _, grad_B, _ = run(inputs)
    h_last, u_last, delta_last, _, B_last, _ = run(last)
    assert_equal((h[-1:], grad_u[-1:], grad_delta[-1:], grad_B[-1:]), (h_last, u_last, delta_last, B_last))


@pytest.mark.parametrize(("index", "name"), [(1, "delta"), (2, "A"), (3, "B"), (4, "delta_bias")])
def test_inputs_on_two_devices(index, name):
    inputs = make_inputs()
    inputs[index] = inputs[index].cpu()
    with pytest.raises(ValueError, match=rf"^{name} is on cpu but u is on cuda"):
        selective_scan_state(*inputs)


def test_input_on_the_cpu_among_others():
    inputs = make_inputs()
    inputs[0] = inputs[0].cpu()
    with pytest.raises(ValueError, match=r"^delta is on cuda:0 but u is on cpu"):
        selective_scan_state(*inputs)
