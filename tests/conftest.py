"""Every test starts from the same seed and in a folder of its own."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything

torch.set_num_threads(1)  # tiny networks: a second thread only waits


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(0, verbose=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDVIT_TRACEBACK", "")
