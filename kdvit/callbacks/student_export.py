"""The trained student as a folder of its own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from kdvit.callbacks.nonfinite import NonFiniteError
from kdvit.models import export_student
from kdvit.runtime.signals import Stopped


class StudentExport(pl.Callback):
    """Writes the student (raw weights of the last step) into ``RUN/student`` when training ends, however it ends.

    The config.json beside the weights has the run's last scores and its seconds of training, over all restarts.
    """

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds so far."""
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the seconds of the run up to its checkpoint."""
        self._before = state_dict["seconds"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Writes the folder, on one rank."""
        self._write(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Writes the folder of a training that is cut short, if it can.

        All ranks put a split student together, which they can only where all have stopped at one place.
        """
        together = isinstance(exception, (Stopped, NonFiniteError))
        if self._since is None or not (together or pl_module.device_mesh is None):
            return
        try:
            self._write(trainer, pl_module)
        except OSError as error:
            rank_zero_info(f"The student could not be written: {error}")

    def _write(self, trainer: pl.Trainer, pl_module: Any) -> None:
        state = trainer.strategy.lightning_module_state_dict()
        if not trainer.is_global_zero:
            return
        weights = {name.removeprefix("student."): state[name] for name in state if name.startswith("student.")}
        folder = Path(trainer.default_root_dir) / "student"
        spec = pl_module.spec()
        spec["run"]["seconds"] = self._seconds()
        export_student(pl_module.student, spec, folder, weights)
        rank_zero_info(f"The student is in {folder}: kdvit.load_student({str(folder)!r}) loads it.")

    def _seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)
