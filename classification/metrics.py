"""Write what a run measures, while it runs, as JSON lines and TensorBoard scalars; and read the JSON lines."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from classification.errors import UserError, is_file

EPOCHS, STEPS, TENSORBOARD = "metrics.jsonl", "steps.jsonl", "tensorboard"
ONE_CLASS = "there is one class, so every prediction is right: accuracy says nothing"
COUNT_AS_WRONG = "images that could not be read count as wrong"  # where the best epoch is chosen


class MetricsLog:
    """Appends epochs to metrics.jsonl, reported steps to steps.jsonl, and both to `tensorboard/` in a run's folder.

    A line that was cut off when the run was killed is removed first. The files hold an epoch or step that a resumed run
    repeats twice; `read_lines` uses the last of the two.
    """

    def __init__(self, folder: Path, updates: int | None, tensorboard: bool = True):
        """
        Args:
            folder: the run's folder.
            updates: number of updates made so far. TensorBoard drops its values of later updates, which the interrupted
                run did not save. None: updates now have other batches than before, so TensorBoard keeps all values.
            tensorboard: whether to write TensorBoard scalars.
        """
        self.folder = folder
        with self._writing():
            for name in (EPOCHS, STEPS):
                _drop_partial_line(folder / name)
            self.files = {name: (folder / name).open("a") for name in (EPOCHS, STEPS)}
            _pass_over_errors_of_writers()
            purge_step = None if updates is None else updates + 1
            self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge_step) if tensorboard else None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UnicodeError) as error:  # the latter for a folder whose name is no UTF-8
            raise UserError(
                f"{self.folder}: metrics cannot be written ({error}); the last checkpoint, if any, is whole"
            ) from error

    def step(self, values: dict[str, float]) -> None:
        """Write a step's `values`: `update`, the number of updates made so far, and scalars."""
        with self._writing():
            self._write(STEPS, values)
            self._draw("train", values, values["update"])

    def epoch(self, values: dict, update: int) -> None:
        """Write an epoch's `values`: `epoch`, scalars, and a dict of scalars for each evaluated set of weights."""
        with self._writing():
            self._write(EPOCHS, values)
            self._draw("epoch", values, update)
            for name, scalars in values.items():
                if isinstance(scalars, dict):
                    self._draw(f"val/{name}", scalars, update)
            if self.writer:
                self.writer.flush()

    def close(self) -> None:
        with suppress(OSError):  # each line is flushed when it is written
            for file in self.files.values():
                file.close()
            if self.writer:
                self.writer.close()

    def _write(self, name: str, values: dict) -> None:
        self.files[name].write(json.dumps(values) + "\n")
        self.files[name].flush()

    def _draw(self, group: str, values: dict, update: int) -> None:
        if self.writer:
            for key, value in values.items():
                if isinstance(value, int | float) and key != "update":
                    self.writer.add_scalar(f"{group}/{key}", value, update)


def _pass_over_errors_of_writers() -> None:
    """Keep TensorBoard's thread from printing tracebacks: the next call to the writer raises its errors again."""
    otherwise = threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        of_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_writer and isinstance(args.exc_value, OSError)):
            otherwise(args)

    threading.excepthook = report


def read_lines(path: Path, *keys: str) -> list[dict]:
    """Return the objects in a file of JSON lines that lead to the last one, in the order of `keys`.

    A run that went back to an earlier checkpoint repeats epochs and steps; older objects from that place on belong to
    an abandoned branch and are left out. Steps are ordered by epoch and step, not by update, because the count of
    updates changes when the batches change. A last line that was cut off is ignored.

    Raises:
        UserError: the file is missing or of another kind.
    """
    if not is_file(path):
        raise UserError(f"{path}: no such file; name the folder of a run, OUTPUT/MODEL.NAME/TAG")
    try:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        place = itemgetter(*keys)
        lines: list[dict] = []
        for line in map(json.loads, whole.splitlines()):
            for key in keys:
                if type(line[key]) is not int:
                    raise TypeError(f"{key} is {line[key]!r}, not a whole number")
            _check_numbers({key: value for key, value in line.items() if not isinstance(value, dict)})
            for scalars in (value for value in line.values() if isinstance(value, dict)):
                _check_numbers(scalars)
            while lines and place(lines[-1]) >= place(line):
                lines.pop()
            lines.append(line)
    except (OSError, ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error!r}); main.py writes one JSON object a line") from error
    return lines


def _check_numbers(values: dict) -> None:
    """Raise a TypeError unless all are finite: matplotlib draws a text as a place of its own, and infinity nowhere."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"{key} is {value!r:.50}, not a finite number")
    if values.get("steps", 1) < 1:
        raise TypeError(f"steps is {values['steps']!r}, not a number above 0")


def _drop_partial_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def accuracy_on_all(m: dict[str, float]) -> float:
    """Return the top-1 accuracy by which epochs are compared: images that could not be read count as wrong.

    Otherwise, if a disk were away during one validation, a high accuracy on the few remaining images would make that
    epoch the best one.
    """
    unreadable = m.get("unreadable", 0)
    return m["top1"] * m["images"] / (m["images"] + unreadable) if unreadable else m["top1"]


def any_unreadable(metrics: dict) -> bool:
    """Whether validation of an epoch lacked images."""
    return any(metrics.get(name, {}).get("unreadable") for name in ("model", "model_ema"))
