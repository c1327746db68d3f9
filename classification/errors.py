"""Errors that the user, not the program, has caused; and how messages print names."""

import argparse
import contextlib
import io
import logging
import os
import stat
import sys
import time
import unicodedata
from collections.abc import Iterable
from types import TracebackType
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The user sees only the message, which names the file, key or shape and says what to do."""

    def __init__(self, message: str):
        if "Original Traceback" in message:  # torch raises it so where a data loader's worker did
            message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(printable(message))


def printable(text: str, lines: bool = False) -> str:
    """Escape unprintable characters, so that a name can neither control the terminal nor look like another message.

    `lines` keeps line breaks, for a text of several lines.
    """
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def refuse_empty(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if an option is empty, as `--resume "$CKPT"` is if the variable is not set.

    It would count as not given: training would start anew, or begin where weights were to be evaluated.
    """
    for name, value in vars(args).items():
        if isinstance(value, str) and not value:
            parser.error(f"{name.replace('_', '-')} is empty, as from a variable that is not set")


def end_with(message: str, rank: str = "RANK") -> NoReturn:
    """End the process with one line and status 1.

    A launcher ends all processes when one process ends. So the first process prints its error at once, and the other
    processes wait first: mostly they have the same error, and the launcher ends them before they print it again.

    Args:
        message: the line to print after "error: ".
        rank: the environment variable that numbers the processes, over all machines or on each machine.
    """
    if os.environ.get(rank, "0") != "0":
        with contextlib.suppress(KeyboardInterrupt):  # who stops the wait is told at once
            time.sleep(20)  # on a busy machine the first process takes many seconds to end
    sys.exit(f"error: {printable(message)}")


def normalisation_hint(names: Iterable[str], others: Iterable[str]) -> str:
    """Return a hint, for a message, on two differing names that look the same; "" if there are none.

    Systems write letters with accents in two ways (Unicode NFC and NFD).
    """
    looks = {unicodedata.normalize("NFC", name): name for name in names}
    for other in others:
        name = looks.get(unicodedata.normalize("NFC", other), other)
        if name != other:
            return (
                f"; {name!a} and {other!a} look the same but are written otherwise (Unicode NFC and NFD); "
                "rename one of them"
            )
    return ""


def prepare_console() -> None:
    """Make a command print no traceback for a character that the console's encoding lacks, nor for Ctrl-C.

    Nor one for each line of a log that cannot be written, on a full disk or after `| head`.
    """
    sys.excepthook = _say_that_it_is_interrupted
    logging.Handler.handleError = _say_once_that_a_log_is_lost
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say_once_that_a_log_is_lost(handler: logging.Handler, record: logging.LogRecord) -> None:
    if not getattr(handler, "is_lost", False):
        handler.is_lost = True
        place = getattr(handler, "baseFilename", "the standard output")  # a log file has a name
        print(printable(f"{place}: cannot be written to ({sys.exc_info()[1]})"), file=sys.stderr)


def _say_that_it_is_interrupted(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def check_utf8(path: str | os.PathLike) -> None:
    """Raise a UserError if a path is no UTF-8, as libraries in C++ need it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        more = "" if sys.getfilesystemencoding() == "utf-8" else ", or set PYTHONUTF8=1, for the locale is not UTF-8"
        raise UserError(f"{path}: its name is no UTF-8; name another{more}") from error


def is_file(path: str | os.PathLike) -> bool:
    """Return whether `path` is a regular file.

    Raises:
        UserError: the system does not tell: a folder may not be entered, or the name is too long.
    """
    return _is(path, stat.S_ISREG)


def is_dir(path: str | os.PathLike) -> bool:
    """Return whether `path` is a folder; raise as `is_file`."""
    return _is(path, stat.S_ISDIR)


def _is(path: str | os.PathLike, kind) -> bool:
    try:
        return kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot be looked at ({reason}); check the path and its folders' permissions"
        ) from error
