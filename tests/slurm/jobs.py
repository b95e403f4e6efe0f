"""Jobs of the tests: submitted by `kdvit slurm`, watched, and sent signals."""

from __future__ import annotations

import io
import json
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

from kdvit.cli import main
from tests.runs import QUIET

# 200 steps, each with all that a resumed run could get wrong
TRAINING = [
    *["--config", "demo/plain.yaml", *QUIET, "--trainer.max_epochs=5", "--data.init_args.batch_size=16"],
    *["--data.init_args.num_workers=2", "--data.init_args.repeats=3", "--data.init_args.mixup=0.8", "--ema.decay=0.9"],
    *["--trainer.log_every_n_steps=7", "--model.student.init_args.drop_path_rate=0.2"],
    *["--model.optimizer.lr_base_batch=32"],
]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL"}


class Job(NamedTuple):
    """A job of Slurm.

    Attributes:
        number: Slurm's number; of one in an array, ARRAY_INDEX.
        run: The run directory.
    """

    number: str
    run: Path

    @property
    def log(self) -> str:
        """What the job has written so far."""
        file = self.run / f"slurm-{self.number}.log"
        return file.read_text() if file.exists() else ""

    @property
    def step(self) -> int:
        """The last step of the training, 0 before the first."""
        file = self.run / "step"
        return int(file.read_text()) if file.exists() else 0

    def told(self, what: str) -> str:
        """Returns what `scontrol show job` tells of the job under a name."""
        shown = _slurm("scontrol", "--oneliner", "show", "job", self.number)
        return re.search(rf"\b{what}=(\S*)", shown)[1]

    def signal(self, name: str) -> None:
        """Sends a signal to all processes of the training."""
        _slurm("scancel", f"--signal={name}", self.number)

    def wait(self, seconds: float, what: Callable[[], bool]) -> None:
        """Waits until something is so; fails after a time, or when the job has ended without it."""
        end = time.monotonic() + seconds
        while not what():
            ended = self.told("JobState") in ENDED
            assert what() or (time.monotonic() < end and not ended), f"{self.told('JobState')}\n{self.log[-3000:]}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        """Waits until the training has come to a step."""
        self.wait(240, lambda: self.step >= step)

    def wait_for_end(self, state: str = "COMPLETED", seconds: float = 300) -> None:
        """Waits until the job has ended as it should."""
        self.wait(seconds, lambda: self.told("JobState") == state and not _slurm("squeue", "-h", "-j", self.number))

    def wait_for_requeue(self, times: int = 1) -> int:
        """Waits until the job has saved itself and been requeued, and returns the step."""
        pattern = r"at step (\d+), and Slurm has requeued the job\."
        self.wait(180, lambda: len(re.findall(pattern, self.log)) == times)
        return int(re.findall(pattern, self.log)[-1])


def submit(run: Path, *options: str, seconds: float = 0.02) -> Job:
    """Submits the training of the tests.

    Args:
        run: The run directory.
        options: Of `kdvit slurm`, and further ones of `kdvit fit`.
        seconds: What a batch takes at least.
    """
    beat = json.dumps([{"class_path": "tests.slurm.beat.Beat", "init_args": {"seconds": seconds}}])
    given = ["--trainer.callbacks", beat, "--trainer.default_root_dir", str(run), "--gpus", "0", "--time", "20"]
    told = io.StringIO()
    with redirect_stdout(told):
        main(["slurm", *TRAINING, *given, *options])
    return Job(re.match(r"Job (\d+) is submitted", told.getvalue())[1], run)


def _slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180).stdout
