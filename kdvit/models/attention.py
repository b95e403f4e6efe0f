"""Which attention kernel a network trains with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def avoid_slow_attention(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Turns timm's fused attention off, in place, where its backward is slow: for bfloat16 on the CPU.

    Elsewhere the model stays as it is.

    Args:
        model: The network to train.
        device: Where it will train.
        dtype: The type that attention is computed in.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        modules: list[Any] = list(model.modules())
        for module in modules:
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
