"""Images that a table names, with their labels."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdvit.data.labels import LabelError
from kdvit.data.listed import ListedImages
from kdvit.data.listing import ImageList
from kdvit.data.splits import set_apart
from kdvit.errors import some
from kdvit.structures import ONE_CLASS

Rows = list[tuple[str, str]]


class ImageTable(ListedImages):
    """Images by a table of paths and labels, a row an image: CSV, or Parquet where pyarrow is installed.

    Args:
        train: Table of the training images.
        val: The same of the validation images; without it, `val_share` of each class is set apart.
        test: The same for `kdvit test` and `predict`; without it, they show the images of val.
        root: Folder that the paths are relative to; by default the table's own.
        path_column: Name of the column of paths.
        label_column: Name of the column of labels, which are names or numbers.
        classes: The labels in the order of the classes; by default those of train, sorted, numbers as numbers.
        kwargs: Those of ListedImages.

    Raises:
        FileNotFoundError: If there is no such table.
        ImportError: If a Parquet table is given without pyarrow.
        ValueError: If a table has no such column or no row, or a label is missing, unknown or a number to regress.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        root: str | None = None,
        path_column: str = "path",
        label_column: str = "label",
        classes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = {
            split: Path(file).absolute() for split, file in (("train", train), ("val", val), ("test", test)) if file
        }
        column = label_column if self.is_labelled else None
        rows = {split: read_rows(file, path_column, column) for split, file in given.items()}
        self.class_names = () if column is None else classes or sorted_classes(rows["train"], train)
        self.root = Path(root or given["train"].parent).absolute()
        folders = {split: self.root if root else file.parent for split, file in given.items()}
        self.samples = {split: listed(folders[split], rows[split], self.class_names, given[split]) for split in rows}
        if val is None:
            self.samples |= set_apart(self.samples["train"], self.root, self.val_share, self.split_seed)


def read_rows(file: Path, path: str, label: str | None) -> Rows:
    """Reads path and label of each row as text; of images without labels, the label is empty."""
    columns = [path] if label is None else [path, label]
    if file.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f"{str(file)!r}: Parquet tables need pyarrow: pip install 'kdvit[data]'.") from error
        known = parquet.read_schema(file).names
        require_columns(file, columns, known)
        read = parquet.read_table(file, columns=columns).to_pydict()
        found = list(zip(*(read[name] for name in columns), strict=True))
    else:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream)
            require_columns(file, columns, table.fieldnames or ())
            found = [tuple(row[name] for name in columns) for row in table]
    if not found:
        raise ValueError(f"{str(file)!r} has no row.")
    rows = [(str(each[0] or ""), "" if label is None or each[1] is None else str(each[1])) for each in found]
    empty = [number for number, row in enumerate(rows, start=2) if not row[0] or not (row[1] or label is None)]
    if empty:
        raise ValueError(f"{str(file)!r}: row {empty[0]} has no {' or no '.join(columns)} ({len(empty)} such rows).")
    return rows


def require_columns(file: Path, wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError unless a table has certain columns."""
    if lacking := [name for name in wanted if name not in known]:
        raise ValueError(
            f"{str(file)!r} has no column {lacking[0]!r}; it has {', '.join(map(repr, known)) or 'none'}. Name it by "
            "path_column or label_column."
        )


def sorted_classes(rows: Rows, file: str) -> list[str]:
    """Returns the labels of a table, each once: whole numbers by size, other texts by name.

    Raises:
        LabelError: If they are numbers to regress, or below 0.

    Examples:
        >>> sorted_classes([("a.png", "10"), ("b.png", "9")], "train.csv")
        ['9', '10']
    """
    names = sorted({label for _, label in rows})
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return names
    if wrong := [name for name, value in values.items() if value < 0 or not value.is_integer()]:
        raise LabelError(f"{file!r}: the labels are numbers, and {wrong[0]} is no class. {ONE_CLASS}")
    return sorted(names, key=values.__getitem__)


def listed(folder: Path, rows: Rows, classes: Sequence[str], table: Path) -> ImageList:
    """Lists the images of a table, by paths relative to a folder."""
    numbers = {name: number for number, name in enumerate(classes)}
    if classes and (unknown := sorted({label for _, label in rows} - numbers.keys())):
        raise LabelError(
            f"{str(table)!r} has labels that are no classes of train: {some(map(repr, unknown))}. Classes: "
            f"{some(classes)}."
        )
    samples = [(os.path.join(folder, path), numbers[label] if classes else -1) for path, label in rows]
    return ImageList(samples, classes, hashlib.sha256(repr([path for path, _ in rows]).encode()).hexdigest())
