"""Parameters and FLOPs of a toolchain's model, with the backbone's custom operators counted."""

import torch
from fvcore.nn import FlopCountAnalysis, parameter_count
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from classification.errors import UserError
from classification.flops import analyse

BOX_PROPOSALS, MASK_PROPOSALS = 1000, 100  # for each image, as published figures count them


class _TwoStage(nn.Module):
    """A two-stage detector up to its heads' outputs, for a fixed number of equal proposals.

    In mmdet's own model, the number of proposals after suppression depends on the weights.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list:
        maps = self.model.extract_feat(images)
        height, width = images.shape[2:]
        rois = images.new_tensor([[0, 0, 0, width / 2, height / 2]]).repeat(BOX_PROPOSALS, 1)
        head = self.model.roi_head
        outputs = [self.model.rpn_head(maps), head._bbox_forward(maps, rois)["cls_score"]]
        if head.with_mask:
            outputs.append(head._mask_forward(maps, rois[:MASK_PROPOSALS])["mask_preds"])
        if hasattr(self.model, "semantic_head"):  # of a panoptic model
            outputs += self.model.semantic_head(maps).values()
        return outputs


class _WithSizes(nn.Module):
    """A detector of mmdet's DETR family, which masks what lies outside each image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list:
        size = tuple(images.shape[2:])
        sample = BaseDataElement(metainfo=dict(img_shape=size, batch_input_shape=size))
        return self.model(images, [sample])


UNCOUNTED = ("mmdet.MaskFormerHead", "mmseg.MaskFormerHead", "mmseg.Mask2FormerHead", "mmseg.PointHead")


def count_model_flops(model: nn.Module, size: tuple[int, int]) -> FlopCountAnalysis:
    """Count the FLOPs of one image of `size` (height, width) in evaluation mode.

    Raises:
        UserError: a detector for which no number of proposals is defined, or a head that needs more than maps.
    """
    model = revert_sync_batchnorm(model).eval()
    kinds = {f"{type(part).__module__.partition('.')[0]}.{type(part).__name__}" for part in model.modules()}
    if uncounted := kinds & set(UNCOUNTED):
        raise UserError(f"FLOPs are not counted for {uncounted.pop()}: its forward needs more than maps")
    if hasattr(model, "roi_head"):
        if type(model.roi_head).__name__ != "StandardRoIHead":
            raise UserError(f"FLOPs are counted for mmdet's StandardRoIHead, not for {type(model.roi_head).__name__}")
        model = _TwoStage(model)
    elif hasattr(model, "forward_transformer"):
        model = _WithSizes(model)
    return analyse(model, torch.zeros(1, 3, *size))


def complexity_table(cfg: Config, size: tuple[int, int]) -> str:
    """Return a table of the parameters and FLOPs of the config's model and of its parts."""
    model = MODELS.build(cfg.model)
    counted, parameters = count_model_flops(model, size), parameter_count(model)
    prefix = "model." if f"model.{next(model.named_children())[0]}" in counted.by_module() else ""
    rows = [f"| | parameters, M | FLOPs at {size[0]}x{size[1]}, G |", "|---|---|---|"]
    for name in ("", *(name for name, _ in model.named_children() if parameters[name])):
        flops = counted.by_module()[f"{prefix}{name}".rstrip(".")]
        rows.append(f"| {name or 'all'} | {parameters[name] / 1e6:.4g} | {flops / 1e9:.4g} |")
    return "\n".join(rows)
