"""YAML and JSON configs as data. mmengine's own reader of YAML calls the functions that tags name."""

import importlib.util
import inspect
import os
import re
from contextlib import suppress

import yaml
from mmengine.config import Config
from mmengine.fileio import BaseFileHandler, load, register_handler
from mmengine.registry import Registry, root
from mmengine.utils import get_object_from_string, import_modules_from_strings

from classification.config import StrictYaml
from classification.errors import UserError

OF_DATA = (".json", ".yaml", ".yml")  # suffixes of configs that are no programs
SCOPES = ("mmcv", "mmdet", "mmengine", "mmpretrain", "mmseg")  # of the toolchains' registries
OURS = "classification."
PACKAGES = (OURS, "torch.nn.", "torch.optim.")  # whose classes run no text; inferencers run a config's
BACKENDS = ("disk", "http", "lmdb", "local", "petrel")  # of mmengine's, those that import nothing that a config names
COMPILE = {"backend", "disable", "dynamic", "fullgraph", "mode"}  # arguments of torch.compile
# Registered types that run their arguments as Python, call what these name, or read pickles.
RUN_CODE = {"CameraMotionCompensation", "RFSearchHook", "VPD"}
RUN_CODE |= {"CIFAR10", "CIFAR100", "Detectron2Wrapper", "RAMNormal", "RAMOpenset"}
# Arguments by which mmengine's memcached and transformers' models import what a config names.
IMPORT_CODE = ("sys_path", "trust_remote_code")


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def check_types(value: object, key: str = "") -> None:
    """Check the names of types. mmengine imports dotted ones and calls what they name, for example `subprocess.Popen`.

    They are in `type` and other keys that end so, for example EMAHook's `ema_type`, and in `constructor`. mmcv
    evaluates the type of an NMS as Python. A `backend` of `backend_args`, or `file_client_args` as it was called, may
    import a module, too. mmengine writes the config as a Python file, for which it does not escape keys.

    Raises:
        UserError: a name is neither a registered one nor a class of PyTorch or of this repository; or it is of a type
            that evaluates text; or an argument may import code; or a key or `save_dir` would make a program; or a text
            has control characters.
    """
    if key == "compile" and isinstance(value, dict) and (others := value.keys() - COMPILE):
        raise UserError(
            f"compile.{min(map(str, others))} may name a program, which PyTorch runs; write such a config in Python"
        )
    if isinstance(value, str) and CONTROLS.search(value):  # mmengine and mmseg print names of classes as they are
        raise UserError(f"{key} is {value!a}, whose control characters would steer a terminal; leave them out")
    if key.rpartition(".")[2] in IMPORT_CODE and value:
        raise UserError(f"{key} is {value!r}, by which code of elsewhere may run; write such a config in Python")
    if isinstance(value, dict | list | tuple):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(name, str) and (not name.isprintable() or set(name) & {"'", '"', "\\"}):
                raise UserError(
                    f"{key or 'the config'} has the key {name!r}, whose quotes or escapes mmengine would write into a "
                    "Python config as they are; leave them out"
                )
            check_types(item, f"{key}.{name}" if key else str(name))
    elif key.endswith("decode_backend") and value == "pickle":
        raise UserError(f"{key} is 'pickle', which can run code; write the data for 'numpy' or 'nifti'")
    elif key.endswith(("backend_args.backend", "client_args.backend")) and value not in (None, *BACKENDS):
        raise UserError(f"{key} is {value!r}, which may import a module; of {', '.join(BACKENDS)}, name one")
    elif isinstance(value, str) and value.endswith(".py"):
        raise UserError(f"{key} is {value!r}, a program, which mmengine may run; write such a config in Python")
    elif key.endswith("save_dir") and isinstance(value, str):  # of visualisers, which write the config as config.py
        raise UserError(
            f"{key} is {value!r}, where mmengine would write over config.py; leave it out, or use --work-dir"
        )
    elif key.endswith("_scope_") and value not in SCOPES:
        raise UserError(f"{key} is {value!r}, which mmengine may import; of {', '.join(SCOPES)}, name one")
    elif key.endswith("teacher_config") and isinstance(value, str):  # a config, which mmdet reads without these checks
        raise UserError(
            f"{key} is {value!r}, a config of its own, whose types are not checked; write them here instead (model: "
            "...), or write this config in Python"
        )
    elif key.endswith(("type", "constructor")) and isinstance(value, str) and not _is_harmless(value):
        raise UserError(
            f"{key} is {value!r}, which is no registered name and no class of torch.nn or torch.optim, and could run "
            "anything; write such a config in Python, or register the class"
        )


def check_bases(path: str) -> None:
    """Check the configs of data that a config in Python inherits: what they name is not the program's.

    Raises:
        UserError: one of them is refused as it would be by itself; the message names it.
    """
    for base in [] if path.lower().endswith(OF_DATA) else Config._get_base_files(path):
        here = os.path.dirname(os.path.abspath(path))
        file, _ = Config._get_cfg_path(re.sub(r"{{\s*fileDirname\s*}}", lambda _, here=here: here, base), path)
        if "{{" in file and file.lower().endswith(OF_DATA):
            raise UserError(f"its _base_ {base!r} names a config of data by a variable, so it is not checked; name it")
        if not os.path.isfile(file):
            continue  # Config.fromfile says so
        if not file.lower().endswith(OF_DATA):
            check_bases(file)
            continue
        try:
            cfg = Config.fromfile(file, import_custom_modules=False)
            check_types(cfg.to_dict())
            import_modules(cfg, file)
        except UserError as error:
            raise UserError(f"its _base_ {file}: {error}") from error


def import_modules(cfg: Config, path: str) -> None:
    """Import what `custom_imports` names, as `Config.fromfile` would: modules of this repository and the toolchains.

    Raises:
        UserError: it names another module, and not in a config in Python that this one inherits.
    """
    wanted = cfg.get("custom_imports")
    if not wanted:
        return
    names = wanted.get("imports") if isinstance(wanted, dict) else None
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError("custom_imports is no dict(imports=[...], allow_failed_imports=False)")
    others = [name for name in names if f"{name}.".partition(".")[0] not in (OURS.rstrip("."), *SCOPES)]
    if others and not set(others) <= _imports_of_programs(path):
        raise UserError(
            f"custom_imports has {others[0]!r}, which is no module of this repository or of the toolchains, and could "
            "run anything; write such a config in Python"
        )
    import_modules_from_strings(**wanted)


def _imports_of_programs(path: str) -> set[str]:
    """Return the names in `custom_imports` of the configs in Python that a config of data inherits."""
    try:
        content = load(path)
    except Exception:  # mmengine replaces `{{ ... }}` before it parses the file
        content = None
    bases = content.get("_base_", []) if isinstance(content, dict) else []
    found = set()
    for base in [bases] if isinstance(bases, str) else bases:
        folder = os.path.dirname(os.path.abspath(path))
        file = os.path.join(folder, re.sub(r"{{\s*fileDirname\s*}}", lambda _, here=folder: here, base))
        if "::" not in base and not base.lower().endswith(OF_DATA):
            check_bases(file)  # what its own configs of data import does not count
            names = (Config.fromfile(file, import_custom_modules=False).get("custom_imports") or {}).get("imports", [])
            found |= {names} if isinstance(names, str) else set(names)
        elif "::" not in base:
            found |= _imports_of_programs(file)
    return found


TUPLES = ("crop_size", "cutout_shape", "degree", "img_scale", "scale", "size")


def make_sizes_tuples(value: object) -> None:
    """Make tuples of sizes in a config, as mmcv and mmseg want them: YAML and JSON have only lists."""
    for one in value.values() if isinstance(value, dict | Config) else value if isinstance(value, list) else ():
        make_sizes_tuples(one)
    for name in TUPLES if isinstance(value, dict) else ():
        numbers = value.get(name)
        if isinstance(numbers, list) and all(isinstance(one, int | float) for one in numbers):
            value[name] = tuple(numbers)


def _is_harmless(name: str) -> bool:
    *scopes, last = name.split(".")
    if last in RUN_CODE or not re.fullmatch(r"[\w./ -]*", name):  # no call, as in torchvision/Resize
        return False
    if not scopes:
        return not _is_module(name)
    # Only then look, because this imports the module.
    if scopes in [[scope] for scope in SCOPES]:
        found = _object(name)
        return found is None or _is_registered(found)  # mmdet.ResNet is no path, but known to mmdet's registry
    found = _object(name) if name.startswith(PACKAGES) else None
    return _is_registered(found) if name.startswith(OURS) else inspect.isclass(found)


def _is_registered(kind: object) -> bool:
    """Return whether it is in a registry of mmengine or of a toolchain: other classes may open files or import."""
    roots = (one for one in vars(root).values() if isinstance(one, Registry))
    return any(kind in one.module_dict.values() for top in roots for one in (top, *top.children.values()))


def _is_module(name: str) -> bool:
    """Return whether Python would import a module of that name, as mmengine does if no registry has it."""
    with suppress(ImportError, ValueError):
        return importlib.util.find_spec(name) is not None
    return False


def _object(name: str) -> object:
    try:
        return get_object_from_string(name)
    except Exception:  # importing may fail in any way
        return None


class _Loader(StrictYaml, yaml.SafeLoader):
    pass


@register_handler(["yaml", "yml"])
class SafeYamlHandler(BaseFileHandler):
    """mmengine's handler of these files from the import of this module on."""

    def load_from_fileobj(self, file, **_: object) -> object:
        return yaml.load(file, _Loader)

    def dump_to_fileobj(self, obj: object, file, **options: object) -> None:
        yaml.safe_dump(obj, file, **options)

    def dump_to_str(self, obj: object, **options: object) -> str:
        return yaml.safe_dump(obj, **options)
