"""A loader's worker ends: one message, and nobody waits for the batch of one that is gone."""

from __future__ import annotations

import json
import os
import resource
import signal
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from kdvit.cli import main
from kdvit.structures import View
from tests.runs import QUIET
from tests.tiny import STUDENT, Blobs, SizedData


class Faulty(SizedData):
    """Data whose workers meet a fault at the 30th training image."""

    def __init__(self, fault: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fault = fault

    def dataset(self, split: str) -> Dataset:
        return Images(self.sizes[split], self.fault if split == "train" else "")


class Images(Blobs):
    """Images of which one ends its worker."""

    def __init__(self, size: int, fault: str) -> None:
        super().__init__(size, 0)
        self.fault = fault

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, int, int]:
        image = View.of(index).image
        if image == 30 and get_worker_info() is not None:
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "full":  # a file in /dev/shm is too large, as where that is full
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return super().__getitem__(image)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a worker's socket, left open
@pytest.mark.parametrize("fault", [pytest.param("killed", marks=pytest.mark.slow), "full"])
def test_a_worker_that_has_ended_is_one_message(fault: str, capfd) -> None:
    data = ["--data=tests.test_workers.Faulty", f"--data.init_args={{fault: {fault}, num_workers: 2}}"]
    student = ["--model.student=TimmStudent", "--model.student.init_args", json.dumps(STUDENT)]
    run = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.default_root_dir=run", *QUIET]
    with pytest.raises(SystemExit) as end:
        main(["fit", *data, *student, *run])
    assert end.value.code == 2
    told = capfd.readouterr().err
    assert "kdvit: error: a loader's worker has ended, as it does where memory or shared memory" in told
    assert "Traceback" not in told
