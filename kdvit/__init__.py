"""kdvit: distill vision transformers with Lift, WideLast and the objectives that they are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "Batch",
    "DistillationModule",
    "Distiller",
    "ImageFormat",
    "OptimizerOptions",
    "ScheduleOptions",
    "ViTOutput",
    "load_student",
]

if TYPE_CHECKING:
    __version__: str
    from kdvit.distillers import Distiller
    from kdvit.models import load_student
    from kdvit.structures import Batch, ImageFormat, ViTOutput
    from kdvit.training.module import DistillationModule
    from kdvit.training.optim import OptimizerOptions
    from kdvit.training.schedule import ScheduleOptions

_HOMES = {
    "Batch": "kdvit.structures",
    "DistillationModule": "kdvit.training",
    "Distiller": "kdvit.distillers",
    "ImageFormat": "kdvit.structures",
    "OptimizerOptions": "kdvit.training.optim",
    "ScheduleOptions": "kdvit.training.schedule",
    "ViTOutput": "kdvit.structures",
    "load_student": "kdvit.models",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kdvit")
    if name not in _HOMES:
        raise AttributeError(f"module 'kdvit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
