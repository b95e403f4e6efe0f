"""Signals that request a run to save itself, and the requeueing of its Slurm job. Light to import."""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType

REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
STOP = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """Ends a run that has been saved.

    Args:
        status: Exit status: 0 where Slurm has requeued the job, else 128 + the signal's number.
        story: What has happened.
    """

    def __init__(self, status: int, story: str = "") -> None:
        super().__init__(status)
        self.story = story


class Requests:
    """What signals have requested of this process.

    Attributes:
        requeue: Whether SIGUSR1 or SIGUSR2 has come: Slurm's warning before it takes the machine away.
        stop: SIGTERM or SIGINT (Ctrl-C), if one has come.
    """

    def __init__(self) -> None:
        self.requeue = False
        self.stop: signal.Signals | None = None
        self._process = os.getpid()

    def listen(self, *signals: signal.Signals) -> None:
        """Records these signals from now on. (A no-op outside the main thread, which alone can.)"""
        self._process = os.getpid()
        try:
            for each in signals:
                signal.signal(each, self._record)
        except ValueError:
            return

    def clear(self) -> None:
        """Drops the requests so far."""
        self.requeue, self.stop = False, None

    def _record(self, number: int, frame: FrameType | None) -> None:
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


def signal_name(number: int) -> str:
    """Returns the name of a signal as users know it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def requeue_job() -> str:
    """Requeues this process's Slurm job, and returns why it was refused, or nothing."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "this is no Slurm job."
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"scontrol cannot be run ({error})."
    said = " ".join(done.stderr.split()) or f"status {done.returncode}"
    return "" if done.returncode == 0 else f"scontrol requeue {job}: {said}."
