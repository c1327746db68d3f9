"""Checkpoints: the published layout is read safely and strictly, ours are written whole or not at all."""

import pytest
import torch
from yacs.config import CfgNode

from classification.checkpoint import load_weights, read_checkpoint, save_checkpoint, state_dicts
from classification.errors import UserError
from classification.models import spatialmamba_micro


def published(model, ema) -> dict:
    """What a published checkpoint holds, `max_accuray_ema` spelt as there."""
    config = CfgNode({"MODEL": CfgNode({"NAME": "x", "DEPTHS": [1, 2]}), "AUG": CfgNode({"MIXUP": 0.8})})
    config.freeze()
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "model": model.state_dict(),
        "model_ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"t_initial": 300},
        "scaler": {"scale": 65536.0},
        "epoch": 299,
        "steps": 1251,
        "max_accuracy": 83.5,
        "max_accuray_ema": 83.4,
        "config": config,
    }


def test_published_layout_loads_with_both_weights(tmp_path):
    model, ema = spatialmamba_micro(), spatialmamba_micro()
    torch.save(published(model, ema), tmp_path / "ckpt.pth")
    content = read_checkpoint(tmp_path / "ckpt.pth")
    assert content["config"]["AUG"]["MIXUP"] == 0.8
    weights = state_dicts(content, "ckpt.pth")
    for name, source in (("model", model), ("model_ema", ema)):
        target = spatialmamba_micro()
        assert load_weights(target, weights[name], "ckpt.pth") is False
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())


def test_published_layout_is_evaluated_model_and_ema(tmp_path, few_digits, run_main):
    torch.manual_seed(0)
    model, ema = spatialmamba_micro(num_classes=10), spatialmamba_micro(num_classes=10)
    torch.save(published(model, ema), tmp_path / "ckpt.pth")
    printed = run_main("--data-path", few_digits, "--output", tmp_path, "--pretrained", tmp_path / "ckpt.pth")
    assert "model: top-1" in printed
    assert "model_ema: top-1" in printed


def test_bare_state_dict_loads(tmp_path):
    model = spatialmamba_micro()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    weights = state_dicts(read_checkpoint(tmp_path / "bare.pth"), "bare.pth")
    assert list(weights) == ["model"]
    load_weights(spatialmamba_micro(), weights["model"], "bare.pth")


def test_nothing_is_loaded_from_a_state_dict_that_does_not_fit():
    model, other = spatialmamba_micro(num_classes=4), spatialmamba_micro(num_classes=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = other.state_dict()
    del state["norm.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"1 missing \(norm.bias\); 1 unexpected \(extra\)"):
        load_weights(model, state, "x.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "latest.pth"
    save_checkpoint({"model": {"w": torch.ones(3)}}, path)
    with pytest.raises(TypeError):
        save_checkpoint({"model": {"w": torch.zeros(3)}, "broken": (i for i in range(3))}, path)
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.ones(3))
    assert [f.name for f in tmp_path.iterdir()] == ["latest.pth"]
