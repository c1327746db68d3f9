"""The report reads what a run wrote, draws the two pictures, and says the accuracies as they are."""

import json
import shutil
from itertools import cycle

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from running import QUICK, ROOT, run_command

from classification.config import default_config
from classification.data.build import eval_transform
from classification.data.images import ImageFolder
from classification.errors import UserError
from classification.explain import image_transform, load
from classification.metrics import read_lines
from classification.models import spatialmamba_micro
from classification.report import draw_learning_curve, draw_predictions, draw_training_curves, read_metrics, report


def test_report_of_a_run(few_digits, tmp_path, run_main, capsys):
    arguments = ["--data-path", few_digits, "--output", tmp_path]
    run_main(*arguments, "--opts", *QUICK)
    run = tmp_path / "spatialmamba_micro/default"
    run_main(*arguments, "--pretrained", run / "best.pth")
    done = run_command("python", "-m", "classification.report", run, "--data-path", few_digits, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    best = max(m["model"]["top1"] for m in read_metrics(run))
    assert done.stdout.count(f"{best:.3f} %") == 2
    parameters = sum(p.numel() for p in spatialmamba_micro(num_classes=10).parameters())
    assert f"{parameters:,}" in done.stdout
    for path in run.glob("*.png"):
        path.unlink()
    command = f"set -o pipefail; python -m classification.report {run} --data-path {few_digits} | true"
    done = run_command("bash", "-c", command, cwd=ROOT)  # whose reader ends at once
    assert (done.returncode, done.stderr) == (0, "")
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"otherwise": ["DATA.IMG_SIZE 40 -> 32"]}))
    report(run, few_digits)
    assert "33 images, DATA.IMG_SIZE 40 -> 32  " in capsys.readouterr().out
    best_one = torch.load(run / "best.pth", weights_only=True)
    torch.save(best_one | {"epoch": "4\x1b[2K"}, run / "best.pth")  # nothing may control the terminal
    report(run, few_digits)
    assert r"epoch 4\x1b[2K" in capsys.readouterr().out
    large = best_one["config"].replace("IMG_SIZE: 32", "IMG_SIZE: 16384")  # gigabytes an image
    torch.save(best_one | {"config": large}, run / "best.pth")
    with pytest.raises(UserError, match=r"best\.pth: is for images of 16384 pixels; predictions are drawn up to 4096"):
        report(run, few_digits)
    with pytest.raises(UserError, match="the checkpoint is for images of 16384 pixels; pass --size, at most 4096"):
        image_transform(load(str(run / "best.pth")).config)
    torch.save(best_one, run / "best.pth")
    for other in (
        {"data_path": "/elsewhere"},
        {"sha256": "0"},
        {"images_digest": "0"},
    ):  # that others have replaced since
        (run / "evaluation.json").write_text(json.dumps(evaluation | other))
        report(run, few_digits)
        assert "evaluated again" not in capsys.readouterr().out
    for top1 in (150, float("nan")):
        (run / "evaluation.json").write_text(json.dumps(evaluation | {"model": {"images": 5, "top1": top1}}))
        with pytest.raises(UserError, match=r"evaluation\.json: is damaged .*its top1 is (150|nan)"):
            report(run, few_digits)
    for name in ("learning_curve.png", "predictions.png"):
        picture = imread(run / name)
        assert min(picture.shape[:2]) > 300
        assert np.std(picture[..., :3]) > 0.05  # not blank


def test_an_unfinished_epoch_is_drawn_as_far_as_it_is():
    """The last line of earlier versions does not say how many steps its epoch has."""
    steps = [{"epoch": e, "step": step, "loss": loss} for e, step, loss in ((0, 4, 3.0), (0, 8, 2.0), (1, 2, 1.0))]
    for lines, last in (([{**line, "steps": 8} for line in steps], 1.25), (steps, 2.0)):
        curve = draw_training_curves(lines).axes[0].lines[0]
        assert curve.get_xdata().tolist() == [0.5, 1.0, last]
        assert curve.get_ydata().tolist() == [3.0, 2.0, 1.0]


def test_long_names_of_classes_do_not_meet(tmp_path):
    """Each is above its own image, right or wrong."""
    names = ["American_black_bear", "W" * 40, *(f"garden spider, {i}" for i in range(8))]
    for name in names:
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "val" / name / f"{i}.png")
    dataset = ImageFolder(str(tmp_path), "val", eval_transform(default_config()))
    guesses = cycle(torch.eye(10))
    figure = draw_predictions(lambda image: next(guesses)[None], dataset, dataset.classes)
    figure.canvas.draw()
    titles = [cell.title for cell in figure.axes]
    assert {title.get_color() for title in titles} == {"black", "red"}
    edges = [title.get_window_extent() for title in titles if "W" not in title.get_text()]
    assert len(edges) > 40
    assert not any(a.overlaps(b) for i, a in enumerate(edges) for b in edges[:i])


def test_predictions_of_images_that_cannot_be_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes(b"no image")
    dataset = ImageFolder(str(tmp_path), "val", eval_transform(default_config()))
    with pytest.raises(UserError, match="val: none of the 2 images chosen for predictions can be read"):
        draw_predictions(lambda images: torch.eye(2), dataset, dataset.classes)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "a" / "0.png")
    figure = draw_predictions(lambda images: torch.eye(2)[: len(images)], dataset, dataset.classes)
    assert figure.get_suptitle() == "Predictions on 1 validation images, evenly spaced over the classes"


def test_repeated_epoch_counts_as_last_written(tmp_path):
    """And what followed it then is of a branch that was given up."""
    losses = ((0, 3.0), (1, 2.0), (2, 1.0), (1, 1.5))
    lines = [{"epoch": epoch, "loss": loss, "seconds": 1.0} for epoch, loss in losses]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path) == [lines[0], lines[3]]


def test_epochs_that_could_not_read_all_images_are_no_part_of_the_curve(tmp_path, capsys):
    """The few that were left are another measure."""
    top1 = ((50, {}), (100, {"unreadable": 32}), (60, {}))
    lines = [
        {"epoch": i, "loss": 1.0, "seconds": 1.0, "model": {"top1": a, **more}} for i, (a, more) in enumerate(top1)
    ]
    accuracy = draw_learning_curve(lines).axes[1]
    found = [(line.get_xdata().tolist(), line.get_ydata().tolist(), line.get_marker()) for line in accuracy.lines]
    assert [tuple(map(list, one[:2])) for one in found] == [([1, 3], [50, 60]), ([2], [100])]
    assert [one[2] for one in found] == ["None", "x"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(tmp_path, None)
    assert (
        "in 1 of 3 epochs, for example epoch 1, not all validation images could be read: crosses in"
        in capsys.readouterr().out
    )


def test_an_accuracy_that_counts_unreadable_images_says_so(few_digits, tmp_path, run_main, capsys):
    """It chooses the best epoch, and is lower than what validation says."""
    data = shutil.copytree(few_digits, tmp_path / "data")
    next((data / "val" / "4").iterdir()).write_bytes(b"")
    printed = run_main("--data-path", data, "--output", tmp_path, "--opts", *QUICK, "TRAIN.EPOCHS", "1")
    run = tmp_path / "spatialmamba_micro/default"
    (line,) = read_metrics(run)
    best = torch.load(run / "best.pth", weights_only=True)["max_accuracy"]
    assert best == pytest.approx(line["model"]["top1"] * 32 / 33)
    assert f"epoch 0 model: {best:.3f}% if images that could not be read count as wrong, as for best.pth" in printed
    report(run, data)
    assert f"top-1 in training, epoch 0, images that could not be read count as wrong {best:.3f} %" in " ".join(
        capsys.readouterr().out.split()
    )
    whole = {key: {"top1": best} if isinstance(one, dict) else one for key, one in line.items()}
    others = [whole, {**line, "epoch": 1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in others))
    report(run, data)
    assert f"top-1 in training, epoch 0 {best:.3f} %" in " ".join(capsys.readouterr().out.split())
    others[0] = {**whole, "model": {"top1": best - 1}}  # of a second pass; best.pth is of the first
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in others))
    report(run, data)
    expected = f"top-1 in training, epoch 0, of a pass that the run has given up {best:.3f} %"
    assert expected in " ".join(capsys.readouterr().out.split())
    (run / "metrics.jsonl").write_text(json.dumps(others[1]) + "\n")  # of a run that began from copied checkpoints
    report(run, data)
    assert f"top-1 in training, epoch 0 {best:.3f} %" in " ".join(capsys.readouterr().out.split())


def test_updates_of_other_batches_are_on_the_way(tmp_path):
    """A batch twice as large halves the number of updates so far."""
    places = [(2, 50, 150), (3, 50, 200), (4, 25, 125), (4, 10, 110)]
    lines = [json.dumps(dict(zip(("epoch", "step", "update"), place, strict=True))) for place in places]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines) + "\n")
    kept = read_lines(tmp_path / "steps.jsonl", "epoch", "step")
    assert [line["update"] for line in kept] == [150, 200, 110]


@pytest.mark.parametrize(
    ("key", "value"),
    [("loss", one) for one in ('"9.0"', "true", "[1]", "null", "-1e400", '{"loss": "b"}')] + [("steps", "-2")],
)
def test_steps_that_are_no_numbers(key, value, tmp_path):
    """matplotlib would draw a text as a place of its own."""
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "loss": 1.0, "seconds": 1.0}\n')
    (tmp_path / "steps.jsonl").write_text(f'{{"epoch": 0, "step": 1, "{key}": {value}}}\n')
    with pytest.raises(UserError, match=rf"steps\.jsonl: is damaged \(TypeError.*{key} is .*not a (finite )?number"):
        report(tmp_path, None)


def test_numbers_that_leave_no_room_for_an_axis(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "loss": 1e308, "seconds": 1.0}\n')
    with pytest.raises(
        UserError, match=r"learning_curve\.png: cannot be drawn of what metrics\.jsonl and steps\.jsonl"
    ):
        report(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        *('{"epoch": null}', '{"epoch": 0, "loss": null}', '{"epoch": 0}', '{"epoch": "0"}', "[" * 9999, "\x1b[31m"),
        f'{{"epoch": 2, "loss": 1{"0" * 400}, "seconds": 1}}',
        *(
            f'{{"epoch": 2, "loss": 1, "seconds": 1, "model": {{"top1": {a}}}}}'
            for a in ('"97"', "true", "100.1", "-1", "{}")
        ),
    ],
)
def test_damaged_metrics_are_one_line(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0, "seconds": 1.0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"is damaged"):
        report(tmp_path, None)
