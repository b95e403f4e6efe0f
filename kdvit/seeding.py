"""Random draws that follow from what is drawn for, and from nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mixed_seed(*parts: int) -> int:
    """Returns a 64-bit seed that mixes its parts well: neighbours share nothing.

    Example:
        >>> mixed_seed(0, 1, 2) == mixed_seed(0, 1, 2), mixed_seed(0, 1, 2) == mixed_seed(0, 2, 1)
        (True, False)
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds python, numpy and torch (CPU) inside, and leaves their state as it was."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
