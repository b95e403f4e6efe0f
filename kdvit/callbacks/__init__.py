"""Callbacks: what happens around the training of a student, and is no part of the method."""

from kdvit.callbacks.bad_images import BadImages
from kdvit.callbacks.ema import StudentEMA
from kdvit.callbacks.epoch_lines import EpochLines, NetworkLine, ScoreLine
from kdvit.callbacks.first_batch import FirstBatch
from kdvit.callbacks.labelled_probe import LabelledProbe
from kdvit.callbacks.nonfinite import NonFiniteError, NonFiniteGuard
from kdvit.callbacks.predictions import PredictionWriter
from kdvit.callbacks.preemption import Preemption
from kdvit.callbacks.student_export import StudentExport
from kdvit.callbacks.teacher_scores import TeacherScores
from kdvit.callbacks.throughput import Throughput

__all__ = [
    "BadImages",
    "EpochLines",
    "FirstBatch",
    "LabelledProbe",
    "NetworkLine",
    "NonFiniteError",
    "NonFiniteGuard",
    "PredictionWriter",
    "Preemption",
    "ScoreLine",
    "StudentEMA",
    "StudentExport",
    "TeacherScores",
    "Throughput",
]
