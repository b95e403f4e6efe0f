"""An outside project with a distiller of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import Distiller, ViTOutput
from kdvit.structures import OutputShapes


class RelationalDistiller(Distiller):
    """Relations between images: distances of pooled features (RKD, arXiv:1904.05068)."""

    student_layers = (-1,)
    teacher_layers = (-1,)
    needs_teacher_logits = False

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        self.projector = nn.Linear(student.features[0][0], teacher.features[0][0])

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        ours = self.projector(student.features[0].mean((2, 3)))
        theirs = teacher.features[0].mean((2, 3))
        return F.smooth_l1_loss(_distances(ours), _distances(theirs))


def _distances(features: Tensor) -> Tensor:
    distances = torch.pdist(features)
    return distances / distances.mean()
