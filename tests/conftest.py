import logging
import os
from datetime import date

import pytest
import torch

# Compiled graphs on disk do not know that an operator's fake kernel has changed since.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # or each process starts Python to try each of the CPU's instruction sets
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when Triton is first imported, so it cannot wait for the tests that use it
    )


DAYS = 7  # in which `--long today` comes to every long test


def pytest_addoption(parser):
    parser.addoption("--random-cases", type=int, default=200, help="random cases for each compared implementation")
    parser.addoption("--hostile-cases", type=int, default=50, help="hostile checkpoints; a fifth as many of the rest")
    parser.addoption(
        "--long", choices=("no", "today", "all"), default="no",
        help=f"tests that only take longer than others of theirs: none, one in {DAYS} by the date, or all",
    )  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("markers", "long: shows at length what a shorter test shows; --long runs it")
    config.addinivalue_line("markers", "long_in_interpreter: is long where Triton's kernels run in its interpreter")
    config.addinivalue_line("markers", "float32_in_interpreter: there, and in any other dtype than float32, is long")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name != "test_readme.py")  # minutes each: a process that has none left waits
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if torch.cuda.is_available() or params.get("backend") != "triton":
            continue
        other = item.get_closest_marker("float32_in_interpreter") and params["dtype"] != torch.float32
        if other or item.get_closest_marker("long_in_interpreter"):
            item.add_marker("long")
    wanted, day = config.getoption("--long"), date.today().toordinal()
    for i, item in enumerate(item for item in items if item.get_closest_marker("long")):
        if wanted == "no" or (wanted == "today" and i % DAYS != day % DAYS):
            item.add_marker(pytest.mark.skip(reason="--long all runs it"))


@pytest.fixture(scope="session", autouse=True)
def _poison_uninitialised_memory():
    """Fill what torch.empty returns with NaN, so that a kernel that leaves an element unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.allow_tf32 = False  # references on a GPU are held to float32's precision
    assert torch.empty(7).isnan().all()


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was():
    """What a test, or the code that it calls, sets for the whole process would change the tests that follow it."""

    def settings():
        return {
            "logging.disable": logging.root.manager.disable,
            "threads": torch.get_num_threads(),
            "default dtype": torch.get_default_dtype(),
            "grad mode": torch.is_grad_enabled(),
            "directory": os.getcwd(),
        }

    before = settings()
    yield
    assert settings() == before
