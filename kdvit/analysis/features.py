"""Features that others saved."""

from __future__ import annotations

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
    loaded = np.load(file, mmap_mode="c", allow_pickle=False)  # copy-on-write: torch wants writable arrays
    arrays = dict(loaded) if file.suffix == ".npz" else {file.stem: loaded}
    for name, array in arrays.items():
        if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"Array {name!r} is {array.dtype} of shape {list(array.shape)}; expected floating-point tokens "
                "[images, N, D]."
            )
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
