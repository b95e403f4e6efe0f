"""`kdvit import`: checkpoints of the paper's authors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kdvit.errors import UserError, shown


def import_released(
    checkpoint: str, *, out: str, weights: Literal["raw", "ema"] = "raw", num_heads: int | None = None
) -> None:
    """Turn a Lift or WideLast checkpoint of the authors into a student of kdvit.

    Args:
        checkpoint: The authors' .pth file.
        out: Folder of the student; kdvit.load_student reads it.
        weights: The raw ones, which the paper reports, or their average.
        num_heads: Heads of the wide blocks, for a file that does not say them, where they are not 64 channels each.

    Examples:
        kdvit import lift.pth --out students/lift
    """
    if not Path(checkpoint).is_file():
        raise UserError(f"There is no checkpoint file {str(Path(checkpoint).absolute())!r}.")
    from kdvit.models import export_student, load_released
    from kdvit.models.checkpoint import student_spec
    from kdvit.models.cost import parameter_count

    with shown():
        student, dropped = load_released(checkpoint, weights == "ema", num_heads)
    export_student(student, student_spec(student, student.image_format), out)
    print(f"{type(student).__name__}, {parameter_count(student):,} parameters, {weights} weights, in {out}.")
    if dropped:
        print(f"Left out, as no output depends on them: {', '.join(dropped)}.")
