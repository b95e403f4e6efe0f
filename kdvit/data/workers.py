"""Loader workers that share their parent's memory and exit on its SIGTERM, and on no other signal."""

from __future__ import annotations

import gc
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

import torch.distributed as dist

SETTLING = 0.02  # seconds
FORK = "fork" if sys.platform == "linux" else None
"""How workers are started, None for the platform's way. Those of a fork server outlive a parent that is killed."""


def start_worker(worker: int) -> None:
    """Prepares a worker, as `worker_init_fn`.

    Args:
        worker: Number of the worker.
    """
    gc.freeze()  # a collection writes to every object there is, and so copies all memory shared with the parent
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(_exit_on_a_lost_batch)
    ignore_signals_of_the_run()


def _exit_on_a_lost_batch(error: Exception, batch: Any) -> None:
    """Ends a worker that cannot pass on a batch: Python would drop it, and the run wait for it for ever."""
    try:
        if "</torch_" not in str(error):  # a file in shared memory: `kdvit.cli.messages` says it
            traceback.print_exception(error)
    finally:
        os._exit(1)


def ignore_signals_of_the_run() -> None:
    """Ignores, in a worker, the signals that Slurm and Ctrl-C send to all processes of a run.

    The run goes on to the end of its batch and saves itself, and needs its workers till then. SIGTERM still ends a
    worker when its parent sends it, as Python does with those that are left when it exits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for each in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(128 + signal.SIGTERM)


def let_collectives_end() -> None:
    """Waits for threads of torch.distributed to leave Python: before a worker is forked, and before Python ends.

    A C++ thread enters Python when a collective has just ended. A worker that is forked meanwhile waits for ever for a
    lock that nobody holds in it (https://github.com/python/cpython/issues/112275), and a Python that ends meanwhile
    aborts.
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(SETTLING)


if sys.version_info < (3, 11, 10):
    os.register_at_fork(before=let_collectives_end)
