"""mmdet's drawings of small images, for a person to read."""

from collections.abc import Sequence

import numpy as np
import torch
from mmdet.registry import VISUALIZERS
from mmdet.visualization import DetLocalVisualizer
from mmdet.visualization.palette import get_palette
from mmengine.structures import InstanceData

from classification.openmmlab.drawing import LabelsBeside, enlarge, times


@VISUALIZERS.register_module()
class EnlargedDetVisualizer(LabelsBeside, DetLocalVisualizer):
    """mmdet's visualizer, but it enlarges small images and covers no object.

    For each instance, it draws the box, the outline of the mask, and the name and score beside the box. It ignores
    `alpha`, `line_width` and the colours of text and masks. It draws panoptic and semantic maps as mmdet does.
    """

    def _draw_instances(
        self,
        image: np.ndarray,
        instances: InstanceData,
        classes: Sequence[str] | None,
        palette: Sequence[tuple[int, int, int]] | None,
    ) -> np.ndarray:
        """Draw on an image (H, W, 3). Return bytes (factor H, factor W, 3)."""
        factor = times(*image.shape[:2])
        image = enlarge(image, factor)
        self.set_image(image)
        boxes = _array(instances.bboxes) * factor if "bboxes" in instances else np.zeros((0, 4))
        masks = instances.masks if "masks" in instances else np.zeros((len(boxes), 0, 0))
        masks = _array(masks.to_ndarray() if hasattr(masks, "to_ndarray") else masks).astype(bool)
        labels = instances.labels.tolist() if len(boxes) else []
        chosen = palette if self.bbox_color is None else self.bbox_color
        colors = _colors(chosen, max(labels, default=0) + 1)
        taken = np.zeros(image.shape[:2])
        for box, mask in zip(boxes, masks, strict=True):
            left, top, right, bottom = np.maximum(box.round().astype(int), 0)
            taken[top:bottom, left:right] += 1
            if mask.size:  # what is drawn on a digit hides more than what is drawn beside it in its box
                taken += 10 * np.kron(mask, np.ones((factor, factor), bool))
        for box, mask, label in zip(boxes, masks, labels, strict=True):
            self.frame(box, colors[label])
            if mask.size:
                self.outline(mask, factor, colors[label])
        for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            text = classes[label] if classes is not None else f"class {label}"
            text = instances.label_names[i] if "label_names" in instances else text
            text += f": {float(instances.scores[i]):.0%}" if "scores" in instances else ""
            self.label(text, box, colors[label], taken)
        return self.get_image()


def _colors(palette: str | tuple | list | None, count: int) -> list[tuple[int, int, int]]:
    """Return the colours of the first `count` labels. Labels beyond the end of a list get mmdet's fixed random ones.

    A config's list is made for its own data set. For one with more classes, mmdet stops with an AssertionError.
    """
    if isinstance(palette, list):
        return palette + get_palette("random", count)[len(palette) :]
    return get_palette(palette, count)


def _array(values: torch.Tensor | np.ndarray) -> np.ndarray:
    values = getattr(values, "tensor", values)  # boxes of a class of mmdet's
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
