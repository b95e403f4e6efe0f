"""`kdvit init`: a first config for one's own images and networks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kdvit.errors import UserError


def init(
    *,
    images: str,
    teacher: str,
    student: str = "deit_tiny_patch16_224",
    remedy: Literal["lift", "wide_last", "none"] = "lift",
    labels: bool | None = None,
    out: str = "kdvit.yaml",
) -> None:
    """Write a config with comments for your own images, teacher and student, sized for this machine.

    It looks at the images, builds both networks and times them, and asks nothing. `kdvit check` and `kdvit fit` take
    the config as it is.

    Args:
        images: Folder with a folder a class, or with train and val that have them, or of images without labels.
        teacher: A name of timm's, whose published weights are fetched; an exported folder or a run of `kdvit fit`; or a
            checkpoint of a run.
        student: A name of timm's.
        remedy: What the student learns the teacher's maps by: lift (for a VisionTransformer or Eva; free once trained),
            wide_last (a last block as wide as the teacher), or none (logits alone, or a fixed basis of the maps).
        labels: Whether folders are classes; by default they are, if there are two or more.
        out: The config.

    Examples:
        kdvit init --images photographs --teacher runs/demo/teacher
    """
    file = Path(out)
    if file.exists():
        raise UserError(f"{out!r} is there already: name another with --out, or remove it.")
    from kdvit.cli.starting import first_config

    text, facts = first_config(images, teacher, student, remedy, labels, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    print(f"{facts}\nWritten: {out}\nNext: kdvit check --config {out}\n      kdvit fit --config {out}")
