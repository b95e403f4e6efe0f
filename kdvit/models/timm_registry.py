"""Lift and WideLast under timm's own model names, so that exported students load with `timm.create_model`."""

from __future__ import annotations

from typing import Any

from timm.models import PretrainedCfg, load_pretrained, register_model, resolve_pretrained_cfg
from torch import nn

from kdvit.models.lift import LiftViT
from kdvit.models.timm_network import TimmNetwork
from kdvit.models.wide_last import WideLastViT


@register_model
def lift_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds the timm model inside a `LiftViT`; takes its arguments."""
    return _registered(LiftViT, "lift_vit", pretrained, kwargs)


@register_model
def wide_last_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds the timm model inside a `WideLastViT`; takes its arguments."""
    return _registered(WideLastViT, "wide_last_vit", pretrained, kwargs)


def _registered(remedy: type[TimmNetwork], name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    config: PretrainedCfg = resolve_pretrained_cfg(
        name, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    )
    cache_dir = kwargs.pop("cache_dir", None)
    kwargs.pop("pretrained_model_args", None)  # what config.json said, a second time
    classes: int = kwargs.setdefault("num_classes", config.num_classes)
    make: Any = remedy
    model: nn.Module = make(**kwargs).model
    settings: Any = model
    settings.pretrained_cfg = settings.default_cfg = config.to_dict()  # type: ignore[no-untyped-call]
    if pretrained:
        load_pretrained(model, settings.pretrained_cfg, num_classes=classes, cache_dir=cache_dir)
    return model
