"""mmseg's drawings of small images, for a person to read."""

from collections.abc import Sequence

import cv2
import numpy as np
from mmengine.structures import PixelData
from mmseg.registry import VISUALIZERS
from mmseg.visualization import SegLocalVisualizer

from classification.openmmlab.drawing import LabelsBeside, enlarge, times

SMALLEST = 1 / 1000  # of the image, a region with a name: the names of specks would hide what is beside them


@VISUALIZERS.register_module()
class EnlargedSegVisualizer(LabelsBeside, SegLocalVisualizer):
    """mmseg's visualizer, but it enlarges small images, outlines each region, and writes the name beside it.

    Args:
        name: the name of this visualizer, which mmengine requires.
        background: a label without colour and name. By default, each region has a colour and a name.
        alpha: opacity of the colours over the image.
        **settings: as in mmseg.
    """

    def __init__(self, name: str = "visualizer", background: int | None = None, alpha: float = 0.3, **settings):
        super().__init__(name, alpha=alpha, **settings)
        self.background = background

    def _draw_sem_seg(
        self,
        image: np.ndarray,
        sem_seg: PixelData,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        with_labels: bool = True,
    ) -> np.ndarray:
        """Draw on an image (H, W, 3). Return bytes (factor H, factor W, 3)."""
        labels = np.asarray(sem_seg.cpu().data)[0].astype(int)  # a head of one channel predicts floats
        factor = times(*image.shape[:2])
        colors = np.array(palette, np.uint8)
        shown = [label for label in np.unique(labels) if label < len(classes) and label != self.background]
        large = np.kron(labels, np.ones((factor, factor), labels.dtype))
        drawn = enlarge(image, factor)
        coloured = np.isin(large, shown)
        drawn[coloured] = (1 - self.alpha) * drawn[coloured] + self.alpha * colors[large[coloured]]
        self.set_image(drawn)
        taken, regions = coloured.astype(float), []
        for label in shown:
            self.outline(labels == label, factor, colors[label])
            _, _, found, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=8)
            regions += [(label, *region) for region in found[1:] if region[cv2.CC_STAT_AREA] >= SMALLEST * labels.size]
        for label, left, top, width, height, _ in regions if with_labels else ():
            box = np.array([left, top, left + width, top + height]) * factor
            self.label(classes[label], box, colors[label], taken)
        return self.get_image()
