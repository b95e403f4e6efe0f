"""Every test starts from the same seed and in a folder of its own."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loops import evaluation_loop
from lightning.pytorch.trainer.connectors import callback_connector

from kdvit.cli import main
from tests.runs import SHORT

torch.set_num_threads(1)  # tiny networks: a second thread only waits


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(0, verbose=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDVIT_TRACEBACK", "")
    for module in (
        evaluation_loop,
        callback_connector,
    ):  # transformers brings rich, in which Lightning draws its tables
        monkeypatch.setattr(module, "_RICH_AVAILABLE", False)


@pytest.fixture(scope="session")
def demo_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Trains the demo's teacher for a few steps, and returns how a config names it."""
    root = tmp_path_factory.mktemp("teacher")
    main(["fit", "--config", "demo/teacher.yaml", *SHORT, "--trainer.default_root_dir", str(root)])
    return f"local-dir:{root / 'student'}"
