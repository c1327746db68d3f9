"""Random numbers that depend on where in the run they are drawn, and on nothing else.

An image's augmentation follows from (seed, epoch, image), a step's mixup and stochastic depth from (seed, epoch, step,
rank). So a run that was interrupted draws what it would have drawn, and neither the number of workers nor the place of
the interruption matters; no generator's state has to be saved.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """A 32-bit seed, well mixed from non-negative numbers (NumPy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def set_seed(*numbers: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, those of all devices, with `seed_of(*numbers)`."""
    seed = seed_of(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """The generators of the CPU seeded for a while, then as they were before."""
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
