"""Random numbers that depend only on the place in the run at which they are drawn.

An image's augmentation follows from (seed, epoch, image); a step's mixup and stochastic depth follow from (seed, epoch,
step, rank). So an interrupted run draws the same numbers as an uninterrupted run. Neither the number of workers nor the
place of the interruption matters, and checkpoints need not hold the state of any generator.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """Return a 32-bit seed, well mixed from non-negative numbers (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def set_seed(*numbers: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators on all devices with `seed_of(*numbers)`."""
    seed = seed_of(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the CPU's generators within a `with` block, then restore their states."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = seed_of(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
