"""Steps and predictions of Mask R-CNN in numbers, to see that mmcv-lite with mmcv_ext gives those of full mmcv.

    python tests/compare_mmcv.py lite.pt             in the one environment
    python tests/compare_mmcv.py full.pt lite.pt     in the other: prints the largest difference

The exit status is 1 if that is more than 1e-6.
Five updates on random images and boxes, then the detections on others; on a GPU if there is one.
"""

import argparse
import sys
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmcv import _ext
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope

CONFIG = Path(__file__).parents[1] / "detection/configs/spatialmamba/mask_rcnn_spatialmamba_micro_digits.py"
CLASSES, STEPS, ALLOWED = 10, 5, 1e-6


def numbers() -> dict[str, torch.Tensor]:
    """Each loss and gradient norm of the updates, and scores, boxes, labels and masks of the detections."""
    cfg = Config.fromfile(CONFIG)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    detector = MODELS.build(cfg.model).train()
    if torch.cuda.is_available():
        detector = detector.cuda()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    found = {}
    for step in range(STEPS):
        losses = detector(**detector.data_preprocessor(inputs(step), training=True), mode="loss")
        total, named = detector.parse_losses(losses)
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(detector.parameters(), 35.0)
        optimizer.step()
        found |= {f"{name} {step}": value.detach().cpu() for name, value in named.items()}
        found[f"gradient norm {step}"] = norm.cpu()
    with torch.no_grad():
        predicted = detector.eval().test_step(inputs(STEPS))
    for i, sample in enumerate(predicted):
        instances = sample.pred_instances
        for name in ("scores", "bboxes", "labels", "masks"):
            found[f"{name} of image {i}"] = instances[name].cpu().double()
    return found


def inputs(seed: int) -> dict:
    np.random.seed(seed)  # what demo_mm_inputs draws from
    return demo_mm_inputs(2, [[3, 128, 128], [3, 120, 96]], num_items=[4, 6], num_classes=CLASSES, with_mask=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file that the numbers are written to")
    parser.add_argument("other", nargs="?", help="file to compare them with")
    args = parser.parse_args()
    found = numbers()
    torch.save(found, args.out)
    print(f"mmcv {mmcv.__version__}, operators of {_ext.__file__}: {len(found)} tensors, loss {found['loss 0']:.9g}")
    if not args.other:
        return 0
    other = torch.load(args.other, weights_only=True)
    assert found.keys() == other.keys()
    worst = 0.0
    for name, value in found.items():
        if value.shape != other[name].shape:
            sys.exit(f"{name}: {tuple(value.shape)} and {tuple(other[name].shape)}")
        difference = (value - other[name]).abs().max() / value.abs().max().clamp(min=1e-12) if value.numel() else 0.0
        worst = max(worst, float("inf") if difference != difference else float(difference))  # NaN is no agreement
    print(f"largest difference, of the largest value of a tensor: {worst:.3g}")
    return int(not worst <= ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
