"""Students in another form, each compared with the network that it came from: torch.export's, and a folded lift."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from kdvit.files import write_whole
from kdvit.models.lift import LiftViT
from kdvit.models.network import Network, network_name

BATCHES = (1, 3)  # sizes that an exported file is checked on: its batch is dynamic
IMAGES = 16  # on which a folded student is compared
TOLERANCE = 1e-4  # of the largest logit


class Agreement(NamedTuple):
    """How far an exported student agrees with the original.

    Attributes:
        largest: Largest difference of a logit, or without a head of a feature.
        scale: Largest logit or feature, by magnitude.
        same: Share of the images that get the same class; None without a head.
        images: Number of images.
    """

    largest: float
    scale: float
    same: float | None
    images: int

    def __str__(self) -> str:
        differ = f"differ from PyTorch's by at most {self.largest:.2g} of {self.scale:.2g}"
        if self.same is None:
            return f"its features {differ}, on {self.images} images"
        return f"its logits {differ}, and {self.same:.1%} of {self.images} images get the same class"


class Classifier(nn.Module):
    """A student as a plain module from images ``[B, C, H, W]`` to logits ``[B, K]``, or features without a head."""

    def __init__(self, student: Network) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        """Returns what the student is used for."""
        return self.student.deployed(image)


def export_program(student: Network, file: str | Path) -> Agreement:
    """Writes a program of torch.export (.pt2) with a dynamic batch, which `torch.export.load` reads without kdvit.

    Args:
        student: The student.
        file: Where to write.

    Returns:
        How far its logits, or without a head its features, agree with the student's.

    Raises:
        RuntimeError: If they differ by more than 1e-4 of the largest one. Nothing is written then.
    """
    shapes = {"image": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Classifier(student).eval(), (random_images(student, 2),), dynamic_shapes=shapes)
    images = [random_images(student, batch) for batch in BATCHES]
    with torch.no_grad():
        result = agreement(student, [program.module()(image) for image in images], images)
    content = io.BytesIO()
    torch.export.save(program, content)
    write_whole(Path(file), content.getbuffer())
    return result


@torch.no_grad()
def agreement(
    student: Network, exported: Sequence[Tensor], images: Sequence[Tensor], tolerance: float = TOLERANCE
) -> Agreement:
    """Compares the logits of an exported student, or without a head its features, with those of the original, in eval.

    Args:
        student: The original.
        exported: Logits ``[B, K]`` or features ``[B, C]`` for each of `images`.
        images: Batches ``[B, C, H, W]``.
        tolerance: How much of the largest one they may differ by.

    Raises:
        RuntimeError: If they differ by more, or are not finite.
    """
    with student.evaluating():
        original = torch.cat([student.deployed(image) for image in images]).double()
    ours = torch.cat(list(exported)).double()
    largest, scale = float((ours - original).abs().max()), float(original.abs().max())
    classifies = student.output_shapes().classes is not None
    if not (math.isfinite(largest) and largest <= tolerance * scale):
        raise RuntimeError(
            f"The exported student's {'logits' if classifies else 'features'} differ from the original's by "
            f"{largest:.2g} of {scale:.2g}; at most {tolerance:g} of the largest is right. Nothing is written."
        )
    same = float((ours.argmax(1) == original.argmax(1)).double().mean()) if classifies else None
    return Agreement(largest, scale, same, len(ours))


def random_images(student: Network, batch: int, size: tuple[int, int] | None = None) -> Tensor:
    """Returns normal noise ``[B, C, H, W]``, the same at every call, by default of the student's own size."""
    shape = batch, len(student.image_format.mean), *(size or student.image_format.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch))


def checked_reparameterization(student: Network) -> tuple[Network, Agreement]:
    """Merges the branches of a student that it needs in training alone, as timm does, and compares the two.

    Args:
        student: One with blocks such as those of MobileOne, RepVGG, FastViT or LeViT.

    Returns:
        The merged student, and how far its logits agree with the student's.

    Raises:
        ValueError: If there is nothing to merge.
        RuntimeError: If they differ by more than 1e-4 of the largest logit.
    """
    merged, images = cast("Network", reparameterize_model(student)), random_images(student, IMAGES)
    if merged.state_dict().keys() == student.state_dict().keys():
        raise ValueError(f"There is nothing to reparameterize in this {network_name(student)}: leave it out.")
    merged.spec = {**student.spec, "reparameterized": True}
    with torch.no_grad():
        return merged, agreement(student, [merged.deployed(images)], [images])


def checked_fold(student: Network) -> tuple[LiftViT, Agreement]:
    """Folds a Lift student, and compares the two on random images.

    Args:
        student: A LiftViT.

    Returns:
        The folded student, and how far its logits agree with the student's.

    Raises:
        ValueError: If the student has no lift, or it cannot be folded.
        RuntimeError: If they differ by more than 1e-4 of the largest logit.
    """
    if not isinstance(student, LiftViT):
        raise ValueError(
            f"--fold is for students with a lift, and this is a {type(student).__name__}. (The wide block of WideLast "
            "is not linear, and a student without a remedy has nothing to fold.)"
        )
    folded, images = student.folded().eval(), random_images(student, IMAGES)
    with torch.no_grad():
        return folded, agreement(student, [folded(images).logits], [images])
