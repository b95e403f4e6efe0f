"""The weight of a loss term: a number, or a schedule over the epochs of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["linear", "cosine", "step"]
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
    "step": math.floor,
}
"""The part of the way from start to end that is gone, by the part of the epochs that is over."""


@dataclass(frozen=True)
class WeightSchedule:
    """A weight that goes from one value to another over the first epochs of a run, and stays there.

    It is constant within an epoch, as the learning rate is, and follows from the number of the epoch alone: a run that
    goes on, or reads a cache, has the weights of an uninterrupted one.

    Attributes:
        start: Weight of epoch 0, the first.
        end: Weight from epoch `epochs` on.
        epochs: Epochs from start to end.
        shape: "linear", "cosine" (half a wave, flat at both ends), or "step" (start for so many epochs, then end).

    Raises:
        ValueError: If a weight is negative, `epochs` is below 1, or the shape is unknown.

    Examples:
        >>> weight = WeightSchedule(start=1.0, end=0.0, epochs=4)
        >>> [weight.at(epoch) for epoch in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> f"{weight:g}"
        '1 (epoch 0) to 0 (epoch 4 on, linear)'
    """

    start: float
    end: float
    epochs: int
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        if not (self.start >= 0 and self.end >= 0):
            raise ValueError(f"weight: start and end must be 0 or more, got {self.start} and {self.end}.")
        if self.epochs < 1:
            raise ValueError(f"weight: epochs must be 1 or more, got {self.epochs}. (A constant weight is a number.)")
        if self.shape not in SHAPES:
            raise ValueError(f"weight: shape must be one of {', '.join(get_args(Shape))}, got {self.shape!r}.")

    def at(self, epoch: int) -> float:
        """Returns the weight in an epoch, counted from 0."""
        done = SHAPES[self.shape](min(epoch / self.epochs, 1.0))
        return self.start * (1 - done) + self.end * done

    def __format__(self, spec: str) -> str:
        return f"{self.start:{spec}} (epoch 0) to {self.end:{spec}} (epoch {self.epochs} on, {self.shape})"


Weight = float | WeightSchedule


def require_weight(weight: Weight, name: str) -> None:
    """Raises ValueError if a weight is null or a negative number; a schedule has been checked."""
    if not isinstance(weight, WeightSchedule) and (weight is None or weight < 0):
        raise ValueError(f"{name} must be 0 or more, got {weight}.")


def weight_at(weight: Weight, epoch: int) -> float:
    """Returns a weight in an epoch, counted from 0."""
    return weight.at(epoch) if isinstance(weight, WeightSchedule) else weight
