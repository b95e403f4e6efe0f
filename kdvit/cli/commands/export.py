"""`kdvit export`: a student for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kdvit.errors import UserError, shown
from kdvit.tables import as_size

COMPARED = 256
"""Images that an ONNX file is compared on, of those that are named."""


def export(
    *,
    ckpt: str,
    out: str,
    format: Literal["timm", "onnx", "torch-export"] = "timm",
    weights: Literal["raw", "ema"] = "raw",
    fold: bool = False,
    reparameterize: bool = False,
    precision: Literal["float32", "float16", "int8"] = "float32",
    dynamic_size: bool = False,
    images: str | None = None,
) -> None:
    """Take a student out of a run: as safetensors that timm loads, as ONNX, or as a program of torch.export.

    Args:
        ckpt: A checkpoint of `kdvit fit` or of the authors, or an exported folder.
        out: Folder of model.safetensors and config.json, and of the format's file.
        format: timm is the folder alone.
        weights: The raw ones, which are trained and reported, or their average.
        fold: Fold the lift of a LiftViT into the student's own width: the same logits for the cost of a plain student.
        reparameterize: Merge branches that only the training needs (MobileOne, RepVGG, FastViT, LeViT): the same logits
            for less. kdvit loads the folder then, and timm does not.
        precision: Of the ONNX file: float16 halves it, int8 quarters it by onnxruntime's dynamic quantisation.
        dynamic_size: Whether the ONNX file takes images of other heights and widths, where the network can.
        images: Folder of images, or a data module by its class name, to compare the ONNX file on, beside noise.

    Examples:
        kdvit export --ckpt runs/demo/lift/student --out students/lift --fold
    """
    if not Path(ckpt).exists():
        raise UserError(f"There is no exported folder or checkpoint {str(Path(ckpt).absolute())!r}.")
    if format != "onnx" and (precision != "float32" or dynamic_size or images is not None):
        raise UserError("--precision, --dynamic_size and --images are for --format onnx.")
    from kdvit.models import export_student, load_student
    from kdvit.models.cost import forward_cost, parameter_count
    from kdvit.models.export import checked_fold, checked_reparameterization, export_program

    folder = Path(out)
    with shown((ValueError, TypeError, OSError, ImportError, RuntimeError)):
        student = load_student(ckpt, ema=weights == "ema")
        steps = {
            "Folded": checked_fold if fold else None,
            "Reparameterized": checked_reparameterization if reparameterize else None,
        }
        for done, step in steps.items():
            if step is not None:
                before = student
                student, agreement = step(before)
                print(
                    f"{done}: {agreement}; {parameter_count(before):,} parameters became {parameter_count(student):,}, "
                    f"{forward_cost(before).flops / 1e9:.4g} GFLOP an image {forward_cost(student).flops / 1e9:.4g}."
                )
        if format == "torch-export":
            print(f"{folder / 'model.pt2'}: {export_program(student, folder / 'model.pt2')}.")
        elif format == "onnx":
            from kdvit.cli.images import batches
            from kdvit.models.onnx import export_onnx

            file = folder / "model.onnx"
            compared = [] if images is None else batches(images, student.image_format, COMPARED)
            agreement = export_onnx(student, file, precision, dynamic_size, compared)
            print(f"{file}, {precision}, {as_size(file.stat().st_size)}: {agreement}.")
        export_student(student, student.spec, folder)
        print(f"{type(student).__name__}, {parameter_count(student):,} parameters, {weights} weights, in {folder}.")
