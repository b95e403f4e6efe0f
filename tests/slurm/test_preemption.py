"""A training that a real Slurm interrupts in every way it has ends with the weights of one that nothing interrupts."""

from __future__ import annotations

import random
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.runs import assert_same_end
from tests.slurm.jobs import Job, submit

pytestmark = pytest.mark.slow
RUN = Path("run")
TWO_TASKS = ["--tasks_per_node", "2"]


def assert_resumed(job: Job, step: int) -> None:
    assert f"Going on from {job.run}/checkpoints/last.ckpt, step {step}." in job.log


def test_a_job_that_is_preempted_at_any_moment_four_times_comes_to_the_same_end(whole: Job) -> None:
    job = submit(RUN.absolute(), *TWO_TASKS)
    step = 0
    for times in range(1, 5):
        job.wait_for_step(step + random.randint(2, 9))
        job.signal("USR1")
        step = job.wait_for_requeue(times)
    job.wait_for_end()
    assert job.told("Restarts") == "4"
    assert job.log.count("Going on from ") == 4
    assert_same_end(str(whole.run), str(job.run))


def test_a_job_of_higher_priority_preempts(whole: Job) -> None:
    job = submit(RUN.absolute(), "--nodes", "2", "--partition", "low", "--signal_seconds", "20")
    job.wait_for_step(20)
    high = ["sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    subprocess.run(high, check=True)
    step = job.wait_for_requeue()
    job.wait_for_end()
    assert_resumed(job, step)
    assert_same_end(str(whole.run), str(job.run))


def test_the_time_limit_requeues(whole: Job) -> None:
    job = submit(RUN.absolute(), *TWO_TASKS, "--time", "1", "--signal_seconds", "40", seconds=0.5)
    job.wait_for_step(1)
    step = job.wait_for_requeue()
    job.wait_for_step(step + 1)
    assert_resumed(job, step)
    assert job.told("Restarts") == "1"


def test_scancel_saves_and_the_same_command_goes_on(whole: Job) -> None:
    job = submit(RUN.absolute(), *TWO_TASKS)
    job.wait_for_step(30)
    since = time.monotonic()
    subprocess.run(["scancel", job.number], check=True)
    job.wait_for_end("CANCELLED")
    assert time.monotonic() - since < 30
    (stopped,) = (line for line in job.log.splitlines() if line.startswith("Stopped by SIGTERM."))
    step = int(stopped.partition("at step ")[2].partition(";")[0])
    assert stopped.endswith(f"/checkpoints/last.ckpt at step {step}; the same command goes on from there.")
    again = submit(RUN.absolute(), *TWO_TASKS)
    again.wait_for_end()
    assert_resumed(again, step)
    assert_same_end(str(whole.run), str(again.run))


def test_a_signal_while_python_starts_is_remembered() -> None:
    job = submit(RUN.absolute(), *TWO_TASKS)
    job.wait(180, lambda: listening(job) == 2)
    job.signal("USR1")
    assert "Initializing distributed" not in job.log
    step = job.wait_for_requeue()
    assert step <= 2
    job.wait_for_step(step + 1)
    assert_resumed(job, step)


def listening(job: Job) -> int:
    """Returns how many processes of a training have a handler for SIGUSR1."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            caught = (process / "status").read_text().partition("SigCgt:")[2].split()[0]
        except (OSError, IndexError):
            continue
        found += b"fit" in words and b"-m" in words and str(job.run).encode() in words and int(caught, 16) >> 9 & 1
    return found


def test_a_job_that_may_not_be_requeued_trains_on(whole: Job) -> None:
    job = submit(RUN.absolute(), *TWO_TASKS, "--sbatch=--no-requeue")
    job.wait_for_step(30)
    job.signal("USR1")
    job.wait_for_end()
    assert re.search(r"It is not requeued: scontrol requeue \d+: .*disabled.* Training goes on\.", job.log)
    assert_same_end(str(whole.run), str(job.run))
