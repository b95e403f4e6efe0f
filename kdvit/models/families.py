"""The networks of timm's that take a remedy."""

from __future__ import annotations

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def check_family(remedy: str, arch: str, model: nn.Module) -> None:
    """Checks that a model is one of timm's that a remedy knows.

    VisionTransformer is ViT, DeiT (with distillation token, too), DINOv2, CLIP, SigLIP and the hybrids; Eva is EVA-02,
    DINOv3, PE and other networks with rotary position embedding (RoPE).

    Raises:
        ValueError: If it is another.
    """
    if not isinstance(model, VisionTransformer | Eva):
        raise ValueError(
            f"{remedy} is for timm's VisionTransformer and Eva; {arch} is a {type(model).__name__}. Use one of them, "
            "such as deit_tiny_patch16_224 or vit_small_patch16_dinov3, or distill this one with FeatureDistiller "
            "(kdvit init: --remedy none)."
        )
