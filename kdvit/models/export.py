"""Students for other runtimes: ONNX and torch.export, each checked against the network that it came from."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.models.lift import LiftViT
from kdvit.models.network import Network

BATCHES = (1, 3)  # sizes that an exported file is checked on: its batch is dynamic
IMAGES = 16  # on which a folded student is compared
TOLERANCE = 1e-4  # of the logits


class Classifier(nn.Module):
    """A student as a plain module from images ``[B, 3, H, W]`` to logits ``[B, K]``."""

    def __init__(self, student: Network) -> None:
        super().__init__()
        self.student = student

    def forward(self, image: Tensor) -> Tensor:
        """Returns the logits."""
        logits: Tensor = self.student(image).logits
        return logits


def export_onnx(student: Network, file: str | Path) -> float:
    """Writes an ONNX file with a dynamic batch, input "image" and output "logits".

    Args:
        student: The student.
        file: Where to write.

    Returns:
        The largest difference between the logits of onnxruntime and of PyTorch.

    Raises:
        ImportError: If the extra `onnx` is not installed.
        RuntimeError: If they differ by more than 1e-4.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (what torch.onnx needs)
    except ImportError as error:
        raise ImportError("Export to ONNX needs the extra: pip install 'kdvit[onnx]'.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Classifier(student).eval(),
            (_images(student, 2),),
            str(file),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])

    return _largest_difference(student, run)


def export_program(student: Network, file: str | Path) -> float:
    """Writes a program of torch.export (.pt2) with a dynamic batch, which `torch.export.load` reads without kdvit.

    Args:
        student: The student.
        file: Where to write.

    Returns:
        The largest difference between its logits and the student's.

    Raises:
        RuntimeError: If they differ by more than 1e-4.
    """
    shapes = {"image": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Classifier(student).eval(), (_images(student, 2),), dynamic_shapes=shapes)
    torch.export.save(program, str(file))
    return _largest_difference(student, torch.export.load(str(file)).module())


def checked_fold(student: Network) -> tuple[LiftViT, float, float]:
    """Folds a Lift student, and compares the two on random images.

    Args:
        student: A LiftViT.

    Returns:
        The folded student, the largest difference of their logits, and the largest logit.

    Raises:
        ValueError: If the student has no lift, or it cannot be folded.
        RuntimeError: If they differ by more than 1e-4 of the largest logit.
    """
    if not isinstance(student, LiftViT):
        raise ValueError(
            f"--fold is for students with a lift, and this is a {type(student).__name__}. (The wide block of WideLast "
            "is not linear, and a student without a remedy has nothing to fold.)"
        )
    folded = student.folded()
    images = _images(student, IMAGES).to(student.blank_image())
    with torch.no_grad(), student.evaluating():
        ours, theirs = student(images).logits.double(), folded.eval()(images.to(folded.blank_image())).logits.double()
    largest, scale = float((ours - theirs).abs().max()), float(ours.abs().max())
    if not largest <= TOLERANCE * scale:
        raise RuntimeError(f"The folded student's logits differ by {largest:.2g} of {scale:.2g}: it is not exported.")
    return folded, largest, scale


def _images(student: Network, batch: int) -> Tensor:
    return torch.randn(batch, 3, *student.image_format.size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def _largest_difference(student: Network, exported: Any) -> float:
    differences = [
        (exported(image) - student.eval()(image).logits).abs().max() for image in (_images(student, n) for n in BATCHES)
    ]
    largest = float(torch.stack(differences).max())
    if largest > TOLERANCE:
        raise RuntimeError(
            f"The exported student differs from the original by {largest:.2g}; at most {TOLERANCE:g} is right."
        )
    return largest
