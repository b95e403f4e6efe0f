"""`kdvit export`: a student for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kdvit.errors import UserError, shown


def export(
    *,
    ckpt: str,
    out: str,
    format: Literal["timm", "onnx", "torch-export"] = "timm",
    weights: Literal["raw", "ema"] = "raw",
    fold: bool = False,
) -> None:
    """Take a student out of a run: as safetensors that timm loads, as ONNX, or as a program of torch.export.

    Args:
        ckpt: A checkpoint of `kdvit fit` or of the authors, or an exported folder.
        out: Folder of model.safetensors and config.json, and of the format's file.
        format: timm is the folder alone.
        weights: The raw ones, which are trained and reported, or their average.
        fold: Fold the lift of a LiftViT into the student's own width: the same logits for the cost of a plain student.

    Example:
        kdvit export --ckpt runs/demo/lift/student --out students/lift --fold
    """
    if not Path(ckpt).exists():
        raise UserError(f"There is no exported folder or checkpoint {str(Path(ckpt).absolute())!r}.")
    from kdvit.models import export_student, load_student
    from kdvit.models.cost import forward_flops, parameter_count
    from kdvit.models.export import checked_fold, export_onnx, export_program

    folder = Path(out)
    with shown((ValueError, TypeError, OSError, ImportError, RuntimeError)):
        student = load_student(ckpt, ema=weights == "ema")
        if fold:
            lifted = student
            student, largest, scale = checked_fold(lifted)
            print(
                f"Folded: the logits differ by at most {largest:.2g} of {scale:.2g}; "
                f"{parameter_count(lifted):,} parameters became {parameter_count(student):,}, "
                f"{forward_flops(lifted) / 1e9:.4g} GFLOP an image {forward_flops(student) / 1e9:.4g}."
            )
        export_student(student, student.spec, folder)
        print(f"{type(student).__name__}, {parameter_count(student):,} parameters, {weights} weights, in {folder}.")
        if format != "timm":
            write, name = {"onnx": (export_onnx, "model.onnx"), "torch-export": (export_program, "model.pt2")}[format]
            largest = write(student, folder / name)
            print(f"{folder / name}: its logits differ from PyTorch's by at most {largest:.2g}.")
