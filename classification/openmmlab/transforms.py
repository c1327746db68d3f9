"""A step of a data pipeline that mmsegmentation lacks."""

import numpy as np
from mmengine.registry import TRANSFORMS
from PIL import Image

from classification.data.images import image_formats
from classification.errors import UserError

IGNORED = 255


@TRANSFORMS.register_module()
class CheckLabels:
    """Looks at a segmentation map's labels, after LoadAnnotations.

    Otherwise one that is no class ends training in the loss: on a GPU as an assertion that names no file.

    Raises:
        UserError: one that is neither below `num_classes` nor ignored (255), or a file that is no map of labels.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, results: dict) -> dict:
        path, labels = results["seg_map_path"], results["gt_seg_map"]
        if labels.ndim != 2:
            raise UserError(
                f"{path}: is a picture of {labels.shape[-1]} colours, not a map of labels: write one number a pixel"
            )
        reduced = bool(results.get("reduce_zero_label"))  # 1 subtracted from the file's by LoadAnnotations
        wrong = _beyond_a_byte(path)
        if wrong is None:
            outside = labels[(labels >= self.num_classes) & (labels != IGNORED)]
            wrong = np.max(outside) + reduced if outside.size else None
        if wrong is not None:
            first = int(reduced)
            raise UserError(
                f"{path}: has label {wrong}, but with {self.num_classes} "
                f"classes {first} to {self.num_classes - 1 + first} are labels, and {IGNORED} is what is ignored"
            )
        return results


def _beyond_a_byte(path: str) -> int | None:
    """The largest label of a map of more than 8 bits if it is above 255: LoadAnnotations takes it modulo 256."""
    try:
        with Image.open(path, formats=image_formats()) as image:
            if image.mode in ("1", "L", "P"):
                return None
            largest = int(np.asarray(image).max(initial=0))
    except (OSError, ValueError):  # of another place or kind, which LoadAnnotations has read by other means
        return None
    return largest if largest > IGNORED else None
