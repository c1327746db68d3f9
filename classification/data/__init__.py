"""Image folders, their transforms and loaders; `digits` writes the embedded data set."""

from classification.data.build import (
    UnreadableImages,
    build_eval_loader,
    build_mixup,
    build_train_loader,
    class_names,
)

__all__ = ["UnreadableImages", "build_eval_loader", "build_mixup", "build_train_loader", "class_names"]
