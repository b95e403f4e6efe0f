"""Features that others saved."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_features(file: str | Path) -> dict[str, Tensor]:
    """Reads tokens of a ``.npy`` file, or of every array of a ``.npz``, by name.

    Args:
        file: Arrays ``[images, N, D]`` of a floating type. A ``.npy`` is mapped, not read at once. Pickled objects are
            refused.

    Raises:
        ValueError: If an array has another shape or type.
        FileNotFoundError: If there is no such file.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file.absolute())!r}.")
    try:
        loaded = np.load(file, mmap_mode="c", allow_pickle=False)  # copy-on-write: torch wants writable arrays
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                arrays = dict(loaded)
        else:
            arrays = {file.stem: loaded}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"It is no array file that can be read without running code: {error}.") from error
    if not arrays:
        raise ValueError("It holds no array.")
    for name, array in arrays.items():
        if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"Array {name!r} is {array.dtype} of shape {list(array.shape)}; expected floating-point tokens "
                "[images, N, D]."
            )
    native = {name: array.dtype.newbyteorder("=") for name, array in arrays.items()}
    return {name: torch.from_numpy(array.astype(native[name], copy=False)) for name, array in arrays.items()}
