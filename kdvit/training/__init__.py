"""A training step: a batch becomes terms, a loss and logs; optimizer, schedule, metrics, split students."""

from kdvit.training.module import DistillationModule
from kdvit.training.optim import OptimizerOptions
from kdvit.training.schedule import ScheduleOptions

__all__ = ["DistillationModule", "OptimizerOptions", "ScheduleOptions"]
