"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table in columns as wide as their widest cell, two spaces apart.

    Args:
        head: Names of the columns; empty for a table without.
        rows: Cells of each row.
        left: Columns that stand at the left, from the first on; numbers stand at the right.

    Example:
        >>> print(text_table(("run", "top-1 (%)"), [("lift", "77.53"), ("plain", "74.86")]))
        run    top-1 (%)
        lift       77.53
        plain      74.86
    """
    lines = [head, *rows] if head else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
