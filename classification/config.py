"""Configuration: yacs defaults, then a YAML file, then command-line flags, then `--opts`. Unknown keys are errors."""

import difflib
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
    c.DATA.PIN_MEMORY = True

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
    c.TRAIN.SYNC_BN = True  # with several GPUs
    c.TRAIN.AUTO_RESUME = True  # go on from latest.pth in the output folder
    c.TRAIN.OPTIMIZER = CfgNode()
    c.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]
    c.TRAIN.OPTIMIZER.EPS = 1e-8
    c.TRAIN.EMA = CfgNode()
    c.TRAIN.EMA.ENABLE = True
    c.TRAIN.EMA.DECAY = 0.9999
    c.TRAIN.MESA = CfgNode()  # self-distillation from the EMA model
    c.TRAIN.MESA.WEIGHT = 1.0  # 0: off
    c.TRAIN.MESA.START = 0.25  # fraction of the epochs

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
        _set(config, key, CfgNode._decode_cfg_value(value), "--opts")
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
    """Set one leaf; yacs checks the type against the default's."""
    known = [k for k, _ in _flatten(config)]
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; classification/config.py lists the keys"
        raise UserError(f"{source}: no config key {key}{hint}")
    section, _, leaf = key.rpartition(".")
    node = config
    for name in filter(None, section.split(".")):
        node = node[name]
    if isinstance(node[leaf], float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    try:
        node.merge_from_list([leaf, value])
    except ValueError as error:
        expected = type(node[leaf]).__name__
        raise UserError(f"{source}: {key} must be of type {expected}, got {value!r}") from error


def _validate(config: CfgNode) -> None:
    """Refuse values that could only fail later, or be taken silently for something else."""
    if config.MODEL.NAME not in VARIANTS:
        raise UserError(f"MODEL.NAME must be one of {', '.join(VARIANTS)}, got {config.MODEL.NAME!r}")
    if config.TRAIN.AMP not in ("float16", "bfloat16", "off"):
        raise UserError(f"TRAIN.AMP must be float16, bfloat16 or off, got {config.TRAIN.AMP!r}")
    at_least_one = {
        "DATA.BATCH_SIZE (--batch-size)": config.DATA.BATCH_SIZE,
        "DATA.IMG_SIZE": config.DATA.IMG_SIZE,
        "TRAIN.EPOCHS": config.TRAIN.EPOCHS,
        "TRAIN.ACCUMULATION_STEPS (--accumulation-steps)": config.TRAIN.ACCUMULATION_STEPS,
        "SAVE_FREQ": config.SAVE_FREQ,
        "PRINT_FREQ": config.PRINT_FREQ,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{key} must be at least 1, got {value}")
    if not 0 <= config.TRAIN.WARMUP_EPOCHS < config.TRAIN.EPOCHS:
        raise UserError(
            f"TRAIN.WARMUP_EPOCHS must be in [0, TRAIN.EPOCHS), got {config.TRAIN.WARMUP_EPOCHS} "
            f"of {config.TRAIN.EPOCHS} epochs"
        )
    if not 0 < config.TEST.CROP_PCT <= 1:
        raise UserError(f"TEST.CROP_PCT must be in (0, 1], got {config.TEST.CROP_PCT}")
    if config.TRAIN.MESA.WEIGHT > 0 and not config.TRAIN.EMA.ENABLE:
        raise UserError("MESA distils from the EMA model: set TRAIN.EMA.ENABLE True or TRAIN.MESA.WEIGHT 0")
