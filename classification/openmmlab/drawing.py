"""The common part of both toolchains' visualizers: they enlarge small images, and put labels beside objects."""

from collections.abc import Sequence

import cv2
import numpy as np
from mmengine.visualization import Visualizer

LARGEST = 768  # pixels, of the longer side of an image that was enlarged
MOST = 3  # the largest factor
GAP = 4  # pixels between an object's box and its label
STEP = 3  # pixels between candidate places along an edge
LINE = 2  # pixels
FONT = 9  # points, of 100/72 pixels


def times(height: int, width: int) -> int:
    """Return the factor by which an image of this size is enlarged."""
    return max(1, min(MOST, LARGEST // max(height, width)))


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Enlarge bytes (H, W, 3) to (factor H, factor W, 3) with bicubic interpolation."""
    height, width = image.shape[:2]
    return cv2.resize(image, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC)


def place_beside(box: Sequence[float], size: Sequence[float], taken: np.ndarray) -> tuple[int, int]:
    """Choose a label's place: of all places along the box's four edges, the first with the least cost.

    Args:
        box: the object's left, top, right and bottom, in pixels.
        size: the label's width and height.
        taken: (H, W), the cost of covering each pixel of the drawing.

    Returns:
        The label's left and top. If there is room, the whole label is inside the drawing.
    """
    left, top, right, bottom = (round(float(side)) for side in box)
    width, height = (int(np.ceil(side)) for side in size)
    along_x = range(left, max(right - width, left) + 1, STEP)
    along_y = range(top, max(bottom - height, top) + 1, STEP)
    places = [(x, y) for y in (top - GAP - height, bottom + GAP) for x in along_x]
    places += [(x, y) for x in (right + GAP, left - GAP - width) for y in along_y]
    last_x, last_y = max(taken.shape[1] - width, 0), max(taken.shape[0] - height, 0)
    within = [(min(max(x, 0), last_x), min(max(y, 0), last_y)) for x, y in places]
    return min(within, key=lambda place: taken[place[1] : place[1] + height, place[0] : place[0] + width].sum())


class LabelsBeside(Visualizer):
    """Draws outlines and labels on the image of `set_image`. Coordinates are those of the enlarged image."""

    def set_image(self, image: np.ndarray) -> None:
        """As in mmengine, but lines at the image's edge do not change the drawing's range."""
        super().set_image(image)
        self.ax_save.autoscale(False)

    def outline(self, mask: np.ndarray, factor: int, color: Sequence[int]) -> None:
        """Draw a line around a mask (H, W), in pixels of the image before it was enlarged."""
        padded = np.pad(mask.astype(float), 1)  # so that a line closes at the image's edge
        y, x = ((np.arange(side) - 0.5) * factor for side in padded.shape)
        if mask.any():
            self.ax_save.contour(x, y, padded, levels=[0.5], colors=[_fraction(color)], linewidths=_points(self, LINE))

    def frame(self, box: Sequence[float], color: Sequence[int]) -> None:
        left, top, right, bottom = box
        x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
        self.ax_save.plot(x, y, color=_fraction(color), linewidth=_points(self, LINE), alpha=0.8)

    def label(self, text: str, box: Sequence[float], color: Sequence[int], taken: np.ndarray) -> None:
        """Write a label beside the box, on the object's colour, and add its pixels to `taken`."""
        ink = "black" if np.dot(color, (0.299, 0.587, 0.114)) > 128 else "white"
        ground = dict(facecolor=_fraction(color), edgecolor="none", pad=1.5)
        written = self.ax_save.text(
            0, 0, text, size=FONT, color=ink, va="bottom", ha="left", bbox=ground, parse_math=False
        )
        ends = written.get_window_extent(self.fig_save_canvas.get_renderer())
        margin = 1.5 * self.dpi / 72  # `pad` is in points
        width, height = ends.width + 2 * margin, ends.height + 2 * margin
        left, top = place_beside(box, (width, height), taken)
        written.set_position((left + margin, top + height - margin))
        taken[top : top + int(np.ceil(height)), left : left + int(np.ceil(width))] += 1


def _fraction(color: Sequence[int]) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in color)


def _points(visualizer: Visualizer, pixels: float) -> float:
    return pixels * 72 / visualizer.dpi
