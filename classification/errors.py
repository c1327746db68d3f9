"""What goes wrong by the user's hand, as opposed to by ours; and what names look like in a message."""

import io
import os
import stat
import sys
import time
import unicodedata
from collections.abc import Iterable
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is all the user sees: it names the file, key or shape and says what to do."""


def printable(text: str) -> str:
    """Text as a terminal may show it: what is not printable is escaped, so that a name cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def end_with(message: str, rank: str = "RANK") -> NoReturn:
    """End the process with one line and status 1.

    A launcher ends all processes when one ends. So the first process prints its error at once. The others wait first:
    mostly they have the same error, and the launcher ends them before they print it again.

    Args:
        rank: the environment variable that numbers the processes, of all machines or of each.
    """
    if os.environ.get(rank, "0") != "0":
        time.sleep(10)  # on a busy machine the first process takes seconds to end
    sys.exit(f"error: {printable(message)}")


def normalisation_hint(names: Iterable[str], others: Iterable[str]) -> str:
    """Which of names that differ look the same, for a message: systems write letters with accents in two ways."""
    looks = {unicodedata.normalize("NFC", name): name for name in names}
    for other in others:
        name = looks.get(unicodedata.normalize("NFC", other), other)
        if name != other:
            return (
                f"; {name!a} and {other!a} look the same but are written otherwise (Unicode NFC and NFD); "
                "rename one of them"
            )
    return ""


def escape_on_streams() -> None:
    """Have the console escape what its encoding lacks: a name is no reason to end with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_file(path: str | os.PathLike) -> bool:
    """
    Raises:
        UserError: whether there is a file cannot be told: a folder that may not be entered, a name that is too long.
    """
    return _is(path, stat.S_ISREG)


def is_dir(path: str | os.PathLike) -> bool:
    """As `is_file`."""
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
