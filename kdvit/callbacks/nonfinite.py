"""Steps whose loss terms or gradients are not finite: skipped, or the end of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kdvit.callbacks.nonfinite_report import SeenBatch, bad_gradients, bad_terms, place, save
from kdvit.errors import UserError, some
from kdvit.runtime.loggers import is_logged
from kdvit.runtime.processes import gather
from kdvit.structures import Batch, as_batch
from kdvit.training.optim import gradient_norm

FREE_TO_READ = ("cpu",)  # on other devices a read waits for all that the device has been given to do


class NonFiniteError(UserError, RuntimeError):
    """A loss term or a gradient is not finite. The message says which, where, and what can be done."""


class Step(NamedTuple):
    """A step of the optimizer, and the verdict on it.

    Attributes:
        number: The step, from 0.
        seen: The batches behind it.
        bad: 1.0 if a number of it is not finite on any rank, else 0.0; in the host's memory once `written` has come.
        written: The device's mark behind that copy; None where there is no copy.
    """

    number: int
    seen: list[SeenBatch]
    bad: Tensor
    written: torch.cuda.Event | None = None

    def copied(self) -> Step:
        """Starts to copy the verdict to the host's memory, without waiting for the device."""
        if self.bad.device.type != "cuda":
            return self
        copy, mark = self.bad.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self.bad.device))
        return self._replace(bad=copy, written=mark)

    def is_bad(self) -> bool:
        """Reads the verdict, and waits for it."""
        if self.written is not None:
            self.written.synchronize()
        return bool(self.bad.tolist())


class NonFiniteGuard(pl.Callback):
    """Skips a step whose loss terms or gradients are not finite, and stops the run when there are too many.

    Weights, moments and weight decay stay as they were. (The average of the EMA counts the step, with equal weights.)
    All ranks decide alike. The batch is saved as ``RUN/nonfinite/step_N_rank_R.pt``; a run that stops also saves
    ``RUN/nonfinite/step_N.ckpt``: the weights before the step, and the place in the data behind it. Gradients that
    overflow under a GradScaler (16-mixed) are left to it; loss terms are not.

    No step waits for a GPU. A fused optimizer skips the step on the device; the verdict stays pending, and the host
    reads it while the device computes the next batch. (So a run that stops has skipped that batch, too.) An optimizer
    that is not fused waits for the verdict.

    Args:
        skip_steps: Steps that may be skipped in all, over all restarts of the run; one more stops it.
    """

    def __init__(self, skip_steps: NonNegativeInt = 0) -> None:
        self.skip_steps = skip_steps
        self.skipped = 0
        self._seen: list[SeenBatch] = []
        self._pending: Step | None = None
        self._failure: tuple[int, str] | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Keeps the batch until its numbers are known to be finite."""
        self._current = batch_idx, as_batch(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Keeps the batch's terms."""
        self._seen.append(SeenBatch(*self._current, pl_module.last_terms))

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Reads the verdict on the last step, whose gradients are still there, while the device runs a forward pass."""
        self._read_verdict(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Skips the step if a number is not finite. (Optimizers skip parameters without a gradient.)"""
        seen, self._seen = self._seen, []
        if self._failure is not None:
            optimizer.zero_grad()
            return
        bad = self._verdict(trainer, optimizer, seen)
        self._pending = Step(trainer.global_step, seen, bad).copied()
        if optimizer.defaults.get("fused") and bad.device.type not in FREE_TO_READ:
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # read by torch's fused kernels
        elif self._read_verdict(trainer, pl_module):
            optimizer.zero_grad()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Stops a run that has failed, or logs the number of skipped steps."""
        self._raise_if_failed(trainer)
        if self.skip_steps and is_logged(trainer, trainer.global_step):
            pl_module.log("train/skipped_steps", float(self.skipped))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Reads the pending verdict, so that neither a score nor a checkpoint follows on a step that stops the run."""
        self._read_verdict(trainer, pl_module)
        self._raise_if_failed(trainer)

    on_train_epoch_end = on_validation_start

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Reads the pending verdict."""
        self.on_validation_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of skipped steps."""
        return {"skipped": self.skipped + (self._pending is not None and self._pending.is_bad())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads that number."""
        self.skipped = state_dict["skipped"]

    def _verdict(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer, seen: list[SeenBatch]) -> Tensor:
        """Returns 1.0 if a number of the step is not finite on any rank, else 0.0, on the device."""
        numbers = [term for each in seen for term in each.terms.values()]
        if trainer.scaler is None:
            numbers.append(gradient_norm(optimizer).float())
        bad = torch.stack(numbers).isfinite().all().logical_not().float()
        if trainer.world_size > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return bad

    def _read_verdict(self, trainer: pl.Trainer, pl_module: Any) -> bool:
        """Reads the pending verdict, if there is one, and returns whether its step is skipped.

        Reports what is wrong on any rank, and saves the batches of this rank if it is the reason.
        """
        step, self._pending = self._pending, None
        if step is None or not step.is_bad():
            return False
        mark = f" (rank {trainer.global_rank})" if trainer.world_size > 1 else ""
        gradients = bad_gradients(pl_module)
        ours = [f"{cause}{mark}" for seen in step.seen for cause in bad_terms(trainer, pl_module, seen)]
        causes = [cause for theirs in gather(trainer, ours) for cause in theirs]
        by_gradient = not causes
        if by_gradient:
            whose = f"the gradient of {some(gradients)}" if gradients else "the norm of the gradient"
            causes = [f"{whose} is not finite ({'; '.join(place(trainer, seen) for seen in step.seen)})"]
        message = f"At step {step.number} of epoch {trainer.current_epoch}, {'; '.join(causes)}."
        self.skipped += 1
        rank_zero_info(f"{message} The step is skipped ({self.skipped} of at most {self.skip_steps}).")
        if self.skipped > self.skip_steps:
            self._failure = step.number, message
        if ours or by_gradient:
            file = _folder(trainer) / f"step_{step.number}_rank_{trainer.global_rank}.pt"
            save(file, step.number, step.seen, gradients)
        return True

    def _raise_if_failed(self, trainer: pl.Trainer) -> None:
        """Saves the weights and raises, if the run has failed."""
        if self._failure is None:
            return
        (number, message), self._failure = self._failure, None
        checkpoint = _folder(trainer) / f"step_{number}.ckpt"
        trainer.save_checkpoint(checkpoint)
        raise NonFiniteError(
            f"{message} The step was not taken; the batch and the weights before it are in {checkpoint.parent}. A run "
            "is exact to the last bit, so the same command meets this again. Lower the learning rate, clip the "
            "gradients (--trainer.gradient_clip_val 1), take another --trainer.precision, go on after this batch "
            f"(--ckpt_path {checkpoint}), or skip such steps (--nonfinite.skip_steps "
            f"{self.skip_steps + 10})."
        )


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "nonfinite"
