"""The learning rate over a run: timm's schedules, as a function of epoch or step and of the config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

SCHEDULES = ("constant", "cosine", "multistep", "poly", "step", "tanh")
TAKEN_BY = {
    "decay_epochs": ("step",),
    "decay_milestones": ("multistep",),
    "decay_rate": ("step", "multistep", "poly"),
    "patience_epochs": (),
    "plateau_mode": (),
}
"""Arguments of timm's that have an effect on some schedules alone."""
IN_EPOCHS = ("decay_epochs", "decay_milestones", "cooldown_epochs")
"""Arguments of timm's that are numbers of epochs."""
IN_TIMM: dict[str, dict[str, Any]] = {
    "step": {"decay_epochs": 90},
    "multistep": {"decay_milestones": (90, 180, 270)},
}
"""timm's defaults for them."""


class RunLength(NamedTuple):
    """How long a run is planned to be.

    Attributes:
        epochs: Epochs, the last one perhaps not whole.
        steps: Steps of the optimizer; None where they are not counted.
        steps_an_epoch: The same of an epoch.
    """

    epochs: int
    steps: int | None = None
    steps_an_epoch: int | None = None


def limited(batches: int, limit: int | float | None) -> int:
    """Returns how many of the batches of an epoch `trainer.limit_train_batches` leaves, a number or a share.

    Examples:
        >>> [limited(20, limit) for limit in (None, 5, 30, 0.25)]
        [20, 5, 20, 5]
    """
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def planned_length(epochs: int, steps: int, an_epoch: int) -> RunLength:
    """Returns the length of a run that is given by epochs or, where those are below 1, by steps.

    Examples:
        >>> planned_length(epochs=-1, steps=25, an_epoch=10)
        RunLength(epochs=3, steps=25, steps_an_epoch=10)
    """
    if epochs > 0:
        return RunLength(epochs, epochs * an_epoch, an_epoch)
    return RunLength(math.ceil(steps / an_epoch), steps, an_epoch)


@dataclass
class ScheduleOptions:
    """The learning rate over a run. It follows from the epoch or step and these options, and is never restored.

    Attributes:
        name: timm's name of the schedule. (Its multistep falls one epoch, or step, before a milestone; its poly has the
            power `args: {decay_rate: 1.0}`, by default 0.1.)
        interval: What moves it. By steps, all that is given in epochs counts as that many steps.
        warmup_epochs: Epochs of linear warm-up, rounded to whole ones for `interval: epoch`.
        warmup_steps: Steps of the warm-up, instead of `warmup_epochs`; for `interval: step`.
        warmup_share: Share of the run that is warm-up, instead of `warmup_epochs`.
        warmup_lr: Learning rate at the start of the warm-up.
        min_lr: Learning rate at the end of cosine, tanh and poly.
        lag_epochs: Epochs by which the learning rate is late; till then it is that of epoch 0. The authors' code
            (arXiv:2511.15572) is one late, for it moves the rate after an epoch: epochs 0 and 1 have `warmup_lr`. The
            default is better founded: no epoch is spent at the first rate of the warm-up twice.
        args: More arguments of timm's `create_scheduler_v2`. The run is shared by `cycle_limit` cycles and
            `cooldown_epochs`.

    Raises:
        ValueError: If there is no such schedule or argument, or options contradict each other.
    """

    name: str = "cosine"
    interval: Literal["epoch", "step"] = "epoch"
    warmup_epochs: float = 5
    warmup_steps: int | None = None
    warmup_share: float | None = None
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    lag_epochs: int = 0
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"schedule.name must be one of {', '.join(SCHEDULES)}, got {self.name!r}.")
        if self.warmup_steps is not None and (self.interval == "epoch" or self.warmup_share is not None):
            raise ValueError("schedule.warmup_steps goes with schedule.interval: step, and without warmup_share.")
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "lag_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} must be 0 or more, got {getattr(self, name)}.")
        for name in self.args:
            if name in TAKEN_BY and self.name not in TAKEN_BY[name]:
                needed = " or ".join(TAKEN_BY[name]) or "a schedule that kdvit has not"
                raise ValueError(f"schedule.args: {name} has no effect on {self.name}; it goes with {needed}.")
        try:
            self.rates(1.0, RunLength(1, 1, 1))
        except (TypeError, ArithmeticError) as error:  # an argument that timm does not have, or that kdvit sets
            raise ValueError(f"schedule.args: {error}.") from error

    def build(self, optimizer: torch.optim.Optimizer, length: RunLength) -> LearningRate:
        """Builds the schedule of an optimizer for a run of some length."""
        total, unit = self._measure(length)
        args: dict[str, Any] = {
            name: ([each * unit for each in value] if isinstance(value, (list, tuple)) else value * unit)
            if name in IN_EPOCHS
            else value
            for name, value in {**IN_TIMM.get(self.name, {}), **self.args}.items()
        }
        if self.name == "constant":
            args |= {"decay_epochs": total, "decay_rate": 1.0}
        warmup = self.warmup(length)
        left = total - args.get("cooldown_epochs", 0) - (warmup if args.get("warmup_prefix") else 0)
        cycles = sum(args.get("cycle_mul", 1) ** i for i in range(args.get("cycle_limit", 1)))
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched="step" if self.name == "constant" else self.name,
            num_epochs=max(1, math.ceil(left / cycles)),
            warmup_epochs=warmup,
            warmup_lr=self.warmup_lr,
            min_lr=self.min_lr,
            step_on_epochs=self.interval == "epoch",
            updates_per_epoch=1,
            **args,
        )
        return LearningRate(schedule, self.lag_epochs * unit)

    def _measure(self, length: RunLength) -> tuple[int, int]:
        """Returns how many epochs or steps a run has, and how many of them an epoch is."""
        if self.interval == "epoch":
            return length.epochs, 1
        assert length.steps is not None
        assert length.steps_an_epoch is not None
        return length.steps, length.steps_an_epoch

    def warmup(self, length: RunLength) -> int:
        """Returns how many epochs or steps of a run are warm-up."""
        total, unit = self._measure(length)
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.warmup_epochs * unit if self.warmup_share is None else self.warmup_share * total)

    def fault(self, length: RunLength) -> str:
        """Says that the warm-up fills a run, if it does."""
        total, _ = self._measure(length)
        if (warmup := self.warmup(length)) < total:
            return ""
        return (
            f"the warm-up of {warmup} {self.interval}s fills the run of {total}, which never comes to its learning "
            "rate: lower schedule.warmup_epochs (or what stands for it)."
        )

    def rates(self, lr: float, length: RunLength) -> list[float]:
        """Returns the learning rate of every epoch of a run, or of every step.

        Args:
            lr: The highest.
            length: How long the run is.

        Examples:
            >>> ScheduleOptions(warmup_epochs=2, warmup_lr=0.0, min_lr=0.0).rates(1.0, RunLength(4))
            [0.0, 0.5, 0.5, 0.14644660940672627]
        """
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
        rate = self.build(optimizer, length)
        values = []
        for i in range(length.epochs if self.interval == "epoch" else length.steps or 0):
            rate.set(epoch=i, step=i)
            values.append(float(optimizer.param_groups[0]["lr"]))
        return values


class LearningRate:
    """Sets the learning rate of an optimizer. It has no state: a run that goes on has the rates of its own command.

    Args:
        schedule: timm's schedule.
        lag: Epochs by which the rate is late or, for a schedule by steps, steps.
    """

    def __init__(self, schedule: Scheduler, lag: int = 0) -> None:
        self.schedule, self.optimizer, self.lag = schedule, schedule.optimizer, lag

    def set(self, epoch: int, step: int) -> None:
        """Sets the rate of an epoch or, for a schedule by steps, of a step."""
        self.schedule.step(max(epoch - self.lag, 0))
        self.schedule.step_update(max(step - self.lag, 0))

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores nothing."""
