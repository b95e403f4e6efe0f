"""kdvit: distill vision transformers with Lift, WideLast and the objectives that they are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Batch", "DistillationModule", "Distiller", "ViTOutput", "load_student"]

if TYPE_CHECKING:
    from kdvit.distillers import Distiller
    from kdvit.models import load_student
    from kdvit.module import DistillationModule
    from kdvit.structures import Batch, ViTOutput

_HOMES = {
    "Batch": "kdvit.structures",
    "DistillationModule": "kdvit.module",
    "Distiller": "kdvit.distillers",
    "ViTOutput": "kdvit.structures",
    "load_student": "kdvit.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdvit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
