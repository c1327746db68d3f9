import os

import pytest
import torch

# Compiled graphs on disk do not know that an operator's fake kernel has changed since.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when Triton is first imported, so it cannot wait for the tests that use it
    )


def pytest_addoption(parser):
    parser.addoption("--random-cases", type=int, default=200, help="random cases for each compared implementation")
    parser.addoption("--hostile-cases", type=int, default=50, help="hostile checkpoints; a fifth as many of the rest")


@pytest.fixture(scope="session", autouse=True)
def _poison_uninitialised_memory():
    """Fill what torch.empty returns with NaN, so that a kernel that leaves an element unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(7).isnan().all()
