"""The trained student as a folder of its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from kdvit.callbacks.epoch_lines import PROBED, in_figures, in_words
from kdvit.callbacks.nonfinite import NonFiniteError
from kdvit.errors import UserError
from kdvit.models import export_student
from kdvit.models.checkpoint import require_loadable, student_spec
from kdvit.runtime.signals import Stopped


def _best(trainer: pl.Trainer) -> tuple[str, dict[str, Any]] | None:
    """Names the best checkpoint of a run, and returns what it holds; None where no validation has been held."""
    for each in trainer.checkpoint_callbacks:
        monitor, score = getattr(each, "monitor", None), getattr(each, "best_model_score", None)
        path = Path(getattr(each, "best_model_path", ""))
        if monitor and score is not None and path.is_file():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            where = f"of epoch {content['epoch']}, in {os.path.relpath(path)}"
            return f"Best {monitor} {in_figures(monitor, float(score))}, {where}. ", content
    return None


class StudentExport(pl.Callback):
    """Writes the student (raw weights) into ``RUN/student`` when training ends, however it ends.

    Before the first step it makes sure that `kdvit.load_student` will load it (`require_loadable`). The config.json
    beside the weights has its scores and the seconds of training, over all restarts.

    Args:
        weights: Those of the last step, or the best by the monitored score, where a validation has been held.
    """

    def __init__(self, weights: Literal["last", "best"] = "last") -> None:
        self.weights = weights
        self._before = 0.0
        self._since: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuses a student of one's own that nobody could load after the training, while it is whole."""
        if stage == "fit":
            self.require_loadable(pl_module)

    def require_loadable(self, pl_module: Any) -> None:
        """Raises UserError if `load_student` could not load the student."""
        try:
            require_loadable(pl_module.student, student_spec(pl_module.student, pl_module.image_format))
        except ValueError as error:
            raise UserError(f"{error} To train it all the same: --callbacks.student_export null.") from error

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
        except Exception as error:  # after that of a device, say, which is the one to be told
            rank_zero_info(f"The student could not be written: {error}")

    def _write(self, trainer: pl.Trainer, pl_module: Any) -> None:
        state = trainer.strategy.lightning_module_state_dict()
        if not trainer.is_global_zero:
            return
        folder, spec, which = Path(trainer.default_root_dir) / "student", pl_module.spec(), "last"
        score, best = _best(trainer) or ("", None)
        if best is not None and self.weights == "best":
            state, spec, which = best["state_dict"], best["kdvit"], "best"
        weights = {name.removeprefix("student."): state[name] for name in state if name.startswith("student.")}
        spec = {**spec, "run": {**spec["run"], "seconds": self._seconds()}}
        export_student(pl_module.student, spec, folder, weights)
        kind = spec["class"].rpartition(".")[0]
        own = f", imports=[{kind!r}]" if kind else ""
        probed = [in_words(name, spec["run"][name]) for name in PROBED if name in spec["run"]]
        which += f" ({', '.join(probed)} at the last probe)" if probed else ""
        rank_zero_info(f"{score}{folder} holds the {which}: kdvit.load_student({str(folder)!r}{own}) loads it.")

    def _seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)
