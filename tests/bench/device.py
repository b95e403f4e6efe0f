"""Time, memory and waiting of a device: CUDA's own events and counters, and a plain clock on CPUs."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CPU = torch.device("cpu")


def device() -> torch.device:
    """Returns the GPU, where there is one."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


def timed(work: Callable[[], object], on: torch.device = CPU) -> Callable[[], float]:
    """Returns a function that runs the work and returns its seconds, on a GPU between two of its events."""

    def run() -> float:
        if on.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(on)
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    return run


def now(on: torch.device) -> float:
    """Returns the clock's time once a GPU has done all that it was given."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return time.perf_counter()


def peak_gb(work: Callable[[], object], on: torch.device) -> float | None:
    """Returns the most memory in GB that work takes of a GPU beside what was taken before; None on CPUs."""
    if on.type != "cuda":
        work()
        return None
    torch.cuda.synchronize(on)
    before: int = torch.cuda.memory_allocated(on)
    torch.cuda.reset_peak_memory_stats(on)
    work()
    torch.cuda.synchronize(on)
    return (torch.cuda.max_memory_allocated(on) - before) / 1e9


@contextmanager
def waits(on: torch.device) -> Iterator[list[Any]]:
    """Lists the places inside where the host waits for a GPU; none are known on CPUs."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        places: list[Any] = found if on.type == "cuda" else []
        if on.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if on.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
