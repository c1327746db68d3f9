"""`train.py`, `test.py` and `get_flops.py` of detection and segmentation: OpenMMLab's command lines for mmengine."""

import argparse
import copy
import difflib
import gc
import inspect
import keyword
import logging
import math
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from mmengine import registry as root
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import METRICS, RUNNERS, Registry, init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint

from classification.checkpoint_folder import lock_folder
from classification.errors import UserError, check_utf8, end_with, is_dir, is_file, prepare_console, refuse_empty
from classification.models import SpatialMamba, optimise_for_cpu
from classification.models.openmmlab import MM_SpatialMamba

# Imported for what they register: readers of pickles and YAML, and the checks that pipelines call.
from classification.openmmlab import pickle_files, transforms, yaml_files  # noqa: F401
from classification.openmmlab.checks import (
    ENDLESS_SAMPLERS,
    check_channels,
    check_checkpoint,
    check_data,
    check_file,
    check_is_no_data,
    check_operators,
    check_written_names,
    data_classes,
    pretrained_of,
    reduces_zero_label,
    warn_of_a_head_for_other_classes,
    warn_of_other_normalisation,
)
from classification.openmmlab.config_parts import (
    argument_of,
    class_names_of,
    datasets_of,
    is_kind,
    kind_of,
    metrics_of,
    parts_of,
    predicting_head,
    segmentation_heads,
    steps_of,
)
from classification.openmmlab.flops import complexity_table
from classification.openmmlab.hooks import (
    AverageBatchNorm,
    CheckLabelsOfCategories,
    CheckLength,
    CheckPredictions,
    CheckResumed,
    CheckSameData,
    NameAbsentClasses,
    NoteOtherProcesses,
    SaveDigests,
    StopAtInvalidLoss,
    saving_folder,
    unwrapped,
)
from classification.openmmlab.messages import print_log
from classification.openmmlab.pipelines import (
    insert_image_checks,
    insert_label_checks,
    insert_size_checks,
    pass_class_weights,
)
from classification.openmmlab.saved_config import warn_of_other_config, warn_of_other_start, warn_of_what_goes_on
from classification.openmmlab.shared_memory import end_workers, sharing
from classification.openmmlab.unread_variables import settings_of, warn_of_unread_variables
from classification.run import lost_another, meeting, whole_numbers

RESUME_LATEST = "auto"


class _Options(DictAction):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            key, equals, text = value.partition("=")
            parts = key.split(".")  # mmengine writes them as Python
            if not equals or not all(parts) or not parts[0].isidentifier() or any(map(keyword.iskeyword, parts)):
                parser.error(f"{option_string} takes KEY=VALUE, got {value!r}")
            # mmengine drops all spaces, also those of a path, which then leads elsewhere.
            text = text.strip("'\"").strip()
            if " " in text and "," not in text and text[0] not in "([":
                setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), key: text})
                continue
            if re.search(r"[^\s,([] +[^\s,)\]]", text):
                parser.error(
                    f"{option_string} {value!r}: mmengine drops the spaces in a list's parts; write it in a config of "
                    "your own"
                )
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (AssertionError, RecursionError):  # brackets that are not balanced, and dict(...)
                parser.error(
                    f"{option_string} {value!r}: mmengine reads KEY=V1,V2, KEY=[(V1,V2),V3] and KEY.NAME=V; write "
                    "anything else in a config of your own"
                )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", help="config file")
    add("--cfg-options", nargs="+", action=_Options, metavar="KEY=VALUE",
        help="settings over the config's, e.g. model.backbone.pretrained=CKPT; with data_root=DIR/, paths under the "
        "config's data_root move along")  # fmt: skip


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add = parser.add_argument
    add("--work-dir", help="folder of logs and checkpoints; ./work_dirs/CONFIG by default")
    add("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="how processes are started")
    add("--local-rank", "--local_rank", type=int, default=0, help="set by torch.distributed.launch")


def train(scope: str) -> None:
    """Run the command line of `train.py`; `scope` is the toolchain's, "mmdet" or "mmseg"."""
    parser = argparse.ArgumentParser(description="Train.", allow_abbrev=False)
    add_run_arguments(parser)
    add = parser.add_argument
    add("--resume", nargs="?", const=RESUME_LATEST, metavar="CKPT",
        help="go on from a checkpoint, by default the work dir's latest")  # fmt: skip
    add("--amp", action="store_true", help="automatic mixed precision")
    add("--auto-scale-lr", action="store_true", help="scale the learning rate with the global batch size")
    parser.set_defaults(tool="train")
    _run(_train, _parsed(parser), scope)


def test(scope: str) -> None:
    """Run the command line of `test.py`; `scope` is as for `train`."""
    parser = argparse.ArgumentParser(description="Test a checkpoint.", allow_abbrev=False)
    add_run_arguments(parser)
    add = parser.add_argument
    add("checkpoint", help="checkpoint file")
    add("--tta", action="store_true", help="test-time augmentation by the config's tta_model and tta_pipeline")
    add("--out", type=os.path.expanduser, help="write the predictions: mmdet's to a pickle file, mmseg's to a folder")
    add("--show", action="store_true", help="show predictions on a screen")
    add(
        "--show-dir",
        type=os.path.expanduser,
        help="folder for images with predictions drawn by the first process; mmdet's is in the work dir",
    )
    add("--wait-time", type=float, default=2, help="seconds that --show shows an image")
    parser.set_defaults(tool="test")
    _run(_test, _parsed(parser), scope)


def get_flops(scope: str, size: tuple[int, int]) -> None:
    """Run the command line of `get_flops.py`; `size` is the image height and width of the published figures."""
    parser = argparse.ArgumentParser(
        description="Print parameters and FLOPs, custom operators counted.", allow_abbrev=False
    )
    add_common_arguments(parser)
    parser.add_argument("--shape", type=_pixels, nargs=2, default=size, metavar=("H", "W"), help="of the image")
    _run(_get_flops, _parsed(parser), scope)


def _parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    refuse_empty(parser, args)
    for key, value in (args.cfg_options or {}).items():
        if value == "" and key.rpartition(".")[2] in PLACES:
            parser.error(f"--cfg-options {key}= is empty, as from a variable that is not set; name one or leave it out")
    return args


PLACES = ("checkpoint", "data_root", "load_from", "out_dir", "pretrained", "work_dir")


def _pixels(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels")
    return int(text)


def _run(work: Callable[[argparse.Namespace, Config], None], args: argparse.Namespace, scope: str) -> None:
    """Read the config and do the work. A user's error ends the process with one line and status 1."""
    prepare_console()
    try:
        if "launcher" in args:
            _export_ranks(args.launcher, args.local_rank)
        work(args, _read_config(args, scope))
        # Free DistributedDataParallel: gloo's threads live as long, and a thread in Python at exit aborts the process.
        gc.collect()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except UserError as error:
        end_with(str(error), "LOCAL_RANK")
    except RuntimeError as error:
        if not (gone := lost_another(error)):
            raise
        end_with(gone, "LOCAL_RANK")


# ----- the config

NEEDED = {
    "train": ("optim_wrapper", "train_cfg", "train_dataloader"),
    "test": ("test_cfg", "test_dataloader", "test_evaluator"),
}


def _read_config(args: argparse.Namespace, scope: str) -> Config:
    if not is_file(args.config):
        raise UserError(f"{args.config}: no such config file")
    of_data = args.config.lower().endswith(yaml_files.OF_DATA)
    try:
        yaml_files.check_bases(args.config)
        cfg = Config.fromfile(args.config, import_custom_modules=not of_data)
        if of_data:
            yaml_files.check_types(cfg.to_dict())
            yaml_files.import_modules(cfg, args.config)
            yaml_files.make_sizes_tuples(cfg)
    except UserError as error:
        raise UserError(f"{args.config}: {error}") from error
    except Exception as error:  # a config is a program, or a file that may be broken anywhere
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"{args.config}: cannot be read ({type(error).__name__}: {reason})") from error
    if cfg.get("default_scope") != scope:
        raise UserError(f"{args.config}: is a config of {cfg.get('default_scope')}, this is a tool for {scope}")
    init_default_scope(scope)
    try:
        merge_options(cfg, args.cfg_options or {})
        _warn_of_unused_options(args)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--cfg-options: do not fit {args.config} ({error})") from error
    with _reading(args.config):
        warn_of_unread_variables(args.config, settings_of(cfg))
        _warn_of_misspelt_settings(cfg)
    for split in ("train", "val", "test"):
        loader = cfg.get(f"{split}_dataloader")
        if isinstance(loader, dict) and loader.get("num_workers") == 0:  # customary while one looks for an error
            loader.persistent_workers = False  # PyTorch refuses True, which configs inherit
    for key in ("model", *NEEDED.get(getattr(args, "tool", None), ())):
        if not isinstance(cfg.get(key), dict | list):
            raise UserError(f"{args.config}: has no {key}; write it, or inherit a config that has by _base_")
    with _reading(args.config):
        check_channels(cfg.model)
        _check_training(cfg)
        saver = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
        keeps_one = getattr(args, "tool", None) == "train" and saver.get("max_keep_ckpts") == 1
    if keeps_one:
        print_log(
            "default_hooks.checkpoint.max_keep_ckpts is 1: mmengine removes the last checkpoint before it writes the "
            "next, so a full disk or a kill loses the run; set 2",
            level=logging.WARNING,
        )
    return cfg


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn an error in our checks of a config into one line: a part of it is of another kind than usual."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: a part of it is not what configs have there ({type(error).__name__}: {error!s:.200}); compare it "
            "with the configs in configs/spatialmamba"
        ) from error


def _check_unit(cfg: Config) -> None:
    """Compare what counts by epochs with what counts by iterations, as a config has both after its loop was changed.

    Raises:
        UserError: an epoch would never end.
    """
    loop = cfg.get("train_cfg")
    if not isinstance(loop, dict):
        return
    by_epoch = is_kind(loop, "EpochBasedTrainLoop") if loop.get("type") else loop.get("by_epoch", True)
    samplers = [(cfg.get("train_dataloader") or {}).get(key) or {} for key in ("sampler", "batch_sampler")]
    endless = [kind_of(one) for one in samplers if is_kind(one, *ENDLESS_SAMPLERS)]
    if by_epoch and endless:
        raise UserError(
            f"train_cfg counts epochs, but train_dataloader takes an {endless[0]}, whose epoch has no end: take an "
            "IterBasedTrainLoop, or a DefaultSampler"
        )
    if by_epoch or (loop.get("type") and not is_kind(loop, "IterBasedTrainLoop")):
        return
    schedules = cfg.get("param_scheduler")
    for i, one in enumerate(schedules if isinstance(schedules, list) else [schedules]):
        counts_epochs = isinstance(one, dict) and one.get("type") and one.get("by_epoch", True)
        if counts_epochs and not one.get("convert_to_iter_based"):
            print_log(
                f"param_scheduler[{i}] counts epochs, but train_cfg iterations, which are all of one epoch: the "
                "schedule does nothing; set by_epoch=False, and its begin, end and milestones in iterations",
                level=logging.WARNING,
            )
    saver = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    if saver and saver.get("by_epoch", True):
        print_log(
            "default_hooks.checkpoint counts epochs, but train_cfg iterations, which are all of one epoch: nothing is "
            "saved before the end; set by_epoch=False, and its interval in iterations",
            level=logging.WARNING,
        )


def _check_training(cfg: Config) -> None:
    """Raise a UserError if training is to end before it begins, or learns nothing: mmengine would say nothing."""
    loop = cfg.get("train_cfg")
    for key in ("max_epochs", "max_iters", "val_interval") if isinstance(loop, dict) else ():
        if key in loop and not _is_count(loop[key]):
            raise UserError(f"train_cfg.{key} is {loop[key]!r}, but must be a whole number above 0")
    _check_unit(cfg)
    for name in ("train", "val", "test"):
        size = (cfg.get(f"{name}_dataloader") or {}).get("batch_size")
        if size is not None and not (isinstance(size, int) and _is_count(size)):
            raise UserError(f"{name}_dataloader.batch_size is {size!r}, but must be a whole number above 0")
    optimizer = (cfg.get("optim_wrapper") or {}).get("optimizer") or {}
    rate = optimizer.get("lr")
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
        raise UserError(f"optim_wrapper.optimizer.lr is {rate!r}, but must be a number above 0")
    for name, value in optimizer.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, float) and not math.isfinite(one) for one in numbers):
            raise UserError(f"optim_wrapper.optimizer.{name} is {value!r}, with which nothing is learnt")
    eps = optimizer.get("eps")
    if isinstance(eps, int | float) and not 0 <= eps <= 1:
        raise UserError(f"optim_wrapper.optimizer.eps is {eps!r}, but must be from 0 to 1: else, nothing is learnt")
    for key, part in segmentation_heads(cfg.get("model") or {}):
        dropped = part.get("dropout_ratio")
        if isinstance(dropped, int | float) and not dropped < 1:
            raise UserError(f"{key}.dropout_ratio is {dropped!r}, but must be below 1: else, nothing is learnt there")
    counts = (cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    if not _is_count(counts):
        raise UserError(f"optim_wrapper.accumulative_counts is {counts!r}, but must be a whole number above 0")
    for key, part in (
        *parts_of("param_scheduler", cfg.get("param_scheduler")),
        *parts_of("model.data_preprocessor", (cfg.get("model") or {}).get("data_preprocessor")),
    ):
        for name, value in part.items():
            numbers = value if isinstance(value, list | tuple) else [value]
            if name != "end" and any(isinstance(one, float) and not math.isfinite(one) for one in numbers):
                raise UserError(f"{key}.{name} is {value!r}, with which nothing is learnt")
    scaling = cfg.get("auto_scale_lr")
    base = scaling.get("base_batch_size") if isinstance(scaling, dict) else None
    if base is not None and not _is_count(base):
        raise UserError(f"auto_scale_lr.base_batch_size is {base!r}, but must be a whole number above 0")
    clip = (cfg.get("optim_wrapper") or {}).get("clip_grad")
    for name in ("max_norm", "clip_value"):  # by norm; by value
        largest = clip.get(name, 1) if isinstance(clip, dict) else 1
        if not (isinstance(largest, int | float) and largest > 0):
            raise UserError(
                f"optim_wrapper.clip_grad.{name} is {largest!r}, but must be a number above 0: 0 stops all gradients; "
                "leave clip_grad out to clip nothing"
            )


def _is_count(value: object) -> bool:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # 9e4, max_iters / 5
    return whole and not isinstance(value, bool) and value > 0


def merge_options(cfg: Config, options: dict) -> None:
    """Merge `--cfg-options`. A new `data_root` first replaces the old one in all paths of the config.

    Settings such as `val_evaluator.ann_file = data_root + ...` hold a copy from when the config was read.
    """
    old, new = cfg.get("data_root"), options.get("data_root")
    if old and new:
        for key in cfg.keys() - {"work_dir", "load_from", "resume", "classes"}:
            cfg[key] = _moved(cfg[key], old.rstrip("/"), new.rstrip("/"))
        options = {**options, "data_root": os.path.join(new, "")}
    _warn_of_misspelt_keys(cfg, options)
    cfg.merge_from_dict(options)
    _warn_of_root_without_data(cfg, old)


def _warn_of_root_without_data(cfg: Config, written: str | None) -> None:
    """Warn if no data set lies under `data_root`: a config that inherits another changes the variable, but no copy."""
    loaders = {name: cfg.get(f"{name}_dataloader") for name in ("train", "val", "test")}
    places = {name: _first_root(loader.get("dataset")) for name, loader in loaders.items() if isinstance(loader, dict)}
    places = {name: place for name, place in places.items() if place}
    root = (cfg.get("data_root") or "").rstrip("/")
    if root and places and not any(f"{place}/".startswith(f"{root}/") for place in places.values()):
        name, place = next(iter(places.items()))
        print_log(
            f"data_root is {cfg.data_root}, but no data is read from there: {name}_dataloader.dataset has {place}. Set "
            "data_root of each data set, and ann_file of the evaluators"
            + (
                f"; or leave data_root = {written!r} out of the config, and pass --cfg-options data_root"
                if written
                else ""
            ),
            level=logging.WARNING,
        )


def _first_root(dataset: object) -> str | None:
    """Return the data_root of a data set, or of the first one in it that has one."""
    if isinstance(dataset, list | tuple):
        return next(filter(None, map(_first_root, dataset)), None)
    if not isinstance(dataset, dict):
        return None
    return dataset.get("data_root") or _first_root([dataset.get("dataset"), dataset.get("datasets")])


# Settings that a tool does not use, by the first part of the key.
UNUSED = {
    "train": ("test_cfg", "test_dataloader", "test_evaluator"),
    "test": (
        *("optim_wrapper", "param_scheduler", "train_cfg", "train_dataloader"),
        *("val_cfg", "val_dataloader", "val_evaluator"),
    ),
}


def _warn_of_unused_options(args: argparse.Namespace) -> None:
    """Warn of options that the tool does not use.

    `test_dataloader = val_dataloader` in a config makes a copy, so an option for one does not change the other.
    """
    tool = getattr(args, "tool", None)
    unused = [key for key in args.cfg_options or {} if key.partition(".")[0] in UNUSED.get(tool, ())]
    if unused:
        print_log(f"--cfg-options {', '.join(unused)}: {tool}.py does not use them", level=logging.WARNING)


def _warn_of_misspelt_keys(cfg: Config, options: dict) -> None:
    """Warn of options that nothing reads: misspelt keys, and variables that only the config's own file uses."""
    settings = settings_of(cfg)
    known = {*cfg.keys(), *settings}
    for key in options:
        name = key.partition(".")[0]
        if name in cfg and name not in settings:
            print_log(
                f"--cfg-options {key}: {name} was used while the config was read, and changes nothing now; set what "
                "used it, for example train_cfg.max_epochs",
                level=logging.WARNING,
            )
        if name == "data_root" and name not in cfg:
            print_log(
                f"--cfg-options {key}: the config has none that could be replaced; set that of each data set, as "
                "train_dataloader.dataset.data_root",
                level=logging.WARNING,
            )
        close = [] if name in known else difflib.get_close_matches(name, known, 1, 0.8)
        if close:
            print_log(f"--cfg-options {key}: the config has no {name}; is {close[0]} meant?", level=logging.WARNING)
        elif name not in known and name != "data_root":
            meant = f"; {NEWER_NAMES[name]} is its newer name" if name in NEWER_NAMES else " but code of your own"
            print_log(
                f"--cfg-options {key}: the config has no {name}, and nothing reads it{meant}", level=logging.WARNING
            )
        elif misspelt := _misspelt_within(cfg, key):
            place, part, meant = misspelt
            print_log(f"--cfg-options {key}: {place} has no {part}; is {meant} meant?", level=logging.WARNING)


# What mmdet 2 and mmseg 0 called otherwise.
NEWER_NAMES = {
    "checkpoint_config": "default_hooks.checkpoint",
    "data": "train_dataloader",
    "deterministic": "randomness.deterministic",
    "evaluation": "train_cfg.val_interval",
    "log_config": "default_hooks.logger",
    "lr_config": "param_scheduler",
    "optimizer": "optim_wrapper.optimizer",
    "optimizer_config": "optim_wrapper",
    "runner": "train_cfg",
    "seed": "randomness.seed",
    "total_epochs": "train_cfg.max_epochs",
    "total_iters": "train_cfg.max_iters",
}


def _misspelt_within(cfg: Config, key: str) -> tuple[str, str, str] | None:
    """Find a part of a key that is not in the config, but is spelt nearly like a name beside it.

    Returns:
        the place, the part and the similar name; None if there is no such part, or its class takes that argument.
    """
    value, parts = cfg, key.split(".")
    for i, part in enumerate(parts):
        if isinstance(value, list | tuple):
            value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
        elif isinstance(value, dict | Config) and "custom_keys" not in parts[:i]:  # its keys are parameter names
            if part in value:
                value = value[part]
                continue
            close = difflib.get_close_matches(part, map(str, value), 1, 0.8) if i else []
            return (".".join(parts[:i]), part, close[0]) if close and not _accepts(value.get("type"), part) else None
        else:
            return None
    return None


# The names that mmengine, mmdet and mmseg look for in parts that take any name, by the end of the part's key.
NAMES = {
    "paramwise_cfg": (
        *("bias_decay_mult", "bias_lr_mult", "bypass_duplicate", "custom_keys", "dcn_offset_lr_mult", "decay_rate"),
        *("decay_type", "dwconv_decay_mult", "flat_decay_mult", "layer_decay_rate", "norm_decay_mult", "num_layers"),
    ),
    "auto_scale_lr": ("base_batch_size", "enable"),
    "test_cfg": (
        *("crop_size", "mask_thr_binary", "max_per_image", "max_per_img", "min_bbox_size", "mode", "nms", "nms_pre"),
        *("rcnn", "rpn", "score_thr", "stride"),
    ),
}


def _warn_of_misspelt_settings(cfg: Config) -> None:
    """Warn of names that are nearly those of settings, where the toolchains take any name and look for some.

    Raises:
        UserError: a part that holds such names is no dict.
    """
    wrapper = cfg.get("optim_wrapper") or {}
    parts = {"optim_wrapper.paramwise_cfg": wrapper.get("paramwise_cfg"), "auto_scale_lr": cfg.get("auto_scale_lr")}
    parts["model.test_cfg"] = cfg.model.get("test_cfg") if isinstance(cfg.get("model"), dict) else None
    for key, part in parts.items():
        names = NAMES[key.rpartition(".")[2]]
        if not isinstance(part, dict | None):
            raise UserError(f"{key} is {part!r:.300}, not a dict")
        for name in part or ():
            if name not in names and (close := difflib.get_close_matches(str(name), names, 1, 0.8)):
                print_log(f"{key} has a {name}, which nothing reads; is {close[0]} meant?", level=logging.WARNING)


def _warn_of_unknown_keys(cfg: Config, model: torch.nn.Module) -> None:
    """Warn of `custom_keys` that are in no parameter's name, but are nearly a part of one."""
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    paramwise = cfg.optim_wrapper.get("paramwise_cfg") or {}
    for key in paramwise.get("custom_keys") or {}:
        close = difflib.get_close_matches(key, parts, 1, 0.8)
        if close and not any(key in name for name, _ in model.named_parameters()):
            print_log(
                f"optim_wrapper.paramwise_cfg.custom_keys has {key!r}, which is in no parameter's name; is "
                f"{close[0]!r} meant?",
                level=logging.WARNING,
            )


OF_MMENGINE = ("function", "inferencer", "strategy")  # registries that not all toolchains have


def _accepts(kind: object, argument: str) -> bool:
    """Return whether a class, or the toolchain's class of that name, takes an argument; True for unknown classes."""
    if not kind:
        return False
    kinds = [kind] if isinstance(kind, type) else []
    registries = [one for one in vars(root).values() if isinstance(one, Registry) and one.name not in OF_MMENGINE]
    for registry in () if kinds else registries:
        with registry.switch_scope_and_registry(None) as own:
            kinds += filter(inspect.isclass, [own.get(str(kind))])
    initialisers = [base.__init__ for one in kinds for base in one.__mro__ if "__init__" in vars(base)]
    return not kinds or any(argument in inspect.signature(one).parameters for one in initialisers)


def _moved(value: object, old: str, new: str) -> object:
    if isinstance(value, dict):
        for key, item in list(value.items()):
            if key != "classes" or isinstance(item, str):  # names of classes are no paths; that of their file is
                moved = _moved(item, old, new)
                if moved is not item:  # a config with read_base gives classes here, but is written by their names
                    value[key] = moved
    elif isinstance(value, list | tuple):
        moved = [_moved(item, old, new) for item in value]
        return value if all(a is b for a, b in zip(moved, value, strict=True)) else type(value)(moved)
    elif isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value.removeprefix(old)
    return value


# ----- processes

RANKS = {  # the variables of rank, number of processes, and rank and number on this machine
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
}


# What says that a launcher has started several processes.
STARTED = {"WORLD_SIZE": "pytorch", "SLURM_STEP_NUM_TASKS": "slurm", "OMPI_COMM_WORLD_SIZE": "mpi"}


def _prepare(cfg: Config, args: argparse.Namespace) -> None:
    cfg.launcher = args.launcher
    cfg.work_dir = _work_dir(args, cfg)
    if args.launcher == "none":
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not torch.cuda.is_available():
        _use_cpu(cfg, args.launcher)
    elif args.launcher != "none":
        _check_gpus(args.launcher)


def _as_read(args: argparse.Namespace, cfg: Config) -> Config:
    """Copy the config for the file in the work dir: later runs start from it, on other machines and other data."""
    copied = copy.deepcopy(cfg)
    copied.work_dir, copied.launcher = _work_dir(args, cfg), args.launcher
    return copied


def _work_dir(args: argparse.Namespace, cfg: Config) -> str:
    named = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", Path(args.config).stem)
    return os.path.expanduser(named)  # a shell does not in --work-dir=~/run


def _export_ranks(launcher: str, local_rank: int) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK, which mmengine and PyTorch read, to the launcher's values."""
    if launcher == "pytorch":
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # older torch.distributed.launch passes an argument
    for name, source in zip(RANKS["pytorch"][:3], RANKS.get(launcher, ()), strict=False):
        if source not in os.environ:
            raise UserError(
                f"--launcher {launcher}: {source} is not set; start the processes by dist_train.sh, slurm_train.sh or "
                "the like, or leave --launcher out"
            )
        os.environ[name] = os.environ[source]
    values = whole_numbers()
    started = next((name for name in STARTED if values.get(name, 1) > 1), None)
    if launcher == "none" and started:
        raise UserError(
            f"{started} is {values[started]}, but --launcher is none: each process would work alone, all in the same "
            f"folder; pass --launcher {STARTED[started]}, or unset {started}"
        )
    if launcher != "none" and values["RANK"] >= values["WORLD_SIZE"]:
        raise UserError(
            f"RANK is {values['RANK']}, but WORLD_SIZE is {values['WORLD_SIZE']}: ranks are 0 to that less 1"
        )


def _check_gpus(launcher: str) -> None:
    """Raise a UserError if this machine has fewer GPUs than processes.

    All processes of a machine raise it, so that none waits for another that has ended.
    """
    asked = max(int(os.environ.get(RANKS[launcher][3], 0)), int(os.environ["LOCAL_RANK"]) + 1)
    there = torch.cuda.device_count()
    if asked > there:
        raise UserError(f"{asked} GPUs were asked for, but there are {there} here; ask for {there}")


def _use_cpu(cfg: Config, launcher: str) -> None:
    """Set up training and testing without a GPU, by one process or several.

    mmengine's own set-up of several processes calls CUDA, but mmengine keeps a set-up that exists.
    """
    replaced = _replace_sync_bn(cfg) + bool(cfg.pop("sync_bn", None))
    if replaced and launcher != "none" and int(os.environ["WORLD_SIZE"]) > 1 and os.environ["RANK"] == "0":
        print_log(
            "no GPU, so there is no SyncBN: batch norm is each process's own, and their statistics are averaged",
            level=logging.WARNING,
        )
    if launcher == "none":
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"--launcher {launcher}: MASTER_ADDR, the first machine's address, is not set")
    os.environ.setdefault("MASTER_PORT", "29500")
    with meeting():
        torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "0":
        print_log(f"no GPU: {os.environ['WORLD_SIZE']} processes on the CPU", level=logging.WARNING)
    cfg.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
        **(cfg.get("model_wrapper_cfg") or {}),
        "device_ids": None,
    }


def _replace_sync_bn(value: object) -> int:
    """Replace SyncBN, which PyTorch has only for GPUs, by BN. Return the number of replacements."""
    items = value.values() if isinstance(value, (dict, Config)) else value if isinstance(value, (list, tuple)) else ()
    found = isinstance(value, dict) and value.get("type") in ("SyncBN", "MMSyncBN", torch.nn.SyncBatchNorm)
    if found:
        value["type"] = "BN"
    return found + sum(map(_replace_sync_bn, items))


def _build(cfg: Config, as_read: Config, keep: bool = False) -> Runner:
    """Build the runner. It writes the config to the work dir `as_read`, without what the tool has set since.

    Args:
        cfg: the config.
        as_read: the config with the user's options.
        keep: keep the file that is there. The file from which the config was read is always kept.
    """
    kind = RUNNERS.get(cfg.runner_type) if "runner_type" in cfg else Runner
    if not (inspect.isclass(kind) and issubclass(kind, Runner)):
        raise UserError(f"runner_type is {cfg.runner_type}, which is no kind of mmengine's Runner: leave it out")

    def dump_config(runner: Runner) -> None:
        source = Path(as_read.filename).resolve()
        path = Path(runner.work_dir, source.name).resolve()
        if runner.rank == 0 and path != source and not (keep and path.exists()):
            as_read.dump(path)

    own = {"dump_config": dump_config, "build_dataloader": staticmethod(sharing(kind.build_dataloader))}
    try:
        runner = type(kind.__name__, (kind,), own).from_cfg(cfg)
    except (TypeError, ValueError) as error:
        ours = inspect.getfile(SpatialMamba), inspect.getfile(MM_SpatialMamba)
        by_us = any(frame.filename in ours for frame in traceback.extract_tb(error.__traceback__))
        if isinstance(error, UserError) or not (by_us or MM_SpatialMamba.__name__ in str(error)):
            raise
        raise UserError(f"model.backbone does not fit: {error!s:.300}") from error
    for handler in runner.logger.handlers:
        if isinstance(handler, logging.FileHandler):  # opened in the system's encoding
            handler.stream.reconfigure(errors="backslashreplace")
    check_operators(unwrapped(runner.model))
    if not torch.cuda.is_available():
        optimise_for_cpu(unwrapped(runner.model))
    return runner


# ----- the work


def _train(args: argparse.Namespace, cfg: Config) -> None:
    if args.amp:
        if (kind := cfg.optim_wrapper.get("type")) and kind_of(cfg.optim_wrapper) not in WITH_AMP:
            raise UserError(f"--amp takes an AmpOptimWrapper in place of OptimWrapper, not of {kind}; leave it out")
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
            raise UserError(f"{args.config}: has no auto_scale_lr.base_batch_size, which --auto-scale-lr needs")
        cfg.auto_scale_lr.enable = True
    _warn_of_accumulation(cfg)
    _check_can_be_written(_work_dir(args, cfg))
    check_utf8(_saving_folder(args, cfg))  # or mmengine cannot note the first checkpoint in last_checkpoint
    as_read = _as_read(args, cfg)
    finds = args.resume or (cfg.get("resume") and not cfg.get("load_from"))
    looked = _find_what_to_resume(args, cfg) if finds else None
    if not cfg.get("resume"):
        _check_nothing_is_overwritten(args, cfg)
    elif cfg.get("load_from"):
        _check_no_other_run_is_overwritten(args, cfg)
    with _reading(args.config):
        check_file(cfg.get("load_from"))
        check_file(pretrained_of(cfg.model))
        check_data(cfg, ("train", "val"))
        insert_label_checks(cfg)
        pass_class_weights(cfg)
        warn_of_other_normalisation(cfg)
        insert_image_checks(cfg)
        insert_size_checks(cfg)
    _prepare(cfg, args)
    if is_kind(cfg.optim_wrapper, "AmpOptimWrapper") and not torch.cuda.is_available():
        raise UserError("mixed precision (--amp, or AmpOptimWrapper) needs a GPU, and there is none; leave it out")
    lock = _lock(args, cfg, looked)  # held until training ends
    with _with_advice():
        runner = _build(cfg, as_read)
    _warn_of_unknown_keys(cfg, unwrapped(runner.model))
    own = (
        *(NameAbsentClasses, StopAtInvalidLoss, CheckPredictions, AverageBatchNorm, CheckLabelsOfCategories),
        *(CheckResumed, CheckSameData, CheckLength, NoteOtherProcesses, SaveDigests),
    )
    for hook in own:
        if not any(type(one) is hook for one in runner.hooks):  # a config for the toolchain's own train.py names it
            runner.register_hook(hook())
    if path := cfg.get("load_from"):
        resumed = bool(cfg.get("resume"))
        classes = data_classes(cfg, "train") if resumed else ()
        reduces = reduces_zero_label(cfg, "train") if resumed else None
        meta = check_checkpoint(unwrapped(runner.model), path, not resumed, classes, reduces)
        if resumed:
            warn_of_other_config(cfg, meta, path, resumed=resumed)
            warn_of_what_goes_on(cfg, meta, path)
        else:
            warn_of_other_start(cfg, meta, path)
            warn_of_a_head_for_other_classes(meta, data_classes(cfg, "train"), path)
        for module in unwrapped(runner.model).modules():
            if isinstance(module, MM_SpatialMamba):
                module.loaded_later = True
    with _with_advice():
        runner.train()
    end_workers(runner.train_loop, runner.val_loop)
    if lock:
        lock.close()


def _warn_of_accumulation(cfg: Config) -> None:
    counts = cfg.optim_wrapper.get("accumulative_counts", 1)
    if counts > 1 and (cfg.get("auto_scale_lr") or {}).get("enable"):
        print_log(
            "auto_scale_lr scales the learning rate by batch_size and processes, not by optim_wrapper."
            f"accumulative_counts={counts}: if all images of an update are to count, set its lr {counts} times as high",
            level=logging.WARNING,
        )


WITH_AMP = ("OptimWrapper", "AmpOptimWrapper")


def _find_what_to_resume(args: argparse.Namespace, cfg: Config) -> str | None:
    """Set the checkpoint to resume: the named one or the work dir's latest. If there is none, keep load_from.

    Returns:
        The work dir's latest if it was looked for and found.
    """
    latest = args.resume
    if args.resume in (None, RESUME_LATEST):
        latest = _latest_checkpoint(_work_dir(args, cfg))
        if not latest:
            _check_nothing_is_lost(args, cfg)
        if not latest and cfg.get("load_from"):
            print_log(f"nothing to resume yet: training starts from load_from, {cfg.load_from}", logger="current")
            cfg.resume = False
            return None
    cfg.resume, cfg.load_from = True, latest
    return latest if args.resume in (None, RESUME_LATEST) else None


def _check_nothing_is_lost(args: argparse.Namespace, cfg: Config) -> None:
    """Raise a UserError if the run's folder has checkpoints but no last_checkpoint file.

    mmengine finds the latest checkpoint by that file. Without it, training would start anew and overwrite them.
    """
    folder = _saving_folder(args, cfg)
    if newest := _newest_checkpoint(cfg, folder):
        raise UserError(
            f"{folder}: holds {newest}, but no last_checkpoint that says where to go on; name the checkpoint by "
            f"--resume {os.path.join(folder, newest)}, or another --work-dir"
        )
    if best := _best_checkpoint(folder):  # of weights only
        raise UserError(f"{folder}: holds only {best}, from which no run can go on; name another --work-dir")


def _check_nothing_is_overwritten(args: argparse.Namespace, cfg: Config) -> None:
    """Raise a UserError if the run's folder has checkpoints: mmengine would start anew and overwrite them."""
    folder = _saving_folder(args, cfg)
    if newest := _newest_checkpoint(cfg, folder) or _best_checkpoint(folder):
        raise UserError(
            f"{folder}: holds {newest} of an earlier run, which this one would overwrite; go on with that run by "
            "--resume, or name another --work-dir"
        )


def _check_no_other_run_is_overwritten(args: argparse.Namespace, cfg: Config) -> None:
    """Raise a UserError if a run goes on from a checkpoint elsewhere, and its own folder holds checkpoints."""
    folder, resumed = _saving_folder(args, cfg), Path(cfg.load_from).expanduser()
    newest = _newest_checkpoint(cfg, folder) or _best_checkpoint(folder)
    elsewhere = resumed.resolve().parent != Path(folder).resolve()
    if elsewhere and not args.resume:  # as in a config that mmengine saved when a run was resumed
        print_log(
            f"{args.config}: has resume=True, so this run goes on with that of {resumed}; for a new run, pass "
            "--cfg-options resume=False load_from=None",
            level=logging.WARNING,
        )
    if newest and elsewhere:
        raise UserError(
            f"{folder}: holds {newest} of an earlier run, which the one that goes on from {resumed} would overwrite; "
            "name another --work-dir"
        )
    if newest and _count(cfg, newest) > _count(cfg, resumed.name) > 0:
        print_log(
            f"{folder}: the run goes back to {resumed.name}, and overwrites its later checkpoints up to {newest}; "
            "those that it does not reach stay beside its own. Name another --work-dir to keep both",
            level=logging.WARNING,
        )


def _lock(args: argparse.Namespace, cfg: Config, looked: str | None = None) -> TextIO | None:
    """Keep other runs out of the run's folder, in the first process. Look once more whether one was there before.

    Args:
        looked: the checkpoint that was found to be the folder's latest; None if none was looked for.
    """
    if args.launcher != "none" and os.environ["RANK"] != "0":
        return None
    lock, note = lock_folder(Path(_saving_folder(args, cfg)), "--work-dir", "--work-dir")
    if note:
        print_log(note, level=logging.WARNING)
    if not cfg.get("resume"):
        _check_nothing_is_overwritten(args, cfg)
    elif looked and (latest := _latest_checkpoint(_work_dir(args, cfg))) != looked:
        raise UserError(f"{latest}: another run has saved it since this one found {looked}; start again")
    return lock


def _saving_folder(args: argparse.Namespace, cfg: Config) -> str:
    """Return the folder of the run's checkpoints."""
    saver = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    return saving_folder(saver.get("out_dir"), os.path.abspath(_work_dir(args, cfg)))


def _newest_checkpoint(cfg: Config, folder: str) -> str | None:
    """Return the name of the checkpoint with the highest number of epochs or iterations; None if there is none."""
    counts = {path.name: _count(cfg, path.name) for path in Path(folder).glob("*")}
    return max(filter(counts.get, counts), key=counts.get, default=None)


def _count(cfg: Config, name: str) -> int:
    """Return the number of epochs or iterations in a checkpoint's name, 0 for another name."""
    saver = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
    parts = [re.escape(part) for part in re.split(r"{[^{}]*}", saver.get("filename_tmpl") or "", maxsplit=1)]
    own = [r"(\d+)".join(parts)] if len(parts) == 2 else []
    for pattern in (r"(?:epoch|iter)_(\d+)\.pth", *own):
        if found := re.fullmatch(pattern, name):
            return int(found[1])
    return 0


def _best_checkpoint(work_dir: str) -> str | None:
    """Return the name of a checkpoint that CheckpointHook's save_best has written; None if there is none."""
    return min((path.name for path in Path(work_dir).glob("best_*.pth")), default=None)


def _latest_checkpoint(work_dir: str) -> str | None:
    """Return the work dir's latest checkpoint. mmengine notes its full path, which is wrong if the folder has moved."""
    try:
        noted = find_latest_checkpoint(work_dir)
        if noted and "\0" in noted:  # which a power failure may leave
            raise ValueError("it holds NUL bytes")
    except (OSError, ValueError) as error:
        of_locale = isinstance(error, UnicodeDecodeError) and error.encoding != "utf-8"
        hint = "set PYTHONUTF8=1, or " * of_locale
        raise UserError(
            f"{work_dir}/last_checkpoint: cannot be read ({error}): {hint}name the checkpoint by --resume"
        ) from error
    moved = os.path.join(work_dir, os.path.basename(noted)) if noted else None
    return moved if moved and os.path.isfile(moved) else noted


def _check_can_be_written(path: str | None, folder: bool = True) -> None:
    """Raise a UserError if a folder or a file cannot be made, so that no result is lost after the work is done."""
    whole = Path(path).expanduser().absolute() if path else None
    place = next(one for one in (whole, *whole.parents) if is_dir(one) or one.exists()) if whole else None
    if place and (place.is_dir() != (folder or place != whole) or not os.access(place, os.W_OK)):
        raise UserError(f"{path}: cannot be written, because {place} is in the way or may not be written to")


def _test(args: argparse.Namespace, cfg: Config) -> None:
    if args.out and cfg.default_scope == "mmdet":
        if not args.out.endswith((".pkl", ".pickle")):
            raise UserError(f"{args.out}: predictions are written as a pickle; name a .pkl file")
        if isinstance(cfg.test_evaluator, dict) and is_kind(cfg.test_evaluator, "MultiDatasetsEvaluator"):
            raise UserError(
                f"--out {args.out}: a MultiDatasetsEvaluator passes predictions to one metric for each data set, and "
                "none to --out; leave it out, or test one data set at a time"
            )
    _check_can_be_written(args.out, folder=cfg.default_scope == "mmseg")
    for folder in (args.show_dir, _work_dir(args, cfg)):
        _check_can_be_written(folder)
    drawn = args.show_dir if cfg.default_scope == "mmdet" and os.path.isabs(args.show_dir or "") else None
    for option, folder in (("--out", args.out), ("--show-dir", drawn)):  # mmdet's --out is a file
        if folder and not (option == "--out" and cfg.default_scope == "mmdet"):
            check_is_no_data(cfg, folder, f"{option} {folder}")
    check_file(args.checkpoint)
    as_read = _as_read(args, cfg)
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.show or args.show_dir:
        _draw(args, cfg)
    if args.tta:
        _augment(args, cfg)
    if args.out and cfg.default_scope == "mmseg":
        write_maps(cfg, args.out)
    with _reading(args.config):
        check_data(cfg, ("test",))
        insert_label_checks(cfg)
        insert_image_checks(cfg)
        insert_size_checks(cfg)
    _prepare(cfg, args)
    with _with_advice():
        runner = _build(cfg, as_read, keep=True)
    for hook in (NameAbsentClasses, CheckPredictions, CheckLabelsOfCategories, CheckSameData):
        runner.register_hook(hook())
    meta = check_checkpoint(
        unwrapped(runner.model),
        args.checkpoint,
        classes=data_classes(cfg, "test"),
        reduces=reduces_zero_label(cfg, "test"),
    )
    warn_of_other_config(cfg, meta, args.checkpoint)
    folders = [metric.output_dir for metric in runner.test_evaluator.metrics if getattr(metric, "output_dir", None)]
    if folders or args.show_dir:
        written = [*folders, *([drawn] if drawn else [])]
        draws = bool(args.show_dir) and cfg.default_scope == "mmseg"  # mmdet's drawings are written without OpenCV
        if draws:
            check_utf8(args.show_dir)
        check_written_names(runner.test_dataloader.dataset, suffix=not folders, folders=written, by_opencv=draws)
    if args.out and cfg.default_scope == "mmdet":
        runner.test_evaluator.metrics.append(METRICS.build(dict(type="DumpDetResults", out_file_path=args.out)))
    with _with_advice():
        runner.test()
    end_workers(runner.test_loop)


# What to do about errors of the libraries that do not say it, by a part of their message.
ADVICE = {
    "Expected more than 1 value per channel when training": "set train_dataloader.batch_size to 2 or more",
    "The image size in a batch should be the same": "set batch_size=1 of the data loader, or resize to one size",
    "index 255 is out of bounds": "a loss with class_weight cannot weigh ignored pixels (255): of label maps, and of "
    "the padding of images that are smaller than data_preprocessor.size; leave class_weight out",
    "Invalid beta parameter": "correct optim_wrapper.optimizer.betas",
    "base_wd should not be None": "optim_wrapper.paramwise_cfg scales the weight decay: set "
    "optim_wrapper.optimizer.weight_decay (0.0 for none)",
    "Invalid weight_decay value": "correct optim_wrapper.optimizer.weight_decay",
    "inv_scale_x > 0": "an image is so thin that no pixel is left once it is resized: leave it out",
    "failed to load image": "replace it, or take it out of the data",
    **dict.fromkeys(
        ("unable to allocate shared memory", "out of shared memory"),
        "/dev/shm is too small for the batches of the workers: start the container with a larger one (docker's "
        "--shm-size=16g or --ipc=host), or set num_workers=0 of the data loader",
    ),
    "exited unexpectedly": "the lines above may say why; if it could not allocate shared memory, /dev/shm is too small "
    "(docker's --shm-size=16g or --ipc=host); if it was killed, memory is: set a smaller num_workers or batch_size",
    "'ascii' codec can't": "the locale is ASCII, for which set PYTHONUTF8=1, or an address has other characters, to be "
    "written as %XX",
    "No space left on device": "the disk of the work folder or of --out is full, or /dev/shm is (docker's --shm-size)",
    "'NoneType' object has no attribute 'squeeze'": "imdecode_backend of LoadAnnotations does not read a label map: "
    "write it as PNG",
    "Unable to locate Ghostscript": "an image is an EPS file, which is not read for safety; convert or remove it",
    "TTA of instance segmentation does not support": "mmdet augments tests of boxes alone: leave --tta out",
    "Expected to have finished reduction in the prior iteration": "some weights get no gradient, as those of a map "
    "that no head reads: leave the map out of model.backbone.out_indices, or set find_unused_parameters=True",
    "but when load annotation the `reduce_zero_label`": "make that of LoadAnnotations, too, equal to it",
}


@contextmanager
def _with_advice() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any type, as OpenCV's own
        if isinstance(error, KeyError) and error.args[:1] == ("flip",):
            raise UserError(
                "'flip' is no key of an image's meta: DetTTAModel needs to know whether an image is mirrored; add a "
                "RandomFlip to each alternative of tta_pipeline (prob=0.0 for none)"
            ) from error
        advice = next((advice for part, advice in ADVICE.items() if part in str(error)), None)
        if advice is None:
            raise
        raise UserError(f"{_last_message(str(error).strip())}; {advice}") from error


def _last_message(text: str) -> str:
    """Return the message at the end of a worker's traceback, else the last line. A file's name may have line breaks."""
    *_, message = re.split(r"^[\w.]*(?:[Ee]rror|Exception): ", text, flags=re.MULTILINE)
    return message if message != text else text.splitlines()[-1]


def _draw(args: argparse.Namespace, cfg: Config) -> None:
    """Turn on drawing. The hooks of mmdet and mmseg differ in where images go and how many are drawn."""
    for key, part in {"default_hooks.visualization": cfg.get("default_hooks", {}), "visualizer": cfg}.items():
        if not part.get(key.rpartition(".")[2]):
            raise UserError(f"{args.config}: has no {key}, which draws; add it, or leave --show out")
    pipelines = [list(steps_of(one.get("pipeline") or ())) for one in datasets_of(cfg.test_dataloader.dataset)]
    for steps in pipelines:
        loads = next((i for i, step in enumerate(steps) if "LoadAnnotations" in kind_of(step)), len(steps))
        if any("Resize" in kind_of(step) for step in steps[loads:]):
            raise UserError(
                f"{args.config}: the test pipeline has {kind_of(steps[loads])} before a Resize, which changes what it "
                "loads, but drawings are on images of their own size; put it after Resize"
            )
    steps = [step for one in pipelines for step in one]
    if any(str(step.get("color_type")).endswith(("ignore_orientation", "unchanged")) for step in steps):
        print_log(
            "the images are loaded without their EXIF orientation, but drawn with it: on turned photographs, drawings "
            "are not in their places",
            level=logging.WARNING,
        )
    cfg.default_hooks.visualization.update(draw=True, show=args.show, wait_time=args.wait_time)
    if cfg.default_scope == "mmdet":
        cfg.default_hooks.visualization.test_out_dir = args.show_dir
    else:
        places = cfg.visualizer.get("vis_backends") or []
        places = places if isinstance(places, list | tuple) else [places]
        if args.show_dir and not any(is_kind(one, "LocalVisBackend") for one in places):
            raise UserError(
                f"--show-dir {args.show_dir}: mmseg writes images by a LocalVisBackend, and {args.config} has none; "
                "add dict(type='LocalVisBackend') to visualizer.vis_backends"
            )
        cfg.default_hooks.visualization.interval = 1
        cfg.visualizer.update({"save_dir": args.show_dir} if args.show_dir else {})


BYTE = 256  # values


def write_maps(cfg: Config, folder: str) -> None:
    """Make mmseg's metrics write the predicted maps during the test.

    Raises:
        UserError: none of the metrics can write maps, or a map cannot hold so many labels.
    """
    metrics, dataset = metrics_of(cfg, "test"), next(datasets_of(cfg.test_dataloader.dataset))
    classes = len(class_names_of(dataset, "test_dataloader.dataset")) + bool(argument_of(dataset, "reduce_zero_label"))
    if classes > BYTE:
        raise UserError(f"--out {folder}: maps are written in 8 bits, which hold {BYTE} labels, not {classes}")
    able = [m for m in metrics if is_kind(m, "IoUMetric", "DepthMetric")]
    able = able or [m for m in metrics if is_kind(m, "CityscapesMetric")]  # only if alone: it reads the maps again
    for metric in able:
        metric.output_dir = folder
        if is_kind(metric, "CityscapesMetric"):
            metric.keep_results = True  # otherwise it removes its files
    if not able:
        raise UserError(f"--out {folder}: none of test_evaluator's metrics writes maps; add an IoUMetric")


def _augment(args: argparse.Namespace, cfg: Config) -> None:
    for key in ("tta_model", "tta_pipeline"):
        if not cfg.get(key):
            raise UserError(f"{args.config}: has no {key}, which --tta needs; add one, or leave --tta out")
    if predicting_head(cfg.model).get("out_channels") == 1 and cfg.get("default_scope") == "mmseg":
        raise UserError(
            f"{args.config}: --tta is not for a decode_head of one channel: mmseg would take the sigmoid twice, and "
            "call all pixels foreground; test without it, or train with out_channels=2"
        )
    steps = list(steps_of(cfg.tta_pipeline))
    packs = [step for step in steps if is_kind(step, "PackSegInputs", "PackDetInputs") and step.get("meta_keys")]
    flips = any(is_kind(step, "RandomFlip") for step in steps)
    if lacks := next((step for step in packs if flips and not {"flip", "flip_direction"} <= {*step.meta_keys}), None):
        raise UserError(
            f"{args.config}: tta_pipeline flips images, but the meta_keys of its {kind_of(lacks)} lack 'flip' or "
            "'flip_direction', so that predictions would stay mirrored; add them"
        )
    for dataset in datasets_of(cfg.test_dataloader.dataset):
        dataset.pipeline = cfg.tta_pipeline
    # mmengine passes the config's variable of that name to the outermost model, and thereby replaces the model's own.
    own = {"data_preprocessor": cfg.model.data_preprocessor} if cfg.model.get("data_preprocessor") else {}
    cfg.model = ConfigDict(own | cfg.tta_model, module=cfg.model)


def _get_flops(args: argparse.Namespace, cfg: Config) -> None:
    print(complexity_table(cfg, tuple(args.shape)))
