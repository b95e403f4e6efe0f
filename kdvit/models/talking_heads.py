"""CaiT's talking heads at the cost of a small matrix product: the same numbers, the same weights."""

from __future__ import annotations

import torch
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn


class FastTalkingHeadAttn(TalkingHeadAttn):
    """timm's TalkingHeadAttn with the heads mixed as one product ``[H, H] @ [H, N * N]`` an image.

    timm applies a Linear of H inputs to a permuted view of the attention maps ``[B, H, N, N]``, which is copied there
    and back. Parameters, their names and the result (to rounding) are timm's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the attended tokens ``[B, N, D]`` of tokens ``[B, N, D]``."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attn = mix_heads((q * self.scale) @ k.transpose(-2, -1), self.proj_l).softmax(dim=-1)
        attn = self.attn_drop(mix_heads(attn, self.proj_w))
        x = (attn @ v).transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.proj_drop(self.proj(x))
        return out


def mix_heads(attn: Tensor, mix: nn.Linear) -> Tensor:
    """Applies a Linear over the heads of attention maps ``[B, H, N, N]``."""
    # bmm of an expanded weight: matmul would fold the images into one product, and copy the maps for it
    mixed = torch.bmm(mix.weight.expand(attn.shape[0], -1, -1), attn.flatten(2))
    return mixed.add_(mix.bias.to(mixed.dtype).unsqueeze(1)).view_as(attn)


def use_fast_talking_heads(model: nn.Module) -> None:
    """Gives every TalkingHeadAttn of timm's inside a model the fast forward, in place."""
    for module in model.modules():
        if type(module) is TalkingHeadAttn:
            module.__class__ = FastTalkingHeadAttn
