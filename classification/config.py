"""Configuration: yacs defaults, then a YAML file, then command-line flags, then `--opts`. Unknown keys are errors."""

import ast
import difflib
import functools
from collections.abc import Sequence
from pathlib import Path

import yaml
from yacs.config import CfgNode

from classification.errors import UserError
from classification.models import VARIANTS


def default_config() -> CfgNode:
    """The ImageNet-1K recipe of the paper; a YAML file writes what differs."""
    c = CfgNode()

    c.DATA = CfgNode()
    c.DATA.DATA_PATH = ""  # an image folder: train/CLASS/*.jpg and val/CLASS/*.jpg
    c.DATA.BATCH_SIZE = 128  # per process
    c.DATA.IMG_SIZE = 224
    c.DATA.INTERPOLATION = "bicubic"
    c.DATA.NUM_WORKERS = 8  # per process, no more than there are processors
    c.DATA.PREFETCH_FACTOR = 2  # batches that each of them has ready
    c.DATA.PIN_MEMORY = True
    c.DATA.MAX_UNREADABLE = 100  # training images, per process, that may be replaced because they cannot be read

    c.MODEL = CfgNode()
    c.MODEL.NAME = "spatialmamba_tiny"
    c.MODEL.NUM_CLASSES = 0  # 0: as many as the data has class folders, or the checkpoint, or 1000
    c.MODEL.DROP_PATH_RATE = 0.2
    c.MODEL.LABEL_SMOOTHING = 0.1
    c.MODEL.PRETRAINED = ""
    c.MODEL.RESUME = ""

    c.TRAIN = CfgNode()
    c.TRAIN.EPOCHS = 300
    c.TRAIN.WARMUP_EPOCHS = 20
    c.TRAIN.BASE_LR = 5e-4  # these three for a global batch of 512, scaled linearly
    c.TRAIN.WARMUP_LR = 5e-7
    c.TRAIN.MIN_LR = 5e-6
    c.TRAIN.WEIGHT_DECAY = 0.05
    c.TRAIN.CLIP_GRAD = 5.0  # 0: off
    c.TRAIN.ACCUMULATION_STEPS = 1
    c.TRAIN.USE_CHECKPOINT = False  # gradient checkpointing
    c.TRAIN.AMP = "float16"  # "float16" (off on a CPU), "bfloat16" or "off"
    c.TRAIN.SYNC_BN = False  # batch norm over the batches of all processes; the recipe normalises each its own
    c.TRAIN.AUTO_RESUME = True  # go on from the last checkpoint in the output folder
    c.TRAIN.MAX_SKIPPED = 20  # as many updates in a row that are not finite end the run
    c.TRAIN.OPTIMIZER = CfgNode()
    c.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]
    c.TRAIN.OPTIMIZER.EPS = 1e-8
    c.TRAIN.EMA = CfgNode()
    c.TRAIN.EMA.ENABLE = True
    c.TRAIN.EMA.DECAY = 0.9999
    c.TRAIN.MESA = CfgNode()  # self-distillation from the EMA model
    c.TRAIN.MESA.WEIGHT = 1.0  # 0: off
    c.TRAIN.MESA.START = 0.25  # fraction of the epochs, rounded down to a whole one

    c.AUG = CfgNode()
    c.AUG.SCALE = [0.08, 1.0]  # area of a random crop
    c.AUG.RATIO = [3 / 4, 4 / 3]  # and its aspect
    c.AUG.HFLIP = 0.5
    c.AUG.COLOR_JITTER = 0.4
    c.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # "": off
    c.AUG.REPROB = 0.25
    c.AUG.REMODE = "pixel"
    c.AUG.RECOUNT = 1
    c.AUG.MIXUP = 0.8
    c.AUG.CUTMIX = 1.0
    c.AUG.MIXUP_PROB = 1.0
    c.AUG.MIXUP_SWITCH_PROB = 0.5
    c.AUG.MIXUP_MODE = "batch"

    c.TEST = CfgNode()
    c.TEST.CROP_PCT = 224 / 256  # the centre that is kept of the resized image

    c.OUTPUT = "output"
    c.TAG = "default"  # the run's folder is OUTPUT/MODEL.NAME/TAG
    c.SAVE_FREQ = 1  # epochs
    c.SAVE_STEPS = 0  # updates; 0: not within an epoch
    c.KEEP_LAST = 3  # epoch_*.pth, beside best.pth, best_ema.pth and latest.pth
    c.TENSORBOARD = True
    c.PRINT_FREQ = 10  # steps
    c.SEED = 0
    return c


def load_config(path: str, overrides: dict[str, object], opts: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file at `path`, then `overrides` (dotted key to value), then `opts` (KEY VALUE KEY VALUE ...).

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong type or outside its range.
    """
    config = default_config()
    for key, value in _flatten(_read_yaml(path)):
        _set(config, key, value, path)
    for key, value in overrides.items():
        _set(config, key, value, "the command line")
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs of KEY VALUE, got {len(opts)} words: {' '.join(opts)}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        _set(config, key, value, "--opts")
    _validate(config)
    config.freeze()
    return config


def _read_yaml(path: str) -> dict:
    if not Path(path).is_file():
        raise UserError(f"--cfg {path}: no such file; the published sizes are in classification/configs/spatialmamba")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--cfg {path}: not a YAML file: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--cfg {path}: expected sections such as DATA and TRAIN, got {type(content).__name__}")
    return content


def _flatten(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    leaves = []
    for key, value in tree.items():
        leaves += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return leaves


def _set(config: CfgNode, key: str, value: object, source: str) -> None:
    """Set one leaf to a value of its default's type."""
    known = [k for k, _ in _flatten(config)]
    if key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; classification/config.py lists the keys"
        raise UserError(f"{source}: no config key {key}{hint}")
    *sections, leaf = key.split(".")
    node = functools.reduce(CfgNode.__getitem__, sections, config)
    kind = type(node[leaf])
    if kind is not str and type(value) is str:
        value = _literal(value)  # YAML reads 5e-5 as a word
    if (kind is float and type(value) is int) or (kind is str and type(value) in (int, float)):
        value = kind(value)
    if type(value) is not kind:
        raise UserError(f"{source}: {key} must be of type {kind.__name__}, got {value!r}")
    node[leaf] = value


def _literal(text: str) -> object:
    """A word as Python reads it, or the word itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


CHOICES = {
    "MODEL.NAME": tuple(VARIANTS),
    "DATA.INTERPOLATION": ("bilinear", "bicubic", "nearest", "random"),
    "TRAIN.AMP": ("float16", "bfloat16", "off"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
}
INFINITY = float("inf")
# Lowest and highest value; for a list, of each of its two ascending numbers.
RANGES = {
    "DATA.BATCH_SIZE": (1, INFINITY),
    "DATA.IMG_SIZE": (1, INFINITY),
    "DATA.NUM_WORKERS": (0, INFINITY),
    "DATA.PREFETCH_FACTOR": (1, INFINITY),
    "DATA.MAX_UNREADABLE": (0, INFINITY),
    "MODEL.NUM_CLASSES": (0, INFINITY),
    "MODEL.DROP_PATH_RATE": (0, 0.999),
    "MODEL.LABEL_SMOOTHING": (0, 0.999),
    "TRAIN.EPOCHS": (1, INFINITY),
    "TRAIN.BASE_LR": (0, INFINITY),
    "TRAIN.WARMUP_LR": (0, INFINITY),
    "TRAIN.MIN_LR": (0, INFINITY),
    "TRAIN.WEIGHT_DECAY": (0, INFINITY),
    "TRAIN.CLIP_GRAD": (0, INFINITY),
    "TRAIN.ACCUMULATION_STEPS": (1, INFINITY),
    "TRAIN.MAX_SKIPPED": (1, INFINITY),
    "TRAIN.OPTIMIZER.BETAS": (0, 0.999999),
    "TRAIN.OPTIMIZER.EPS": (0, INFINITY),
    "TRAIN.EMA.DECAY": (0, 1),
    "TRAIN.MESA.WEIGHT": (0, INFINITY),
    "TRAIN.MESA.START": (0, 1),
    "AUG.SCALE": (1e-6, 1),
    "AUG.RATIO": (1e-3, 1e3),
    "AUG.HFLIP": (0, 1),
    "AUG.COLOR_JITTER": (0, INFINITY),
    "AUG.REPROB": (0, 1),
    "AUG.RECOUNT": (1, INFINITY),
    "AUG.MIXUP": (0, INFINITY),
    "AUG.CUTMIX": (0, INFINITY),
    "AUG.MIXUP_PROB": (0, 1),
    "AUG.MIXUP_SWITCH_PROB": (0, 1),
    "TEST.CROP_PCT": (0.1, 1),
    "SAVE_FREQ": (1, INFINITY),
    "SAVE_STEPS": (0, INFINITY),
    "KEEP_LAST": (1, INFINITY),
    "PRINT_FREQ": (1, INFINITY),
    "SEED": (0, 2**31),
}
FLAGS = {"DATA.BATCH_SIZE": "--batch-size", "TRAIN.ACCUMULATION_STEPS": "--accumulation-steps", "SEED": "--seed"}


def _validate(config: CfgNode) -> None:
    """Refuse values that could only fail later, or be taken silently for something else."""
    values = dict(_flatten(config))
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, got {values[key]!r}")
    for key, (low, high) in RANGES.items():
        _check_range(key, values[key], low, high)
    if not 0 <= config.TRAIN.WARMUP_EPOCHS < config.TRAIN.EPOCHS:
        raise UserError(
            f"TRAIN.WARMUP_EPOCHS must be in [0, TRAIN.EPOCHS), got {config.TRAIN.WARMUP_EPOCHS} "
            f"of {config.TRAIN.EPOCHS} epochs"
        )
    if config.TRAIN.MESA.WEIGHT > 0 and not config.TRAIN.EMA.ENABLE:
        raise UserError("MESA distils from the EMA model: set TRAIN.EMA.ENABLE True or TRAIN.MESA.WEIGHT 0")


def _check_range(key: str, value: object, low: float, high: float) -> None:
    name = f"{key} ({FLAGS[key]})" if key in FLAGS else key
    if isinstance(value, list):
        numbers = len(value) == 2 and all(type(v) in (int, float) for v in value)
        if not (numbers and low <= value[0] <= value[1] <= high):
            raise UserError(f"{name} must be two ascending numbers in [{low}, {high}], got {value}")
    elif not low <= value <= high:
        bounds = f"at least {low}" if high == INFINITY else f"in [{low}, {high}]"
        raise UserError(f"{name} must be {bounds}, got {value}")
