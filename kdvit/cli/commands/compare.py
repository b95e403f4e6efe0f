"""`kdvit compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path

from kdvit.errors import UserError, shown


def compare(runs: list[str], out: str = "runs/comparison") -> None:
    """Show runs side by side: accuracy, curves, costs, and settings that differ.

    Writes a page, the same as Markdown, and the numbers. What a run does not say is left blank. Runs that differ only
    in seed and paths are one setting: mean and 95 % interval (Student's t), and against the first setting the
    differences of runs that have the same seed.

    Args:
        runs: Run directories of `kdvit fit`, or exported students.
        out: Folder of comparison.html, comparison.md, comparison.json and curves.png.

    Examples:
        kdvit compare runs/demo/lift runs/demo/plain
    """
    for folder in map(Path, runs):
        if not any((folder / name).exists() for name in ("metrics.csv", "student", "model.safetensors")):
            raise UserError(
                f"{str(folder.absolute())!r} holds no run: expected metrics.csv or student/ in it, or an exported "
                "student."
            )
    with shown((OSError,), prefix=f"--out {out!r}: "):
        Path(out).mkdir(parents=True, exist_ok=True)
    from kdvit.cli.comparison import Comparison, save

    comparison = Comparison.read([Path(run) for run in runs])
    page, numbers = save(comparison, Path(out))
    print(comparison.text())
    print(f"To read: {page}. Numbers: {numbers}.")
