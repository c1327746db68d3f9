"""Draws the results of `compute`. Each function takes arrays and returns a `Figure`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from classification.errors import printable
from classification.explain.compute import States, area_holding, checked_index

SHARES = (0.2, 0.5, 0.99)  # of a receptive field's sum, as in RepLKNet's tables
CELL = 1.9  # side of a panel, in inches
BAR = 0.12  # height of a colour bar, in inches
FAINTEST = 1e-3  # smallest share of the largest value that logarithmic colours show
Picture = np.ndarray  # (H, W, 3), 0 to 1


def picture_of(image: Tensor) -> Picture:
    """A normalised image (3, H, W) as a picture, without the normalisation."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return (image.detach().cpu().permute(1, 2, 0) * std + mean).clamp(0, 1).numpy()


def draw_states(
    pictures: Sequence[Picture],
    found: States,
    title: str = "",
    names: Sequence[str] = (),
    colour: str = "mean",
    channels: Sequence[int] = (),
) -> Figure:
    """Draw input, h, h' and y beside each image.

    Args:
        pictures: the images, as many as `found` has.
        found: the result of `states`.
        title: title of the figure.
        names: names of the images.
        colour: "mean" draws the mean over channels and states, with one colour scale for each column. "pca" draws the
            first three principal components of all tokens of a column as red, green and blue.
        channels: channels to draw instead; each has its own row and its own colour scale.

    Raises:
        UserError: there is no such channel.
    """
    columns = {"x, input": found.x, "h, after the scan": found.h, "h', after the fusion": found.fused, "y": found.y}
    planes = {label: value.detach().cpu().double().numpy() for label, value in columns.items()}
    count = found.x.shape[1]
    channels = [checked_index(c, count, "channel", "the block") for c in channels]
    rows = [(i, c) for i in range(len(pictures)) for c in (channels or [None])]
    by_components = colour == "pca" and not channels
    bars = colour == "mean" and not channels
    room = 0.2 * len(rows) if channels else 0.4 * by_components
    panels = Panels(len(rows), 1 + len(planes), title, pictures[0].shape, bars, below=room)
    for ax, (i, _) in zip(panels.axes[:, 0], rows, strict=True):
        ax.imshow(pictures[i])
    of_rows = [names[i] if names else f"image {i}" for i, _ in rows]
    panels.name_rows([n if c is None else f"{n}\nchannel {c}" for n, (_, c) in zip(of_rows, rows, strict=True)])
    panels.name_columns(["image", *planes])
    for column, values in enumerate(planes.values(), start=1):
        below = panels.axes[:, column]
        if by_components:
            maps, explained = _principal_components(values)
            for ax, rgb in zip(below, maps, strict=True):
                ax.imshow(rgb)
            below[-1].set_xlabel(f"3 components:\n{explained:.0%} of the variance", fontsize=8)
            continue
        maps = [_without_states(values[i] if c is None else values[i, c : c + 1]) for i, c in rows]
        scale = Normalize(min(m.min() for m in maps), max(m.max() for m in maps)) if bars else None
        drawn = [ax.imshow(m, norm=scale, cmap="viridis") for ax, m in zip(below, maps, strict=True)]
        if bars:
            panels.bar(drawn[0], column, column, "mean over channels")
            continue
        for ax, m in zip(below, maps, strict=True):  # channels differ too much in magnitude for one scale
            ax.set_xlabel(f"{m.min():.2g} to {m.max():.2g}", fontsize=7)
    return panels.figure


def _without_states(values: np.ndarray) -> np.ndarray:
    """(D, H, W) or (D, N, H, W) -> their mean, (H, W)."""
    return values.mean(tuple(range(values.ndim - 2)))


def _principal_components(values: np.ndarray) -> tuple[np.ndarray, float]:
    """(B, D, ..., H, W) -> RGB (B, H, W, 3) of all tokens' first three components, and their share of the variance.

    Each component is scaled to its 1st to 99th percentile. The sign of a component is arbitrary, so it is chosen such
    that the largest weight is positive.
    """
    height, width = values.shape[-2:]
    tokens = np.moveaxis(values.reshape(len(values), -1, height, width), 1, -1)  # (B, H, W, D N)
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    variances, vectors = np.linalg.eigh(flat.T @ flat)
    vectors = vectors[:, ::-1][:, :3]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    found = flat @ vectors
    low, high = np.percentile(found, (1, 99), axis=0)
    found = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    found = np.pad(found, ((0, 0), (0, 3 - found.shape[1])))  # if there are fewer than three channels
    explained = variances[::-1][:3].sum() / max(variances.sum(), 1e-300)
    return found.reshape(len(values), height, width, 3), float(explained)


def draw_activation(
    pictures: Sequence[Picture],
    maps: Sequence[np.ndarray],
    labels: Sequence[str],
    title: str = "",
    names: Sequence[str] = (),
) -> Figure:
    """Draw each image, the map alone, and the map over the image.

    Args:
        pictures: the images.
        maps: one map (H, W) for each image, 0 to 1.
        labels: a label for each map.
        title: title of the figure.
        names: names of the images.
    """
    panels = Panels(len(pictures), 3, title, pictures[0].shape)
    panels.name_rows(names)
    panels.name_columns(["image", "activation", "both"])
    for row, picture, activation, label in zip(panels.axes, pictures, maps, labels, strict=True):
        row[0].imshow(picture)
        drawn = row[1].imshow(activation, cmap="magma", vmin=0, vmax=1)
        row[2].imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=1)
        row[2].imshow(activation, cmap="magma", vmin=0, vmax=1, alpha=0.75 * activation)
        row[1].set_xlabel(_text(label), fontsize=9)
    panels.bar(drawn, 1, 1, "share of the largest value")
    return panels.figure


@dataclass
class Panels:
    """A figure of panels without ticks. Each is as wide as `CELL`, and as high as an image of this shape would be.

    With `bars`, the last row of the grid is for colour bars: if single panels gave the space, they would not line up.
    """

    rows: int
    columns: int
    title: str
    shape: Sequence[int]
    bars: bool = True
    below: float = 0  # inches for text below the panels

    def __post_init__(self) -> None:
        high = CELL * min(4.0, max(0.25, self.shape[0] / self.shape[1]))
        heights = [high] * self.rows + [BAR] * self.bars
        lines = self.title.count("\n") + 1
        size = (self.columns * (CELL + 0.15), sum(heights) + 0.12 * self.rows + 0.3 + 0.2 * lines + self.below)
        self.figure = Figure(figsize=(size[0], size[1] + 0.5 * self.bars), layout="constrained", dpi=120)
        self.grid = self.figure.add_gridspec(len(heights), self.columns, height_ratios=heights)
        cells = [[self.figure.add_subplot(self.grid[i, j]) for j in range(self.columns)] for i in range(self.rows)]
        self.axes = np.array(cells, dtype=object)
        for ax in self.axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.title.set_fontsize(10)
        self.figure.suptitle(_text(self.title), fontsize=11)

    def name_rows(self, names: Sequence[str]) -> None:
        for ax, name in zip(self.axes[:, 0], names, strict=False):
            ax.set_ylabel(_text(name), fontsize=8)

    def name_columns(self, names: Sequence[str]) -> None:
        for ax, name in zip(self.axes[0], names, strict=True):
            ax.set_title(name)

    def bar(self, drawn: AxesImage, first: int, last: int, label: str) -> None:
        """A colour bar below the columns `first` to `last`."""
        inside = self.figure.add_subplot(self.grid[-1, first : last + 1])
        bar = self.figure.colorbar(drawn, cax=inside, orientation="horizontal", label=label)
        bar.ax.tick_params(labelsize=7)
        bar.ax.xaxis.label.set_fontsize(8)
        if not isinstance(drawn.norm, LogNorm):
            bar.locator = MaxNLocator(3)
            bar.update_ticks()


def _text(text: str) -> str:
    """Text that is drawn as it stands: a dollar would begin a formula, and a control character may have no glyph."""
    return printable(text, lines=True).replace("$", r"\$")


def draw_mixing(
    pictures: Sequence[Picture],
    without: Sequence[np.ndarray],
    fused: Sequence[np.ndarray],
    query: tuple[int, int],
    stride: int,
    title: str = "",
    names: Sequence[str] = (),
) -> Figure:
    """Draw what one position takes from each other one, without and with fusion, beside each image.

    The position is outlined. Colours are logarithmic and show shares of a map's largest value. The position's own value
    includes D, so it does not count as the largest.

    Args:
        pictures: the images.
        without: for each image, rows of the matrix without fusion, (K, H, W). The mean of their magnitudes is drawn.
        fused: the same with fusion.
        query: (row, column) of the position.
        stride: stride of the map, in pixels.
        title: title of the figure.
        names: names of the images.
    """
    panels = Panels(len(pictures), 3, title, pictures[0].shape)
    panels.name_rows(names)
    panels.name_columns(["image", "scan alone", "with fusion"])
    for row, picture, *rows in zip(panels.axes, pictures, without, fused, strict=True):
        row[0].imshow(picture)
        width = rows[0].shape[-1]
        _outline(row[0], query, stride, stride)
        for ax, values in zip(row[1:], rows, strict=True):
            magnitudes = np.abs(values).mean(0)
            others = np.delete(magnitudes.ravel(), query[0] * width + query[1])
            drawn = _draw_shares(ax, magnitudes, others.max(initial=0))
            _outline(ax, query)
    panels.bar(drawn, 1, 2, "share of the largest, mean over channels")
    return panels.figure


def _draw_shares(ax: Axes, values: np.ndarray, largest: float) -> AxesImage:
    shares = values / max(largest, np.finfo(float).tiny)
    return ax.imshow(np.clip(shares, FAINTEST, 1), norm=LogNorm(FAINTEST, 1), cmap="magma")


def _outline(ax: Axes, cell: tuple[int, int], height: float = 1, width: float = 1) -> None:
    corner = (cell[1] * width - 0.5, cell[0] * height - 0.5)
    ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="cyan", linewidth=1.5))


def draw_receptive_fields(
    fields: dict[str, np.ndarray], position: tuple[int, int] | None = None, stride: int = 1, title: str = ""
) -> Figure:
    """Draw scores of some models side by side, and below each the shares of pixels that hold `SHARES` of the sum.

    Colours are logarithmic and show shares of the largest score.

    Args:
        fields: scores (H, W) for each model's name.
        position: (row, column) in the map of the position that has these scores. Its pixels are outlined.
        stride: stride of the map, in pixels.
        title: title of the figure.
    """
    panels = Panels(1, len(fields), title, next(iter(fields.values())).shape, below=0.4)
    for ax, (name, scores) in zip(panels.axes[0], fields.items(), strict=True):
        drawn = _draw_shares(ax, scores, scores.max())
        ax.set_title(_text(name), fontsize=8)
        held = [f"{share:.0%} in {area_holding(torch.from_numpy(scores), share):.1%} of pixels" for share in SHARES]
        ax.set_xlabel("\n".join(held), fontsize=8)
        if position is not None:
            _outline(ax, position, stride, stride)
    panels.bar(drawn, 0, len(fields) - 1, "share of the largest gradient magnitude")
    return panels.figure
