"""Computes states, the matrix, effective receptive fields and class activation. The model stays as it was."""

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
    "pip install grad-cam; with OpenMMLab, which brings OpenCV, pip install --no-deps -r requirements-explain.txt"
)


# ----- keeping the model as it was


def with_gradients(function: Callable) -> Callable:
    """Make a function run with gradients enabled, even if the caller is in inference mode."""
    return torch.inference_mode(False)(torch.enable_grad()(function))


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside, and afterwards restore each module's mode and each parameter's gradient.

    Modes are set one by one, not by `model.eval()`, because some modules fold weights or freeze others in `train`.
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
    """Find the Spatial-Mamba in a model: the model itself, or a part of a detector, a segmenter or a timm extractor.

    Raises:
        UserError: the model holds none.
    """
    found = next((module for module in model.modules() if isinstance(module, SpatialMamba)), None)
    if found is None:
        raise UserError(f"{type(model).__name__}: holds no Spatial-Mamba")
    return found


def block_at(model: nn.Module, stage: int, block: int) -> Block:
    """Find a block by the numbers of its stage and of the block in it. Negative numbers count from the end.

    Raises:
        UserError: there is no such stage or block.
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
    """Return a valid (row, column), by default the centre."""
    height, width = size
    y, x = (height // 2, width // 2) if position is None else position
    if not (0 <= y < height and 0 <= x < width):
        raise UserError(f"no position {y} {x}: {of} has rows 0 to {height - 1} and columns 0 to {width - 1}")
    return y, x


# ----- states


class States(NamedTuple):
    """What one block's state space model computes. x and y have the model's dtype; states are at least float32.

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

    The pass always runs in evaluation mode: batch norm uses its running statistics and does not update them, and
    nothing is dropped. So a model gives the same states in training and in evaluation.

    Args:
        model: a Spatial-Mamba in any form, or a model that holds one.
        images: (B, C, H, W), normalised, of any size; on the model's device.
        stage: number of the stage; a negative number counts from the end.
        block: number of the block in the stage; a negative number counts from the end.

    Raises:
        UserError: no such stage or block, or no Spatial-Mamba in the model.
        ValueError: images of another shape.
    """
    (found,) = states_at(model, images, [(stage, block)])
    return found


@torch.no_grad()
def states_at(model: nn.Module, images: Tensor, places: Sequence[tuple[int, int]]) -> list[States]:
    """`states` of several (stage, block), from a single forward pass."""
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
    """Compute h' with the module itself: its result y = sum_n C_n h'_n + D x is h'_n for one state, C = 1 and D = 0."""
    single = h.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B, D, N, H, W) -> (B N, D, 1, H, W)
    ones, nothing = torch.ones_like(single[:, 0]), torch.zeros_like(single[:, :, 0])
    fused = fusion(single, ones, h.new_zeros(h.shape[1]), nothing)
    return fused.unflatten(0, (h.shape[0], h.shape[2])).transpose(1, 2)


# ----- the matrix: at fixed Delta, B and C a state space model is linear in x, y = M x (arXiv 2410.15091)

LARGEST_MATRIX = 2**31  # bytes
COLUMNS_AT_ONCE = 2**22  # elements of h in a batch of columns


class FixedSSM:
    """One block's state space model at fixed Delta, B and C, in float64. It is then a linear map of x.

    The map does not mix channels, so each channel has its own matrix.

    Args:
        ssm: the module; this class copies it.
        x: (B, D, H, W); Delta, B and C are computed from it.
        channels: the K of D channels to keep.
    """

    def __init__(self, ssm: StructureAwareSSM, x: Tensor, channels: Sequence[int]):
        self.ssm = copy.deepcopy(ssm).double().requires_grad_(False)
        dt, self.B, self.C = self.ssm.select(x.double())
        self.dt = dt[:, channels]
        _keep(self.ssm, ("dt_projs_bias", "A_logs", "Ds"), channels)
        _keep(self.ssm.state_fusion, ("kernel_3", "kernel_3_1", "kernel_3_2"), channels)

    def __call__(self, x: Tensor, fusion: bool = True) -> Tensor:
        """Map x (B, K, H, W) to y of the same shape: sum_n C_n h'_n + D x, or sum_n C_n h_n + D x without `fusion`."""
        return self._apply(x, self.dt, self.B, self.C, fusion)

    def columns(self, image: int, fusion: bool = True) -> Tensor:
        """M of one image, (K, L, L) with L = H W. A column is y for a unit impulse."""
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
        """M's row for one position of each image, as a map (B, K, H, W). It is the gradient of y at that position."""
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


@torch.inference_mode(False)  # autograd in `FixedSSM.row` cannot use inference tensors
@torch.no_grad()
def fixed_ssm(
    model: nn.Module, images: Tensor, stage: int, block: int, channels: Sequence[int] | int | None = None
) -> FixedSSM:
    """A block's `FixedSSM` for these images, from one forward pass up to its stage. Arguments: see `mixing_matrix`."""
    ssm = block_at(model, stage, block).self_attention
    ((_, x, _),) = _observe(model, images, [ssm.state_fusion], stage % len(backbone_of(model).layers))
    channels = [channels] if isinstance(channels, int) else range(x.shape[1]) if channels is None else channels
    channels = [checked_index(c, x.shape[1], "channel", "the block") for c in channels]
    with undisturbed(ssm):  # without gradients, which deepcopy would copy
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

    Positions i and j are in raster order, and a_t = exp(Delta_t A). Without fusion,
    M_ij = sum_n C_i,n (a_{j+1} ... a_i) Delta_j B_j,n for j <= i, and 0 for j > i; D is added on the diagonal. Fusion
    mixes the rows of M: each state becomes a weighted sum of the states of 25 positions. The paper compares both forms
    with linear attention.

    Args:
        model: as for `states`.
        images: as for `states`.
        stage: number of the stage; a negative number counts from the end.
        block: number of the block; a negative number counts from the end.
        channels: numbers of the K channels; None for all D.
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
            "name fewer channels, or use mixing_row, which computes single rows"
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
    """The row of `mixing_matrix` for one position, as a map, computed without the rest of the matrix.

    Args:
        query: (row, column) in the block's map; None for its centre. Other arguments as for `mixing_matrix`.

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
    """How strongly each pixel changes one position of a stage's map: the sum of |gradient| over images and colours.

    The gradient is that of the sum of the position's channels (arXiv 1701.04128; RepLKNet, arXiv 2203.06717, appendix).
    RepLKNet takes the gradient's positive part; this function takes its magnitude. The map is the stage's output
    without the final norm, because right after a LayerNorm at its initialisation the channels add up to a constant.

    Args:
        model: a model with timm's `forward_intermediates`, or one that returns a map or a list of maps. A map is
            (B, C, H, W), or (B, H, W, C) if `output_fmt` is "NHWC". It runs in evaluation mode, as for `states`.
        images: (B, C, H, W), normalised; on the model's device.
        position: (row, column) in the map; None for its centre.
        stage: number of the map; a negative number counts from the end; None for the last.

    Returns:
        Scores (H, W) of the images' size, float64, not negative.

    Raises:
        UserError: no such stage or position, or the model returns no map.
    """
    images = images.detach().clone().requires_grad_()  # a copy, because inference tensors cannot require gradients
    with undisturbed(model):
        found = _feature_map(model, images, stage)
        y, x = checked_position(position, found.shape[2:], "the map")
        (gradient,) = torch.autograd.grad(found[:, :, y, x].sum(), images)
    return gradient.double().abs().sum((0, 1))


def _feature_map(model: nn.Module, images: Tensor, stage: int | None) -> Tensor:
    """The map of a stage, (B, C, H, W)."""
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

    Pixels count in descending order of their scores, wherever they are. RepLKNet (arXiv 2203.06717) takes the smallest
    square around the centre, which has at least as many pixels. But the centre of a field can be elsewhere: strided
    convolutions may not be centred on the position's pixels, and a scan may reach further back than ahead.

    Args:
        scores: not negative, of any shape.
        share: above 0, up to 1.

    Raises:
        UserError: the share is out of range, or scores are negative, not finite or all 0.
    """
    ordered = scores.double().flatten().sort(descending=True).values
    if not 0 < share <= 1:
        raise UserError(f"share is {share}, but must be above 0 and at most 1")
    if not (torch.isfinite(ordered).all() and ordered[-1] >= 0 and ordered[0] > 0):
        raise UserError("scores must be finite and not negative, and one of them above 0")
    held = ordered.cumsum(0)
    # The factor allows for rounding of the sum. Otherwise a share that is met exactly could count one pixel too many.
    return (int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1) / len(ordered)


# ----- class activation


@with_gradients
def class_activation(
    model: nn.Module, images: Tensor, classes: Sequence[int] | None = None, stage: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Grad-CAM (arXiv 1610.02391) at the output of a stage's last block, computed by the package pytorch-grad-cam.

    Blocks return tokens (B, H, W, C). The package gets them as planes.

    Args:
        model: a classifier.
        images: (B, C, H, W), normalised; on the model's device.
        classes: one for each image; by default the most likely class of each.
        stage: number of the stage; a negative number counts from the end.

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
    # The package converts maps and logits to NumPy, which has no bfloat16. So maps become float32 below, and targets
    # are chosen here.
    targets = [lambda logits: logits[logits.argmax()]] * len(images)
    if chosen is not None:
        targets = [lambda logits, c=c: logits[c] for c in chosen]
    with undisturbed(model), contextlib.ExitStack() as hooks:
        cam = GradCAM(model, [layer], reshape_transform=lambda t: to_planes(t).float())
        hooks.callback(cam.activations_and_grads.release)  # not by its own `with`, which hides an IndexError
        maps = cam(images, targets)
        probabilities = cam.outputs.detach().float().softmax(1)
    found = cam.outputs.argmax(1) if chosen is None else torch.tensor(chosen, device=probabilities.device)
    return torch.from_numpy(maps), found, probabilities


def no_class_activation(model: nn.Module) -> str:
    """The reason why class activation is impossible, or an empty string."""
    if not backbone_of(model).num_classes:
        return "the model has no head, so no classes"
    try:
        import pytorch_grad_cam  # noqa: F401
    except ImportError as error:  # pytorch-grad-cam or OpenCV, which it needs
        return f"pytorch-grad-cam is missing ({error}); {INSTALL_GRAD_CAM}"
    return ""
