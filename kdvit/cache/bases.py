"""The axes of the teacher's tokens by which stored targets were made, beside the records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save

from kdvit.files import write_whole
from kdvit.structures import SharedBasis

FILE = "bases.safetensors"


def save_bases(folder: Path, bases: Mapping[str, SharedBasis]) -> None:
    """Writes bases by name, in one piece."""
    tensors = {
        f"{name}: {part}": value.contiguous() for name, each in bases.items() for part, value in each._asdict().items()
    }
    write_whole(folder / FILE, save(tensors))


def load_bases(folder: Path) -> dict[str, SharedBasis]:
    """Reads bases by name; none where a cache has none."""
    file = folder / FILE
    tensors = load_file(file) if file.is_file() else {}
    names = dict.fromkeys(each.rpartition(": ")[0] for each in tensors)
    return {name: SharedBasis(*(tensors[f"{name}: {part}"] for part in SharedBasis._fields)) for name in names}
