"""Configuration: yacs defaults, then a YAML file, then command-line flags, then `--opts`. Unknown keys are errors."""

import ast
import difflib
import functools
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from yacs.config import CfgNode

from classification.errors import UserError, is_file
from classification.models import VARIANTS


def default_config() -> CfgNode:
    """Return the ImageNet-1K recipe of the paper; a YAML file holds only the keys that differ."""
    c = CfgNode()

    c.DATA = CfgNode()
    c.DATA.DATA_PATH = ""  # an image folder: train/CLASS/*.jpg and val/CLASS/*.jpg
    c.DATA.BATCH_SIZE = 128  # per process
    c.DATA.IMG_SIZE = 224
    c.DATA.INTERPOLATION = "bicubic"  # "random" draws bilinear or bicubic in training; evaluation takes bilinear
    c.DATA.NUM_WORKERS = 8  # per process, at most the number of processors
    c.DATA.PREFETCH_FACTOR = 2  # batches that each worker prepares in advance
    c.DATA.PIN_MEMORY = True
    c.DATA.MAX_UNREADABLE = 100  # training images, per process, that may be replaced because they cannot be read

    c.MODEL = CfgNode()
    c.MODEL.NAME = "spatialmamba_tiny"
    c.MODEL.NUM_CLASSES = 0  # 0: the number of class folders in the data, or of the checkpoint's classes, or 1000
    c.MODEL.DROP_PATH_RATE = 0.2
    c.MODEL.LABEL_SMOOTHING = 0.1
    c.MODEL.PRETRAINED = ""
    c.MODEL.RESUME = ""

    c.TRAIN = CfgNode()
    c.TRAIN.EPOCHS = 300
    c.TRAIN.WARMUP_EPOCHS = 20
    c.TRAIN.BASE_LR = 5e-4  # these three rates are for a global batch of 512 and scale linearly
    c.TRAIN.WARMUP_LR = 5e-7
    c.TRAIN.MIN_LR = 5e-6
    c.TRAIN.WEIGHT_DECAY = 0.05
    c.TRAIN.CLIP_GRAD = 5.0  # 0: off
    c.TRAIN.ACCUMULATION_STEPS = 1
    c.TRAIN.USE_CHECKPOINT = False  # gradient checkpointing
    c.TRAIN.AMP = "float16"  # "float16" (off on a CPU), "bfloat16" or "off"
    c.TRAIN.SYNC_BN = False  # batch norm over the batches of all processes; the recipe: each process alone
    c.TRAIN.AUTO_RESUME = True  # go on from the last checkpoint in the output folder
    c.TRAIN.MAX_SKIPPED = 20  # so many updates in a row that are not finite end the run
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
    c.AUG.RATIO = [3 / 4, 4 / 3]  # aspect ratio of a random crop
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
    c.TEST.CROP_PCT = 224 / 256  # fraction of the resized image that the centre crop keeps

    c.OUTPUT = "output"
    c.TAG = "default"  # the run's folder is OUTPUT/MODEL.NAME/TAG
    c.SAVE_FREQ = 1  # epochs
    c.SAVE_STEPS = 0  # updates; 0: do not save within an epoch
    c.KEEP_LAST = 3  # number of epoch_*.pth to keep, beside best.pth, best_ema.pth and latest.pth
    c.TENSORBOARD = True
    c.PRINT_FREQ = 10  # steps
    c.SEED = 0
    return c


def load_config(path: str, overrides: dict[str, object], opts: Sequence[str] = ()) -> CfgNode:
    """Merge defaults, the file at `path`, `overrides` (dotted key to value) and `opts` (KEY VALUE ...), in this order.

    Raises:
        UserError: the file is unreadable, a key is unknown, or a value has the wrong type or is outside its range.
    """
    config = default_config()
    written = _flatten(_read_yaml(path))
    if twice := next((key for key, count in Counter(key for key, _ in written).items() if count > 1), None):
        raise UserError(f"{path}: sets {twice} twice, in a section and by its whole name; keep one")
    for key, value in written:
        _set(config, key, value, path)
    for key, value in overrides.items():
        _set(config, key, value, "the command line")
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs of KEY VALUE, got {len(opts)} words: {' '.join(opts)}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        _set(config, key, value, "--opts")
    for node, key in (
        (config, "OUTPUT"),
        (config.DATA, "DATA_PATH"),
        (config.MODEL, "PRETRAINED"),
        (config.MODEL, "RESUME"),
    ):
        node[key] = os.path.expanduser(node[key])  # a shell does so for flags
    _validate(config)
    for key, value in _flatten(config):
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"{key} holds a character that no name can have: {value!r}")
    config.freeze()
    return config


def saved_config(text: str, source: str, keys: Sequence[str] = ()) -> CfgNode:
    """Read the config that a checkpoint holds as text; skip keys that no longer exist.

    Args:
        keys: the keys to read, by default all. Weights are good weights even if the bounds of other keys have changed
            since their training.

    Raises:
        UserError: the text is not a config, or a value is invalid.
    """
    config = default_config()
    known = {key for key, _ in _flatten(config)}.intersection(keys or dict(_flatten(config)))
    for key, value in _flatten(_parse_yaml(text, source)):
        if key in known:
            _set(config, key, value, source)
    _validate(config)
    return config


def config_text(content: dict) -> str | None:
    """Return the text of main.py's config in a checkpoint; None without one, or for another text, as a file's name."""
    text = content.get("config")
    if not isinstance(text, str):
        return None
    try:
        return None if isinstance(yaml.load(text, _TextLoader), str | list | int | float) else text
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # of a damaged one, which `saved_config` reports
        return text


def trained_with(content: dict, path: str) -> CfgNode:
    """Return the default config with the evaluation keys that a checkpoint of main.py holds; else the defaults alone.

    Raises:
        UserError: the text that the checkpoint holds as its config is not a config.
    """
    text = config_text(content)
    return default_config() if text is None else saved_config(text, f"{path}: its config", SAVED_WITH_WEIGHTS)


# Keys that change no number, or that may change when a run is resumed.
MAY_CHANGE_ON_RESUME = (
    *("DATA.DATA_PATH", "DATA.NUM_WORKERS", "DATA.PREFETCH_FACTOR", "DATA.PIN_MEMORY", "DATA.MAX_UNREADABLE"),
    *("MODEL.NUM_CLASSES", "MODEL.PRETRAINED", "MODEL.RESUME"),  # loading compares the head's size
    *("TRAIN.USE_CHECKPOINT", "TRAIN.AUTO_RESUME", "TRAIN.MAX_SKIPPED"),
    *("OUTPUT", "TAG", "SAVE_FREQ", "SAVE_STEPS", "KEEP_LAST", "TENSORBOARD", "PRINT_FREQ"),
)


# Keys that may differ between processes: paths, and keys that change neither a number nor when the processes meet.
MAY_DIFFER_BETWEEN_PROCESSES = (
    *("DATA.DATA_PATH", "DATA.NUM_WORKERS", "DATA.PREFETCH_FACTOR", "DATA.PIN_MEMORY", "TRAIN.USE_CHECKPOINT"),
    *("OUTPUT", "TAG", "TENSORBOARD"),
)


def shared_settings(config: CfgNode) -> dict[str, object]:
    """Return the keys that must be the same in all processes of a run, with their values."""
    return {key: value for key, value in _flatten(config) if key not in MAY_DIFFER_BETWEEN_PROCESSES}


def changed_keys(text: str, config: CfgNode, source: str | Path, keys: Sequence[str] = ()) -> list[str]:
    """Return KEY OLD -> NEW for each key that changes numbers and differs between a checkpoint's `text` and `config`.

    Args:
        keys: the keys to compare, by default all.

    Raises:
        UserError: `text` is not a config.
    """
    saved = dict(_flatten(saved_config(text, f"{source}: its config", keys)))
    there = {key for key, _ in _flatten(_parse_yaml(text, str(source)))}  # earlier versions have fewer keys
    return [
        f"{key} {saved[key]!r} -> {value!r}"
        for key, value in _flatten(config)
        if key in there and key not in MAY_CHANGE_ON_RESUME and (not keys or key in keys) and saved[key] != value
    ]


LARGEST_SIZE = 4096  # pixels of a side, up to which a command takes the image size that a checkpoint names
EVALUATION_KEYS = ("DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.CROP_PCT", "TRAIN.AMP")  # accuracy depends on these
SAVED_WITH_WEIGHTS = ("MODEL.NAME", *EVALUATION_KEYS)


def changed_evaluation_keys(content: dict, config: CfgNode, path: str | Path) -> list[str]:
    """Return KEY OLD -> NEW for each evaluation key that differs between a checkpoint of main.py and `config`."""
    text = config_text(content)
    return [] if text is None else changed_keys(text, config, path, EVALUATION_KEYS)


def evaluation_config_text(content: dict, path: str | Path) -> str | None:
    """Return, as text, the keys of a checkpoint's config that its evaluation depends on; None without a config.

    The text is for weights that are passed on to others, so it holds no paths and the like.
    """
    if config_text(content) is None:
        return None
    values = dict(_flatten(trained_with(content, str(path))))
    tree: dict[str, dict] = {}
    for key in SAVED_WITH_WEIGHTS:
        section, _, leaf = key.partition(".")
        tree.setdefault(section, {})[leaf] = values[key]
    return yaml.safe_dump(tree)


def _read_yaml(path: str) -> dict:
    if not is_file(path):
        raise UserError(f"--cfg {path}: no such file; the published sizes are in classification/configs/spatialmamba")
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--cfg {path}: not a YAML file: {error}") from error
    return _parse_yaml(text, f"--cfg {path}")


class StrictYaml:
    """A mixin for YAML loaders that refuses aliases, tags and repeated keys.

    Aliases can turn a few lines into gigabytes, and tags can run code.
    """

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.constructor.ConstructorError(None, None, "anchors and aliases are not read", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.constructor.ConstructorError(None, None, "tags are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands there twice", node.start_mark)
        return mapping


class _TextLoader(StrictYaml, yaml.BaseLoader):
    """Load every value as text, as --opts does: no dates, no octal numbers, no `off` for False."""


def _parse_yaml(text: str, source: str) -> dict:
    try:
        content = yaml.load(text, _TextLoader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{source}: not a YAML file: {error}") from error
    except RecursionError as error:
        raise UserError(f"{source}: not a config: it is nested too deeply") from error
    if content is None or content == "":
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected sections such as DATA and TRAIN, got {type(content).__name__}")
    return content


def _flatten(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    leaves = []
    for key, value in tree.items():
        leaves += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return leaves


# Keys of the authors' repository, or their first parts, with advice what to do instead; docs/from_the_authors_code.md.
AUTHORS_KEYS = {
    "MODEL.SPATIALMAMBA": "the sizes follow from MODEL.NAME, e.g. spatialmamba_tiny",
    "MODEL.TYPE": "leave it out; MODEL.NAME says which model, e.g. spatialmamba_tiny",
    "MODEL.DDP": "leave it out; training is distributed by PyTorch",
    "MODEL.DROP_RATE": "leave it out; the recipe has no dropout",
    "TRAIN.MESA": "set TRAIN.MESA.WEIGHT",
    "TRAIN.START_EPOCH": "leave it out; a run goes on from its last checkpoint",
    "TRAIN.LR_SCHEDULER": "leave it out; the schedule is the recipe's cosine, see TRAIN.WARMUP_EPOCHS and TRAIN.MIN_LR",
    "TRAIN.OPTIMIZER.NAME": "leave it out; the optimizer is AdamW",
    "TRAIN.OPTIMIZER.MOMENTUM": "leave it out; the optimizer is AdamW, see TRAIN.OPTIMIZER.BETAS",
    "TRAIN.MOE": "leave it out; there are no experts in this model",
    "DATA.DATASET": "leave it out; the data is an image folder",
    "DATA.ZIP_MODE": "leave it out; the data is an image folder",
    "DATA.CACHE_MODE": "leave it out; images are read as they are needed",
    "AUG.CUTMIX_MINMAX": "leave it out; set AUG.CUTMIX",
    "TEST.CROP": "set TEST.CROP_PCT: 0.875 is their True. Their False squeezes each image to a square, which is not "
    "done here: 1.0 keeps the whole short side, and cuts the long one to a square",
    "TEST.SEQUENTIAL": "leave it out; every validation image counts once, in order",
    "TEST.SHUFFLE": "leave it out; every validation image counts once, in order",
    "AMP_ENABLE": "set TRAIN.AMP to float16, bfloat16 or off",
    "AMP_OPT_LEVEL": "set TRAIN.AMP to float16, bfloat16 or off",
    "ENABLE_AMP": "set TRAIN.AMP to float16, bfloat16 or off",
    "EVAL_MODE": "pass --eval",
    "THROUGHPUT_MODE": "pass --throughput",
    "TRAINCOST_MODE": "leave it out; `python -m classification.benchmark --train` times training",
    "LOCAL_RANK": "leave it out; the launcher says it",
    "FUSED_LAYERNORM": "leave it out; there is one LayerNorm, PyTorch's",
    "FUSED_WINDOW_PROCESS": "leave it out; there are no windows in this model",
    "BASE": "leave it out; write what differs from classification/config.py",
}


def _hint(key: str, known: list[str]) -> str:
    for name, instead in AUTHORS_KEYS.items():
        if key == name or key.startswith(f"{name}."):
            return f"; it is of the authors' repository: {instead}"
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; classification/config.py lists the keys"


def _set(config: CfgNode, key: str, value: object, source: str) -> None:
    """Set one key to a value, which must be of the type of the key's default."""
    known = [k for k, _ in _flatten(config)]
    section = [one for one in known if one.startswith(f"{key}.")]
    if section and key not in AUTHORS_KEYS:
        raise UserError(f"{source}: {key} is a section of keys; set one of them, such as {section[0]}, or leave it out")
    if key not in known:
        raise UserError(f"{source}: no config key {key}{_hint(key, known)}")
    *sections, leaf = key.split(".")
    node = functools.reduce(CfgNode.__getitem__, sections, config)
    kind = type(node[leaf])
    if kind is not str:
        value = [_literal(v, kind) for v in value] if isinstance(value, list) else _literal(value, kind)
    if (kind is float and type(value) is int) or (kind is str and type(value) in (int, float)):
        with suppress(OverflowError):
            value = kind(value)
    if kind is list and type(value) is list and all(type(v) is float for v in node[leaf]):
        with suppress(OverflowError):
            value = [float(v) if type(v) is int else v for v in value]  # PyTorch wants numbers of one type
    if type(value) is not kind:
        raise UserError(f"{source}: {key} must be of type {kind.__name__}, got {reprlib.repr(value)}")
    node[leaf] = value


def _literal(value: object, kind: type) -> object:
    """Read a word as a Python literal or, if `kind` is bool, a YAML truth value; return any other word unchanged."""
    if type(value) is not str:
        return value
    if kind is bool and value.lower() in WORDS:
        return WORDS[value.lower()]
    try:
        read = ast.literal_eval(value)
        repr(read)  # Python reads hexadecimal numbers that are too long for it to print
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return value
    return read


WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
CHOICES = {
    "MODEL.NAME": tuple(VARIANTS),
    "DATA.INTERPOLATION": ("bilinear", "bicubic", "nearest", "random"),
    "TRAIN.AMP": ("float16", "bfloat16", "off"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
}
COUNT = 2**31 - 1  # the upper limit of every count
# Lowest and highest value; for a list, the bounds of each of its two numbers. No bound is infinite.
RANGES = {
    "DATA.BATCH_SIZE": (1, 2**20),
    "DATA.IMG_SIZE": (1, 2**14),
    "DATA.NUM_WORKERS": (0, 2**12),
    "DATA.PREFETCH_FACTOR": (1, 2**12),
    "DATA.MAX_UNREADABLE": (0, COUNT),
    "MODEL.NUM_CLASSES": (0, 2**24),
    "MODEL.DROP_PATH_RATE": (0, 0.999),
    "MODEL.LABEL_SMOOTHING": (0, 0.999),
    "TRAIN.EPOCHS": (1, 2**20),
    "TRAIN.BASE_LR": (0, 1e3),
    "TRAIN.WARMUP_LR": (0, 1e3),
    "TRAIN.MIN_LR": (0, 1e3),
    "TRAIN.WEIGHT_DECAY": (0, 1e3),
    "TRAIN.CLIP_GRAD": (0, 1e9),
    "TRAIN.ACCUMULATION_STEPS": (1, 2**20),
    "TRAIN.MAX_SKIPPED": (1, COUNT),
    "TRAIN.OPTIMIZER.BETAS": (0, 0.999999),
    "TRAIN.OPTIMIZER.EPS": (1e-30, 1),  # a smaller value can be 0 in float32: then moments of 0 would be divided by 0
    "TRAIN.EMA.DECAY": (0, 0.9999999),  # at 1 the average would never change
    "TRAIN.MESA.WEIGHT": (0, 1e3),
    "TRAIN.MESA.START": (0, 1),
    "AUG.SCALE": (1e-6, 1),
    "AUG.RATIO": (1e-3, 1e3),
    "AUG.HFLIP": (0, 1),
    "AUG.COLOR_JITTER": (0, 10),
    "AUG.REPROB": (0, 1),
    "AUG.RECOUNT": (1, 1000),
    "AUG.MIXUP": (0, 1e3),
    "AUG.CUTMIX": (0, 1e3),
    "AUG.MIXUP_PROB": (0, 1),
    "AUG.MIXUP_SWITCH_PROB": (0, 1),
    "TEST.CROP_PCT": (0.1, 1),
    "SAVE_FREQ": (1, COUNT),
    "SAVE_STEPS": (0, COUNT),
    "KEEP_LAST": (1, COUNT),
    "PRINT_FREQ": (1, COUNT),
    "SEED": (0, 2**31),
}
# For these keys 0 means off, but values near 0 break training: tiny alphas give NaN, tiny gradients round to 0.
OFF_OR_MORE, LEAST = ("TRAIN.CLIP_GRAD", "AUG.MIXUP", "AUG.CUTMIX"), 1e-6
FLAGS = {"DATA.BATCH_SIZE": "--batch-size", "TRAIN.ACCUMULATION_STEPS": "--accumulation-steps", "SEED": "--seed"}


def _validate(config: CfgNode) -> None:
    """Refuse values that would fail later, or that would silently mean something else."""
    values = dict(_flatten(config))
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            ours = f"spatialmamba_{values[key]}"  # the authors' names are the sizes alone
            hint = f"; {ours} is that size" if ours in choices else ""
            raise UserError(f"{key} must be one of {', '.join(choices)}, got {values[key]!r}{hint}")
    for key, (low, high) in RANGES.items():
        _check_range(key, values[key], low, high)
    for key in OFF_OR_MORE:
        if 0 < values[key] < LEAST:
            raise UserError(f"{key} must be 0, which is off, or at least {LEAST}, got {values[key]}")
    if not 0 <= config.TRAIN.WARMUP_EPOCHS < config.TRAIN.EPOCHS:
        raise UserError(
            f"TRAIN.WARMUP_EPOCHS must be in [0, TRAIN.EPOCHS), got {config.TRAIN.WARMUP_EPOCHS} "
            f"of {config.TRAIN.EPOCHS} epochs"
        )
    for key in ("MIN_LR", *(["WARMUP_LR"] if config.TRAIN.WARMUP_EPOCHS else [])):  # all rates scale alike
        if config.TRAIN[key] > config.TRAIN.BASE_LR:
            raise UserError(
                f"TRAIN.{key} is {config.TRAIN[key]}, above TRAIN.BASE_LR, {config.TRAIN.BASE_LR}: the rate would run "
                "the wrong way; lower it, or raise TRAIN.BASE_LR"
            )
    if config.TRAIN.MESA.WEIGHT > 0 and not config.TRAIN.EMA.ENABLE:
        raise UserError("MESA distils from the EMA model: set TRAIN.EMA.ENABLE True or TRAIN.MESA.WEIGHT 0")
    if config.TRAIN.MESA.WEIGHT > 0 and config.TRAIN.MESA.START == 1:
        raise UserError("with TRAIN.MESA.START 1 MESA would never begin: lower it, or set TRAIN.MESA.WEIGHT 0")


# Conditions, and the keys that have no effect under them.
WITHOUT_EFFECT: tuple[tuple[str, Callable[[CfgNode], bool], tuple[str, ...]], ...] = (
    (  # as timm decides: of its policies, 3a alone goes with jitter
        "AUG.AUTO_AUGMENT is set",
        lambda c: bool(c.AUG.AUTO_AUGMENT) and "3a" not in c.AUG.AUTO_AUGMENT,
        ("AUG.COLOR_JITTER",),
    ),
    ("AUG.REPROB is 0", lambda c: c.AUG.REPROB == 0, ("AUG.REMODE", "AUG.RECOUNT")),
    (
        "AUG.MIXUP and AUG.CUTMIX are 0",
        lambda c: c.AUG.MIXUP == c.AUG.CUTMIX == 0,
        ("AUG.MIXUP_PROB", "AUG.MIXUP_MODE", "AUG.MIXUP_SWITCH_PROB"),
    ),
    (
        "AUG.MIXUP_PROB is 0",
        lambda c: c.AUG.MIXUP_PROB == 0,
        ("AUG.MIXUP", "AUG.CUTMIX", "AUG.MIXUP_MODE", "AUG.MIXUP_SWITCH_PROB"),
    ),
    ("AUG.MIXUP or AUG.CUTMIX is 0", lambda c: 0 in (c.AUG.MIXUP, c.AUG.CUTMIX), ("AUG.MIXUP_SWITCH_PROB",)),
    ("TRAIN.EMA.ENABLE is False", lambda c: not c.TRAIN.EMA.ENABLE, ("TRAIN.EMA.DECAY",)),
    ("TRAIN.MESA.WEIGHT is 0", lambda c: c.TRAIN.MESA.WEIGHT == 0, ("TRAIN.MESA.START",)),
    ("TRAIN.WARMUP_EPOCHS is 0", lambda c: c.TRAIN.WARMUP_EPOCHS == 0, ("TRAIN.WARMUP_LR",)),
    ("DATA.NUM_WORKERS is 0", lambda c: c.DATA.NUM_WORKERS == 0, ("DATA.PREFETCH_FACTOR",)),
)


def settings_without_effect(config: CfgNode) -> list[str]:
    """Return one message for each key that differs from its default although another key switches it off."""
    values, defaults = dict(_flatten(config)), dict(_flatten(default_config()))
    reasons: dict[str, str] = {}
    for reason, holds, keys in WITHOUT_EFFECT:
        if holds(config):
            reasons |= {key: reason for key in keys if key not in reasons and values[key] != defaults[key]}
    return [f"{key} {values[key]} has no effect, because {reason}" for key, reason in reasons.items()]


def _check_range(key: str, value: object, low: float, high: float) -> None:
    name = f"{key} ({FLAGS[key]})" if key in FLAGS else key
    if isinstance(value, list):
        numbers = len(value) == 2 and all(type(v) in (int, float) for v in value)
        ascending = key != "TRAIN.OPTIMIZER.BETAS"
        if not (numbers and all(low <= v <= high for v in value) and (not ascending or value[0] <= value[1])):
            kind = "two ascending numbers" if ascending else "two numbers"
            raise UserError(f"{name} must be {kind} in [{low}, {high}], got {reprlib.repr(value)}")
    elif not low <= value <= high:
        bound = f"at least {low}" if value < low else f"at most {high}"
        raise UserError(f"{name} must be {bound}, got {reprlib.repr(value)}")
