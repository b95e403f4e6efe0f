"""Runs that are stopped from outside: saved at the end of a batch, and gone on with by the same command."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kdvit.runtime.checkpoints import gradients_are_taken, move_checkpoints, newest_checkpoint
from kdvit.runtime.signals import REQUESTS, REQUEUE, STOP, Stopped, named, requeue_job


class Preemption(Checkpoint):
    """Saves ``RUN/checkpoints/last.ckpt`` when a signal asks for it, and stops.

    * SIGUSR1 or SIGUSR2 (``#SBATCH --signal=SIGUSR1@120``): saves, requeues the Slurm job and exits. Where that is refused,
      or there is no Slurm, it only saves.
    * SIGTERM (``scancel``, the time limit, the end of a pod) and Ctrl-C: saves and exits. A second Ctrl-C exits at once.

    A handler only takes a note. At the end of each batch, of training and validation, the ranks agree on what any of them
    has been asked, by an all-reduce of two numbers that runs along with the next batch; so they save at the same step, and
    no handler ever runs into a collective of another rank. (Lightning's own handler saves at once, wherever each rank is.)

    A validation that is interrupted, or due when a checkpoint is saved, is held anew by the run that goes on, and a run may
    be moved in between.
    """

    def __init__(self) -> None:
        self._training = False
        self._validating = False
        self._agrees = False
        self._asked: tuple[Tensor, dist.Work] | None = None

    # The signals: noted as soon as Lightning has set its own handlers, which it takes back when it is done

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over the signals."""
        REQUESTS.remember(*REQUEUE, *STOP)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes over the signals, where no sanity check has been."""
        REQUESTS.remember(*REQUEUE, *STOP)
        self._training, self._asked = True, None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Does what is asked for, unless gradients are waiting for more batches: a checkpoint has no gradients."""
        if gradients_are_taken(trainer, batch_idx):
            self._obey(trainer)
        if trainer.is_last_batch or validation_is_due(trainer):
            self._hear_all()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds out whether the ranks can agree within this validation: if all have equally many batches."""
        self._validating = self._agrees = self._training
        if self._validating and trainer.world_size > 1:
            batches = sum(trainer.num_val_batches)
            extremes = torch.tensor([batches, -batches], dtype=torch.float32, device=trainer.strategy.root_device)
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            self._agrees = bool(extremes.sum() == 0)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Does what is asked for."""
        if self._validating and self._agrees:
            self._obey(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes that the validation is complete."""
        self._validating = False
        self._hear_all()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits for the last agreement."""
        self._agreed(trainer)
        self._training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tells, as the last line, what has ended the run and from where it goes on, and lets the loader's workers go."""
        if isinstance(exception, Stopped):
            rank_zero_info(exception.story)
        elif self._training and trainer.is_global_zero:
            newest = newest_checkpoint(last_checkpoint(trainer).parent)
            whence = f"goes on from {newest}" if newest else "starts anew, as there is no checkpoint yet"
            rank_zero_info(f"The run has ended at step {trainer.global_step}. The same command {whence}.")
        self._training = False
        REQUESTS.forget()
        trainer.fit_loop.teardown()  # Lightning ends the active loop alone, which amid an epoch may be a validation's

    # What is asked for

    def _obey(self, trainer: pl.Trainer) -> None:
        requeue, stop = self._agreed(trainer)
        if not (requeue or stop):
            self._tell(trainer)
            return
        path = last_checkpoint(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        REQUESTS.forget()
        where = f"The run is saved in {path} at step {trainer.global_step}"
        if requeue:
            answer = requeue_job() if trainer.is_global_zero else ""
            answer = trainer.strategy.broadcast(answer)
            if not answer:
                raise Stopped(0, f"{where}, and Slurm has requeued the job.")
            rank_zero_info(f"{where}. It is not requeued: {answer}{'' if stop else ' Training goes on.'}")
        if stop:
            status = (
                128 + stop if trainer.is_global_zero else 0
            )  # with another status of a rank, launchers kill the rest
            raise Stopped(status, f"Stopped by {named(stop)}. {where}; the same command goes on from there.")
        self._tell(trainer)

    def _tell(self, trainer: pl.Trainer) -> None:
        """Starts to tell the other ranks what this one has been asked."""
        if trainer.world_size > 1:
            asked = torch.tensor(_asked(trainer), device=trainer.strategy.root_device)
            work = dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)
            self._asked = asked, work

    def _hear_all(self) -> None:
        """Waits until all have told: no collective may end while workers are forked, see `kdvit.data.workers`."""
        if self._asked is not None:
            self._asked[1].wait()

    def _agreed(self, trainer: pl.Trainer) -> tuple[int, int]:
        """Returns what any rank had been asked when they last told each other; a single process, what it has been by now."""
        if trainer.world_size == 1:
            return _asked(trainer)
        if self._asked is None:
            return 0, 0
        (asked, work), self._asked = self._asked, None
        work.wait()
        requeue, stop = asked.tolist()
        return requeue, stop

    # Checkpoints, of whoever saves them

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lets a run that was moved know its checkpoints again, so that its best one stays the best."""
        folder = last_checkpoint(trainer).parent.resolve()
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve().parent == folder:
            move_checkpoints(checkpoint["callbacks"], str(folder))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sees to it that a validation that is due or interrupted is held by the run that goes on.

        Lightning would leave out the one, and go on with the other without the scores of its first batches.
        """
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        in_batch_end = progress["current"]["completed"] < progress["current"]["processed"]
        if self._validating or (in_batch_end and validation_is_due(trainer)):
            for count in (progress["current"], progress["total"]):
                count["completed"] = count["processed"]
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            loops["epoch_loop.val_loop.batch_progress"] = {
                "total": begun,
                "current": dict(begun),
                "is_last_batch": False,
            }


def last_checkpoint(trainer: pl.Trainer) -> Path:
    """Returns the path of a run's last.ckpt."""
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Tells whether a validation follows on the current training batch."""
    every = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    if trainer.val_check_batch in (None, float("inf")):
        return trainer.is_last_batch
    batches = (trainer.fit_loop.total_batch_idx if every is None else trainer.fit_loop.batch_idx) + 1
    return batches % trainer.val_check_batch == 0


def _asked(trainer: pl.Trainer) -> tuple[int, int]:
    stop = (
        signal.SIGTERM if trainer.received_sigterm else REQUESTS.stop
    )  # Lightning had it before the handlers were ours
    return int(REQUESTS.requeue), int(stop or 0)
