"""The backbone in mmpretrain's ImageClassifier: the same logits, the recipe, and mmpretrain's own tools."""

import re
from pathlib import Path

import pytest
import torch
from running import CLASSIFICATION, run_command

pytest.importorskip("mmpretrain", reason="make install-openmmlab")
import mmpretrain
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from classification import convert, models
from classification.convert import to_mmpretrain
from classification.data.digits import write_digits

CONFIGS = CLASSIFICATION / "configs/mmpretrain"
SIZES = {"tiny": (64, (2, 4, 8, 4), 0.2), "small": (64, (2, 4, 21, 5), 0.3), "base": (96, (2, 4, 21, 5), 0.5)}


def config(size: str) -> Config:
    return Config.fromfile(CONFIGS / f"spatialmamba_{size}_8xb128_in1k.py")


def build(cfg: Config) -> torch.nn.Module:
    init_default_scope("mmpretrain")
    return MODELS.build(cfg.model)


@pytest.mark.parametrize("size", SIZES)
def test_converted_weights_give_the_same_logits(size):
    torch.manual_seed(0)
    classifier = getattr(models, f"spatialmamba_{size}")().eval()
    model = build(config(size)).eval()
    model.load_state_dict(to_mmpretrain(classifier.state_dict()))  # strictly
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(images), classifier(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_effective_config(size):
    """The recipe of DESIGN.md, section 3, as far as mmpretrain has it."""
    cfg = config(size)
    dims, depths, drop_path = SIZES[size]
    backbone = dict(type="MM_SpatialMamba", dims=dims, depths=depths, d_state=1, drop_path_rate=drop_path)
    assert dict(cfg.model.backbone) == dict(**backbone, out_indices=(3,))
    assert cfg.model.head.in_channels == dims * 8
    assert (cfg.model.head.loss.label_smooth_val, cfg.model.head.loss.mode) == (0.1, "original")
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [("Mixup", 0.8), ("CutMix", 1.0)]
    optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999))
    assert {k: v for k, v in cfg.optim_wrapper.optimizer.items() if k != "_scope_"} == optimizer
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert (cfg.train_cfg.max_epochs, cfg.train_dataloader.batch_size) == (300, 128)
    warmup, cosine = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, cosine.eta_min) == (1e-3, 20, 1e-5)  # of 1e-3: from 1e-6, as ours
    assert (warmup.begin, warmup.convert_to_iter_based) == (0, True)
    assert (cosine.begin, cosine.end, cosine.convert_to_iter_based) == (20, 300, True)
    statistics, ema = cfg.custom_hooks
    assert (statistics.type, ema.type, ema.momentum) == ("AverageBatchNorm", "EMAHook", 1e-4)
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert train["RandAugment"].magnitude_level == 9
    assert train["RandAugment"].magnitude_std == 0.5
    assert (train["RandAugment"].policies, train["RandAugment"].num_policies) == ("timm_increasing", 2)
    assert (train["RandomErasing"].erase_prob, train["RandomErasing"].mode) == (0.25, "rand")
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert (test["ResizeEdge"].scale, test["CenterCrop"].crop_size) == (256, 224)
    assert not re.search("swin", cfg.pretty_text, re.IGNORECASE)


def test_decay_of_each_parameter():
    """None for biases and what has one dimension, as in classification/optim.py."""
    cfg = config("tiny")
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if parameter.ndim == 1 or key.endswith(".bias") else 0.05), key


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mmpretrain") / "digits"
    write_digits(root)
    return root


def test_under_mmpretrains_own_tools(digits, tmp_path):
    """Two iterations with mixup, cutmix, RandAugment and EMA."""
    own = Path(mmpretrain.__file__).parent / ".mim/tools/train.py"
    config_file = tmp_path / "digits.py"
    config_file.write_text(digits_config(digits))
    done = run_command("python", own, config_file, "--work-dir", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"Epoch\(train\) *\[1\]\[ *2/\d+\].*loss: [\d.]+", done.stdout), done.stdout[-2000:]


def digits_config(digits: Path) -> str:
    base = CONFIGS / "spatialmamba_tiny_8xb128_in1k.py"
    return f"""
_base_ = {str(base)!r}
model = dict(backbone=dict(dims=16, depths=(1, 1, 2, 1)), head=dict(in_channels=128, num_classes=10))
data_preprocessor = dict(num_classes=10)
dataset = dict(_delete_=True, type="CustomDataset", data_root={str(digits)!r}, data_prefix="train",
               pipeline={{{{_base_.train_pipeline}}}})
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=2)
param_scheduler = None
val_dataloader = val_cfg = val_evaluator = None
default_hooks = dict(logger=dict(interval=1))
"""


def test_conversion(tmp_path, monkeypatch, capsys):
    """On a checkpoint of T's shape: what is written loads strictly and gives the same logits.

    The file has no place for images of another size than mmpretrain's config has, so this is said.
    """
    torch.manual_seed(0)
    classifier = models.spatialmamba_tiny().eval()
    torch.save({"model": classifier.state_dict()}, tmp_path / "c.pth")

    def converted(name: str) -> None:
        monkeypatch.setattr(
            "sys.argv", ["convert", str(tmp_path / "c.pth"), str(tmp_path / name), "--to", "mmpretrain"]
        )
        convert.main()

    converted("m.pth")
    assert "evaluated with" not in capsys.readouterr().out
    model = build(config("tiny")).eval()
    model.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True)["state_dict"])
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(images), classifier(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit, match="exists; remove it or name another file"):
        converted("m.pth")
    with pytest.raises(SystemExit, match=r"m\.safetensors: must end in \.pth"):
        converted("m.safetensors")
    text = "DATA: {IMG_SIZE: 32, INTERPOLATION: bicubic}\nTEST: {CROP_PCT: 1.0}\nMODEL: {NAME: spatialmamba_tiny}\n"
    torch.save({"model": classifier.state_dict(), "config": text}, tmp_path / "c.pth")
    converted("small.pth")
    said = "evaluated with DATA.IMG_SIZE 32 (224 there), TEST.CROP_PCT 1.0 (0.875 there), which the file does not say"
    assert said in capsys.readouterr().out
