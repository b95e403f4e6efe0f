"""Tables as a run writes them, for the terminal, for Markdown and for LaTeX, and sizes as they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def as_size(count: float) -> str:
    """Returns a number of bytes in the unit that suits it.

    Examples:
        >>> [as_size(count) for count in (7, 4_200, 1.5e6, 2.5e12)]
        ['7 bytes', '4.2 kB', '1.5 MB', '2,500.0 GB']
    """
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    return next((f"{count / unit:,.1f} {name}" for name, unit in units.items() if count >= unit), f"{count:.0f} bytes")


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table in columns as wide as their widest cell, two spaces apart.

    Args:
        head: Names of the columns; empty for a table without.
        rows: Cells of each row.
        left: Columns that stand at the left, from the first on; numbers stand at the right.

    Examples:
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


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Returns a table in Markdown, numbers at the right of the first column.

    Examples:
        >>> print(markdown_table(("run", "top-1"), [("a|b", "77.53")]))
        | run | top-1 |
        |---|--:|
        | a\|b | 77.53 |
    """
    lines = [[cell.replace("|", r"\|") for cell in line] for line in (head, *rows)]
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([drawn[0], "|---|" + "--:|" * (len(head) - 1), *drawn[1:]])


def latex_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Returns a table in LaTeX (booktabs), numbers at the right of the first column.

    Examples:
        >>> print(latex_table(("run", "at 95 %"), [("a_b", "61")]))
        \begin{tabular}{lr}
        \toprule
        run & at 95 \% \\
        \midrule
        a\_b & 61 \\
        \bottomrule
        \end{tabular}
    """
    special = str.maketrans({**{sign: f"\\{sign}" for sign in "&%$#_{}"}, "\\": r"\textbackslash{}"})
    lines = [" & ".join(cell.translate(special) for cell in line) + r" \\" for line in (head, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", *body, r"\end{tabular}"])


def read_table(file: Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics.csv by column, without those that a kill or a full disk has torn."""
    lines = file.read_text(errors="replace").splitlines(keepends=True)
    names, *table = [line.rstrip().split(",") for line in lines if line.endswith("\n")] or [[]]
    rows = (_numbers(dict(zip(names, cells, strict=True))) for cells in table if len(cells) == len(names))
    return [row for row in rows if row]


def _numbers(row: dict[str, str]) -> dict[str, float]:
    try:
        return {name: int(value) if value.isdecimal() else float(value) for name, value in row.items() if value}
    except ValueError:
        return {}
