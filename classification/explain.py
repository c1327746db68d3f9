"""What a model sees: states before and after fusion, effective receptive fields, its matrix, class activation.

    python -m classification.explain output/spatialmamba_micro/digits/best.pth image.png --out figures
    python -m classification.explain spatialmamba_tiny *.jpg --out figures --figures states erf --size own
    python -m classification.explain output/spatialmamba_micro/digits/best.pth --serve

writes one PNG and one .npz of the arrays for each of `FIGURES`. The first argument is a checkpoint, or the name of a
size, which is then drawn as it is initialised. The functions take any images and leave the model as it was: they add
hooks to plain modules, remove them, and run in evaluation mode.
"""

import argparse
import contextlib
import copy
import difflib
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision import transforms
from tqdm import tqdm
from yacs.config import CfgNode

from classification.checkpoint import variant_of, write_atomically
from classification.config import default_config
from classification.data.build import eval_transform
from classification.data.images import read_image
from classification.errors import UserError, escape_on_streams, is_file, printable
from classification.export import read_model
from classification.models import VARIANTS, SpatialMamba
from classification.models.spatialmamba import Block, StateFusion, StructureAwareSSM, to_planes

INSTALL_GRAD_CAM = (
    "pip install grad-cam, or beside OpenMMLab, which has OpenCV, pip install --no-deps -r requirements-explain.txt"
)
PEERS = ("convnext_tiny", "swin_tiny_patch4_window7_224")
SHARES = (0.2, 0.5, 0.99)  # of a receptive field's sum, as RepLKNet's tables have them


# ----- the model, left as it was


def with_gradients(function: Callable) -> Callable:
    """The function with gradients inside it, also where the caller is in inference mode."""
    return torch.inference_mode(False)(torch.enable_grad()(function))


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
        plural = f"{kind}es" if kind.endswith("s") else f"{kind}s"
        raise UserError(f"no {kind} {value}: {owner} has {plural} 0 to {count - 1}")
    return value % count


def last_stage(images: Tensor, stages: int, least: int) -> int:
    """Number of the last stage whose map of these images has at least `least` rows and columns; 0 if none has."""
    smallest = min(images.shape[2:])
    return max((i for i in range(stages) if math.ceil(smallest / 2 ** (i + 2)) >= least), default=0)


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
    """`states` of several (stage, block), by a single forward pass."""
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


# ----- the matrix: at fixed Delta, B and C a state space model is linear in x, y = M x (arXiv 2410.15091)

LARGEST_MATRIX = 2**31  # bytes
COLUMNS_AT_ONCE = 2**22  # numbers of h in a batch of columns


class FixedSSM:
    """One block's state space model as the linear map of x that it is at given Delta, B and C; in float64.

    Channels do not meet in it, so each has a matrix of its own.

    Args:
        ssm: the module; it is copied.
        x: (B, D, H, W), from which Delta, B and C are computed.
        channels: those that stay, K of D.
    """

    def __init__(self, ssm: StructureAwareSSM, x: Tensor, channels: Sequence[int]):
        self.ssm = copy.deepcopy(ssm).double().requires_grad_(False)
        dt, self.B, self.C = self.ssm.select(x.double())
        self.dt = dt[:, channels]
        _keep(self.ssm, ("dt_projs_bias", "A_logs", "Ds"), channels)
        _keep(self.ssm.state_fusion, ("kernel_3", "kernel_3_1", "kernel_3_2"), channels)

    def __call__(self, x: Tensor, fusion: bool = True) -> Tensor:
        """x (B, K, H, W) -> y, alike: sum_n C_n h'_n + D x, or sum_n C_n h_n + D x without `fusion`."""
        return self._apply(x, self.dt, self.B, self.C, fusion)

    def columns(self, image: int, fusion: bool = True) -> Tensor:
        """M of one image, (K, L, L) with L = H W: a column is y of a unit impulse."""
        channels, (height, width) = self.dt.shape[1], self.dt.shape[2:]
        length = height * width
        found = self.dt.new_empty(channels, length, length)
        step = max(1, COLUMNS_AT_ONCE // (channels * self.ssm.d_state * length))
        for chunk in torch.arange(length, device=found.device).split(step):
            x = found.new_zeros(len(chunk), channels, length)
            x[torch.arange(len(chunk)), :, chunk] = 1
            fixed = (t[image].expand(len(chunk), -1, -1, -1).contiguous() for t in (self.dt, self.B, self.C))
            found[:, :, chunk] = (
                self._apply(x.unflatten(2, (height, width)), *fixed, fusion).flatten(2).permute(1, 2, 0)
            )
        return found

    @with_gradients
    def row(self, query: tuple[int, int], fusion: bool = True) -> Tensor:
        """M's row of one position for each image, as a map (B, K, H, W): the gradient of y there, one adjoint pass."""
        x = torch.zeros_like(self.dt, requires_grad=True)
        y = self(x, fusion)
        return torch.autograd.grad(y[..., query[0], query[1]].sum(), x)[0]

    def _apply(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, fusion: bool) -> Tensor:
        h = self.ssm.transition(x, dt, B)
        if fusion:
            return self.ssm.state_fusion(h, C, self.ssm.Ds, x)
        return (h * C.unsqueeze(1)).sum(2) + self.ssm.Ds[:, None, None] * x


def _keep(module: nn.Module, names: Sequence[str], channels: Sequence[int]) -> None:
    for name in names:
        setattr(module, name, nn.Parameter(getattr(module, name)[channels], requires_grad=False))


@torch.inference_mode(False)  # whose tensors `FixedSSM.row` could not use
@torch.no_grad()
def fixed_ssm(
    model: nn.Module, images: Tensor, stage: int, block: int, channels: Sequence[int] | int | None = None
) -> FixedSSM:
    """A block's `FixedSSM` for these images, from one forward pass up to its stage. Arguments as `mixing_matrix`'s."""
    ssm = block_at(model, stage, block).self_attention
    ((_, x, _),) = _observe(model, images, [ssm.state_fusion], stage % len(backbone_of(model).layers))
    channels = [channels] if isinstance(channels, int) else range(x.shape[1]) if channels is None else channels
    channels = [_index(c, x.shape[1], "channel", "the block") for c in channels]
    with undisturbed(ssm):  # whose gradients would be copied
        return FixedSSM(ssm, x, channels)


@torch.no_grad()
def mixing_matrix(
    model: nn.Module,
    images: Tensor,
    stage: int,
    block: int,
    channels: Sequence[int] | int | None = None,
    fusion: bool = True,
) -> Tensor:
    """M of y = M x for each channel of one block's state space model, at the Delta, B and C of these images.

    With positions i and j in raster order and a_t = exp(Delta_t A), without fusion
    M_ij = sum_n C_i,n (a_{j+1} ... a_i) Delta_j B_j,n for j <= i, 0 above the diagonal, and D more on it. Fusion mixes
    its rows: each state becomes a weighted sum of those of 25 positions. The paper sets both beside linear attention.

    Args:
        model: as for `states`.
        images: as for `states`.
        stage: counts from the end where negative.
        block: counts from the end where negative.
        channels: numbers of the K channels, of D; None for all.
        fusion: False leaves the fusion out, h' = h.

    Returns:
        (B, K, H W, H W), float64: row i holds what position i takes from each position j.

    Raises:
        UserError: no such stage, block or channel, or a matrix of more than `LARGEST_MATRIX` bytes.
    """
    fixed = fixed_ssm(model, images, stage, block, channels)
    count, height, width = fixed.dt.shape[1:]
    size = len(images) * count * (height * width) ** 2 * 8
    if size > LARGEST_MATRIX:
        raise UserError(
            f"{len(images)} x {count} matrices of {height}x{width} positions take {size / 2**30:.1f} GiB; "
            "name fewer channels, or take mixing_row, which computes single rows"
        )
    return torch.stack([fixed.columns(image, fusion) for image in range(len(images))])


def mixing_row(
    model: nn.Module,
    images: Tensor,
    stage: int,
    block: int,
    query: tuple[int, int] | None = None,
    channels: Sequence[int] | int | None = None,
    fusion: bool = True,
) -> Tensor:
    """The row of `mixing_matrix` for one position, drawn out as a map, without the rest of the matrix.

    Args:
        query: (row, column) in the block's map; None for its centre. The rest as for `mixing_matrix`.

    Returns:
        (B, K, H, W), float64: what the query takes from each position.

    Raises:
        UserError: no such stage, block, channel or position.
    """
    fixed = fixed_ssm(model, images, stage, block, channels)
    return fixed.row(_position(query, fixed.dt.shape[2:], f"the map of stage {stage}"), fusion)


# ----- effective receptive field


@with_gradients
def effective_receptive_field(
    model: nn.Module, images: Tensor, position: tuple[int, int] | None = None, stage: int | None = None
) -> Tensor:
    """How strongly each pixel moves one position of a stage's map: the sum over images and colours of |gradient|.

    The gradient is that of the sum of the position's channels (arXiv 1701.04128; RepLKNet, arXiv 2203.06717, appendix,
    which takes the gradient's positive part where this takes its magnitude). The map is the stage's output without the
    final norm: right after a LayerNorm at its initialisation, the channels add up to a constant.

    Args:
        model: any with timm's `forward_intermediates`; or one that returns a map, or a list of them, of (B, C, H, W)
            or, if its `output_fmt` is "NHWC", (B, H, W, C). In evaluation mode, as for `states`.
        images: (B, C, H, W), normalised; on the model's device.
        position: (row, column) in the map; None for its centre.
        stage: number of the map; counts from the end where negative; None for the last.

    Returns:
        Scores (H, W) of the images' size, float64, not negative.

    Raises:
        UserError: no such stage or position, or the model returns no map.
    """
    images = images.detach().clone().requires_grad_()  # a copy, for those made in inference mode
    with undisturbed(model):
        found = _feature_map(model, images, stage)
        y, x = _position(position, found.shape[2:], "the map")
        (gradient,) = torch.autograd.grad(found[:, :, y, x].sum(), images)
    return gradient.double().abs().sum((0, 1))


def _feature_map(model: nn.Module, images: Tensor, stage: int | None) -> Tensor:
    """(B, C, H, W) of a stage."""
    if not hasattr(model, "forward_intermediates"):
        maps = model(images)
        maps = list(maps) if isinstance(maps, list | tuple) else [maps]
        found = maps[-1 if stage is None else _index(stage, len(maps), "stage", "the model")]
        if not isinstance(found, Tensor) or found.dim() != 4:
            raise UserError(f"{type(model).__name__} returns no map; pass its backbone, as `backbone_of` finds it")
        return to_planes(found) if getattr(model, "output_fmt", "NCHW") == "NHWC" else found
    stages = len(model.layers if isinstance(model, SpatialMamba) else model.feature_info)
    index = stages - 1 if stage is None else _index(stage, stages, "stage", "the model")
    (found,) = model.forward_intermediates(images, [index], stop_early=True, intermediates_only=True)
    return found


def area_holding(scores: Tensor, share: float) -> float:
    """The smallest share of pixels that holds at least this share of all scores' sum.

    Pixels are taken from the largest on, wherever they are. RepLKNet (arXiv 2203.06717) takes the smallest
    square around the centre, which is the same or more; but a field has its centre elsewhere where strided convolutions
    are not centred on the position's pixels, or where a scan reaches further back than ahead.

    Args:
        scores: not negative, of any shape.
        share: above 0, up to 1.

    Raises:
        UserError: another share, or scores that are negative, not finite or all 0.
    """
    ordered = scores.double().flatten().sort(descending=True).values
    if not 0 < share <= 1:
        raise UserError(f"share is {share}, but must be above 0 and at most 1")
    if not (torch.isfinite(ordered).all() and ordered[-1] >= 0 and ordered[0] > 0):
        raise UserError("scores must be finite and not negative, and one of them above 0")
    held = ordered.cumsum(0)
    # The sum's own rounding, lest a pixel more is counted where the share is met exactly.
    return (int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1) / len(ordered)


# ----- class activation


@with_gradients
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
    if reason := no_class_activation(model):
        raise UserError(f"no class activation: {reason}")
    from pytorch_grad_cam import GradCAM  # optional

    count = backbone_of(model).num_classes
    chosen = None if classes is None else [_index(c, count, "class", "the model") for c in classes]
    layer = block_at(model, stage, -1)
    images = images.detach().clone().requires_grad_()  # so that a frozen model has gradients too
    # NumPy, into which the package puts maps and logits, has no 16 bits of bfloat16; so targets are chosen here, too.
    targets = [lambda logits: logits[logits.argmax()]] * len(images)
    if chosen is not None:
        targets = [lambda logits, c=c: logits[c] for c in chosen]
    with undisturbed(model), contextlib.ExitStack() as hooks:
        cam = GradCAM(model, [layer], reshape_transform=lambda t: to_planes(t).float())
        hooks.callback(cam.activations_and_grads.release)  # as its own `with` does, which hides an IndexError
        maps = cam(images, targets)
        probabilities = cam.outputs.detach().float().softmax(1)
    found = cam.outputs.argmax(1) if chosen is None else torch.tensor(chosen, device=probabilities.device)
    return torch.from_numpy(maps), found, probabilities


def no_class_activation(model: nn.Module) -> str:
    """Why there is none; empty if there is."""
    if not backbone_of(model).num_classes:
        return "the model has no head, so no classes"
    try:
        import pytorch_grad_cam  # noqa: F401
    except ImportError as error:  # it, or OpenCV, which it needs
        return f"pytorch-grad-cam is missing ({error}); {INSTALL_GRAD_CAM}"
    return ""


# ----- drawing: each function takes arrays and returns a Figure, one row for each image

CELL = 1.9  # inches of a panel's side
BAR = 0.12  # and of a colour bar
FAINTEST = 1e-3  # of the largest, where colours are logarithmic
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
        channels: these in place of the mean, a row and a colour scale for each.

    Raises:
        UserError: no such channel.
    """
    columns = {"x, input": found.x, "h, after the scan": found.h, "h', after the fusion": found.fused, "y": found.y}
    planes = {label: value.detach().cpu().double().numpy() for label, value in columns.items()}
    count = found.x.shape[1]
    channels = [_index(c, count, "channel", "the block") for c in channels]
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
        for ax, m in zip(below, maps, strict=True):  # channels differ in size too much for one scale
            ax.set_xlabel(f"{m.min():.2g} to {m.max():.2g}", fontsize=7)
    return panels.figure


def _without_states(values: np.ndarray) -> np.ndarray:
    """(D, H, W) or (D, N, H, W) -> their mean, (H, W)."""
    return values.mean(tuple(range(values.ndim - 2)))


def _principal_components(values: np.ndarray) -> tuple[np.ndarray, float]:
    """(B, D, ..., H, W) -> RGB (B, H, W, 3) of all tokens' first three components, and the variance they explain.

    Each component is scaled to its 1st to 99th percentile. Its sign is that of its largest weight, for it has none.
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
    found = np.pad(found, ((0, 0), (0, 3 - found.shape[1])))  # fewer channels than three
    explained = variances[::-1][:3].sum() / max(variances.sum(), 1e-300)
    return found.reshape(len(values), height, width, 3), float(explained)


def draw_activation(
    pictures: Sequence[Picture],
    maps: Sequence[np.ndarray],
    labels: Sequence[str],
    title: str = "",
    names: Sequence[str] = (),
) -> Figure:
    """Each image, the map alone, and the map over the image.

    Args:
        pictures: the images.
        maps: (H, W) of each, 0 to 1.
        labels: what each map is of.
        title: above all.
        names: of the images.
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
    panels.bar(drawn, 1, 1, "share of its largest")
    return panels.figure


@dataclass
class Panels:
    """A figure of panels without ticks, each as wide as `CELL` and as high as an image of this shape.

    With `bars`, colour bars have a last row of their own: space taken from single panels would put them out of line.
    """

    rows: int
    columns: int
    title: str
    shape: Sequence[int]
    bars: bool = True
    below: float = 0  # inches for text

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
    return printable(text).replace("$", r"\$")


def draw_mixing(
    pictures: Sequence[Picture],
    without: Sequence[np.ndarray],
    fused: Sequence[np.ndarray],
    query: tuple[int, int],
    title: str = "",
    names: Sequence[str] = (),
) -> Figure:
    """What one position takes from each other, without and with fusion, beside each image; the position is outlined.

    Colours are logarithmic, shares of a map's largest value but for the position's own, which holds D.

    Args:
        pictures: the images.
        without: of each image, rows of the matrix (K, H, W); the mean of their magnitudes is drawn.
        fused: the same with fusion.
        query: (row, column) of the position.
        title: above all.
        names: of the images.
    """
    panels = Panels(len(pictures), 3, title, pictures[0].shape)
    panels.name_rows(names)
    panels.name_columns(["image", "scan alone", "with fusion"])
    for row, picture, *rows in zip(panels.axes, pictures, without, fused, strict=True):
        row[0].imshow(picture)
        height, width = rows[0].shape[-2:]
        _outline(row[0], query, picture.shape[0] / height, picture.shape[1] / width)
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
    """Scores of some models side by side, and below each the share of pixels that hold `SHARES` of their sum.

    Colours are logarithmic, shares of the largest score.

    Args:
        fields: scores (H, W) by the model's name.
        position: (row, column) in the map of the position that they are of, whose pixels are outlined.
        stride: of the map, in pixels.
        title: above all.
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


# ----- command line

BATCH = 8
LARGEST_SIZE = 4096
LARGEST_PORT = 65535


class Loaded(NamedTuple):
    """A classifier and what is known of it.

    Attributes:
        model: in evaluation mode.
        size: its name in `VARIANTS`.
        classes: their names, if it has them.
        config: of its evaluation.
        trained: whether it is a checkpoint's.
    """

    model: SpatialMamba
    size: str
    classes: list[str] | None
    config: CfgNode
    trained: bool


@dataclass
class Run:
    """What the figures are drawn from: the arguments, the model, the images as it takes them and as they look."""

    args: argparse.Namespace
    loaded: Loaded
    images: Tensor
    pictures: list[Picture]
    names: list[str]

    @property
    def model(self) -> SpatialMamba:
        return self.loaded.model

    @property
    def size(self) -> str:
        return self.loaded.size

    @property
    def weights(self) -> str:
        return "trained" if self.loaded.trained else "at initialisation"

    def stage(self, least: int) -> int:
        """The one asked for; else the last whose map has at least this many rows and columns; else the first."""
        if self.args.stage is not None:
            return _index(self.args.stage, len(self.model.layers), "stage", "the model")
        return last_stage(self.images, len(self.model.layers), least)

    def block(self, stage: int) -> int:
        return _index(self.args.block, len(self.model.layers[stage].blocks), "block", f"stage {stage}")

    def batches(self, what: str) -> Iterator[Tensor]:
        return iter(tqdm(self.images.split(BATCH), desc=what, unit="batch", disable=None, leave=False))


Drawn = tuple[Figure, dict[str, np.ndarray]]


def _states(run: Run) -> Drawn:
    stage = run.stage(least=14)
    block = run.block(stage)
    parts = zip(*(states(run.model, batch, stage, block) for batch in run.batches("states")), strict=True)
    found = States(*map(torch.cat, parts))
    title = f"States of {run.size}, {run.weights}: stage {stage}, block {block}"
    figure = draw_states(run.pictures, found, title, run.names, run.args.colour, run.args.channels)
    return figure, {key: value.numpy() for key, value in found._asdict().items()}


def _erf(run: Run) -> Drawn:
    stage = run.stage(least=4)
    stride = 2 ** (stage + 2)
    size = [math.ceil(side / stride) for side in run.images.shape[2:]]
    position = _position(run.args.position, size, f"the map of stage {stage}")
    fields = {}
    for name, model in _compared(run):
        if name in fields:
            raise UserError(f"--beside: {_one_line(name)} is there twice; name it once")
        index = stage if isinstance(model, SpatialMamba) else _map_of_stride(model, stride, name)
        batches = run.batches(name.replace("\n", ", "))
        try:
            fields[name] = sum(effective_receptive_field(model, batch, position, index) for batch in batches).numpy()
        except UserError as error:  # a peer that rounds sizes down has a smaller map
            raise UserError(f"{_one_line(name)}: {error}") from error
        except (RuntimeError, ValueError, AssertionError) as error:  # what timm's models say to sizes they do not take
            if model is run.model:
                raise
            height, width = run.images.shape[2:]
            reason = str(error).partition("\n")[0]
            raise UserError(f"--beside {_one_line(name)}: cannot take images of {height}x{width} ({reason})") from error
    title = f"Effective receptive fields of a position at stride {stride}: sums over {_count(run.images)}"
    return draw_receptive_fields(fields, position, stride, title), {
        _one_line(name).replace(" ", "_"): scores for name, scores in fields.items()
    }


def _compared(run: Run) -> Iterator[tuple[str, nn.Module]]:
    """The model, before training too if it is trained, and those beside it, one at a time."""
    if run.loaded.trained:
        yield f"{run.size}\nat initialisation", load(run.size).model
    yield f"{run.size}\n{run.weights}", run.model
    for peer in run.args.beside:
        name, _, weights = peer.partition("=")
        yield f"{name}\n{'trained' if weights else 'at initialisation'}", _peer(name, weights, run.images)


def _one_line(name: str) -> str:
    return name.replace("\n", " ")


def _initialised(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, always with the same random numbers; those of the process stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _peer(name: str, weights: str, images: Tensor) -> nn.Module:
    """A model of timm's; random where no file of weights is given.

    Raises:
        UserError: timm has no such model, or the file does not fit.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models(f"{name}*")[:3]
        raise UserError(f"--beside: timm has no model {name!r}" + (f"; it has {', '.join(close)}" if close else ""))
    if weights and not is_file(weights):
        raise UserError(f"{weights}: no such file of weights for {name}")
    arguments = {"img_size": tuple(images.shape[2:])} if name.startswith("swin") else {}
    if weights:  # not checkpoint_path, by which timm reads no names but its own, and tables of one size alone
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
    try:
        return _initialised(lambda: timm.create_model(name, **arguments))
    except Exception as error:  # timm's models and PyTorch's reading of files raise what they like
        first = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"--beside {name}: cannot be made for these images and weights ({first})") from error


def _map_of_stride(model: nn.Module, stride: int, name: str) -> int:
    strides = [entry["reduction"] for entry in getattr(model, "feature_info", [])]
    if stride not in strides:
        raise UserError(f"--beside {_one_line(name)}: has no map of stride {stride}, only of {strides}")
    return len(strides) - 1 - strides[::-1].index(stride)


def _matrix(run: Run) -> Drawn:
    stage = run.stage(least=14)
    block = run.block(stage)
    channels = run.args.channels or None
    without, fused = [], []
    for batch in run.batches("matrix"):
        fixed = fixed_ssm(run.model, batch, stage, block, channels)
        query = _position(run.args.query, fixed.dt.shape[2:], f"the map of stage {stage}")
        without.append(fixed.row(query, fusion=False))
        fused.append(fixed.row(query))
    arrays = {"query": np.array(query), "scan": torch.cat(without).numpy(), "fused": torch.cat(fused).numpy()}
    which = f"channels {', '.join(map(str, channels))}" if channels else "all channels"
    title = f"What position {query[0]}, {query[1]} takes from the others: {run.size}, {run.weights}"
    title += f"\nstage {stage}, block {block}, {which}"
    return draw_mixing(run.pictures, arrays["scan"], arrays["fused"], query, title, run.names), arrays


def _cam(run: Run) -> Drawn:
    stage = run.stage(least=4)
    parts = zip(*(class_activation(run.model, batch, stage=stage) for batch in run.batches("cam")), strict=True)
    maps, classes, probabilities = (torch.cat(part).numpy() for part in parts)
    names = run.loaded.classes
    labels = [f"{names[c] if names else f'class {c}'}: {p[c]:.0%}" for c, p in zip(classes, probabilities, strict=True)]
    figure = draw_activation(
        run.pictures, maps, labels, f"Grad-CAM of {run.size}, {run.weights}: stage {stage}", run.names
    )
    return figure, {"maps": maps, "classes": classes, "probabilities": probabilities}


def _count(images: Tensor) -> str:
    return f"{len(images)} image{'s' if len(images) > 1 else ''}"


FIGURES: dict[str, Callable[[Run], Drawn]] = {"states": _states, "erf": _erf, "matrix": _matrix, "cam": _cam}


def load(source: str, weights: str = "model") -> Loaded:
    """A checkpoint's classifier, or one of `VARIANTS` at its initialisation, always the same.

    Raises:
        UserError: neither; or what `read_model` raises.
    """
    if source in VARIANTS:
        model = _initialised(lambda: SpatialMamba(**VARIANTS[source])).eval()
        return Loaded(model, source, None, default_config(), False)
    if not is_file(source):
        raise UserError(f"{source}: no such checkpoint, nor one of the models {', '.join(VARIANTS)}")
    model, classes, config = read_model(source, weights)
    return Loaded(model, variant_of(model.state_dict()), classes, config, True)


def image_transform(config: CfgNode, size: int | str | None = None) -> Callable:
    """The evaluation transform of a checkpoint's config; with a size, of that one; with "own", normalisation alone."""
    if size == "own":
        normalise = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        return transforms.Compose([transforms.ToTensor(), normalise])
    if size is not None:
        config = config.clone()
        config.defrost()
        config.DATA.IMG_SIZE = size
    return eval_transform(config)


def read_images(paths: Sequence[str], transform: Callable) -> Tensor:
    """Normalised images (B, 3, H, W).

    Raises:
        UserError: there are none, one cannot be read, or they differ in size.
    """
    if not paths:
        raise UserError("no images: name at least one after the model")
    images = [transform(read_image(path)) for path in paths]
    sizes = [tuple(image.shape[1:]) for image in images]
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            own, first = (f"{height}x{width}" for height, width in (size, sizes[0]))
            raise UserError(f"{path}: is {own}, but {paths[0]} is {first}; pass --size with a number of pixels")
    return torch.stack(images)


def explain(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: bad input of any kind.
    """
    wanted = args.figures or list(FIGURES)
    loaded = load(args.source, args.weights)
    images = read_images(args.images, image_transform(loaded.config, args.size))
    names = ["/".join(Path(path).with_suffix("").parts[-2:])[-16:] for path in args.images]
    run = Run(args, loaded, images, [picture_of(image) for image in images], names)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out}: cannot be made ({error}); name another folder") from error
    for name in wanted:
        if name == "cam" and not args.figures and (reason := no_class_activation(loaded.model)):
            print(printable(f"cam is not drawn: {reason}"))
            continue
        figure, arrays = FIGURES[name](run)
        _write(args.out, name, figure, arrays | {"images": images.numpy()})


def _write(folder: Path, name: str, figure: Figure, arrays: dict[str, np.ndarray]) -> None:
    for path, write in (
        (folder / f"{name}.png", lambda file: figure.savefig(file, format="png")),
        (folder / f"{name}.npz", lambda file: np.savez_compressed(file, **arrays)),
    ):
        write_atomically(path, write)
        print(printable(f"wrote {path}"))


def _size(text: str) -> int | str:
    if text == "own":
        return text
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"must be 'own' or a number of pixels up to {LARGEST_SIZE}, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > LARGEST_PORT:
        raise argparse.ArgumentTypeError(f"must be a number up to {LARGEST_PORT}, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Of the command line; its arguments are what `explain` takes."""
    found = argparse.ArgumentParser(
        description="Draw what a model sees in images, as PNG, and write the arrays as .npz.", allow_abbrev=False
    )
    found.add_argument("source", metavar="CHECKPOINT|MODEL", help=f"a checkpoint, or one of {', '.join(VARIANTS)}")
    found.add_argument("images", nargs="*", metavar="IMAGE", help="image files, a row in each figure")
    found.add_argument("--out", type=Path, metavar="DIR", help="folder for the figures")
    found.add_argument("--serve", action="store_true", help="in place of --out: a local page to drop images on")
    found.add_argument("--port", type=_port, help="of the page; 0 for any that is free")
    found.add_argument("--figures", nargs="+", choices=tuple(FIGURES), help="by default all that can be made")
    found.add_argument("--weights", choices=("model", "model_ema"), default="model", help="which of a checkpoint's")
    found.add_argument(
        "--size", type=_size, help="of the images: pixels, or 'own'; by default as the checkpoint is evaluated"
    )
    found.add_argument("--stage", type=int, help="by default the last whose map is large enough to look at")
    found.add_argument("--block", type=int, default=-1, help="of the stage, for states and matrix; by default the last")
    found.add_argument("--colour", choices=("mean", "pca"), default="mean", help="what states are drawn by")
    found.add_argument("--channels", type=int, nargs="+", default=[], help="these alone, for states and matrix")
    found.add_argument("--query", type=int, nargs=2, metavar=("Y", "X"), help="position in the map, for the matrix")
    found.add_argument("--position", type=int, nargs=2, metavar=("Y", "X"), help="position in the map, for erf")
    found.add_argument(
        "--beside", nargs="*", default=PEERS, metavar="NAME[=WEIGHTS]", help="timm's models to draw beside, for erf"
    )
    return found


def _serve(args: argparse.Namespace) -> None:
    from classification import explain_page  # which imports this module

    loaded = load(args.source, args.weights)
    title = f"{loaded.size}, {Path(args.source).name if loaded.trained else 'at initialisation'}"
    explain_page.serve(
        explain_page.Viewer(loaded, args.size), title, explain_page.PORT if args.port is None else args.port
    )


def _parse_args() -> argparse.Namespace:
    found = parser()
    args = found.parse_args()
    if args.serve and (args.images or args.out):
        found.error("--serve takes no images and no --out: images are dropped on the page")
    if not args.serve and not args.out:
        found.error("--out DIR is needed, for the figures; or --serve, for the page")
    if not args.serve and args.port is not None:
        found.error("--port goes with --serve")
    return args


def main() -> None:
    args = _parse_args()
    escape_on_streams()
    try:
        (_serve if args.serve else explain)(args)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")


if __name__ == "__main__":
    main()
