"""No process of a run outlives the one that started it."""

from __future__ import annotations

import os
import sys
import threading
import time

PARENT = "KDVIT_PARENT"
GRACE = 30.0  # seconds for a process to end by itself


def end_with_parent() -> None:
    """Exits half a minute after the parent at the latest, in a process that Lightning or torchrun has started.

    Lightning ends the first process of a machine when one that it started fails, but nothing ends the others when the
    first is killed: they would wait for it in a collective, for half an hour.
    """
    parent = os.getppid()
    started_by_kdvit = os.environ.get(PARENT) == str(parent)
    os.environ[PARENT] = str(os.getpid())
    if "LOCAL_RANK" in os.environ and (started_by_kdvit or "TORCHELASTIC_RUN_ID" in os.environ):
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(GRACE)
    print(f"kdvit: error: the process {parent} that started this one, {os.getpid()}, has ended.", file=sys.stderr)
    os._exit(1)
