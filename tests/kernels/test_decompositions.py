"""What the operators are written out as for exported programs, against the operators."""

import importlib

import dwconv2d
import pytest
import selective_scan
import torch
from dwconv2d.plane_reference import DILATIONS

SCAN = torch.ops.selective_scan.selective_scan_state.default


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])  # around chunks of 32
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("states", "groups"), [(1, None), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scan(length, known, states, groups, dtype, monkeypatch):
    """Decays from 1 to such that are 0 at once, softplus far from zero among them."""
    module = importlib.import_module("selective_scan.decompositions")
    if not known:  # as where the number of tokens is a symbol
        monkeypatch.setattr(module, "_chunks_of_known", module._chunks_of_unknown)
    state = torch.promote_types(dtype, torch.float32)
    u, delta = torch.randn(2, 6, length, dtype=dtype), torch.randn(2, 6, length, dtype=dtype) * 20
    B = torch.randn(*((2,) if groups is None else (2, groups)), states, length, dtype=dtype)
    inputs = (u, delta, -torch.rand(6, states, dtype=state) * 30, B, torch.randn(6, dtype=state))
    for softplus in (True, False):
        if not softplus:
            inputs = (u, delta.abs(), *inputs[2:4], None)
        is_log = groups is None  # then rates of exp(-30) to 1
        found = selective_scan.decompositions()[SCAN](*inputs, softplus, is_log)
        expected = SCAN(*inputs, softplus, is_log)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        scale = expected.abs().max().item()
        tolerance = 1e-13 if dtype == torch.float64 else 3e-6
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("states", [None, 1, 2])
@pytest.mark.parametrize("size", [(1, 1), (4, 11), (9, 3)])
def test_fusion(states, size):
    table, ops = dwconv2d.decompositions(), torch.ops.dwconv2d
    h = torch.randn(2, 5, *(() if states is None else (states,)), *size)
    weights = (*(torch.randn(5, 1, 3, 3) for _ in DILATIONS), torch.randn(3))
    x, C, D = torch.randn(2, 5, *size), torch.randn(2, states or 1, *size), torch.randn(5)
    for operator, inputs in (
        (ops.state_fusion.default, (h, *weights)),
        (ops.state_fusion_output.default, (h, *weights, C, D, x)),
    ):
        torch.testing.assert_close(table[operator](*inputs), operator(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding_mode", ["replicate", "zeros"])
@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), 1), ((1, 5), 2)])
def test_convolution(kernel, dilation, padding_mode):
    operator = torch.ops.dwconv2d.dilated_dwconv2d.default
    inputs = (torch.randn(2, 5, 7, 9), torch.randn(5, 1, *kernel), torch.randn(5), dilation, padding_mode)
    found = dwconv2d.decompositions()[operator](*inputs)
    torch.testing.assert_close(found, operator(*inputs), rtol=1e-5, atol=1e-5)
