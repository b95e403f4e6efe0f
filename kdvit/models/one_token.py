"""Layers of one token an image, which a timm network offers beside its blocks, as maps ``[B, C, 1, 1]``.

They stand behind the final norm; a network that norms what it has pooled (timm's `fc_norm`, as EVA-02's) has none
before its class token. "pooled" is what the head reads (of two heads, the mean of what they read), before its dropout.
"class_token" is the class token. "distillation_logits" are the logits of the distillation head alone (DeiT,
arXiv:2012.12877, section 4), of K channels.
"""

from __future__ import annotations

from typing import Any

from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

POOLED, CLASS_TOKEN, DISTILLATION_LOGITS = NAMES = ("pooled", "class_token", "distillation_logits")
WAYS_OUT = {
    POOLED: "its class does not offer it; name it in token_layers(), and return it in forward().",
    CLASS_TOKEN: "it has no class token; take 'pooled', which is what its head reads.",
    DISTILLATION_LOGITS: "it has no distillation head; take one that has, such as deit_tiny_distilled_patch16_224.",
}
"""What to do where a network does not offer a layer."""


def has_head(model: Any) -> bool:
    """Tells whether a timm model classifies; one of `num_classes: 0` returns what its head would read."""
    classes: int = getattr(model, "num_classes", 1)
    return classes != 0


def offered(model: Any) -> list[str]:
    """Returns the names of the layers that a timm model has."""
    has = {
        POOLED: True,
        CLASS_TOKEN: getattr(model, "cls_token", None) is not None,
        DISTILLATION_LOGITS: isinstance(model, VisionTransformerDistilled) and has_head(model),
    }
    return [name for name in NAMES if has[name]]


def one_token_map(name: str, model: Any, end: Any) -> Tensor:
    """Returns a layer.

    Args:
        name: The layer, one of those that the model has.
        model: The timm model.
        end: What its `forward_features` returns.

    Returns:
        ``[B, C, 1, 1]``.
    """
    vector: Tensor
    if name == POOLED:
        vector = _pooled(model, end)
    elif name == CLASS_TOKEN:
        vector = end[:, 0]
    else:
        vector = model.head_dist(model.head_drop(end[:, 1]))
    return vector[:, :, None, None]


def _pooled(model: nn.Module, end: Any) -> Tensor:
    """Returns ``[B, C]``, with dropout off: as a module, and as a function that looks at the model's mode."""
    pooled: Tensor
    if not model.training:
        pooled = model.forward_head(end, pre_logits=True)  # type: ignore[operator]
        return pooled
    active = [each for each in model.modules() if each.training and (each is model or isinstance(each, nn.Dropout))]
    for each in active:
        each.training = False
    try:
        pooled = model.forward_head(end, pre_logits=True)  # type: ignore[operator]
    finally:
        for each in active:
            each.training = True
    return pooled
