"""Feature-map distillation between chosen layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from kdvit.distillers.agreement import agreement
from kdvit.distillers.base import Distiller
from kdvit.distillers.bases import FixedProjection, energies_kept, pca_projection, phi_s_projection
from kdvit.distillers.spectral import spectral_mse
from kdvit.distillers.weights import Weight
from kdvit.structures import FixedTarget, Layer, OutputShapes, SharedBasis, ViTOutput, at_least_float32


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared difference over all elements (arXiv:2511.15572, feature loss).

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C, H, W]``.
    """
    return F.mse_loss(at_least_float32(student), at_least_float32(teacher))


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of each token's two features, averaged.

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C, H, W]``.
    """
    return 1 - F.cosine_similarity(at_least_float32(student), at_least_float32(teacher), dim=1).mean()


def cosine_smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Half `cosine_distance` and half smooth L1 (RADIO, arXiv:2312.06709; UNIC, arXiv:2408.05088).

    Args:
        student: ``[B, C, H, W]``.
        teacher: ``[B, C, H, W]``.
    """
    return 0.5 * cosine_distance(student, teacher) + 0.5 * F.smooth_l1_loss(student, teacher)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": feature_mse,
    "spectral": spectral_mse,
    "smooth_l1": F.smooth_l1_loss,
    "cosine": cosine_distance,
    "cosine_smooth_l1": cosine_smooth_l1,
}
FIXED = {"pca": pca_projection, "phi_s": phi_s_projection}
"""Projections of the teacher's tokens that are measured once."""
Loss = Literal["mse", "spectral", "smooth_l1", "cosine", "cosine_smooth_l1"]
Projector = Literal["pool", "linear", "orthogonal", "pca", "phi_s"]
Normalize = Literal["layer_norm", "unit_norm"]


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


def layer_normed(feature: Tensor) -> Tensor:
    """Returns the LayerNorm of each token of a map ``[B, C, H, W]`` over its channels, without affine part."""
    return F.layer_norm(feature.movedim(1, -1), feature.shape[1:2]).movedim(-1, 1)


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
    Features are taken before the final norm. With the layers "pooled" or "class_token", maps of one pixel behind it,
    single vectors are distilled (`kdvit.models.one_token`).

    VkD (arXiv:2403.06213) is ``projector: orthogonal, normalize: layer_norm, loss: smooth_l1``: between blocks token by
    token. Its classification runs compare mean tokens, which are the layer "pooled" of networks that pool by average.

    Args:
        weight: Factor of this term in the total loss; 0.2 in the paper's runs.
        student_layers: Layers of the student: block index (-1 is the last), fraction of the depth (0.5), or a
            name that the student offers.
        teacher_layers: Layers of the teacher, one for each of `student_layers`.
        loss: "mse", "smooth_l1", "cosine", "cosine_smooth_l1", or "spectral" for SpectralKD (arXiv:2412.19055).
        projector: What bridges unequal widths, always at no cost at inference. "pool" averages the channels of the
            wider map (the naive baseline of arXiv:2511.15572). "linear" trains a projector to the teacher's width.
            "orthogonal" trains one with orthonormal rows (VkD), and comes with layer_norm unless `normalize` says
            otherwise. "pca" and "phi_s" project the teacher to its leading principal axes
            in the student's width, see `kdvit.distillers.bases`; their targets have the mean variance 1, for which a
            weight of 0.1 to 0.5 is a good start.
        calibration_images: Training images on which the axes of "pca" and "phi_s" are measured.
        normalize: What is done to the tokens of a pair of maps, over their channels, right before the loss.
            "layer_norm" gives the teacher's mean 0 and variance 1 and leaves the student's alone: every token counts
            alike in the target, whatever the teacher's scale, and it is the student that comes to it. "unit_norm" gives
            those of both the length 1: a direction is compared, and a length that only one side had would be an error
            that no direction can mend.
        teacher: Name of the teacher, where there are several.

    Raises:
        ValueError: If the lists differ in length, are empty or an option is unknown; at `build`, if widths differ and
            no projector is named.
    """

    needs_teacher_logits: ClassVar[bool] = False
    way_out: ClassVar[str] = (
        "Name a bridge: projector: phi_s (the teacher's leading axes), pool (averages channels, the naive baseline) or "
        "linear (trained), all gone at inference. Or make the student wide: LiftViT or WideLastViT with width: {width}."
    )

    def __init__(
        self,
        weight: Weight = 1.0,
        student_layers: Sequence[Layer] = (-1,),
        teacher_layers: Sequence[Layer] = (-1,),
        loss: Loss = "mse",
        projector: Projector | None = None,
        calibration_images: int = 1000,
        normalize: Normalize | None = None,
        teacher: str | None = None,
    ) -> None:
        super().__init__(weight, teacher)
        if not student_layers or len(student_layers) != len(teacher_layers):
            raise ValueError(
                f"{type(self).__name__}: student_layers and teacher_layers are pairs and must be lists of one length, "
                f"got {len(student_layers)} ({list(student_layers)}) and {len(teacher_layers)} "
                f"({list(teacher_layers)})."
            )
        if loss not in LOSSES:
            raise ValueError(f"{type(self).__name__}: loss must be one of {sorted(LOSSES)}, got {loss!r}.")
        if projector not in (None, *get_args(Projector)):
            known = ", ".join(get_args(Projector))
            raise ValueError(f"{type(self).__name__}: projector must be one of {known} or null, got {projector!r}.")
        if normalize not in (None, *get_args(Normalize)):
            raise ValueError(
                f"{type(self).__name__}: normalize must be layer_norm, unit_norm or null, got {normalize!r}."
            )
        if calibration_images < 2:
            raise ValueError(f"{type(self).__name__}: calibration_images must be 2 or more, got {calibration_images}.")
        self.student_layers = tuple(student_layers)
        self.teacher_layers = tuple(teacher_layers)
        self.loss = loss
        self.projector = projector
        self.normalize = normalize or ("layer_norm" if projector == "orthogonal" else None)
        self.projectors = nn.ModuleList()
        self.widths: list[tuple[int, int]] = []
        self.calibration_images = calibration_images if projector in FIXED else 0

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Checks the widths and creates the linear projectors, if asked for."""
        self.projectors = nn.ModuleList()
        pairs = zip(student.features, teacher.features, strict=True)
        self.widths = [(ours, theirs) for (ours, *_), (theirs, *_) in pairs]
        for i, (ours, theirs) in enumerate(self.widths):
            if self.projector == "linear":
                self.projectors.append(nn.Conv2d(ours, theirs, kernel_size=1))
            elif self.projector == "orthogonal":
                self.projectors.append(orthogonal(nn.Linear(ours, theirs, bias=False)))
            elif self.projector in FIXED:
                if ours > theirs:
                    raise ValueError(
                        f"{type(self).__name__}: projector {self.projector} cannot keep {ours} of the teacher's "
                        f"{theirs} axes. For a student that is wider than its teacher take projector: linear."
                    )
                self.projectors.append(FixedProjection(theirs, ours))
            elif self.projector is None:
                self.require_same_width(i)

    def require_same_width(self, i: int) -> None:
        """Raises ValueError if a pair of layers has two widths."""
        ours, theirs = self.widths[i]
        if ours != theirs:
            raise ValueError(
                f"{type(self).__name__}: the student's layer {self.student_layers[i]!r} is {ours} channels wide "
                f"and the teacher's layer {self.teacher_layers[i]!r} {theirs}. {self.way_out.format(width=theirs)}"
            )

    def fixed_targets(self) -> tuple[FixedTarget | None, ...]:
        """Names those of "pca", "phi_s" and "pool" that are narrower than the teacher's map."""
        if self.projector not in (*FIXED, "pool"):
            return super().fixed_targets()
        axes = f", axes of {self.calibration_images} images" if self.projector in FIXED else ""
        return tuple(
            FixedTarget(f"{self.projector} to {ours} channels{axes}", ours) if ours < theirs else None
            for ours, theirs in self.widths
        )

    def target(self, i: int, feature: Tensor) -> Tensor:
        """Projects a map of the teacher by "pca", "phi_s" or "pool"; see `Distiller.target`."""
        if self.projector in FIXED:
            return self.projectors[i](feature)  # type: ignore[no-any-return]
        return _pool_channels(feature, min(self.widths[i])) if self.projector == "pool" else feature

    def calibrate(self, bases: Sequence[SharedBasis]) -> None:
        """Fixes the projections of "pca" and "phi_s"."""
        for basis, projection in zip(bases, self.projectors, strict=True):
            assert isinstance(projection, FixedProjection)
            projection.fix(basis.mean, FIXED[str(self.projector)](basis, projection.width))

    def is_calibrated(self) -> bool:
        """Returns whether the projections are fixed."""
        return all(bool(each.is_fixed) for each in self.projectors if isinstance(each, FixedProjection))

    def describe_calibration(self, bases: Sequence[SharedBasis]) -> list[str]:
        """Says how much of the teacher's energy, centred, each target keeps, and how much others would."""
        said = []
        for layer, basis, (width, channels) in zip(self.teacher_layers, bases, self.widths, strict=True):
            kept, drawn, pooled = energies_kept(basis, width).values()
            said.append(
                f"The target of layer {layer!r} keeps {kept:.1%} of their centred energy in {width} of {channels} "
                f"channels (pooled channels would keep {pooled:.1%}, random orthogonal axes {drawn:.1%})."
            )
        return said

    def aligned(self, student: ViTOutput, teacher: ViTOutput) -> list[tuple[Tensor, Tensor]]:
        """Returns the pairs of maps as the loss compares them, student first, each ``[B, C, H, W]``."""
        pairs = []
        for i, (ours, theirs) in enumerate(zip(student.features, teacher.features, strict=True)):
            ours, theirs = same_grid(ours, theirs)
            if self.projector == "linear":
                ours = self.projectors[i](ours)
            elif self.projector == "orthogonal":
                ours = self.projectors[i](ours.movedim(1, -1)).movedim(-1, 1)
            elif self.projector in FIXED:
                theirs = self.target(i, theirs)
            elif self.projector == "pool":
                ours, theirs = same_width(ours, theirs)
            if self.normalize == "layer_norm":
                theirs = layer_normed(theirs)
            elif self.normalize == "unit_norm":
                ours, theirs = F.normalize(ours), F.normalize(theirs)
            pairs.append((ours, theirs))
        return pairs

    def forward(self, student: ViTOutput, teacher: ViTOutput, target: Tensor) -> Tensor:
        """Returns the mean over the pairs of the loss of each pair."""
        loss = LOSSES[self.loss]
        return torch.stack([loss(ours, theirs) for ours, theirs in self.aligned(student, teacher)]).mean()

    def metrics(self, student: ViTOutput, teacher: ViTOutput) -> dict[str, Tensor]:
        """Measures each pair of maps as `kdvit.distillers.agreement` does."""
        measured: dict[str, Tensor] = {}
        for i, (ours, theirs) in enumerate(self.aligned(student, teacher)):
            suffix = f"_{i}" if len(self.student_layers) > 1 else ""
            measured |= {f"{name}{suffix}": value for name, value in agreement(ours, theirs).items()}
        return measured
