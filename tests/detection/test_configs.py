"""The configs: what they come to, what they build, and that it trains."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="make install-openmmlab")
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from toolchains import refused

from classification.errors import UserError
from classification.openmmlab import checks
from classification.openmmlab.flops import count_model_flops

CONFIGS = Path(__file__).parents[2] / "detection/configs/spatialmamba"
COCO = ("tiny", "small", "base", "tiny_3x", "small_3x")
SIZES = {  # dims, depths, drop path; millions of parameters and GFLOPs as published
    "tiny": (64, (2, 4, 8, 4), 0.2, 46, 261),
    "small": (64, (2, 4, 21, 5), 0.3, 63, 315),
    "base": (96, (2, 4, 21, 5), 0.5, 115, 494),
}


def config(name: str) -> Config:
    return Config.fromfile(CONFIGS / f"mask_rcnn_spatialmamba_fpn_coco_{name}.py")


def build(cfg: Config) -> torch.nn.Module:
    init_default_scope("mmdet")
    return MODELS.build(cfg.model)


@pytest.mark.parametrize("name", COCO)
def test_effective_config(name):
    """The recipe of the paper, DESIGN.md section 3, whoever's config it was inherited from."""
    cfg = config(name)
    size, _, three_times = name.partition("_")
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
    assert cfg.model.type == "MaskRCNN"
    assert (cfg.model.neck.type, cfg.model.neck.out_channels, cfg.model.neck.num_outs) == ("FPN", 256, 5)
    assert cfg.model.neck.in_channels == [dims * 2**i for i in range(4)]
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 80

    epochs, steps = (36, [27, 33]) if three_times else (12, [8, 11])
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ("EpochBasedTrainLoop", epochs)
    warmup, decay = cfg.param_scheduler
    assert (warmup.type, warmup.by_epoch, warmup.begin, warmup.end) == ("LinearLR", False, 0, 1000)
    assert (decay.type, decay.by_epoch, decay.milestones, decay.gamma) == ("MultiStepLR", True, steps, 0.1)
    assert decay.end == epochs

    assert cfg.optim_wrapper.type == "OptimWrapper"
    assert dict(cfg.optim_wrapper.optimizer) == dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert cfg.optim_wrapper.paramwise_cfg == dict(custom_keys=dict(norm=dict(decay_mult=0.0)))
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    assert cfg.train_dataloader.batch_size == 2  # on each of 8 GPUs

    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert test["Resize"] == dict(type="Resize", scale=(1333, 800), keep_ratio=True)
    assert train["RandomFlip"].prob == 0.5
    if three_times:
        plain, cropped = train["RandomChoice"].transforms
        scales = [(s, 1333) for s in range(480, 801, 32)]
        assert [t.type for t in plain] == ["RandomChoiceResize"]
        assert plain[0].scales == cropped[2].scales == scales
        assert cropped[0].scales == [(s, 1333) for s in (400, 500, 600)]
        assert (cropped[1].type, cropped[1].crop_size) == ("RandomCrop", (384, 600))
        assert "Resize" not in train
    else:
        assert train["Resize"] == test["Resize"]
    assert cfg.val_evaluator.metric == ["bbox", "segm"]
    assert [hook.type for hook in cfg.custom_hooks] == ["SyncBuffersHook", "CheckInvalidLossHook"]
    assert not re.search("swin|window_size=7|http", cfg.pretty_text, re.IGNORECASE)


@pytest.mark.parametrize("name", ["tiny", "tiny_3x"])
def test_decay_of_each_parameter(name):
    """None for names with `norm` in them, and for nothing else: `ln_1` and `ln_2`, biases and `A_logs` decay."""
    cfg = config(name)
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert len(decays) == len(names)
    for key, parameter in names.items():
        assert decays[id(parameter)] == (0.0 if "norm" in key else 0.05), key
    assert all(group["lr"] == 1e-4 for group in groups)
    assert {decays[id(p)] for k, p in names.items() if ".ln_1." in k or "A_logs" in k or "cpe1.bias" in k} == {0.05}
    assert {decays[id(p)] for k, p in names.items() if "outnorm" in k or "out_norm" in k} == {0.0}


@pytest.mark.parametrize("name", SIZES)
def test_published_parameters(name):
    with torch.device("meta"):
        model = build(config(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == SIZES[name][3]


@pytest.mark.parametrize("name", ["tiny", *(pytest.param(name, marks=pytest.mark.long) for name in ("small", "base"))])
def test_published_flops(name):
    """At 1280x800, as tools/get_flops.py prints them."""
    with torch.no_grad():
        counted = count_model_flops(build(config(name)), (1280, 800)).total()
    assert counted / 1e9 == pytest.approx(SIZES[name][4], rel=0.01)


def test_flops_of_another_head_are_not_guessed():
    cascade = build(get_config("mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"))
    with pytest.raises(UserError, match="not for CascadeRoIHead"):
        count_model_flops(cascade, (64, 64))
    head = type("Mask2FormerHead", (torch.nn.Module,), {"__module__": "mmseg.models"})()
    with pytest.raises(UserError, match=r"not counted for mmseg\.Mask2FormerHead"):
        count_model_flops(torch.nn.ModuleDict(dict(decode_head=head)), (64, 64))


def test_flops_of_a_semantic_head():
    """Of a panoptic model, beside the boxes' and masks' heads."""
    config = get_config("mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py")
    counted = count_model_flops(build(config), (64, 96))
    parts = [counted.by_module()[f"model.{name}"] for name in ("backbone", "neck", "rpn_head", "roi_head")]
    semantic = counted.by_module()["model.semantic_head"]
    assert semantic > 1e6
    assert sum(parts) + semantic == counted.total()


def test_flops_of_detr():
    """It masks what lies outside each image, so that it needs their sizes."""
    counted = count_model_flops(build(get_config("mmdet::detr/detr_r50_8xb2-150e_coco.py")), (64, 96))
    parts = [counted.by_module()[f"model.{name}"] for name in ("backbone", "neck", "encoder", "decoder", "bbox_head")]
    assert all(parts)
    assert sum(parts) == counted.total()


@pytest.mark.parametrize("name", ["tiny_3x", "small_3x"])
def test_3x_builds_the_same_model(name):
    assert config(name).model == config(name.removesuffix("_3x")).model


def sample(height: int, width: int) -> DetDataSample:
    """Two objects of an image of that size."""
    found = DetDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0)))
    boxes = torch.tensor([[20.0, 30, 150, 180], [100, 40, 220, 250]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    found.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([3, 17]), masks=BitmapMasks(masks.numpy(), height, width)
    )
    found.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
    return found


def test_a_training_step():
    """Of the tiny config at 320x256: every parameter of the backbone gets a finite gradient and moves."""
    torch.manual_seed(0)
    cfg = config("tiny")
    model = build(cfg).train()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    before = {k: v.detach().clone() for k, v in model.backbone.named_parameters()}
    images = [torch.randint(256, (3, 320, 256), dtype=torch.uint8) for _ in range(2)]
    data = model.data_preprocessor(dict(inputs=images, data_samples=[sample(320, 256) for _ in images]), training=True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_mmdets_own_configs_are_not_refused(every, monkeypatch):
    """But for the few that name pickles: Fast R-CNN's proposals, and what Open Images' classes belong to."""
    for check in ("must_exist", "check_annotations", "check_objects"):
        monkeypatch.setattr(checks, check, lambda *_: None)
    broken = ("bytetrack", "sort", "strongsort", "ocsort", "deepsort")  # some inherit from files that are not there
    count, messages = refused("mmdet", lambda path: path.parent.name not in broken, every)
    assert count > 700 / every
    assert len(messages) < count / 25
    assert all("is a pickle, which can run code" in said for said in messages.values()), messages
