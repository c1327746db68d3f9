import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _poison_uninitialised_memory():
    """Fill what torch.empty returns with NaN, so that a kernel that leaves an element unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(7).isnan().all()
