"""One run, one folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kdvit.errors import UserError
from kdvit.runtime import lock
from kdvit.runtime.lock import LOCK, SILENCE, run_lock
from tests.runs import SHORT, fit
from tests.several import PATHS

FILE = Path("run", LOCK)
HOLD = """
import time
from kdvit.runtime.lock import run_lock
with run_lock("run"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of the folder "run"."""
    env = {**os.environ, **PATHS}
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_start_says_who_holds_the_run_and_a_killed_one_holds_nothing(
    other: subprocess.Popen[str], capsys
) -> None:
    with pytest.raises(SystemExit) as end:
        fit("plain", "", *SHORT)
    assert end.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    told = f"'run' is in use: process {other.pid} on {socket.gethostname()} works there since 20"
    assert told in message
    assert not Path("run/checkpoints").exists()
    other.send_signal(signal.SIGKILL)
    while Path(f"/proc/{other.pid}/stat").read_text().split()[2] != "Z":  # dead, and not waited for
        time.sleep(0.01)
    assert FILE.exists()
    fit("plain", "", *SHORT)
    assert Path("run/checkpoints/last.ckpt").is_file()
    assert not FILE.exists()


def test_of_two_that_find_a_lock_left_behind_one_gets_it(other: subprocess.Popen[str], monkeypatch) -> None:
    other.kill()
    other.wait()
    create, got = lock._create, []

    def slow(*args: Any) -> bool:
        time.sleep(0.05)
        return create(*args)

    def start() -> None:
        with suppress(UserError), run_lock("run"):
            got.append(1)
            time.sleep(1)

    monkeypatch.setattr(lock, "_create", slow)
    starts = [threading.Thread(target=start) for _ in range(2)]
    for each in starts:
        each.start()
    for each in starts:
        each.join()
    assert got == [1]


def test_a_run_leaves_no_lock_when_it_fails(capsys) -> None:
    with pytest.raises(SystemExit):
        fit("plain", "", *SHORT, "--model.optimizer.lr_base_batch", "0")
    assert not FILE.exists()


@pytest.mark.parametrize(
    ("change", "silent", "is_held"),
    [
        ({"host": "elsewhere"}, 0.0, True),
        ({"host": "elsewhere"}, SILENCE + 1, False),
        ({"host": "elsewhere", "job": "7.0"}, 0.0, False),
        ({"host": "elsewhere", "job": "7.1"}, 0.0, True),
        ({"start": "1"}, 0.0, False),
        ({}, SILENCE + 1, True),
    ],
)
def test_a_lock_is_left_behind_if_its_process_job_or_machine_is_gone(
    change: dict[str, str], silent: float, is_held: bool, other: subprocess.Popen[str], monkeypatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    FILE.write_text(json.dumps({**json.loads(FILE.read_text()), "job": "6.0", **change}))
    os.utime(FILE, (time.time() - silent,) * 2)
    if is_held:
        with pytest.raises(UserError, match="'run' is in use"), run_lock("run"):
            pass
    else:
        with run_lock("run"):
            assert json.loads(FILE.read_text())["process"] == os.getpid()
        assert not FILE.exists()


def test_a_run_directory_that_cannot_be_made_is_named(capsys) -> None:
    Path("file").touch()
    with pytest.raises(SystemExit) as end:
        fit("plain", "", *SHORT, "--trainer.default_root_dir", "file/run")
    assert end.value.code == 2
    assert "trainer.default_root_dir: " in capsys.readouterr().err.splitlines()[-1]
