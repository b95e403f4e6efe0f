"""Building timm models from a config, with errors that name the way out."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from torch import nn

from kdvit.errors import nearest

WEIGHTS = "model.safetensors"
"""The weights in an exported folder."""
OF_A_RUN = "student.model."
"""What stands before a student's keys in a checkpoint of `kdvit fit`."""


def create_timm_model(
    arch: str,
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    img_size: int | None = None,
    drop_path_rate: float = 0.0,
    model_args: dict[str, Any] | None = None,
    new_head: bool = True,
) -> nn.Module:
    """Builds a timm model.

    Args:
        arch: timm's model name, or ``local-dir:FOLDER`` for an exported folder.
        num_classes: Number of classes; None leaves the architecture's own head.
        pretrained: Load timm's published weights.
        checkpoint: Load weights from a local file instead, of timm or `kdvit fit`, or from an exported folder.
        img_size: Input size in pixels; None leaves the architecture's own.
        drop_path_rate: Stochastic depth.
        model_args: More arguments of the model.
        new_head: Whether a checkpoint of other classes may leave the model with an untrained head.

    Raises:
        ValueError: If the architecture or an argument is unknown, or weights do not fit.
        FileNotFoundError: If the checkpoint is not there.
        RuntimeError: If published weights cannot be fetched.
    """
    _check_arch(arch)
    if pretrained and checkpoint:
        raise ValueError(
            f"{arch}: give either pretrained: true or a checkpoint, not both; got checkpoint {checkpoint!r}."
        )
    if checkpoint and Path(checkpoint).is_dir():
        checkpoint = str(Path(checkpoint) / WEIGHTS)
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"{arch}: there is no checkpoint file {str(Path(checkpoint).absolute())!r}.")
    given = {"num_classes": num_classes, "img_size": img_size, "drop_path_rate": drop_path_rate or None}
    args = {**{name: value for name, value in given.items() if value is not None}, **(model_args or {})}
    try:
        model: nn.Module = timm.create_model(arch, pretrained=pretrained, **args)
    except TypeError as error:
        raise ValueError(f"{arch} does not take these arguments: {args}. timm says: {error}") from error
    except (AssertionError, RuntimeError, ZeroDivisionError, OverflowError, MemoryError) as error:
        raise ValueError(f"timm cannot build {arch} with {args}: {str(error) or type(error).__name__}") from error
    except OSError as error:
        raise RuntimeError(
            f"The published weights of {arch} cannot be fetched ({type(error).__name__}: {error}). Fetch them where "
            "there is internet and pass the file as `checkpoint`, or set HF_HUB_CACHE to a folder that has them."
        ) from error
    if checkpoint:
        _load(model, arch, checkpoint, new_head)
    return model


def _check_arch(arch: str) -> None:
    source, _, folder = arch.rpartition(":")
    if source == "local-dir":
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(
                f"There is no exported network in {str(Path(folder).absolute())!r}: expected config.json and "
                "model.safetensors there. Train it first, or correct the path in `arch`."
            )
    elif not source and not timm.is_model(arch.split(".")[0]):
        raise ValueError(f"timm has no model {arch!r}.{nearest(arch, timm.list_models())} timm.list_models() has all.")


def _load(model: nn.Module, arch: str, checkpoint: str, new_head: bool) -> None:
    """Loads weights of the same architecture; position embeddings are resized."""
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        weights = load_state_dict(checkpoint, use_ema=False)
        if trained := {key.removeprefix(OF_A_RUN): value for key, value in weights.items() if key.startswith(OF_A_RUN)}:
            weights = trained
        weights = filter_fn(weights, model) if filter_fn else weights
        own = model.state_dict()
        found = [key for key in own if key.startswith("head") and key in weights]
        heads = [key for key in found if len(weights[key]) != len(own[key])]
        if heads and new_head:
            warnings.warn(f"{checkpoint!r} is of other classes: {', '.join(heads)} are left out.", stacklevel=2)
        model.load_state_dict({**weights, **({key: own[key] for key in heads} if new_head else {})})
    except (RuntimeError, ValueError, KeyError, AttributeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"The checkpoint {checkpoint!r} does not fit {arch}: {error}") from error
