"""Label maps whose labels a tool has numbered anew. mmcv reads numbers of colours; tools keep the colours alone.

Tools that make image files smaller, such as oxipng, give each file a palette of its own, and so does Pillow in a GIF.
"""

from collections import Counter

import numpy as np
from PIL import Image

WHITE = 255
SPARSE = 8  # pixels, of which one is looked at first


class Palettes:
    """Looks at the maps of a data set one after another."""

    def __init__(self):
        self.known: dict[tuple[int, ...], tuple[int, str]] = {}  # for each colour, its label and the map that has it

    def fault(self, path: str, labels: np.ndarray, reduced: bool, meant: set[int]) -> str | None:
        """Say why a map's labels may be others than were meant; None if nothing speaks for it.

        Args:
            path: the map's file.
            labels: what was read from it.
            reduced: whether 1 has been subtracted from them.
            meant: the labels that a map may have.
        """
        try:
            with Image.open(path) as image:
                mode, colours = image.mode, image.getpalette("RGB") if image.mode == "P" else None
        except Exception:  # LoadAnnotations has read the file by other means
            return None
        if mode == "1" and len(meant) > 3 and (labels == 1 - reduced).any():  # with two classes, it is the usual mask
            return (
                f"is a map of 1 bit, whose white is read as label 1; if a tool (oxipng) made it of a grey map, in "
                f"which it was {WHITE}, write such maps as PNG of 8 bits anew"
            )
        if not colours:
            return None
        table = np.array(colours).reshape(-1, 3)
        some = np.unique(labels[::SPARSE, ::SPARSE])
        some = some[some != WHITE].astype(int) + reduced
        some = some[some < len(table)]
        return self._of_greys(table, some, labels, reduced, meant) or self._of_others(table, some, path)

    def _of_greys(
        self, table: np.ndarray, some: np.ndarray, labels: np.ndarray, reduced: bool, meant: set[int]
    ) -> str | None:
        """Look for a palette of greys that could be the labels that were meant, and are others than are read."""
        if (table[some] != table[some, :1]).any():
            return None  # most palettes have colours, which a few pixels show
        found = np.flatnonzero(np.bincount(labels.ravel(), minlength=WHITE + 1)[:WHITE]) + reduced
        found = found[found < len(table)]
        if (table[found] != table[found, :1]).any():
            return None
        greys = dict(zip(found.tolist(), table[found, 0].tolist(), strict=True))
        others = {label: grey for label, grey in greys.items() if label != grey}
        of_a_map = len({*greys.values()}) == len(greys)  # in which each label has a grey of its own
        black_and_white = {*greys.values()} <= {0, WHITE}  # as masks often are, and classes in colourful palettes
        if not others or not meant.issuperset(greys.values()) or not of_a_map or black_and_white:
            return None
        label, grey = next(iter(others.items()))
        return (
            f"has a palette in which label {label} is the grey {grey}, and {label} is what is read; if a tool (oxipng, "
            f"GIF) made it of a grey map, in which it was {grey}, write such maps as grey PNG anew"
        )

    def _of_others(self, table: np.ndarray, some: np.ndarray, path: str) -> str | None:
        """Look for a colour that was another label in an earlier map."""
        counts = Counter(map(tuple, table.tolist()))
        for label in some.tolist():
            colour = tuple(table[label].tolist())
            if counts[colour] > 1:  # as in palettes that are filled up with black
                continue
            other, its_path = self.known.setdefault(colour, (label, path))
            if other != label:
                return (
                    f"has the colour {colour} for label {label}, and {its_path} for {other}; labels are read as "
                    "numbers, whatever their colours: if a tool (oxipng) numbered them anew, write such maps anew"
                )
        return None
