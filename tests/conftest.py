"""Every test starts from the same seed and in a folder of its own.

Imports wait for the first test: the process that only deals out the tests to others needs none of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # tiny networks: a second thread only waits


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import seed_everything
    from lightning.pytorch.loops import evaluation_loop
    from lightning.pytorch.trainer.connectors import callback_connector

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
    from tests.runs import SHORT, fit

    root = tmp_path_factory.mktemp("teacher")
    fit("teacher", "", *SHORT, "--trainer.default_root_dir", str(root))
    return f"local-dir:{root / 'student'}"


@pytest.fixture(scope="session")
def _plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.runs import SHORT, fit

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        fit("plain", "", *SHORT, "--trainer.log_every_n_steps=1")
        return Path("run").absolute()


@pytest.fixture
def plain_run(_plain_run: Path) -> str:
    """Copies a short run of the demo's plain student, which logged every step, into the test's folder as "run"."""
    return str(shutil.copytree(_plain_run, "run"))
