"""FLOPs of the published sizes, custom operators counted."""

import pytest
import torch

from classification import models
from classification.flops import count_flops, flops_table
from classification.models import fused_operators, spatialmamba

PUBLISHED = {"tiny": 4.468e9, "small": 7.117e9, "base": 15.801e9}


@pytest.mark.parametrize("size", ["tiny", *(pytest.param(size, marks=pytest.mark.long) for size in ("small", "base"))])
def test_published_figures(size):
    model = getattr(models, f"spatialmamba_{size}")()
    with torch.no_grad():
        # Theirs were traced in training mode, where fvcore counts more for batch norm.
        assert count_flops(model.train()).total() == pytest.approx(PUBLISHED[size], abs=0.5e6)
        assert count_flops(model.eval()).total() == pytest.approx(PUBLISHED[size], rel=0.005)


def test_custom_operators_are_counted():
    counted = count_flops(models.spatialmamba_tiny().eval()).by_operator()
    states = 128 * 56**2 * 2 + 256 * 28**2 * 4 + 512 * 14**2 * 8 + 1024 * 7**2 * 4  # D L over the blocks
    assert counted["selective_scan_state"] == 7 * states
    assert counted["state_fusion_output"] == 27 * states


def test_count_on_a_gpu(monkeypatch):
    """There operators join modules, but give way to those that the counter watches: the count is the same."""
    model = models.spatialmamba_micro().eval()
    expected = count_flops(model, (64, 96)).total()
    for module in (spatialmamba, fused_operators):
        monkeypatch.setattr(module, "has_fused_kernels", lambda x: True)
    assert count_flops(model, (64, 96)).total() == expected


def test_counting_leaves_the_model_alone():
    model = models.spatialmamba_micro().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_flops(model, (64, 64)).total()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


def test_table_names_the_layers():
    table = flops_table(models.spatialmamba_micro().eval(), (64, 64))
    assert "layers.0" in table
    assert "self_attention" in table
