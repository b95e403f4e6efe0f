"""Feature-map distillation between chosen layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional import explained_variance

from kdvit.distillers.base import Distiller
from kdvit.distillers.spectral import spectral_mse
from kdvit.structures import Layer, OutputShapes, ViTOutput, at_least_float32


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared difference over all elements (arXiv:2511.15572, feature loss).

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C, H, W]``.
    """
    return F.mse_loss(at_least_float32(student), at_least_float32(teacher))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": feature_mse, "spectral": spectral_mse}


def same_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Resizes the finer of two maps to the grid of the coarser (bilinear, anti-aliased).

    Args:
        student: ``[B, C_s, H_s, W_s]``.
        teacher: ``[B, C_t, H_t, W_t]``.
    """
    size = min(student.shape[2:], teacher.shape[2:], key=torch.Size.numel)
    return _resize(student, size), _resize(teacher, size)


def same_width(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Averages neighbouring channels of the wider of two maps down to the width of the narrower.

    The order of channels is arbitrary, so this mixes unrelated ones: it is the baseline that the paper shows to fail,
    kept because it is the published one.

    Args:
        student: ``[B, C_s, H, W]``.
        teacher: ``[B, C_t, H, W]``.
    """
    width = min(student.shape[1], teacher.shape[1])
    return _pool_channels(student, width), _pool_channels(teacher, width)


def _resize(feature: Tensor, size: torch.Size) -> Tensor:
    if feature.shape[2:] == size:
        return feature
    return F.interpolate(feature, size=list(size), mode="bilinear", align_corners=False, antialias=True)


def _pool_channels(feature: Tensor, width: int) -> Tensor:
    if feature.shape[1] == width:
        return feature
    tokens = feature.flatten(2).transpose(1, 2)
    return F.adaptive_avg_pool1d(tokens, width).transpose(1, 2).reshape(-1, width, *feature.shape[2:])


class FeatureDistiller(Distiller):
    """Feature-map distillation between pairs of layers, averaged over the pairs.

    Unequal grids are bridged by resizing the finer map; unequal widths only by a `projector` that the user names.
    Features are taken before the final norm.

    Args:
        weight: Factor of this term in the total loss; 0.2 in the paper's runs.
        student_layers: Layers of the student: block index (-1 is the last), fraction of the depth (0.5), or a
            name that the student offers.
        teacher_layers: Layers of the teacher, one for each of `student_layers`.
        loss: "mse", or "spectral" for SpectralKD (arXiv:2412.19055).
        projector: What bridges unequal widths. "pool" averages the channels of the wider map (the naive baseline of
            arXiv:2511.15572); "linear" trains a projector from student to teacher width, gone after training.

    Raises:
        ValueError: If the lists differ in length, are empty or an option is unknown; at `build`, if widths differ and
            no projector is named.
    """

    needs_teacher_logits: ClassVar[bool] = False
    way_out: ClassVar[str] = (
        "Name a bridge: projector: pool (averages channels, the naive baseline) or projector: linear (trained, gone at "
        "inference). Or make the student wide: LiftViT or WideLastViT with width: {width}."
    )

    def __init__(
        self,
        weight: float = 1.0,
        student_layers: Sequence[Layer] = (-1,),
        teacher_layers: Sequence[Layer] = (-1,),
        loss: Literal["mse", "spectral"] = "mse",
        projector: Literal["pool", "linear"] | None = None,
    ) -> None:
        super().__init__(weight)
        if not student_layers or len(student_layers) != len(teacher_layers):
            raise ValueError(
                f"{type(self).__name__}: student_layers and teacher_layers are pairs and must be lists of one length, "
                f"got {len(student_layers)} ({list(student_layers)}) and {len(teacher_layers)} "
                f"({list(teacher_layers)})."
            )
        if loss not in LOSSES:
            raise ValueError(f"{type(self).__name__}: loss must be one of {sorted(LOSSES)}, got {loss!r}.")
        if projector not in (None, "pool", "linear"):
            raise ValueError(f"{type(self).__name__}: projector must be 'pool', 'linear' or null, got {projector!r}.")
        self.student_layers = tuple(student_layers)
        self.teacher_layers = tuple(teacher_layers)
        self.loss = loss
        self.projector = projector
        self.projectors = nn.ModuleList()

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Checks the widths and creates the linear projectors, if asked for."""
        self.projectors = nn.ModuleList()
        for i, ((ours, *_), (theirs, *_)) in enumerate(zip(student.features, teacher.features, strict=True)):
            if self.projector == "linear":
                self.projectors.append(nn.Conv2d(ours, theirs, kernel_size=1))
            elif self.projector is None and ours != theirs:
                raise ValueError(
                    f"{type(self).__name__}: the student's layer {self.student_layers[i]!r} is {ours} channels wide "
                    f"and the teacher's layer {self.teacher_layers[i]!r} {theirs}. {self.way_out.format(width=theirs)}"
                )

    def aligned(self, student: ViTOutput, teacher: ViTOutput) -> list[tuple[Tensor, Tensor]]:
        """Returns the pairs of maps as the loss compares them, student first, each ``[B, C, H, W]``."""
        pairs = []
        for i, (ours, theirs) in enumerate(zip(student.features, teacher.features, strict=True)):
            ours, theirs = same_grid(ours, theirs)
            if self.projector == "linear":
                ours = self.projectors[i](ours)
            elif self.projector == "pool":
                ours, theirs = same_width(ours, theirs)
            pairs.append((ours, theirs))
        return pairs

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns the mean over the pairs of the loss of each pair."""
        loss = LOSSES[self.loss]
        return torch.stack([loss(ours, theirs) for ours, theirs in self.aligned(student, teacher)]).mean()

    def metrics(self, student: ViTOutput, teacher: ViTOutput) -> dict[str, Tensor]:
        """Measures, for each pair, the mean cosine similarity of tokens and the explained share of the variance."""
        measured = {}
        for i, (ours, theirs) in enumerate(self.aligned(student, teacher)):
            suffix = f"_{i}" if len(self.student_layers) > 1 else ""
            measured[f"cosine{suffix}"] = F.cosine_similarity(ours, theirs, dim=1).mean()
            ours, theirs = (x.movedim(1, -1).flatten(0, -2) for x in (ours, theirs))
            explained = explained_variance(ours, theirs, multioutput="variance_weighted")
            measured[f"explained_variance{suffix}"] = torch.as_tensor(explained)
        return measured
