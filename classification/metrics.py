"""What a run measures, written as it goes: JSON lines and TensorBoard scalars."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from classification.errors import UserError, is_file

EPOCHS, STEPS, TENSORBOARD = "metrics.jsonl", "steps.jsonl", "tensorboard"


class MetricsLog:
    """Appends epochs to metrics.jsonl, reported steps to steps.jsonl, and both to `tensorboard/` in a run's folder.

    A line that was cut off when the run was killed is removed first. An epoch or step that a resumed run repeats stands
    twice; the last one counts, as `read_lines` has it.
    """

    def __init__(self, folder: Path, updates: int | None, tensorboard: bool = True):
        """`updates` have been made; what TensorBoard holds of later ones is from a run that did not save them. None: an
        update is of other batches than it was, so their numbers say nothing of that.
        """
        self.folder = folder
        with self._writing():
            for name in (EPOCHS, STEPS):
                _drop_partial_line(folder / name)
            self.files = {name: (folder / name).open("a") for name in (EPOCHS, STEPS)}
            purge_step = None if updates is None else updates + 1
            self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge_step) if tensorboard else None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder}: metrics cannot be written ({error}); the last checkpoint is whole"
            ) from error

    def step(self, values: dict[str, float]) -> None:
        """`values` holds `update`, the updates made so far, and scalars."""
        with self._writing():
            self._write(STEPS, values)
            self._draw("train", values, values["update"])

    def epoch(self, values: dict, update: int) -> None:
        """`values` holds `epoch`, scalars, and a dict of scalars for each set of weights that was evaluated."""
        with self._writing():
            self._write(EPOCHS, values)
            self._draw("epoch", values, update)
            for name, scalars in values.items():
                if isinstance(scalars, dict):
                    self._draw(f"val/{name}", scalars, update)
            if self.writer:
                self.writer.flush()

    def close(self) -> None:
        with suppress(OSError):  # what has been written is there
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


def read_lines(path: Path, *keys: str) -> list[dict]:
    """The objects of a file of JSON lines in the order of `keys`: those on the way to the last one.

    A run that went back to an earlier checkpoint repeats them; what stood there from that place on is of a branch that
    was given up. Steps are in the order of epoch and step: updates are counted anew where a batch becomes another.

    Raises:
        UserError: the file is not there or not of this kind. A last line that was cut off is passed over.
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
            while lines and place(lines[-1]) >= place(line):
                lines.pop()
            lines.append(line)
    except (OSError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error!r}); main.py writes one JSON object a line") from error
    return lines


def _drop_partial_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
