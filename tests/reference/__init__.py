"""Numbers of the authors' code, made once with seeded input (README.md of this folder says how)."""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "reference.json").read_text())
ARRAYS = {name: torch.from_numpy(array) for name, array in np.load(HERE / "reference.npz").items()}


def reference_weights(model: str) -> dict[str, torch.Tensor]:
    """Returns the weights, by the keys of the authors' checkpoint, with which their outputs were computed."""
    return {**_drawn(model)}


@functools.cache
def _drawn(model: str) -> dict[str, torch.Tensor]:
    entry = NUMBERS["models"][model]
    weights = {}
    for key, shape in entry["state_dict"].items():
        seed = (zlib.crc32(key.encode()) + entry["weight_seed"]) % 2**32
        array = (0.05 * np.random.RandomState(seed).standard_normal(shape)).astype(np.float32)
        if "norm" in key and key.endswith("weight"):
            array = array + np.float32(1)
        weights[key] = torch.from_numpy(array)
    return weights


def reference_image(model: str) -> torch.Tensor:
    """Returns the images ``[2, 3, 224, 224]`` on which they were computed."""
    seed = NUMBERS["models"][model]["input_seed"]
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((2, 3, 224, 224)).astype(np.float32))
