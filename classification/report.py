"""What a run came to: a short table on the console, its learning curve and validation predictions as PNG.

    python -m classification.report output/spatialmamba_micro/digits --data-path data/digits

reads metrics.jsonl, evaluation.json (if the checkpoint was evaluated again) and best.pth, and writes
learning_curve.png and predictions.png beside them.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.datasets import ImageFolder
from yacs.config import CfgNode

from classification.checkpoint import load_weights, num_classes, read_checkpoint, state_dicts
from classification.data.build import eval_transform, image_folder
from classification.errors import UserError
from classification.models import VARIANTS, SpatialMamba

GRID_ROWS, GRID_COLUMNS = 6, 10


def read_metrics(folder: Path) -> list[dict]:
    """The epochs of a run in order; an epoch that a resumed run repeated counts as last written."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the folder of a run, OUTPUT/MODEL.NAME/TAG")
    try:
        epochs = {line["epoch"]: line for line in map(json.loads, path.read_text().splitlines())}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error!r}); main.py writes one JSON object a line") from error
    if not epochs:
        raise UserError(f"{path}: holds no epochs yet")
    return [epochs[epoch] for epoch in sorted(epochs)]


def summary(folder: Path, metrics: list[dict], checkpoint: dict) -> str:
    """The run in a table: where training ended, and what a second process measured on the saved weights."""
    weights = state_dicts(checkpoint, folder / "best.pth")["model"]
    trained = {m["epoch"]: m["model"]["top1"] for m in metrics}.get(checkpoint["epoch"], math.nan)
    rows = [
        ("parameters", f"{sum(v.numel() for k, v in weights.items() if _is_parameter(k)):,}"),
        ("epochs", f"{len(metrics)} in {sum(m['seconds'] for m in metrics):.0f} s of training"),
        (f"top-1 in training, epoch {checkpoint['epoch']}", f"{trained:.3f} %"),
    ]
    evaluation = folder / "evaluation.json"
    if evaluation.is_file():
        again = json.loads(evaluation.read_text())["model"]
        rows.append((f"top-1 evaluated again, {again['images']} images", f"{again['top1']:.3f} %"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _is_parameter(key: str) -> bool:
    return not key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def draw_learning_curve(metrics: list[dict]) -> Figure:
    """Training loss, and validation top-1 of the model and its EMA, over the epochs."""
    epochs = [m["epoch"] + 1 for m in metrics]
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    loss.plot(epochs, [m["loss"] for m in metrics])
    loss.set(xlabel="epoch", ylabel="training loss (mixup, MESA included)")
    for key, label in (("model", "model"), ("model_ema", "EMA")):
        if key in metrics[0]:
            accuracy.plot(epochs, [m[key]["top1"] for m in metrics], label=label)
    accuracy.set(xlabel="epoch", ylabel="validation top-1 (%)")
    accuracy.legend(loc="lower right")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    return figure


@torch.no_grad()
def draw_predictions(model: SpatialMamba, dataset: ImageFolder) -> Figure:
    """A grid of validation images with the predicted class above each; a wrong one in red, with the true class."""
    count = min(GRID_ROWS * GRID_COLUMNS, len(dataset))
    indices = torch.linspace(0, len(dataset) - 1, count).round().int().tolist()
    samples = [dataset[i] for i in indices]
    predicted = model(torch.stack([image for image, _ in samples])).argmax(1).tolist()
    figure, axes = plt.subplots(GRID_ROWS, GRID_COLUMNS, figsize=(10, 7), layout="constrained")
    for cell in axes.flat:
        cell.axis("off")
    for cell, index, guess, (_, target) in zip(axes.flat, indices, predicted, samples, strict=False):
        cell.imshow(Image.open(dataset.samples[index][0]).convert("RGB"))
        right = guess == target
        title = dataset.classes[guess] if right else f"{dataset.classes[guess]}, is {dataset.classes[target]}"
        cell.set_title(title, color="black" if right else "red", fontsize=10)
    figure.suptitle(f"Predictions on {count} validation images, evenly spaced over the classes")
    return figure


def report(folder: Path, data_path: str) -> None:
    metrics = read_metrics(folder)
    path = folder / "best.pth"
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("config"), str):
        raise UserError(f"{path}: has no 'config', so it was not saved by main.py")
    config = CfgNode.load_cfg(checkpoint["config"])
    state = state_dicts(checkpoint, path)["model"]
    model = SpatialMamba(num_classes=num_classes(state) or 0, **VARIANTS[config.MODEL.NAME]).eval()
    load_weights(model, state, path)
    dataset = image_folder(data_path, "val", eval_transform(config))
    if len(dataset.classes) != model.num_classes:
        raise UserError(f"{data_path}: has {len(dataset.classes)} classes, the checkpoint {model.num_classes}")

    figures = {
        "learning_curve.png": draw_learning_curve(metrics),
        "predictions.png": draw_predictions(model, dataset),
    }
    print(summary(folder, metrics, checkpoint))
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
        print(f"wrote {folder / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Summarise a run and draw its learning curve and predictions.")
    parser.add_argument("folder", type=Path, help="of the run, OUTPUT/MODEL.NAME/TAG")
    parser.add_argument("--data-path", required=True, metavar="DIR", help="image folder with val/")
    args = parser.parse_args()
    mpl.use("Agg")
    try:
        report(args.folder, args.data_path)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
