"""Random draws that follow from what is drawn for, and from nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def mixed_seed(*parts: int) -> int:
    """Returns a 64-bit seed that mixes its parts well: neighbours share nothing.

    Examples:
        >>> mixed_seed(0, 1, 2), mixed_seed(0, 2, 1)
        (3071860871404845570, 14406252260519237621)
    """
    return int(mixed_words(*parts, count=2).view(np.uint64)[0])


def mixed_words(*parts: int, count: int) -> NDArray[Any]:
    """Returns so many random words of 32 bits that follow from the parts; the first two are `mixed_seed`."""
    return np.random.SeedSequence(parts).generate_state(count)


def seed_torch(seed: int, device: torch.device) -> None:
    """Seeds torch's generators of the CPU and of the current device of a kind, which Lightning has set."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed keeps a stack trace for each kind not in use
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


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
