"""No process of a run outlives the one that started it, or repeats what that has said."""

from __future__ import annotations

import os
import sys
import threading
import time

from kdvit.runtime.lock import start_of

PARENT = "KDVIT_PARENT"
GRACE = 30.0  # seconds for a process to end by itself
HEARING = 20.0  # seconds for the first process to end by the same error


def end_with_parent() -> None:
    """Exits half a minute after the parent at the latest, in a process that Lightning or torchrun has started.

    Lightning ends the first process of a machine when one that it started fails, but nothing ends the others when the
    first is killed: they would wait for it in a collective, for half an hour, or, before the first one, for ever.
    """
    parent, starter = os.getppid(), os.environ.get(PARENT)
    os.environ[PARENT] = str(os.getpid())
    if "LOCAL_RANK" in os.environ:
        if starter not in (None, str(parent)) and not start_of(int(starter)):
            os._exit(1)  # it has ended while this one was on its way here
        if starter == str(parent) or "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def let_the_first_tell() -> None:
    """Waits, in a process that is not the first of a run, before it says why it ends.

    If the first has met the same error, it ends, and ends this process meanwhile, or their launcher does.
    """
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        time.sleep(HEARING)


def _exit_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    if getattr(sys.modules.get("torch.distributed"), "is_initialized", bool)():
        time.sleep(GRACE)
        print(f"kdvit: error: the process {parent} that started this one, {os.getpid()}, has ended.", file=sys.stderr)
    os._exit(1)
