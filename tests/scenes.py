"""A few digits scenes, and the same laid out as COCO."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from classification.data import digits_scenes


def write_few_scenes(root: Path, train: int = 16, val: int = 4, layout: str = "coco") -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_scenes, "SCENES", {"train": train, "val": val})
        digits_scenes.write_digits_scenes(root, layout)
    return root


def write_coco(root: Path, classes: Sequence[str], train: int = 4, val: int = 2) -> Path:
    """With COCO's names of files and categories `classes`, which the digits take in turn."""
    write_few_scenes(root, train, val)
    for split in ("train", "val"):
        (root / split).rename(root / f"{split}2017")
        path = root / digits_scenes.ANNOTATIONS.format(split)
        content = json.loads(path.read_text())
        content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
        for annotation in content["annotations"]:
            annotation["category_id"] = (annotation["category_id"] - 1) % len(classes) + 1
        path.with_name(f"instances_{split}2017.json").write_text(json.dumps(content))
        path.unlink()
    return root


def enlarged(image: np.ndarray) -> np.ndarray:
    """As drawings are to have it: (H, W, 3) as (3 H, 3 W, 3)."""
    import cv2  # OpenMMLab's

    height, width = image.shape[:2]
    return cv2.resize(image, (3 * width, 3 * height), interpolation=cv2.INTER_CUBIC)
