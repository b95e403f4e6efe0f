"""One run, one folder: who trains in a run directory, as long as it does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdvit.errors import UserError
from kdvit.files import one_after_the_other

LOCK = "run.lock"
BEAT = 20.0  # seconds between two signs of life
SILENCE = 180.0  # seconds without one, after which a process on another machine counts as gone


@contextlib.contextmanager
def run_lock(root: str | Path, option: str = "--trainer.default_root_dir") -> Iterator[None]:
    """Locks a run directory or cache, so that no second process writes into it.

    The lock names host, process, Slurm job and time, and is touched every 20 seconds. It counts as left behind if its
    process is gone, if it is of this Slurm job (which was requeued), or, of another machine, after three minutes of
    silence by the clock of the file system.

    Raises:
        UserError: If another process works there; the message says which, and that `option` gives another folder.
    """
    file, ended = Path(root) / LOCK, threading.Event()
    made = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    ours = {**_identity(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with one_after_the_other(file.parent):  # else one could take the new lock of another for the old one
        if not _create(file, ours):
            held = _read(file)
            if held is not None and _is_held(held, file):
                raise UserError(
                    f"{str(root)!r} is in use: process {held['process']} on {held['host'].split()[0]} works there "
                    f"since {held['since']}. Wait for it, end it, or choose another {option}. (If it is gone for sure, "
                    f"remove {str(file)!r}.)"
                )
            file.unlink(missing_ok=True)
            if not _create(file, ours):
                raise UserError(f"Another process has just begun to work in {str(root)!r}.")
    threading.Thread(target=_beat, args=(file, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if _read(file) == ours:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a run that did not begin leaves empty
            for folder in made:
                folder.rmdir()


def _create(file: Path, content: dict[str, Any]) -> bool:
    """Writes a file whole, unless it is there."""
    new = file.with_name(f"{LOCK}.{os.getpid()}")
    new.write_text(json.dumps(content))
    try:
        os.link(new, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with file.open("x") as stream:
                stream.write(json.dumps(content))
        except FileExistsError:
            return False
    finally:
        new.unlink()
    return True


def _identity() -> dict[str, Any]:
    """Says which process this is on which machine, told from a later one of the same number by its start."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None:  # a requeued job has the number of the one before, a second step of one job does not take over
        job = f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return {"host": _machine(), "process": os.getpid(), "start": start_of(os.getpid()), "job": job}


def _machine() -> str:
    """Returns the machine, and the space of its process numbers: containers may share the machine's name."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def start_of(process: int) -> str:
    """Returns when a process was started, in ticks of the machine; nothing if it is gone, or where that is not told."""
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]  # a dead one may wait for its parent


def _is_held(held: dict[str, Any], file: Path) -> bool:
    if held["host"] == _machine():
        try:
            os.kill(held["process"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return start_of(held["process"]) == str(held["start"])
    ours, theirs = (str(job or "").rpartition(".") for job in (_identity()["job"], held["job"]))
    if ours[0] and ours[0] == theirs[0] and int(ours[2]) > int(theirs[2]):
        return False
    now = file.with_name(f"{LOCK}.{os.getpid()}")  # its time is of the clock that the lock's time is of
    now.touch()
    silent = now.stat().st_mtime - file.stat().st_mtime
    now.unlink()
    return silent < SILENCE


def _read(file: Path) -> dict[str, Any] | None:
    """Returns who holds a lock; None if it is gone, or torn by a full disk."""
    try:
        held: dict[str, Any] = json.loads(file.read_text())
        return held if {"host", "process", "start", "job", "since"} <= {*held} else None
    except (OSError, ValueError, TypeError):
        return None


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(file)
