"""Weights that autocast would cast in every forward, cast once."""

from __future__ import annotations

import copy

import torch
from torch import nn

from kdvit.models.network import Network

CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose input, weight and bias autocast casts; subclasses may compute of their weights in float32 first."""


def cast_once(network: Network, dtype: torch.dtype) -> Network:
    """Returns a copy for use under autocast, whose Linear and convolution weights have autocast's type already.

    All else stays in float32, as autocast leaves it: norms, layer scale, position embeddings. So the output is equal in
    every bit, and a forward does not cast the weights again. (Autocast keeps what it has cast for weights that get a
    gradient only, and a frozen network's do not.)

    Args:
        network: A frozen network of timm's layers, which stays as it is.
        dtype: Autocast's type.
    """
    layers = [module for module in network.modules() if type(module) in CAST]
    weights = [each for layer in layers for each in layer.parameters(recurse=False) if each.dtype == torch.float32]
    cast = {id(each): nn.Parameter(each.detach().to(dtype), requires_grad=False) for each in weights}
    return copy.deepcopy(network, cast)
