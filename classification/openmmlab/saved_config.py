"""Read the config that a toolchain's checkpoint was trained with, as data, and warn of settings that differ now.

mmengine writes the config into `meta["cfg"]` as Python, but reads only the weights. So the settings that the weights do
not show may differ from those of training.
"""

import ast
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress

from mmengine.config import Config

from classification.openmmlab.config_parts import DO_NOTHING, argument_of, kind_of, resizes
from classification.openmmlab.messages import print_log

LONGEST, DEEPEST = 2**20, 60  # characters and nested brackets; published configs have some 10^5 and 12
NAMED = 5  # differences that a warning names

# Settings of a model that change no result or show in the weights, and settings that matter only to training.
NO_MATTER = {"pretrained", "init_cfg", "train_cfg", "drop_path_rate", "with_cp", "_scope_"}
NO_MATTER |= {f"model.backbone.{name}" for name in DO_NOTHING}
ONLY_TRAINING = {"loss_weight", "class_weight", "dropout_ratio", "frozen_stages", "norm_eval", "requires_grad"}
ONLY_TRAINING |= {"batch_augments", "size", "seg_pad_val"}
NORMALISING = ("mean", "std", "bgr_to_rgb", "rgb_to_bgr")
# Keys that differ if only one config has them. Other keys may have the default where a config does not name them.
UNSET = re.compile(rf".*\.(data_preprocessor\.({'|'.join(NORMALISING)})|anchor_generator\.\w+)")


def saved_config(meta: object) -> dict:
    """Return the saved config's variables that are literals or `dict(...)` of literals; {} if the text is not plain."""
    text = meta.get("cfg") if isinstance(meta, dict) else None
    if not isinstance(text, str) or not _is_plain(text):
        return {}
    found = {}
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                with suppress(SyntaxError, TypeError, ValueError):
                    found[statement.targets[0].id] = _value(statement.value)
    return found


def _is_plain(text: str) -> bool:
    """Return whether a text holds only brackets, strings, numbers and `name=`, none nested too deep.

    Python's parser crashes on other text that is deeply nested.
    """
    if len(text) > LONGEST or "'''" in text or '"""' in text:
        return False
    # A string without an end leaves a quote, which is refused. A pattern that did not match it would try at each quote.
    strings = r"(?:\bb)?(?:'(?:[^'\\\n\r]|\\.)*('?)|\"(?:[^\"\\\n\r]|\\.)*(\"?))"
    rest = re.sub(strings, lambda found: "0" if found[1] or found[2] else "'", text)
    rest = re.sub(r"\b\d+(?:\.\d*)?(?:[eE][+-]?\d+)?j?", "0", rest)
    rest = re.sub(r"\bdict\(", "(", rest)
    names = re.sub(r"\b(?:[A-Za-z_]\w*\s*=|True\b|False\b|None\b|inf\b|nan\b)", "", rest)
    if re.search(r"[^\s0,:=()\[\]{}-]", names) or re.search(r"[\w)\]}]\s*[(\[{-]|-\s*-", rest):
        return False
    depth = 0
    for bracket in re.findall(r"[()\[\]{}]", rest):
        depth += 1 if bracket in "([{" else -1
        if depth > DEEPEST:
            return False
    return True


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Call):
        if not (isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args):
            raise ValueError("a call")
        return {word.arg: _value(word.value) for word in node.keywords}
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):  # as mmengine writes these numbers
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Name):
        return -_value(node.operand)
    return ast.literal_eval(node)


def _say_if_unread(meta: object, path: str) -> None:
    """Say that a checkpoint's config cannot be compared, because it is no plain data."""
    if isinstance(meta, dict) and isinstance(meta.get("cfg"), str) and meta["cfg"] and not saved_config(meta):
        _say_that_it_is_not_read(path)


def _say_that_it_is_not_read(path: str) -> None:
    print_log(
        f"{path}: the config in it is not read, because it is no plain data; whether it was trained with another "
        "config is not known",
        logger="current",
        level=logging.WARNING,
    )


Compare = Callable[..., None]


def _or_say_that_it_is_not_read(compare: Compare) -> Compare:
    """Make a comparison end in a warning if the saved config has parts of other kinds than configs have."""

    @functools.wraps(compare)
    def run(cfg: Config, meta: object, path: str, **options: bool) -> None:
        try:
            compare(cfg, meta, path, **options)
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
            _say_that_it_is_not_read(path)

    return run


@_or_say_that_it_is_not_read
def warn_of_other_config(cfg: Config, meta: object, path: str, resumed: bool = False) -> None:
    """Warn of model settings and image sizes that differ from those that the checkpoint was trained with."""
    _say_if_unread(meta, path)
    before = saved_config(meta)
    unused = NO_MATTER | (set() if resumed else ONLY_TRAINING)
    found = _differences(*_with_defaults(_model(before), _model(cfg)), "model")
    found = [one for one in found if not unused & {one[0], *one[0].split(".")}]
    old, new = resizes(before, "test"), resizes(cfg, "test")
    if old is not None and new is not None:
        place = "test_dataloader.dataset.pipeline"
        names = dict.fromkeys([*old, *new])
        both = ((f"{place}.{name}", _lists(old.get(name)), _lists(new.get(name))) for name in names)
        found += [one for one in both if one[1] != one[2]]
    _say(f"{path}: was trained with another config", found)


@_or_say_that_it_is_not_read
def warn_of_other_start(cfg: Config, meta: object, path: str) -> None:
    """Warn if training starts from weights for differently normalised images. Other settings may well differ."""
    _say_if_unread(meta, path)
    parts = (_model(one).get("data_preprocessor") for one in (saved_config(meta), cfg))
    found = _differences(*parts, "model.data_preprocessor")
    found = [one for one in found if one[0].rpartition(".")[2] in NORMALISING]
    _say(f"{path}: was trained on images that were normalised otherwise", found)


@_or_say_that_it_is_not_read
def warn_of_what_goes_on(cfg: Config, meta: object, path: str) -> None:
    """Warn of settings without effect: mmengine resumes with the checkpoint's rates and schedules, not the config's."""
    before, found = saved_config(meta), []
    wrappers = [one.get("optim_wrapper") or {} for one in (before, cfg)]
    for part in ("optimizer", "paramwise_cfg"):  # these make the optimizer's groups; the rest is as the config says
        if wrappers[0]:
            parts = (one.get(part) or {} for one in wrappers)
            found += _differences(*parts, f"optim_wrapper.{part}", missing=True)
    batches = (one.get("train_dataloader") or {} for one in (before, cfg))  # rates and schedules depend on its size
    batches = ({k: v for k, v in loader.items() if k == "batch_size"} for loader in batches)
    found += _differences(*batches, "train_dataloader")
    counts = ({"accumulative_counts": one.get("accumulative_counts", 1)} for one in wrappers)
    found += _differences(*counts, "optim_wrapper")
    if before.get("param_scheduler"):
        schedules = (one.get("param_scheduler") or [] for one in (before, cfg))
        found += _differences(*schedules, "param_scheduler", missing=True)
    if (cfg.get("auto_scale_lr") or {}).get("enable"):  # mmengine logs that it scales, but then resumes the old rates
        print_log(
            f"{path}: its own rates go on, so auto_scale_lr scales nothing", logger="current", level=logging.WARNING
        )
    _say(
        f"{path}: its own rates and schedules go on, whatever the config says (to have the config's, start from these "
        "weights by load_from, without --resume)",
        found,
    )
    if before.get("param_scheduler"):
        loops = ({k: v for k, v in (one.get("train_cfg") or {}).items() if "max_" in k} for one in (before, cfg))
        longer = _differences(*loops, "train_cfg")
        _say(f"{path}: its schedules go on and end where they did, but training does not", longer)


# Arguments of metrics that change no score; which scores there are shows in their names.
NO_SCORE = {"ann_file", "seg_prefix", "outfile_prefix", "output_dir", "keep_results", "collect_device", "backend_args"}
NO_SCORE |= {"classwise", "metric", "iou_metrics"}


def validates_otherwise(cfg: Config, meta: object, automatic: bool) -> bool:
    """Return whether a checkpoint's validation scores do not compare with those of `cfg`, as far as is known.

    They do not if images have another size, or if they are computed otherwise. `automatic`: the best checkpoint is by
    the first score, not by one that the config names.
    """
    before = saved_config(meta)
    try:
        sizes = [{k: _lists(v) for k, v in (resizes(one, "val") or {}).items()} for one in (before, cfg)]
        scores = [_scores(one.get("val_evaluator") or [], automatic) for one in (before, cfg)]
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        return False  # `warn_of_other_config` says that it is not read
    return any(one[0] != one[1] for one in (sizes, scores) if one[0])


def _scores(evaluator: dict | list, automatic: bool) -> list[dict]:
    metrics = evaluator if isinstance(evaluator, list) else [evaluator]
    found = [{k: _lists(v) for k, v in one.items() if k not in NO_SCORE} | {"type": kind_of(one)} for one in metrics]
    if automatic and metrics:
        first = metrics[0].get("metric")
        found[0]["metric"] = first[0] if isinstance(first, list | tuple) and first else first
    return found


def _model(cfg: dict | Config) -> dict:
    outer = cfg.get("model") or {}
    model = outer.get("module", outer)  # with --tta, where mmengine takes the outer data_preprocessor
    preprocessor = outer.get("data_preprocessor") or model.get("data_preprocessor") or cfg.get("data_preprocessor")
    return {**model, "data_preprocessor": preprocessor} if preprocessor else model


def _with_defaults(old: dict, new: dict) -> tuple[dict, dict]:
    """Add to each of two configs of a part what only the other one names, if the part's class has a default for it."""
    old, new = dict(old), dict(new)
    if new.get("type") and kind_of(old) == kind_of(new):
        # The class is the tested config's: to look for a type that a checkpoint names could import a module.
        defaults = {name: argument_of({"type": new["type"]}, name) for name in old.keys() ^ new.keys()}
        defaults = {name: one for name, one in defaults.items() if one not in (None, inspect.Parameter.empty)}
        old, new = {**defaults, **old}, {**defaults, **new}
    for name in old.keys() & new.keys():
        both = old[name], new[name]
        if all(isinstance(one, dict) for one in both):
            old[name], new[name] = _with_defaults(*both)
        elif all(map(_are_parts, both)) and len(both[0]) == len(both[1]):
            pairs = [_with_defaults(*pair) for pair in zip(*both, strict=True)]
            old[name], new[name] = [one for one, _ in pairs], [one for _, one in pairs]
    return old, new


def _are_parts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, dict) for one in value)


def _differences(before: object, now: object, key: str, missing: bool = False) -> list[tuple[str, object, object]]:
    """Return differing keys with both values. A key that one side lacks counts only with `missing` or by UNSET."""
    old, new = (dict(_leaves(one, key)) for one in (before or {}, now or {}))
    found = []
    for name in dict.fromkeys([*old, *new]) if old and (new or missing) else ():
        holder = name.rpartition(".")[0]
        beside = all(any(one.startswith(f"{holder}.") for one in side) for side in (old, new))
        counts = missing or (UNSET.fullmatch(name) and beside)
        values = old.get(name), new.get(name)
        if (counts or (name in old and name in new)) and values[0] != values[1] and any(values):
            found.append((name, *values))
    return found


def _leaves(value: object, key: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _leaves(one, f"{key}.{name}")
    elif isinstance(value, list | tuple) and any(isinstance(one, dict) for one in value):
        for i, one in enumerate(value):
            yield from _leaves(one, f"{key}.{i}")
    elif key.endswith(".type"):
        yield key, kind_of({"type": value}).replace("SyncBN", "BN")  # on a CPU, _use_cpu writes BN
    else:
        yield key, _lists(value)


def _lists(value: object) -> object:
    return [_lists(one) for one in value] if isinstance(value, list | tuple) else value


def _say(start: str, found: list[tuple[str, object, object]]) -> None:
    if found:
        texts = [f"{key} was {_short(old)}, is {_short(new)}" for key, old, new in found[:NAMED]]
        more = f"; and {len(found) - NAMED} more" if found[NAMED:] else ""
        print_log(f"{start}: {'; '.join(texts)}{more}", logger="current", level=logging.WARNING)


def _short(value: object) -> str:
    return "not set" if value is None else f"{value!r:.60}"
