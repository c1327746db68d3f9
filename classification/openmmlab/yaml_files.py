"""YAML and JSON configs as data. mmengine's own reader of YAML calls the functions that tags name."""

import inspect

import yaml
from mmengine.fileio import BaseFileHandler, register_handler
from mmengine.utils import get_object_from_string

from classification.config import StrictYaml
from classification.errors import UserError

OF_DATA = (".json", ".yaml", ".yml")  # suffixes of configs that are no programs
PACKAGES = ("classification.", "mmcv.", "mmdet.", "mmengine.", "mmpretrain.", "mmseg.", "torch.nn.", "torch.optim.")


def check_types(value: object, key: str = "") -> None:
    """Check the dotted names of types. mmengine imports them and calls what they name, as `subprocess.Popen`.

    They are in `type` and other keys that end so, as EMAHook's `ema_type`, and in `constructor`.

    Raises:
        UserError: a name is of another package than the toolchains and PyTorch's, or names a function.
    """
    if isinstance(value, dict | list | tuple):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_types(item, f"{key}.{name}" if key else str(name))
    elif key.endswith(("type", "constructor")) and isinstance(value, str) and not _is_harmless(value):
        raise UserError(
            f"{key} is {value!r}, which is no class of the toolchains, of torch.nn or of torch.optim, and could run "
            "anything; write such a config in Python, or register the class"
        )


def _is_harmless(name: str) -> bool:
    return "." not in name or (name.startswith(PACKAGES) and _is_class(name))


def _is_class(name: str) -> bool:
    """Return whether an object of that name is a class, if there is one; mmengine's registry knows other names."""
    try:
        found = get_object_from_string(name)
    except Exception:  # importing may fail in any way
        found = None
    return name.count(".") == 1 if found is None else inspect.isclass(found)  # mmdet.ResNet is no path


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
