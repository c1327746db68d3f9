"""Report a run, finished or not: a table on the console, and its curves and predictions as PNG.

    python -m classification.report output/spatialmamba_micro/digits [--data-path data/digits]

reads metrics.jsonl and steps.jsonl and writes learning_curve.png and training_curves.png beside them. With --data-path,
it also reads best.pth and, if the checkpoint was evaluated again, evaluation.json; it prints the table and writes
predictions.png.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from classification.checkpoint import (
    class_names_of,
    load_weights,
    num_classes,
    read_checkpoint,
    state_dicts,
    tensors_digest,
    write_atomically,
)
from classification.checkpoint_folder import BEST
from classification.config import LARGEST_SIZE, trained_with
from classification.data import escaped, names_differ
from classification.data.build import eval_transform
from classification.data.images import ImageFolder, UnreadableImageError, read_image
from classification.errors import UserError, prepare_console, printable, refuse_empty
from classification.metrics import COUNT_AS_WRONG, EPOCHS, ONE_CLASS, STEPS, accuracy_on_all, any_unreadable, read_lines
from classification.models import VARIANTS, SpatialMamba

WEIGHTS = {"model": "model", "model_ema": "EMA"}  # the weights that are validated every epoch, and their labels
GRID_ROWS, GRID_COLUMNS = 6, 10
LONGEST_TITLE = 15  # letters that fit above an image of the grid


def read_metrics(folder: Path) -> list[dict]:
    """Return the epochs of a run in order; if a resumed run repeated an epoch, the last one written counts."""
    epochs = read_lines(folder / EPOCHS, "epoch")
    if not epochs:
        raise UserError(f"{folder / EPOCHS}: holds no epochs yet")
    for line in epochs:
        if not all(isinstance(line.get(key), int | float) for key in ("loss", "seconds")):
            raise UserError(f"{folder / EPOCHS}: is damaged: its epoch {line['epoch']} has no loss and seconds")
        for found in (line[key] for key in WEIGHTS if isinstance(line.get(key), dict)):
            top1 = found.get("top1", 0)
            if not 0 <= top1 <= 100:
                raise UserError(f"{folder / EPOCHS}: is damaged: its epoch {line['epoch']} has a top1 of {top1!r:.50}")
    return epochs


def summary(folder: Path, metrics: list[dict], checkpoint: dict, data_path: str, images_digest: str) -> str:
    """Return the run as a table: the result of training, and of a second evaluation of these weights and images."""
    weights = state_dicts(checkpoint, folder / "best.pth")["model"]
    trained = float(checkpoint["max_accuracy"])  # from the checkpoint: a resumed run may have repeated the epoch
    epoch = checkpoint["epoch"]
    of_epoch = [m for m in metrics if m["epoch"] == epoch]
    of_all = "".join(f", {COUNT_AS_WRONG}" for m in of_epoch if any_unreadable(m))
    top1 = [accuracy_on_all(m["model"]) for m in of_epoch if "model" in m]
    beyond = isinstance(epoch, int) and all(m["epoch"] < epoch for m in metrics)
    if beyond or not all(math.isclose(one, trained, abs_tol=1e-6) for one in top1):
        of_all += ", of a pass that the run has given up"  # for it went back, or repeated the epoch
    rows = [
        ("parameters", f"{sum(v.numel() for k, v in weights.items() if _is_parameter(k)):,}"),
        ("epochs", f"{len(metrics)} in {sum(m['seconds'] for m in metrics):.0f} s of training"),
        (f"top-1 in training, epoch {epoch}{of_all}", f"{trained:.3f} %"),
    ]
    evaluation = folder / "evaluation.json"
    try:
        evaluated = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
        measured = [evaluated.get(key) for key in ("sha256", "data_path", "images_digest")]
        if measured == [tensors_digest(weights), str(Path(data_path).resolve()), images_digest]:
            again = evaluated["model"]
            if not 0 <= again["top1"] <= 100:
                raise ValueError(f"its top1 is {again['top1']:.50g}")
            otherwise = "".join(f", {change}" for change in evaluated.get("otherwise", ()))
            rows.append((f"top-1 evaluated again, {again['images']} images{otherwise}", f"{again['top1']:.3f} %"))
    except (ArithmeticError, AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{evaluation}: is damaged ({error!r}); evaluate the checkpoint again") from error
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _is_parameter(key: str) -> bool:
    return not key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def draw_learning_curve(metrics: list[dict]) -> Figure:
    """Draw the training loss, and the validation top-1 of the model and its EMA, over the epochs.

    An epoch whose validation could not read all images does not compare, so it is a cross beside the curve.
    """
    epochs = [m["epoch"] + 1 for m in metrics]
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    loss.plot(epochs, [m["loss"] for m in metrics])
    loss.set(xlabel="epochs trained", ylabel="training loss (mixup, MESA included)")
    for number, (key, label) in enumerate(WEIGHTS.items()):
        color = f"C{number}"
        whole = [m for m in metrics if key in m and not m[key].get("unreadable")]
        partly = [m for m in metrics if key in m and m[key].get("unreadable")]
        for found, how in (
            (whole, {"label": label}),
            (partly, {"label": f"{label}, without unreadable images", "marker": "x", "linestyle": ""}),
        ):
            if found:
                accuracy.plot([m["epoch"] + 1 for m in found], [m[key]["top1"] for m in found], color=color, **how)
    accuracy.set(xlabel="epochs trained", ylabel="validation top-1 (%)")
    accuracy.legend(loc="lower right")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    return figure


def draw_training_curves(steps: list[dict]) -> Figure:
    """Draw the reported loss, learning rate, gradient norm and speed over the epochs."""
    names = {
        "loss": "training loss, mean of the epoch so far",
        "lr": "learning rate",
        "grad_norm": "norm of the gradients",
        "images_per_second": "images/s of the first process",
    }
    lengths: dict[int, int] = {}  # number of steps of each epoch
    for s in steps:
        # Earlier versions did not write "steps"; the last step of a finished epoch is always reported.
        lengths[s["epoch"]] = s.get("steps") or max(s["step"], lengths.get(s["epoch"], 1))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for cell, (key, label) in zip(axes.flat, names.items(), strict=True):
        points = [(s["epoch"] + s["step"] / lengths[s["epoch"]], s[key]) for s in steps if key in s]
        cell.plot(*zip(*points, strict=True)) if points else cell.plot([], [])
        cell.set(xlabel="epochs trained", ylabel=label)
        cell.grid(alpha=0.3)
    return figure


@torch.no_grad()
def draw_predictions(model: SpatialMamba, dataset: ImageFolder, names: list[str]) -> Figure:
    """Draw a grid of validation images with the predicted class above each; in red, with the true class, if wrong.

    Args:
        model: in evaluation mode.
        dataset: the validation images.
        names: the names of the model's classes, in the order of its head.

    Raises:
        UserError: none of the chosen images can be read.
    """
    count = min(GRID_ROWS * GRID_COLUMNS, len(dataset))
    spread = torch.linspace(0, len(dataset) - 1, count).round().int().tolist()
    found = []  # index, predicted class and true class of each image that can be read
    for index in spread:
        if (sample := _read(dataset, index)) is not None:
            found.append((index, model(sample[0][None]).argmax().item(), sample[1]))
    if not found:
        raise UserError(f"{dataset.root}: none of the {count} images chosen for predictions can be read")
    figure, axes = plt.subplots(GRID_ROWS, GRID_COLUMNS, figsize=(10, 7), layout="constrained")
    for cell in axes.flat:
        cell.axis("off")
    size = 10 if max(map(len, names)) < 8 else 8
    for cell, (index, guess, target) in zip(axes.flat, found, strict=False):
        cell.imshow(read_image(dataset.samples[index][0]))
        truth = escaped(dataset.classes[target])
        right = names[guess] == truth
        title = printable(_title(truth) if right else _title(names[guess], truth), lines=True).replace("$", r"\$")
        cell.set_title(title, color="black" if right else "red", fontsize=size)
    figure.suptitle(f"Predictions on {len(found)} validation images, evenly spaced over the classes")
    return figure


def _title(name: str, truth: str | None = None) -> str:
    """Return the title of an image: the predicted class and, if that is wrong, the true class.

    A title that is too long for one line takes two.
    """
    whole = name if truth is None else f"{name}, is {truth}"
    lines = [whole] if truth is None or len(whole) <= LONGEST_TITLE else [name, f"is {truth}"]
    return "\n".join(
        line if len(line) <= LONGEST_TITLE else f"{line[: LONGEST_TITLE - 1].rstrip(' _-,')}…" for line in lines
    )


def _read(dataset: ImageFolder, index: int) -> tuple[Tensor, int] | None:
    try:
        return dataset[index]
    except UnreadableImageError:  # skip it; validation has logged its name
        return None


def report(folder: Path, data_path: str | None) -> None:
    metrics = read_metrics(folder)
    try:
        figures = {"learning_curve.png": draw_learning_curve(metrics)}
        if (folder / STEPS).exists():
            figures["training_curves.png"] = draw_training_curves(read_lines(folder / STEPS, "epoch", "step"))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: its {EPOCHS} or {STEPS} is damaged ({error!r}); a number is missing") from error
    said = []  # after the figures are written: whoever reads may stop, as `| head` does
    if data_path:
        path = folder / BEST
        checkpoint = read_checkpoint(path)
        model, dataset, names = _best_model_and_images(checkpoint, path, data_path)
        figures["predictions.png"] = draw_predictions(model, dataset, names)
        try:
            said.append(printable(summary(folder, metrics, checkpoint, data_path, dataset.digest()), lines=True))
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: it or {EPOCHS} does not hold what a run writes ({error!r})") from error
        said += [ONE_CLASS] * (len(names) == 1)
    if partly := [m["epoch"] for m in metrics if any_unreadable(m)]:
        said.append(
            f"in {len(partly)} of {len(metrics)} epochs, for example epoch {int(partly[0])}, not all validation images "
            "could be read: crosses in learning_curve.png"
        )
    for name, figure in figures.items():
        try:
            write_atomically(folder / name, lambda file, figure=figure: figure.savefig(file, format="png", dpi=120))
        except (ArithmeticError, ValueError) as error:  # a loss of 1e308 leaves no room for an axis
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder / name}: cannot be drawn of what {EPOCHS} and {STEPS} hold ({error})") from error
        said.append(printable(f"wrote {folder / name}"))
    print("\n".join(said), flush=True)


def _best_model_and_images(checkpoint: dict, path: Path, data_path: str) -> tuple[SpatialMamba, ImageFolder, list[str]]:
    if not isinstance(checkpoint.get("config"), str):
        raise UserError(f"{path}: has no 'config', so it was not saved by main.py")
    config = trained_with(checkpoint, str(path))
    if config.DATA.IMG_SIZE > LARGEST_SIZE:
        raise UserError(
            f"{path}: is for images of {config.DATA.IMG_SIZE} pixels; predictions are drawn up to {LARGEST_SIZE}"
        )
    state = state_dicts(checkpoint, path)["model"]
    model = SpatialMamba(num_classes=num_classes(state) or 0, **VARIANTS[config.MODEL.NAME]).eval()
    load_weights(model, state, path)
    dataset = ImageFolder(data_path, "val", eval_transform(config))
    names = class_names_of(checkpoint, path)
    if names is not None and (difference := names_differ(names, dataset.classes)):
        raise UserError(f"{path}: its classes are not those of {dataset.root}: {difference}")
    if len(dataset.classes) != model.num_classes:
        raise UserError(f"{data_path}: has {len(dataset.classes)} classes, the checkpoint {model.num_classes}")
    if names is None:
        print(printable(f"{path}: holds no names of classes; they are taken in the order of the folders"))
        names = [escaped(name) for name in dataset.classes]
    if dataset.left_out:
        print(printable(dataset.left_out))
    return model, dataset, names


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Summarise a run and draw its curves and predictions.", allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="of the run, OUTPUT/MODEL.NAME/TAG")
    parser.add_argument("--data-path", metavar="DIR", help="image folder with val/, for predictions")
    args = parser.parse_args()
    refuse_empty(parser, args)
    mpl.use("Agg")
    prepare_console()
    try:
        report(args.folder, args.data_path)
    except UserError as error:
        sys.exit(f"error: {printable(str(error))}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again as it ends


if __name__ == "__main__":
    main()
