"""Whether a toolchain is installed and works, said in one line if not. Imports nothing that may be missing."""

import importlib
import sys

INSTALL = "pip install --no-build-isolation -r requirements-openmmlab.txt"


def require(toolchain: str) -> None:
    """End the program with a message unless `toolchain` ("mmdet", "mmseg", "mmpretrain") can be imported."""
    for module in ("mmengine", "mmcv", "mmcv.ops", toolchain):
        try:
            importlib.import_module(module)
        except ImportError as error:
            if module == "mmcv.ops":
                sys.exit(
                    f"error: this mmcv has no compiled operators ({error}): is it mmcv-lite, or built for another "
                    f"PyTorch? pip uninstall mmcv mmcv-lite, then in the repository {INSTALL}"
                )
            sys.exit(f"error: {module} is needed and cannot be imported ({error}); in the repository: {INSTALL}")
        except AssertionError as error:  # of versions that do not fit each other
            sys.exit(f"error: {module} refuses what is installed ({error}); in the repository: {INSTALL}")
