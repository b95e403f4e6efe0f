"""Runs that are stopped from outside: they save themselves at the end of a batch, and the same command goes on."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from kdvit.runtime.checkpoints import gradients_are_taken, move_checkpoints
from kdvit.runtime.loggers import is_logged
from kdvit.runtime.saved import newest_checkpoint
from kdvit.runtime.signals import REQUESTS, REQUEUE, STOP, Stopped, requeue_job, signal_name


class Preemption(Checkpoint):
    """Saves ``RUN/checkpoints/last.ckpt`` when a signal requests it, and stops.

    * SIGUSR1 or SIGUSR2 (``#SBATCH --signal=SIGUSR1@120``): saves, requeues the Slurm job and exits. Where that is
      refused, or there is no Slurm, it only saves.
    * SIGTERM (``scancel``, the time limit, the end of a pod) and Ctrl-C: saves and exits. A second Ctrl-C exits at
      once.

    A handler only takes a note. At the end of each batch, of training and validation, each rank broadcasts its requests
    by an all-reduce of two numbers, which runs along with the next batch. So all save at the same step, and no
    handler runs into a collective of another rank. (Lightning's own handler saves at once, wherever each rank is.)

    The run that goes on repeats a validation that was interrupted, or due when a checkpoint was saved. A run may be
    moved in between.
    """

    def __init__(self) -> None:
        self._validating = False
        self._broadcast: tuple[Tensor, dist.Work] | None = None

    # Signals: handled once Lightning has set its own handlers, which it removes at the end

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Takes over the signals."""
        REQUESTS.listen(*REQUEUE, *STOP)
        self._broadcast = None

    on_sanity_check_start = on_train_start

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Answers the requests, unless gradients wait for more batches: a checkpoint has no gradients."""
        if gradients_are_taken(trainer, batch_idx):
            try:
                self._save_if_requested(trainer)
            except Stopped:
                self._log_step(trainer)
                raise
        if trainer.is_last_batch or validation_is_due(trainer):
            self._wait()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Notes that a validation of the training is on."""
        self._validating = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Answers the requests. (All ranks have equally many batches.)"""
        if self._validating:
            self._save_if_requested(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Notes that the validation is complete."""
        self._validating = False
        self._wait()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Waits for the last broadcast."""
        self._wait()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Says, as the last line, why the run has ended and from where it goes on, and ends the loader's workers."""
        if isinstance(exception, Stopped):
            rank_zero_info(exception.story)
        elif trainer.state.fn == TrainerFn.FITTING and trainer.global_step and trainer.is_global_zero:
            newest = newest_checkpoint(last_checkpoint(trainer).parent)
            whence = f"goes on from {newest}" if newest else "starts anew, as there is no checkpoint yet"
            rank_zero_info(f"The run has ended at step {trainer.global_step}. The same command {whence}.")
        REQUESTS.clear()
        trainer.fit_loop.teardown()  # Lightning ends the active loop alone, which amid an epoch may be a validation's

    def _save_if_requested(self, trainer: pl.Trainer) -> None:
        """Saves the run, and ends it, if a signal has requested that of any rank when the last broadcast began."""
        requeue, stop = self._gathered_requests(trainer)
        if requeue or stop:
            path = last_checkpoint(trainer)
            trainer.save_checkpoint(path, weights_only=False)
            REQUESTS.requeue = False  # a signal to stop that has come meanwhile is answered after the next batch
            saved = f"The run is saved in {path} at step {trainer.global_step}"
            if requeue:
                refusal = trainer.strategy.broadcast(requeue_job() if trainer.is_global_zero else "")
                if not refusal:
                    raise Stopped(0, f"{saved}, and Slurm has requeued the job.")
                rank_zero_info(f"{saved}. It is not requeued: {refusal}{'' if stop else ' Training goes on.'}")
            if stop:
                status = 128 + stop if trainer.is_global_zero else 0  # launchers kill the others if a rank has another
                raise Stopped(status, f"Stopped by {signal_name(stop)}. {saved}; the same command goes on from there.")
        if trainer.world_size > 1:
            requests = torch.tensor(_own_requests(trainer), device=trainer.strategy.root_device)
            self._broadcast = requests, dist.all_reduce(requests, dist.ReduceOp.MAX, async_op=True)

    def _log_step(self, trainer: pl.Trainer) -> None:
        """Logs the step at which a run is stopped, as Lightning would behind this hook."""
        if is_logged(trainer, trainer.global_step):
            logged = trainer.logged_metrics.items()
            values = {name: float(value) for name, value in logged if name.startswith("train/")}
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": trainer.current_epoch, **values}, step=trainer.global_step - 1)
                logger.save()

    def _wait(self) -> None:
        """Waits for the broadcast: no collective may end while workers are forked, see `kdvit.data.workers`."""
        if self._broadcast is not None:
            self._broadcast[1].wait()

    def _gathered_requests(self, trainer: pl.Trainer) -> tuple[int, int]:
        """Returns what any rank requested when the last broadcast began; a single process, its requests by now."""
        if trainer.world_size == 1:
            return _own_requests(trainer)
        self._wait()
        requeue, stop = (0, 0) if self._broadcast is None else self._broadcast[0].tolist()
        self._broadcast = None
        return requeue, stop

    # Checkpoints, whoever saves them

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Corrects the paths of a run that was moved, so that its best checkpoint stays the best."""
        folder = last_checkpoint(trainer).parent.resolve()
        if trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve().parent == folder:
            move_checkpoints(checkpoint["callbacks"], str(folder))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lets the run that goes on begin with the validation that is due or interrupted.

        Lightning would leave out the one, and go on with the other without the scores of its first batches.
        """
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        in_batch_end = progress["current"]["completed"] < progress["current"]["processed"]
        if self._validating or (in_batch_end and validation_is_due(trainer)):
            for count in (progress["current"], progress["total"]):
                count["completed"] = count["processed"]
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            validation = {"total": begun, "current": dict(begun), "is_last_batch": False}
            loops["epoch_loop.val_loop.batch_progress"] = validation


def last_checkpoint(trainer: pl.Trainer) -> Path:
    """Returns the path of a run's last.ckpt."""
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Tells whether a validation follows on the current training batch."""
    every = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    if trainer.should_stop:
        return True
    if trainer.val_check_batch in (None, float("inf")):
        return trainer.is_last_batch
    batches = (trainer.fit_loop.total_batch_idx if every is None else trainer.fit_loop.batch_idx) + 1
    return batches % trainer.val_check_batch == 0


def _own_requests(trainer: pl.Trainer) -> tuple[int, int]:
    # a SIGTERM that came before the handlers were ours is known to Lightning
    stop = signal.SIGTERM if trainer.received_sigterm else REQUESTS.stop
    return int(REQUESTS.requeue), int(stop or 0)
