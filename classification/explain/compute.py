"""States, the matrix, effective receptive fields and class activation, as arrays. The model is left as it was."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classification.errors import UserError
from classification.models import SpatialMamba
from classification.models.spatialmamba import Block, StateFusion, StructureAwareSSM, to_planes

INSTALL_GRAD_CAM = (
    "pip install grad-cam, or beside OpenMMLab, which has OpenCV, pip install --no-deps -r requirements-explain.txt"
)


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
    stage = checked_index(stage, len(layers), "stage", "the model")
    blocks = layers[stage].blocks
    return blocks[checked_index(block, len(blocks), "block", f"stage {stage}")]


def checked_index(value: int, count: int, kind: str, owner: str) -> int:
    if not -count <= value < count:
        plural = f"{kind}es" if kind.endswith("s") else f"{kind}s"
        raise UserError(f"no {kind} {value}: {owner} has {plural} 0 to {count - 1}")
    return value % count


def last_stage(images: Tensor, stages: int, least: int) -> int:
    """Number of the last stage whose map of these images has at least `least` rows and columns; 0 if none has."""
    smallest = min(images.shape[2:])
    return max((i for i in range(stages) if math.ceil(smallest / 2 ** (i + 2)) >= least), default=0)


def checked_position(position: tuple[int, int] | None, size: Sequence[int], of: str) -> tuple[int, int]:
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
    channels = [checked_index(c, x.shape[1], "channel", "the block") for c in channels]
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
    return fixed.row(checked_position(query, fixed.dt.shape[2:], f"the map of stage {stage}"), fusion)


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
        y, x = checked_position(position, found.shape[2:], "the map")
        (gradient,) = torch.autograd.grad(found[:, :, y, x].sum(), images)
    return gradient.double().abs().sum((0, 1))


def _feature_map(model: nn.Module, images: Tensor, stage: int | None) -> Tensor:
    """(B, C, H, W) of a stage."""
    if not hasattr(model, "forward_intermediates"):
        maps = model(images)
        maps = list(maps) if isinstance(maps, list | tuple) else [maps]
        found = maps[-1 if stage is None else checked_index(stage, len(maps), "stage", "the model")]
        if not isinstance(found, Tensor) or found.dim() != 4:
            raise UserError(f"{type(model).__name__} returns no map; pass its backbone, as `backbone_of` finds it")
        return to_planes(found) if getattr(model, "output_fmt", "NCHW") == "NHWC" else found
    stages = len(model.layers if isinstance(model, SpatialMamba) else model.feature_info)
    index = stages - 1 if stage is None else checked_index(stage, stages, "stage", "the model")
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
    chosen = None if classes is None else [checked_index(c, count, "class", "the model") for c in classes]
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
