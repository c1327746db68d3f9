"""The configs: what they come to, what they build, and that it trains."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg", reason="make install-openmmlab")
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from toolchains import refused

from classification.openmmlab import checks
from classification.openmmlab.flops import count_model_flops
from classification.openmmlab.tools import _replace_sync_bn as replace_sync_bn

CONFIGS = Path(__file__).parents[2] / "segmentation/configs/spatialmamba"
SIZES = {  # dims, depths, drop path; millions of parameters and GFLOPs as published
    "tiny": (64, (2, 4, 8, 4), 0.2, 57, 936),
    "small": (64, (2, 4, 21, 5), 0.3, 73, 992),
    "base": (96, (2, 4, 21, 5), 0.5, 127, 1176),
}


def config(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"upernet_spatialmamba_4xb4-160k_ade20k-512x512_{name}.py")


def build(cfg: Config) -> torch.nn.Module:
    init_default_scope("mmseg")
    replace_sync_bn(cfg)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize("size", SIZES)
def test_effective_config(size):
    """The recipe of the paper, DESIGN.md section 3, whoever's config it was inherited from."""
    cfg = config(size)
    dims, depths, drop_path, _, _ = SIZES[size]
    assert dict(cfg.model.backbone) == dict(
        type="MM_SpatialMamba",
        dims=dims,
        depths=depths,
        d_state=1,
        drop_path_rate=drop_path,
        out_indices=(0, 1, 2, 3),
        pretrained=None,
    )
    assert cfg.model.pretrained is None
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (head.type, head.channels, head.num_classes) == ("UPerHead", 512, 150)
    assert head.in_channels == [dims * 2**i for i in range(4)]
    assert (auxiliary.type, auxiliary.in_index, auxiliary.in_channels) == ("FCNHead", 2, dims * 4)
    assert (auxiliary.channels, auxiliary.num_classes, auxiliary.loss_decode.loss_weight) == (256, 150, 0.4)
    assert cfg.model.test_cfg.mode == "whole"

    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ("IterBasedTrainLoop", 160_000)
    warmup, decay = cfg.param_scheduler
    assert (warmup.type, warmup.by_epoch, warmup.begin, warmup.end) == ("LinearLR", False, 0, 1500)
    assert (decay.type, decay.by_epoch, decay.begin, decay.end) == ("PolyLR", False, 1500, 160_000)
    assert (decay.power, decay.eta_min) == (1.0, 0.0)
    assert cfg.optim_wrapper.type == "OptimWrapper"
    assert dict(cfg.optim_wrapper.optimizer) == dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
    assert cfg.optim_wrapper.paramwise_cfg == dict(custom_keys=dict(norm=dict(decay_mult=0.0)))
    assert cfg.train_dataloader.batch_size == 2  # on each of 8 GPUs

    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert train["RandomResize"].scale == (2048, 512)
    assert train["RandomResize"].ratio_range == (0.5, 2.0)
    assert train["RandomCrop"] == dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75)
    assert train["RandomFlip"].prob == 0.5
    assert list(train).index("PhotoMetricDistortion") == len(train) - 2
    assert cfg.model.data_preprocessor.size == (512, 512)
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert test["Resize"] == dict(type="Resize", scale=(2048, 512), keep_ratio=True)
    resizes, flips, *_ = cfg.tta_pipeline[-1].transforms
    assert [step.scale for step in resizes] == [(1536, 384), (2048, 512), (2560, 640)]
    assert all(step.keep_ratio for step in resizes)
    assert [step.prob for step in flips] == [0.0, 1.0]
    assert cfg.tta_model.type == "SegTTAModel"
    assert train["CheckLabels"].num_classes == 150
    assert train["LoadAnnotations"].reduce_zero_label
    assert test["LoadAnnotations"].reduce_zero_label
    assert [hook.type for hook in cfg.custom_hooks] == ["AverageBatchNorm"]
    assert cfg.val_evaluator.iou_metrics == ["mIoU"]
    assert not re.search("swin|window_size=7|http", cfg.pretty_text, re.IGNORECASE)


def test_decay_of_each_parameter():
    """None for names with `norm` in them, and for nothing else."""
    cfg = config("tiny")
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(decays) == len(names)
    for key, parameter in names.items():
        assert decays[id(parameter)] == (0.0 if "norm" in key else 0.01), key
    assert all(group["lr"] == 6e-5 for group in groups)
    assert {decays[id(p)] for k, p in names.items() if ".ln_1." in k or "A_logs" in k or "cpe1.bias" in k} == {0.01}


@pytest.mark.parametrize("size", SIZES)
def test_published_parameters(size):
    with torch.device("meta"):
        model = build(config(size))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == SIZES[size][3]


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
def test_published_flops(size):
    """At 512x2048, as tools/get_flops.py prints them."""
    with torch.no_grad():
        counted = count_model_flops(build(config(size)), (512, 2048)).total()
    assert counted / 1e9 == pytest.approx(SIZES[size][4], rel=0.01)


@pytest.mark.parametrize(
    ("name", "height", "width", "images"),
    [
        ("tiny", 97, 75, 3),
        pytest.param("tiny", 128, 128, 2, marks=pytest.mark.long),
        pytest.param("base", 65, 129, 2, marks=pytest.mark.long),
    ],
)
def test_a_training_step(name, height, width, images):
    """Every parameter gets a finite gradient, and there is one, whatever the size of images and batch."""
    torch.manual_seed(0)
    cfg = config(name)
    cfg.model.data_preprocessor.size = (height, width)
    cfg.model.backbone.drop_path_rate = 0.0  # with it, a block that all images leave out has no gradient
    model = build(cfg).train()
    samples = []
    for _ in range(images):
        sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
        sample.gt_sem_seg = PixelData(data=torch.randint(150, (1, height, width)))
        samples.append(sample)
    inputs = [torch.randint(256, (3, height, width), dtype=torch.uint8) for _ in range(images)]
    data = model.data_preprocessor(dict(inputs=inputs, data_samples=samples), training=True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_mmsegs_own_configs_are_not_refused(every, monkeypatch):
    for check in ("must_exist", "check_maps"):
        monkeypatch.setattr(checks, check, lambda *_: None)
    count, messages = refused("mmseg", lambda path: True, every)
    assert count > 600 / every
    assert messages == {}
