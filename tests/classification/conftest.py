"""Real images, a full disk, and main.py in this process."""

import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from running import MICRO

from classification import main as main_module
from classification.data.digits import write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The whole embedded data set."""
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root)
    return root


@pytest.fixture(scope="session")
def few_digits(digits, tmp_path_factory) -> Path:
    """40 training and 33 validation images: three left over after four batches of eight, or two each of two processes.

    The validation classes hold unequal shares.
    """
    root = tmp_path_factory.mktemp("data") / "few"
    for split, counts in (("train", [4] * 10), ("val", [6, 3, 3, 3, 3, 3, 3, 3, 3, 3])):
        for label, count in enumerate(counts):
            (root / split / str(label)).mkdir(parents=True)
            for file in sorted((digits / split / str(label)).iterdir())[:count]:
                shutil.copy(file, root / split / str(label))
    return root


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager]:
    """A context in which no file may grow beyond a number of bytes, as on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def run_main(monkeypatch, capsys):
    """main.py in this process; a refusal raises SystemExit with its message. Returns what was printed."""

    def run(*arguments, cfg=MICRO) -> str:
        monkeypatch.setattr(sys, "argv", ["main.py", "--cfg", str(cfg), *map(str, arguments)])
        main_module.main()
        return capsys.readouterr().out

    return run
