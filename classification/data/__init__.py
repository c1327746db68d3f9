"""Image folders, their transforms and loaders; `digits` writes the embedded data set."""

from classification.data.build import (
    ImageLoader,
    UnreadableImages,
    build_eval_loader,
    build_mixup,
    build_train_loader,
    class_names,
    escaped,
    names_differ,
)

__all__ = [
    "ImageLoader",
    "UnreadableImages",
    "build_eval_loader",
    "build_mixup",
    "build_train_loader",
    "class_names",
    "escaped",
    "names_differ",
]
