"""The checkpoints of a run: epoch_E.pth after E epochs, epoch_E_step_S.pth S batches later, and further names."""

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TextIO

from classification.checkpoint import flush_folder, partial_path, read_checkpoint, save_checkpoint, write_atomically
from classification.checkpoint_archive import DamagedCheckpointError
from classification.errors import UserError, is_dir, is_file

logger = logging.getLogger("spatialmamba")

LATEST, BEST, BEST_EMA = "latest.pth", "best.pth", "best_ema.pth"
DAMAGED, REPLACED = ".damaged", ".replaced"
ORDER_FILE = "checkpoints.txt"


def lock_folder(folder: Path, elsewhere: str, beside: str) -> tuple[TextIO, str | None]:
    """Make a folder, and keep other runs out of it until the returned file is closed.

    Args:
        folder: the run's folder.
        elsewhere: the option that names another folder, if this one cannot be written to.
        beside: the option that names another folder, if this one is taken.

    Returns:
        the open file, and a note if the file system has no locks.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error}); choose another {elsewhere}") from error
    try:
        fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            lock_file.close()
            raise UserError(
                f"{folder}: another process is training in it; wait for that one to end, or pass another {beside}"
            ) from error
        return lock_file, f"{folder}: its file system has no locks; start one run in it at a time ({error})"
    return lock_file, None


class CheckpointFolder:
    """The checkpoints in a run's folder.

    Each checkpoint is written once, as epoch_E.pth or epoch_E_step_S.pth. latest.pth, best.pth and best_ema.pth are
    further names of a checkpoint: hard links, or copies if the file system has no hard links. The folder keeps the last
    `keep` numbered checkpoints of the run. checkpoints.txt lists them in the order in which they were written; unlike
    file times, this order does not depend on clocks or copying.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.damage_messages: list[str] = []  # messages about damaged files
        self.notes: list[str] = []  # other messages for the log
        self.to_set_aside: set[str] = set()  # names whose present files are set aside before new files take the names
        self.lock_file: TextIO | None = None
        self.files_at_start: dict[str, tuple[int, int]] | None = None

    def numbered(self) -> list[Path]:
        """Return the numbered checkpoints in the order in which they were written.

        A run may have gone on from an earlier checkpoint, so this is not the order of epochs. Checkpoints that
        checkpoints.txt does not list come first, by epoch and step.
        """
        found = {p: re.fullmatch(r"epoch_(\d+)(?:_step_(\d+))?\.pth", p.name) for p in self.folder.glob("epoch_*.pth")}
        places = {path: (int(m[1]), int(m[2] or 0)) for path, m in found.items() if m and path.is_file()}
        listed = {name: i for i, name in enumerate(self._read_order())}
        return sorted(places, key=lambda path: (listed.get(path.name, -1), places[path]))

    def own(self) -> list[Path]:
        """Return those of `numbered` that checkpoints.txt lists: the others are never removed."""
        listed = self._read_order()
        return [path for path in self.numbered() if path.name in listed]

    def _read_order(self) -> list[str]:
        path = self.folder / ORDER_FILE
        try:
            return path.read_text().splitlines() if is_file(path) else []  # a pipe would be waited for
        except (OSError, UnicodeDecodeError):
            return []

    def save(self, content: dict, epochs: int, step: int, names: list[str]) -> Path:
        """Write a checkpoint and give it `names`; then remove the oldest listed checkpoints.

        A file that checkpoints.txt does not list, such as a copy from elsewhere, is never removed; if it has the name
        of the new checkpoint, it is set aside.

        Raises:
            UserError: the checkpoint cannot be written; the present files stay.
        """
        path = self.folder / (f"epoch_{epochs}_step_{step}.pth" if step else f"epoch_{epochs}.pth")
        listed = self._read_order()
        if path.name not in listed:
            if path.exists():  # somebody else has put the file there
                logger.warning("%s: is none of this run's; set aside as %s", path, _set_aside(path, REPLACED).name)
            self._write_order([path.name, *listed])  # first: a run killed in between must know its own file
        save_checkpoint(content, path)
        own = [old for old in self.numbered() if old.name in listed and old != path]
        order = [*own, path]
        self._write_order([kept.name for kept in order[-self.keep :]])
        for name in names:
            if name in self.to_set_aside and (self.folder / name).exists():
                logger.warning("%s: set aside as %s", self.folder / name, _set_aside(self.folder / name, REPLACED).name)
            self.to_set_aside.discard(name)
            self._link(path, self.folder / name)
        for old in order[: -self.keep]:
            with suppress(OSError):
                old.unlink()
        return path

    def _write_order(self, names: list[str]) -> None:
        text = "".join(f"{name}\n" for name in names)
        write_atomically(self.folder / ORDER_FILE, lambda file: file.write(text.encode()))

    def _link(self, path: Path, name: Path) -> None:
        partial = partial_path(name)
        partial.unlink(missing_ok=True)
        try:
            try:
                os.link(path, partial)
            except OSError:
                shutil.copyfile(path, partial)
            partial.replace(name)
            flush_folder(self.folder)
        except OSError as error:
            raise UserError(f"{name}: cannot be written ({error})") from error

    def lock(self) -> None:
        """Keep other runs out of the folder for as long as this process lives, if the file system has locks.

        Raises:
            UserError: another process holds the lock, or has trained in the folder since `has_run`; or the folder
                cannot be written to.
        """
        if self.lock_file is not None:  # opening and closing the file again would release the lock
            return
        self.lock_file, note = lock_folder(self.folder, "--output", "--tag")
        self.notes += [note] if note else []
        if self.files_at_start is not None and self.files_at_start != self._present():
            raise UserError(
                f"{self.folder}: another process has trained in it meanwhile; the same command goes on from there"
            )

    def has_run(self) -> bool:
        """Return whether the folder holds checkpoints, even damaged ones: then a run has begun.

        Remember the files that are there now, which `lock` compares.
        """
        self.files_at_start = self._present()
        return bool(self.files_at_start)

    def _present(self) -> dict[str, tuple[int, int]]:
        is_dir(self.folder)  # raises an error if its name is too long
        named = [self.folder / name for name in (LATEST, BEST, BEST_EMA)]
        files = [*self.folder.glob("epoch_*.pth"), *named, *self.folder.glob(f"*{DAMAGED}*")]
        found = {}
        for file in files:
            try:
                status = file.stat()
            except (FileNotFoundError, NotADirectoryError):
                if file.is_symlink():  # perhaps to a disk that is not mounted now
                    raise UserError(
                        f"{file}: is a link to {os.readlink(file)}, which is not there; mend or remove it, or pass "
                        "another --tag"
                    ) from None
                continue
            except OSError as error:
                raise UserError(f"{file}: cannot be looked at ({error.strerror}); choose another --output") from error
            found[file.name] = status.st_ino, status.st_size
        return found

    def remove_partial(self) -> None:
        """Remove the files that a killed process left half-written."""
        names = (*self.folder.glob(".*.pth.partial"), partial_path(self.folder / ORDER_FILE))
        for path in (path for path in names if path.is_file()):
            path.unlink()

    def read_last(self, check: Callable[[dict, Path], object]) -> tuple[dict, Path]:
        """Return the newest undamaged checkpoint that passes `check`, and its path.

        A damaged checkpoint is renamed to NAME.damaged and noted in `damage_messages`.

        Raises:
            UserError: all checkpoints are damaged, or `check` refuses an undamaged one.
        """
        for path in [self.folder / LATEST, *reversed(self.numbered())]:
            if not path.is_file():
                continue
            try:
                content = read_checkpoint(path)
                check(content, path)
                return content, path
            except DamagedCheckpointError as error:
                self.damage_messages.append(f"{error}; set aside as {_set_aside(path).name}")
        found = "; ".join(self.damage_messages) or ", ".join(sorted(f.name for f in self.folder.glob(f"*{DAMAGED}*")))
        best = [name for name in (BEST, BEST_EMA) if (self.folder / name).is_file()]
        if best and not found:
            raise UserError(
                f"{self.folder}: holds {' and '.join(best)}, but neither {LATEST} nor epoch_*.pth to go on from; pass "
                f"--resume {self.folder / best[0]} to go on from that one, or another --tag to start over"
            )
        further = f"; {' and '.join(best)} can be passed to --resume" if best else ""
        raise UserError(
            f"{self.folder}: no checkpoint is whole, so training cannot go on; pass another --tag to start over, or "
            f"--resume CKPT to go on from another checkpoint ({found}{further})"
        )


def _set_aside(path: Path, suffix: str = DAMAGED) -> Path:
    """Rename a file to NAME plus `suffix`, with a number at the end if that name is taken. Return the new path."""
    names = (path.with_name(f"{path.name}{suffix}{i or ''}") for i in count())
    aside = next(name for name in names if not name.exists())
    try:
        path.replace(aside)
    except OSError as error:
        raise UserError(f"{path}: cannot be set aside as {aside.name} ({error})") from error
    return aside
