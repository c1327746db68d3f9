"""Checks that a toolchain is installed and works. Imports nothing that may be missing."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

INSTALL = "pip install -r requirements-openmmlab.txt"
MMCV = ("mmcv", "mmcv-lite", "mmcv-full")  # all install the same folder


def require(toolchain: str) -> None:
    """End the program with a message unless `toolchain` ("mmdet", "mmseg", "mmpretrain") can be imported."""
    _check_one_mmcv()
    for module in ("mmengine", "mmcv", "mmcv.ops", toolchain):
        try:
            importlib.import_module(module)
        except ImportError as error:
            if module == "mmcv.ops":
                sys.exit(
                    f"error: this mmcv has no operators ({error}): is it mmcv-lite alone, or built for another "
                    f"PyTorch? pip uninstall {' '.join(MMCV)}, then in the repository {INSTALL}"
                )
            sys.exit(f"error: {module} is needed and cannot be imported ({error}); in the repository: {INSTALL}")
        except AssertionError as error:  # of versions that do not fit each other
            sys.exit(f"error: {module} refuses what is installed ({error}); in the repository: {INSTALL}")


def _check_one_mmcv() -> None:
    """The packages overwrite each other's files: with two versions, Python imports a mixture."""
    found = {}
    for name in MMCV:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if len(set(found.values())) > 1:
        both = " and ".join(f"{name} {number}" for name, number in found.items())
        sys.exit(f"error: {both} lie in one folder: pip uninstall {' '.join(MMCV)}, then in the repository {INSTALL}")
