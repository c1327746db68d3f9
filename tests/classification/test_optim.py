"""Parameter groups and the learning rate of the published recipe."""

import math

import pytest
from running import CLASSIFICATION

from classification.config import load_config
from classification.models import spatialmamba_micro
from classification.optim import build_optimizer, build_scheduler

UPDATES = 1251  # ImageNet-1K in batches of 1024
GLOBAL_BATCH = 1024


@pytest.fixture
def recipe():
    return load_config(str(CLASSIFICATION / "configs/spatialmamba/spatialmamba_tiny.yaml"), {})


def test_only_vectors_and_biases_are_spared_from_decay(recipe):
    model = spatialmamba_micro()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(recipe, model, GLOBAL_BATCH).param_groups
    decay = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups}
    assert set(decay) == {0.0, 0.05}
    assert decay[0.0] | decay[0.05] == set(names.values())
    assert all(
        p.ndim > 1 and not names[id(p)].endswith(".bias") for p in model.parameters() if names[id(p)] in decay[0.05]
    )
    ssm = "layers.0.blocks.0.self_attention"
    assert {f"{ssm}.A_logs", f"{ssm}.state_fusion.kernel_3", f"{ssm}.x_proj_weight"} <= decay[0.05]
    assert {f"{ssm}.Ds", f"{ssm}.dt_projs_bias", f"{ssm}.state_fusion.alpha", "norm.weight"} <= decay[0.0]


def test_adamw_as_published(recipe):
    optimizer = build_optimizer(recipe, spatialmamba_micro(), GLOBAL_BATCH)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["eps"] == 1e-8
    assert optimizer.defaults["lr"] == 5e-4 * GLOBAL_BATCH / 512


def test_learning_rate_by_update(recipe):
    optimizer = build_optimizer(recipe, spatialmamba_micro(), GLOBAL_BATCH)
    scheduler = build_scheduler(recipe, optimizer, GLOBAL_BATCH, UPDATES)

    def lr(update):
        if update:
            scheduler.step_update(update)
        return optimizer.param_groups[0]["lr"]

    peak, floor, start, warmup = 1e-3, 1e-5, 1e-6, 20 * UPDATES
    assert lr(0) == pytest.approx(start)
    assert lr(warmup // 2) == pytest.approx((start + peak) / 2, rel=1e-3)
    assert lr(warmup) == pytest.approx(peak)
    for epoch in (50, 160, 299):
        progress = (epoch - 20) / 280
        expected = floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
        assert lr(epoch * UPDATES) == pytest.approx(expected)
    assert lr(300 * UPDATES) == pytest.approx(floor)


@pytest.mark.parametrize(("size", "drop_path", "mesa"), [("tiny", 0.2, 1.0), ("small", 0.3, 1.5), ("base", 0.5, 2.0)])
def test_configs_of_the_published_sizes(size, drop_path, mesa):
    config = load_config(str(CLASSIFICATION / f"configs/spatialmamba/spatialmamba_{size}.yaml"), {})
    assert f"spatialmamba_{size}" == config.MODEL.NAME
    assert (drop_path, mesa) == (config.MODEL.DROP_PATH_RATE, config.TRAIN.MESA.WEIGHT)
    assert (config.TRAIN.EPOCHS, config.TRAIN.MESA.START, config.TRAIN.EMA.DECAY) == (300, 0.25, 0.9999)
    assert (config.TRAIN.CLIP_GRAD, config.MODEL.LABEL_SMOOTHING) == (5.0, 0.1)
    assert (config.AUG.MIXUP, config.AUG.CUTMIX, config.AUG.REPROB) == (0.8, 1.0, 0.25)
