"""What a config may have built: classes of the kinds that kdvit asks for, and nothing that only happens to be importable.

jsonargparse calls whatever a ``class_path`` names where a type allows anything, as in `model_args`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.utils.data import Dataset

from kdvit.messages import UserError
from kdvit.structures import subclasses

KINDS: tuple[type, ...] = (
    *(nn.Module, Dataset, pl.LightningDataModule, pl.Callback, Logger, Profiler, Strategy, Accelerator),
    *(Precision, CheckpointIO, ClusterEnvironment, LayerSync),
)


def require_buildable(config: Any) -> None:
    """Looks at every ``class_path`` of a parsed config before anything is built.

    It may name networks, objectives, data and the parts of a Trainer, and other classes of a package that gives one of them.

    Raises:
        UserError: If it names anything else.
    """
    found = {path: _find(path) for path in _class_paths(config)}
    wanted = {path for path, each in found.items() if inspect.isclass(each) and issubclass(each, KINDS)}
    packages = {found[path].__module__.partition(".")[0] for path in wanted}
    for path, each in found.items():
        if path not in wanted and not (inspect.isclass(each) and each.__module__.partition(".")[0] in packages):
            raise UserError(
                f"class_path: {path!r} is refused: expected a network, a distiller, data or a part of the Trainer, or a class of a "
                "package that gives one of them. A config that comes from elsewhere may run a program by such a name."
            )


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        if "class_path" in value:
            yield str(value["class_path"])
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _class_paths(each)


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if not module:
        return next((subclasses(kind)[name] for kind in KINDS if name in subclasses(kind)), None)
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None
