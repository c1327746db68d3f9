"""Variables of a config that nothing reads. A config that inherits another one sets the other's variables too late."""

import ast
import inspect
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from mmengine.fileio import load
from mmengine.runner import Runner

from classification.openmmlab.messages import print_log

# What mmengine and the tools read of a config besides the Runner's arguments.
MORE_SETTINGS = (
    *("activation_checkpointing", "auto_scale_lr", "compile", "custom_imports", "data_root", "default_scope"),
    *("efficient_conv_bn_eval", "find_unused_parameters", "model_wrapper_cfg", "runner_type", "sync_bn", "tta_model"),
    "tta_pipeline",
)


def settings_of(cfg: Config) -> frozenset[str]:
    """Return the settings of a config that are read. The Runner reads data_preprocessor only if the model has none."""
    settings = {*inspect.signature(Runner).parameters, *MORE_SETTINGS}
    model = cfg.get("model")
    return frozenset(settings - ({"data_preprocessor"} if model and model.get("data_preprocessor") else set()))


class _Variables(NamedTuple):
    given: set[str]  # that the config sets, but not to None
    used: set[str]  # that it reads itself
    used_of_bases: set[str]  # that it reads of the configs that it inherits
    bases: list[str]  # paths of these, without the toolchains' own
    inherits: bool


def warn_of_unread_variables(path: str, read: frozenset[str]) -> None:
    """Warn of variables that a config sets, but neither it nor the tool reads; likewise for the configs it inherits.

    A config that inherits another one sets them too late: the other one has used its own values by then.

    Args:
        path: the config, which can be read.
        read: `settings_of` the whole config, and variables that configs read that inherit this one.
    """
    if not os.path.isfile(path):
        return
    found = _of_program(path) if path.endswith(".py") else _of_data(path)
    unread = sorted(found.given - found.used - read)
    if found.inherits and unread:
        print_log(
            f"{path}: sets {', '.join(unread)}, which nothing reads: the config that it inherits has used its own "
            "values by then; set what used them, for example train_cfg.max_iters",
            level=logging.WARNING,
        )
    for base in found.bases:
        warn_of_unread_variables(os.path.join(os.path.dirname(path), base), read | found.used_of_bases)


def _of_data(path: str) -> _Variables:
    """Return the variables of a JSON or YAML config."""
    try:
        content = load(path)
    except Exception:  # mmengine replaces `{{ ... }}` before it parses the file
        return _Variables(set(), set(), set(), [], False)
    bases = content.pop("_base_", [])
    used = set(re.findall(r"{{\s*_base_\.(\w+)", Path(path).read_text(encoding="utf-8")))
    given = {name for name, value in content.items() if value is not None}
    return _Variables(given, set(), used, _own([bases] if isinstance(bases, str) else bases), bool(bases))


def _of_program(path: str) -> _Variables:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    given, bases, inherits = set(), [], False
    for statement in tree.body:
        targets = {name.id for name in _names(_targets(statement), ast.Store)}
        if not _is_none(getattr(statement, "value", None)):
            given |= targets
        if "_base_" in targets:
            inherits = True
            with suppress(ValueError):  # an expression
                named = ast.literal_eval(statement.value)
                bases += _own([named] if isinstance(named, str) else named)
    used = {name.id for name in _names([tree], ast.Load)}
    parts = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used_of_bases = {node.attr for node in parts if node.value.id == "_base_"}
    if modules := list(_read_bases(tree)):  # their variables are the config's own
        inherits, used_of_bases = True, used_of_bases | used
        bases += [name for name in modules if name]
    return _Variables(given - {"_base_"}, used, used_of_bases, bases, inherits)


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AnnAssign) and statement.value else []


def _names(nodes: list[ast.AST], context: type[ast.expr_context]) -> Iterator[ast.Name]:
    for node in nodes:
        yield from (one for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, context))


def _read_bases(tree: ast.Module) -> Iterator[str | None]:
    """Yield the files that `with read_base():` imports, relative to the config's folder; None for a toolchain's own."""
    for statement in tree.body:
        calls = [item.context_expr for item in statement.items] if isinstance(statement, ast.With) else []
        if any(isinstance(call, ast.Call) and getattr(call.func, "id", None) == "read_base" for call in calls):
            for one in statement.body:
                if isinstance(one, ast.ImportFrom):
                    folder = [".."] * (one.level - 1)
                    yield os.path.join(*folder, *(one.module or "").split(".")) + ".py" if one.level else None


def _own(bases: list[str]) -> list[str]:
    return [base for base in bases if "::" not in base]


def _is_none(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is None
