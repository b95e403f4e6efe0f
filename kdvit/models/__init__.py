"""Networks: what is deployed. Students, remedies and teachers, each as logits plus chosen feature maps."""

import kdvit.models.timm_registry  # noqa: F401  (its names are for timm.create_model)
from kdvit.models.attention import avoid_slow_attention
from kdvit.models.checkpoint import export_student, load_student
from kdvit.models.freezing import freeze_parameters
from kdvit.models.lift import LiftViT
from kdvit.models.module_network import ModuleNetwork
from kdvit.models.network import Network, fit_to_data
from kdvit.models.released import load_released
from kdvit.models.talking_heads import use_fast_talking_heads
from kdvit.models.teacher import FrozenTeacher, TimmTeacher
from kdvit.models.timm_network import TimmNetwork, TimmStudent, as_network
from kdvit.models.wide_last import WideLastViT

__all__ = [
    "FrozenTeacher",
    "LiftViT",
    "ModuleNetwork",
    "Network",
    "TimmNetwork",
    "TimmStudent",
    "TimmTeacher",
    "WideLastViT",
    "as_network",
    "avoid_slow_attention",
    "export_student",
    "fit_to_data",
    "freeze_parameters",
    "load_released",
    "load_student",
    "use_fast_talking_heads",
]
