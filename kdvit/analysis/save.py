"""A report as files: a page to read, numbers, tables, curves and figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from kdvit.analysis.page import page
from kdvit.analysis.plots import FIGURES, figures
from kdvit.analysis.report import Report
from kdvit.tables import latex_table, markdown_table


def save(report: Report, folder: str | Path, against: bool = False) -> list[Path]:
    """Writes report.html, report.json, tables (CSV, Markdown, LaTeX), curves.npz and the figures; returns the files.

    Args:
        report: The report.
        folder: Made if it is not there.
        against: In the tables in Markdown and LaTeX, the paper's figures beside the models that it has.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")):
        old.unlink(missing_ok=True)
    drawn = figures(report)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=160)
        figure.savefig(folder / f"{name}.pdf")
    (folder / "report.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
    np.savez_compressed(folder / "curves.npz", **report.curves())  # type: ignore[arg-type]
    with (folder / "tables.csv").open("w", newline="") as stream:
        rows = report.rows()
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    cells = report.publishable(against)
    (folder / "tables.md").write_text(markdown_table(*cells) + "\n")
    (folder / "tables.tex").write_text(latex_table(*cells) + "\n")
    (folder / "report.html").write_text(page(report, {name: folder / f"{name}.png" for name in drawn}))
    names = ["report.html", "report.json", "tables.csv", "tables.md", "tables.tex", "curves.npz"]
    return [folder / name for name in (*names, *(f"{name}.{kind}" for name in drawn for kind in ("png", "pdf")))]
