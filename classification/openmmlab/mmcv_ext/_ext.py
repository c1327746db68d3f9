"""`mmcv._ext` for mmcv-lite, which lacks this compiled module: mmcv's operators by those of torchvision.

There are `nms`, `roi_align_forward` and `roi_align_backward`, called as mmcv.ops calls its own, on CPUs and GPUs. Any
other name is a function that raises NotImplementedError. Where full mmcv is installed this file is not imported.
"""

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor

INSTALL_FULL = (
    "install full mmcv: pip uninstall mmcv-lite mmcv-lite-ext, then pip install --no-build-isolation mmcv==2.1.0, "
    "which takes a compiler and minutes"
)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that stay, by falling score; one goes if its IoU with one that stays is above the threshold.

    Args:
        boxes: x1, y1, x2, y2 in pixels, (N, 4). Those of 16 bits are compared in float32.
        scores: (N,).
        iou_threshold: rounded to float32, as mmcv's is.
        offset: added to widths and heights, 0 or 1.
    """
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, scores.dtype), torch.float32)
    boxes = boxes.to(dtype)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torch.ops.torchvision.nms(boxes, scores.to(dtype), _float32(iou_threshold))


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write each RoI's averages of bilinear samples of `input` into `output`.

    Args:
        input: maps, (B, C, H, W); of 16 bits they are averaged in float32.
        rois: image, x1, y1, x2, y2, (R, 5).
        output: (R, C, aligned_height, aligned_width).
        argmax_y: of the maximum, which is not here.
        argmax_x: likewise.
        aligned_height: bins of a RoI.
        aligned_width: likewise.
        spatial_scale: pixels of the maps for a pixel of the RoIs.
        sampling_ratio: samples of a bin along each side, 0 for as many as it has pixels.
        pool_mode: 1, the average.
        aligned: whether pixels' centres are at halves.
    """
    _check_average(pool_mode)
    dtype = torch.promote_types(input.dtype, torch.float32)
    with torch.autocast(input.device.type, enabled=False):
        averages = torch.ops.torchvision.roi_align(
            *(input.to(dtype), rois.to(dtype), _float32(spatial_scale)),
            *(aligned_height, aligned_width, sampling_ratio, aligned),
        )
    output.copy_(averages)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient for the input of `roi_align_forward` into `grad_input`, that for its output being given."""
    _check_average(pool_mode)
    dtype = torch.promote_types(grad_output.dtype, torch.float32)
    with torch.autocast(grad_output.device.type, enabled=False):
        grad = torch.ops.torchvision._roi_align_backward(
            *(grad_output.to(dtype), rois.to(dtype), _float32(spatial_scale), aligned_height, aligned_width),
            *(*grad_input.shape, sampling_ratio, aligned),
        )
    grad_input.copy_(grad)


def get_compiler_version() -> str:
    """For mmengine's report on the environment."""
    return f"none, operators of torchvision {torchvision.__version__}"


def get_compiling_cuda_version() -> str:
    """Likewise."""
    return torch.version.cuda or "not available"


def _float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def _check_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(f"mmcv-lite-ext has no roi_align with pool_mode='max': {INSTALL_FULL}")


def __getattr__(name: str) -> Callable:
    """An operator that mmcv.ops wants at import and that is missing when it is called."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args, **kwargs):
        raise NotImplementedError(f"mmcv-lite-ext has no operator {name} of mmcv's: {INSTALL_FULL}")

    return missing
