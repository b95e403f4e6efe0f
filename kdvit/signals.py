"""Signals that ask a run to save itself: handlers that only take a note. Light to import."""

from __future__ import annotations

import os
import signal
from types import FrameType

REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
STOP = (signal.SIGTERM, signal.SIGINT)


class Requests:
    """What this process has been asked to do.

    Attributes:
        requeue: Whether SIGUSR1 or SIGUSR2 has come: Slurm's warning before it takes the machine away.
        stop: SIGTERM or SIGINT (Ctrl-C), if one has come.
    """

    def __init__(self) -> None:
        self.requeue = False
        self.stop: signal.Signals | None = None
        self._process = os.getpid()

    def remember(self, *signals: signal.Signals) -> None:
        """Takes note of these signals from now on. (A no-op outside the main thread, which alone can.)"""
        self._process = os.getpid()
        try:
            for each in signals:
                signal.signal(each, self._note)
        except ValueError:
            return

    def forget(self) -> None:
        """Forgets what has been asked so far."""
        self.requeue, self.stop = False, None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, forked with this handler: its parent decides
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif number in REQUEUE:
            self.requeue = True
        elif number == signal.SIGINT and self.stop is not None:
            raise KeyboardInterrupt
        else:
            if number == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, b"\nThe run stops after this batch. Ctrl-C again stops it at once, without saving.\n")
            self.stop = signal.Signals(number)


REQUESTS = Requests()
