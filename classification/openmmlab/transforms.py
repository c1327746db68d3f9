"""A step of a data pipeline that mmsegmentation lacks."""

import numpy as np
from mmengine.registry import TRANSFORMS

from classification.errors import UserError

IGNORED = 255


@TRANSFORMS.register_module()
class CheckLabels:
    """Looks at a segmentation map's labels, after LoadAnnotations.

    Otherwise one that is no class ends training in the loss: on a GPU as an assertion that names no file.

    Raises:
        UserError: one that is neither below `num_classes` nor ignored (255).
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    def __call__(self, results: dict) -> dict:
        labels = results["gt_seg_map"]
        wrong = (labels >= self.num_classes) & (labels != IGNORED)
        if wrong.any():
            first = int(bool(results.get("reduce_zero_label")))  # what LoadAnnotations has subtracted from the file's
            raise UserError(
                f"{results['seg_map_path']}: has label {np.max(labels[wrong]) + first}, but with {self.num_classes} "
                f"classes {first} to {self.num_classes - 1 + first} are labels, and {IGNORED} is what is ignored"
            )
        return results
