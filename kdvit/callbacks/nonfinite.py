"""What happens when a loss term or a gradient is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kdvit.callbacks.nonfinite_report import SeenBatch, bad_gradients, bad_terms, described, place, save
from kdvit.errors import UserError
from kdvit.structures import Batch
from kdvit.training.optim import gradient_norm

FREE_TO_READ = ("cpu",)  # on other devices a read waits for all that the device has been given to do


class NonFiniteError(UserError, RuntimeError):
    """A loss term or a gradient is not finite. The message says which, where, and what can be done."""


class Step(NamedTuple):
    """A step of the optimizer.

    Attributes:
        number: The step, from 0.
        epoch: Its epoch.
        seen: The batches behind it.
        bad: Whether a number of it is not finite on any rank, in the host's memory once `written` has come.
        written: The device's mark behind that copy; None where the host has it already.
    """

    number: int
    epoch: int
    seen: list[SeenBatch]
    bad: Tensor
    written: torch.cuda.Event | None

    def is_bad(self) -> bool:
        """Returns the verdict."""
        if self.written is not None:
            self.written.synchronize()
        return bool(self.bad.tolist())


class NonFiniteGuard(pl.Callback):
    """Leaves out a step whose loss terms or gradients are not finite, and stops the run when there are too many.

    Weights, moments and weight decay stay as they were. (The average of the EMA counts the step, with equal weights.) All
    ranks decide alike. The batch is saved as ``RUN/nonfinite/step_N_rank_R.pt``; a run that stops also saves
    ``RUN/nonfinite/step_N.ckpt``: the weights before the step, and the place in the data behind it. Gradients that overflow
    under a GradScaler (16-mixed) are its business and no error; loss terms are.

    No step waits for a GPU: a fused optimizer leaves the step out on the device, and the host reads the verdict while the
    device computes the next batch. (So the batches behind a step are held for one batch more, and a run that stops has
    left out that batch, too.) An optimizer that is not fused waits for the verdict.

    Args:
        skip_steps: Steps that may be left out in all, over all restarts of the run; one more stops it.

    Raises:
        ValueError: If the number is negative.
    """

    def __init__(self, skip_steps: int = 0) -> None:
        if skip_steps < 0:
            raise ValueError(f"nonfinite.skip_steps must be 0 or more, got {skip_steps}.")
        self.skip_steps = skip_steps
        self.skipped = 0
        self._seen: list[SeenBatch] = []
        self._unread: Step | None = None
        self._failure: tuple[int, str] | None = None
        self._unwritten: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Keeps the batch until its numbers are known to be finite."""
        self._current = batch_idx, batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Keeps the batch's terms."""
        self._seen.append(SeenBatch(*self._current, pl_module.last_terms))

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Reads the verdict on the last step, whose gradients are still there; the device is busy with a forward pass."""
        self._read(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Leaves the step out if a number is not finite. (Optimizers pass over parameters without a gradient.)"""
        seen, self._seen = self._seen, []
        if self._failure is not None:
            optimizer.zero_grad()
            return
        bad = self._verdict(trainer, pl_module, seen)
        step = Step(trainer.global_step, trainer.current_epoch, seen, bad, None)
        if bad.device.type in FREE_TO_READ or not optimizer.defaults.get("fused"):
            if step.is_bad():
                self._judge(trainer, pl_module, step)
                optimizer.zero_grad()
        else:
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # read by torch's fused kernels
            copy = bad.to("cpu", non_blocking=True)
            self._unread = step._replace(bad=copy, written=_mark(bad.device))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Logs the number of steps left out, or stops the run."""
        self._stop(trainer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.skip_steps and every > 0 and trainer.global_step % every == 0:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Reads the verdict on the step before: the weights of a run that stops are not scored."""
        self._read(trainer, pl_module)
        self._stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Reads the verdict on the epoch's last step."""
        self._read(trainer, pl_module)
        self._stop(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Reads the verdict on the last step: no checkpoint lies behind one that stops the run."""
        self._read(trainer, pl_module)
        self._stop(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps left out."""
        return {"skipped": self.skipped + (self._unread is not None and self._unread.is_bad())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self.skipped = state_dict["skipped"]

    def _verdict(self, trainer: pl.Trainer, pl_module: Any, seen: list[SeenBatch]) -> Tensor:
        """Returns 1.0 if a number of the step is not finite on any rank, else 0.0, on the device."""
        numbers = [term for each in seen for term in each.terms.values()]
        if trainer.scaler is None:
            numbers.append(gradient_norm(pl_module).float())
        bad = torch.stack(numbers).isfinite().all().logical_not().float()
        if trainer.world_size > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return bad

    def _read(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step, self._unread = self._unread, None
        if step is not None and step.is_bad():
            self._judge(trainer, pl_module, step)

    def _judge(self, trainer: pl.Trainer, pl_module: Any, step: Step) -> None:
        """Saves the bad batches, and says what is wrong. All ranks come here together."""
        rank, folder = trainer.global_rank, _folder(trainer)
        gradients = bad_gradients(pl_module)
        ours = [cause for seen in step.seen for cause in bad_terms(trainer, pl_module, seen)]
        several = trainer.world_size > 1
        said = _of_all(trainer, [f"{cause} (rank {rank})" if several else cause for cause in ours])
        unwritten = []
        if ours or not said:
            try:
                save(folder / f"step_{step.number}_rank_{rank}.pt", trainer, step.number, step.seen, gradients)
            except OSError as error:
                unwritten = [str(error)]
        self._unwritten = _of_all(trainer, unwritten)
        if not said:
            batches = "; ".join(place(trainer, seen) for seen in step.seen)
            said = [f"{described(gradients, pl_module)} is not finite ({batches})"]
        self.skipped += 1
        message = f"At step {step.number} of epoch {step.epoch}, {'; '.join(said)}."
        if self.skipped <= self.skip_steps:
            counted = f"{self.skipped} of at most {self.skip_steps}"
            rank_zero_info(f"{message} The step is left out ({counted}), and its numbers {self._kept(folder)}.")
        else:
            self._failure = step.number, message

    def _stop(self, trainer: pl.Trainer) -> None:
        if self._failure is None:
            return
        (number, message), self._failure = self._failure, None
        checkpoint = _folder(trainer) / f"step_{number}.ckpt"
        try:
            trainer.save_checkpoint(checkpoint)
        except OSError as error:
            self._unwritten.append(str(error))
        raise NonFiniteError(
            f"{message} The step was not taken; the batch and the weights before it {self._kept(checkpoint.parent)}. A run "
            "repeats itself to the last bit, so the same command meets this again. Lower the learning rate, clip the gradients "
            "(--trainer.gradient_clip_val 1), take another --trainer.precision, go on behind this batch (--ckpt_path "
            f"{checkpoint}), or let such steps be left out (--nonfinite.skip_steps {self.skip_steps + 10})."
        )

    def _kept(self, folder: Path) -> str:
        return f"could not all be written ({self._unwritten[0]})" if self._unwritten else f"are in {folder}"


def _of_all(trainer: pl.Trainer, ours: list[str]) -> list[str]:
    """Returns what each rank says, one after another."""
    if trainer.world_size == 1:
        return ours
    every: list[list[str]] = [[] for _ in range(trainer.world_size)]
    dist.all_gather_object(every, ours)
    return [each for theirs in every for each in theirs]


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "nonfinite"


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
    mark.record(torch.cuda.current_stream(device))
    return mark
