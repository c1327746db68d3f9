"""What a toolchain's own configs say of our checks."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope

from classification.errors import UserError
from classification.openmmlab import checks, tools


def refused(package: str, accept: Callable[[Path], bool], every: int) -> tuple[int, dict[str, str]]:
    """How many configs with a model `package` brings, of those that `accept` takes; and which of them do not pass.

    One in `every` is read, in the order of their names. None of their data is here, so nothing is asked of files.
    """
    folder = Path(find_spec(package).origin).parent / ".mim/configs"
    init_default_scope(package)
    count, messages = 0, {}
    for path in sorted(p for p in folder.rglob("*.py") if "_base_" not in p.parts and accept(p))[::every]:
        cfg = Config.fromfile(path, import_custom_modules=False)  # some want another toolchain
        if "model" not in cfg:
            continue
        count += 1
        try:
            checks.check_channels(cfg.model)
            tools._check_training(cfg)
            checks.check_data(cfg, ("train", "val", "test"))
        except UserError as error:
            messages[str(path.relative_to(folder))] = str(error)
    return count, messages
