"""What a model sees: states before and after fusion, effective receptive fields, its matrix, class activation.

    python -m classification.explain output/spatialmamba_micro/digits/best.pth image.png --out figures
    python -m classification.explain spatialmamba_tiny *.jpg --out figures --figures states erf --size own

writes one PNG and one .npz of the arrays for each of `FIGURES`. The first argument is a checkpoint, or the name of a
size, which is then drawn as it is initialised. The functions take any images and leave the model as it was: they add
hooks to plain modules, remove them, and run in evaluation mode.
"""

import contextlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from classification.errors import UserError, printable
from classification.models import SpatialMamba
from classification.models.spatialmamba import Block, StateFusion, to_planes

PEERS = ("convnext_tiny", "swin_tiny_patch4_window7_224")
SHARES = (0.2, 0.5, 0.99)  # of a receptive field's sum, as RepLKNet's tables have them
GRAD_CAM = "pytorch_grad_cam"
INSTALL_GRAD_CAM = "pip install grad-cam (beside OpenMMLab: pip install --no-deps -r requirements-explain.txt)"


# ----- the model, left as it was


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module's mode and each parameter's gradient are what they were.

    Modes are set one by one, not by `model.eval()`: some modules fold weights or freeze others in their `train`.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


def backbone_of(model: nn.Module) -> SpatialMamba:
    """The Spatial-Mamba in a model: itself, or a part of a detector, of a segmenter or of timm's feature extractor.

    Raises:
        UserError: there is none.
    """
    found = next((module for module in model.modules() if isinstance(module, SpatialMamba)), None)
    if found is None:
        raise UserError(f"{type(model).__name__}: holds no Spatial-Mamba")
    return found


def block_at(model: nn.Module, stage: int, block: int) -> Block:
    """A block by its numbers, which count from the end where negative.

    Raises:
        UserError: no such stage or block.
    """
    layers = backbone_of(model).layers
    stage = _index(stage, len(layers), "stage", "the model")
    blocks = layers[stage].blocks
    return blocks[_index(block, len(blocks), "block", f"stage {stage}")]


def _index(value: int, count: int, kind: str, owner: str) -> int:
    if not -count <= value < count:
        raise UserError(f"no {kind} {value}: {owner} has {kind}s 0 to {count - 1}")
    return value % count


def _position(position: tuple[int, int] | None, size: Sequence[int], of: str) -> tuple[int, int]:
    """(row, column), by default the centre."""
    height, width = size
    y, x = (height // 2, width // 2) if position is None else position
    if not (0 <= y < height and 0 <= x < width):
        raise UserError(f"no position {y} {x}: {of} has rows 0 to {height - 1} and columns 0 to {width - 1}")
    return y, x


# ----- states


class States(NamedTuple):
    """What one block's state space model computes, in the model's dtype but for states, which are float32 at least.

    Attributes:
        x: its input, after the projection, the 3x3 convolution and SiLU: (B, D, H, W).
        h: states after the raster scan, h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t: (B, D, N, H, W).
        fused: states after the fusion, h' = sum_k alpha_k DWConv_k(h): (B, D, N, H, W).
        y: its output, y = sum_n C_n h'_n + D x: (B, D, H, W).
    """

    x: Tensor
    h: Tensor
    fused: Tensor
    y: Tensor


def states(model: nn.Module, images: Tensor, stage: int = -1, block: int = -1) -> States:
    """The states of one block, from one forward pass up to its stage, as arXiv 2410.15091 draws them.

    The pass is in evaluation mode whatever the model's mode is: batch norm takes its running statistics, which stay as
    they are, and nothing is dropped. So a model gives the same states in training and in evaluation.

    Args:
        model: a Spatial-Mamba in any form, or a model that holds one.
        images: (B, C, H, W), normalised, of any size; on the model's device.
        stage: number of the stage; counts from the end where negative.
        block: number of the block in it; counts from the end where negative.

    Raises:
        UserError: no such stage or block, or no Spatial-Mamba in the model.
        ValueError: images of another shape.
    """
    (found,) = states_at(model, images, [(stage, block)])
    return found


@torch.no_grad()
def states_at(model: nn.Module, images: Tensor, places: Sequence[tuple[int, int]]) -> list[States]:
    """As `states`, of several (stage, block) by one forward pass."""
    fusions = [block_at(model, *place).self_attention.state_fusion for place in places]
    observed = _observe(model, images, fusions, max(stage % len(backbone_of(model).layers) for stage, _ in places))
    with undisturbed(model):
        return [States(x, h, _fuse(fusion, h), y) for fusion, (h, x, y) in zip(fusions, observed, strict=True)]


def _observe(
    model: nn.Module, images: Tensor, fusions: Sequence[StateFusion], last_stage: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(h, x, y) of each of these modules in a forward pass that ends with `last_stage`."""
    seen: dict[StateFusion, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(module: StateFusion, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        h, _, _, x = inputs
        seen[module] = h.detach(), x.detach(), y.detach()

    with undisturbed(model), contextlib.ExitStack() as hooks:
        for fusion in fusions:
            hooks.callback(fusion.register_forward_hook(keep).remove)
        backbone_of(model).forward_intermediates(images, [last_stage], stop_early=True, intermediates_only=True)
    return [seen[fusion] for fusion in fusions]


def _fuse(fusion: StateFusion, h: Tensor) -> Tensor:
    """h' by the module itself: it gives y = sum_n C_n h'_n + D x, which is h'_n for a single state, C = 1 and D = 0."""
    single = h.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B, D, N, H, W) -> (B N, D, 1, H, W)
    ones, nothing = torch.ones_like(single[:, 0]), torch.zeros_like(single[:, :, 0])
    fused = fusion(single, ones, h.new_zeros(h.shape[1]), nothing)
    return fused.unflatten(0, (h.shape[0], h.shape[2])).transpose(1, 2)


# ----- class activation


def class_activation(
    model: nn.Module, images: Tensor, classes: Sequence[int] | None = None, stage: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Grad-CAM (arXiv 1610.02391) by the package pytorch-grad-cam, at the output of a stage's last block.

    Blocks give tokens (B, H, W, C), which the package gets as planes.

    Args:
        model: a classifier.
        images: (B, C, H, W), normalised; on the model's device.
        classes: one for each image; by default those that the model finds most likely.
        stage: counts from the end where negative.

    Returns:
        Maps (B, H, W) of the images' size, 0 to 1 in each image; classes (B,); probabilities (B, classes).

    Raises:
        UserError: the package is missing, the model has no head, or there is no such stage or class.
    """
    if find_spec(GRAD_CAM) is None:
        raise UserError(f"class activation needs the package pytorch-grad-cam: {INSTALL_GRAD_CAM}")
    from pytorch_grad_cam import GradCAM  # optional
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    count = backbone_of(model).num_classes
    if not count:
        raise UserError("the model has no head, so there is no class to explain")
    chosen = None if classes is None else [_index(c, count, "class", "the model") for c in classes]
    layer = block_at(model, stage, -1)
    images = images.detach().requires_grad_()  # so that a frozen model has gradients too
    with undisturbed(model), torch.enable_grad(), GradCAM(model, [layer], reshape_transform=to_planes) as cam:
        maps = cam(images, None if chosen is None else [ClassifierOutputTarget(c) for c in chosen])
        probabilities = cam.outputs.detach().softmax(1)
    found = probabilities.argmax(1) if chosen is None else torch.tensor(chosen, device=probabilities.device)
    return torch.from_numpy(maps), found, probabilities


# ----- drawing: each function takes arrays and returns a Figure, one row for each image

CELL = 1.9  # inches of a panel's side
Picture = np.ndarray  # (H, W, 3), 0 to 1


def picture_of(image: Tensor) -> Picture:
    """A normalised image (3, H, W) as it looks."""
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
    """Input, h, h' and y beside each image.

    Args:
        pictures: the images, as many as `found` has.
        found: as `states` gives them.
        title: above all.
        names: of the images.
        colour: "mean" over channels and states, one colour scale for each column; or "pca": the first three principal
            components of all tokens of a column as red, green and blue.
        channels: these in place of the mean, a row for each.

    Raises:
        UserError: no such channel.
    """
    columns = {"x, input": found.x, "h, after the scan": found.h, "h', after the fusion": found.fused, "y": found.y}
    planes = {label: value.detach().cpu().double().numpy() for label, value in columns.items()}
    count = found.x.shape[1]
    channels = [_index(c, count, "channel", "the block's state space model") for c in channels]
    rows = [(i, c) for i in range(len(pictures)) for c in (channels or [None])]
    figure, axes = _grid(len(rows), 1 + len(planes), title, pictures[0].shape, bars=colour == "mean" or bool(channels))
    for row, (i, channel) in enumerate(rows):
        axes[row, 0].imshow(pictures[i])
        label = names[i] if names else ""
        axes[row, 0].set_ylabel(label if channel is None else f"{label}\nchannel {channel}", fontsize=8)
    axes[0, 0].set_title("image")
    for column, (label, values) in enumerate(planes.items(), start=1):
        below = axes[:, column]
        below[0].set_title(label)
        if colour == "pca" and not channels:
            maps, explained = _principal_components(values)
            for ax, rgb in zip(below, maps, strict=True):
                ax.imshow(rgb)
            below[-1].set_xlabel(f"3 components: {explained:.0%}\nof the variance", fontsize=8)
            continue
        maps = [_without_states(values[i] if c is None else values[i, c : c + 1]) for i, c in rows]
        scale = Normalize(min(m.min() for m in maps), max(m.max() for m in maps))
        drawn = [ax.imshow(m, norm=scale, cmap="viridis") for ax, m in zip(below, maps, strict=True)]
        _colour_bar(figure, drawn[0], below, "one channel" if channels else "mean over channels")
    return figure


def _without_states(values: np.ndarray) -> np.ndarray:
    """(D, H, W) or (D, N, H, W) -> their mean, (H, W)."""
    return values.mean(tuple(range(values.ndim - 2)))


def _principal_components(values: np.ndarray) -> tuple[np.ndarray, float]:
    """(B, D, ..., H, W) -> RGB (B, H, W, 3) of all tokens' first three components, and the variance they explain.

    Each component is scaled to its 1st to 99th percentile. Its sign is that of its largest weight, for it has none.
    """
    height, width = values.shape[-2:]
    tokens = np.moveaxis(values.reshape(len(values), -1, height, width), 1, -1)  # (B, H, W, D N)
    flat = tokens.reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(0)
    variances, vectors = np.linalg.eigh(flat.T @ flat)
    vectors = vectors[:, ::-1][:, :3]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    found = flat @ vectors
    low, high = np.percentile(found, (1, 99), axis=0)
    found = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    found = np.pad(found, ((0, 0), (0, 3 - found.shape[1])))  # fewer channels than three
    explained = variances[::-1][:3].sum() / max(variances.sum(), 1e-300)
    return found.reshape(len(values), height, width, 3), float(explained)


def draw_activation(
    pictures: Sequence[Picture], maps: Sequence[np.ndarray], labels: Sequence[str], title: str = "", names=()
) -> Figure:
    """Each image, the map alone, and the map over the image.

    Args:
        pictures: the images.
        maps: (H, W) of each, 0 to 1.
        labels: what each map is of.
        title: above all.
        names: of the images.
    """
    figure, axes = _grid(len(pictures), 3, title, pictures[0].shape, bars=True)
    drawn = None
    for i, (row, picture, activation) in enumerate(zip(axes, pictures, maps, strict=True)):
        row[0].imshow(picture)
        row[0].set_ylabel(names[i] if len(names) else "", fontsize=8)
        drawn = row[1].imshow(activation, cmap="magma", vmin=0, vmax=1)
        row[2].imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=1)
        row[2].imshow(activation, cmap="magma", vmin=0, vmax=1, alpha=0.55)
        row[2].set_title(printable(labels[i]).replace("$", r"\$"), fontsize=9)
    axes[0, 0].set_title("image")
    axes[0, 1].set_title("activation")
    _colour_bar(figure, drawn, axes[:, 1], "share of its largest")
    return figure


def _grid(rows: int, columns: int, title: str, shape: Sequence[int], bars: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure of panels without ticks, each as wide as `CELL` and as high as an image of this shape."""
    high = CELL * min(4.0, max(0.4, shape[0] / shape[1]))
    figure = Figure(
        figsize=(columns * (CELL + 0.15), rows * (high + 0.15) + 0.6 + 0.7 * bars), layout="constrained", dpi=120
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.title.set_fontsize(10)
    figure.suptitle(printable(title).replace("$", r"\$"), fontsize=11)
    return figure, axes


def _colour_bar(figure: Figure, drawn: object, axes: Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(drawn, ax=axes, location="bottom", shrink=0.9, pad=0.02, aspect=14)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)
