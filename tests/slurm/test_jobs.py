"""Jobs on a real Slurm: `kdvit slurm`, and `kdvit fit` under srun and in a shell of Slurm's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdvit import load_student
from tests.runs import SHORT
from tests.slurm.jobs import Job, submit

pytestmark = pytest.mark.slow
FIT = [sys.executable, "-m", "kdvit", "fit", "--config", "demo/plain.yaml", *SHORT, "--trainer.default_root_dir", "run"]


def test_a_job_of_two_nodes_runs_to_its_end(whole: Job) -> None:
    assert {"student", "checkpoints", "metrics.csv", "config.yaml", "fit.sbatch"} <= {
        file.name for file in whole.run.iterdir()
    }
    assert "Starting with 2 processes" in whole.log
    assert f"{whole.run}/student holds the last: kdvit.load_student" in whole.log
    assert load_student(whole.run / "student")(torch.randn(1, 3, 8, 8)).logits.shape == (1, 10)
    assert (whole.told("NumNodes"), whole.told("Restarts")) == ("2", "0")


def test_seeds_are_an_array_whose_jobs_are_requeued_one_by_one() -> None:
    root = Path("it's a root").absolute()
    array = submit(root, "--seeds", "0", "7", "--trainer.max_epochs", "2").number
    other, job = (Job(f"{array}_{seed}", root / f"seed_{seed}") for seed in (0, 7))
    job.wait_for_step(10)
    job.signal("USR1")
    step = job.wait_for_requeue()
    job.wait_for_end()
    other.wait_for_end()
    assert (job.told("Restarts"), other.told("Restarts")) == ("1", "0")
    assert f"step {step}." in job.log
    for each, seed in ((job, 7), (other, 0)):
        assert f"seed_everything: {seed}\n" in (each.run / "config.yaml").read_text()
        assert (each.run / "student").is_dir()


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_srun_starts_the_processes_of_a_run() -> None:
    two = ["srun", "--nodes=1", "--ntasks=2", "--ntasks-per-node=2"]
    done = run(*two, *FIT, "--trainer.devices", "2")
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stderr
    assert Path("run/student").is_dir()
    refused = run(*two, *FIT, "--trainer.devices", "1")
    assert "Slurm has started 2 of the 1 processes" in refused.stderr


def test_a_shell_of_slurm_runs_one_process_and_refuses_what_would_run_twice() -> None:
    alone = run("salloc", "--ntasks=1", *FIT)
    assert alone.returncode == 0, alone.stderr
    assert Path("run/student").is_dir()
    two = ["--nodes=1", "--ntasks-per-node=2"]
    hidden = run("salloc", *two, "srun", *FIT, "--trainer.devices", "2")
    assert "takes a job named 'interactive' for a shell" in hidden.stderr
    lonely = run("salloc", *two, "--job-name=mine", *FIT, "--trainer.devices", "2")
    assert "Slurm has started 1 of the 2 processes" in lonely.stderr
