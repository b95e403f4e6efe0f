"""WideLast: only the last block is as wide as the teacher (arXiv:2511.15572)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdvit.models.families import check_family
from kdvit.models.layouts import read_spec
from kdvit.models.own import class_path
from kdvit.models.timm_model import create_timm_model, start_from
from kdvit.models.timm_network import TimmStudent


class WideBlock(nn.Sequential):
    """Linear, LayerNorm and a block of timm's, which gets all that timm gives a block beside the tokens (RoPE)."""

    def forward(self, input: Tensor, **context: Any) -> Tensor:
        """Returns tokens ``[B, N, width]`` of tokens ``[B, N, D]``."""
        projection, norm, block = self
        tokens: Tensor = block(norm(projection(input)), **context)
        return tokens


class WideLastViT(TimmStudent):
    """A vision transformer of timm's whose last block, final norm and head have the teacher's width.

    The last block is preceded by Linear (without bias) and LayerNorm (eps 1e-6) to the new width; class and register
    tokens go through like the others. Several widths widen as many last blocks, step by step. The wide blocks are
    timm's own for `arch`, so layer scale, MLP ratio, kind of block and the like carry over. Rotary position embeddings
    (RoPE) reach them as they reach the narrow ones, and so fix their head dimension. The layer "wide_last" is the last
    block's output.

    The schedules of the authors' code, for DeiT-Tiny: ``width: 384`` (6 heads, the published one); ``width: 384,
    num_heads: 3``; ``width: [256, 320, 384]`` (4, 5, 6 heads); ``width: [240, 312, 384], num_heads: 3``.

    Args:
        arch: timm's name of the narrow architecture, a VisionTransformer or Eva (`kdvit.models.families`).
        width: Width of the last block, the teacher's; or widths of as many last blocks.
        num_heads: Attention heads of the wide blocks, one number for all or one each. By default as many as keep the
            head dimension of `arch`.
        num_classes: Number of classes.
        published_init: Draw the Linear layers to the wider widths with a std of 0.02 and, unless weights are loaded,
            the class token too, as the authors' code does. The default is better founded: the class token is timm's, as
            in the narrow student (std 1e-6), and a Linear is torch's, scaled by its inputs (std 0.042 at 192).
        checkpoint: Start from weights of `arch` as it is in timm (see TimmStudent), of which the narrow blocks are
            loaded, or from a WideLastViT that kdvit has trained, the wide blocks included.
        kwargs: Those of TimmStudent.

    Raises:
        ValueError: If the architecture is neither a VisionTransformer nor an Eva, timm has no blocks of it at such a
            width, or widths and heads do not fit together.
    """

    def __init__(
        self,
        arch: str,
        width: int | list[int],
        num_heads: int | list[int] | None = None,
        num_classes: int = 1000,
        published_init: bool = False,
        checkpoint: str | None = None,
        **kwargs: Any,
    ) -> None:
        own = read_spec(checkpoint) if checkpoint else {}
        begun = own.get("class") == class_path(type(self)) and not kwargs.get("pretrained")
        super().__init__(arch, num_classes, checkpoint=None if begun else checkpoint, **kwargs)
        check_family("WideLastViT", arch, self.model)
        model: Any = self.model
        blocks = model.blocks
        widths = [width] if isinstance(width, int) else list(width)
        head_dim = model.embed_dim // _head_count(blocks[-1])
        heads = _heads(widths, num_heads, head_dim, len(blocks))
        if getattr(model, "rope", None) is not None:
            _check_rope(arch, model.rope_mixed, widths, heads, head_dim)
        before: int = model.embed_dim
        for i, (wide, count) in enumerate(zip(widths, heads, strict=True), start=len(blocks) - len(widths)):
            donor = self._donor(wide, count)
            blocks[i] = WideBlock(nn.Linear(before, wide, bias=False), nn.LayerNorm(wide, eps=1e-6), donor.blocks[i])
            before = wide
        if published_init:
            loaded = kwargs.get("pretrained") or checkpoint
            token = [model.cls_token] if model.cls_token is not None and not loaded else []
            for weight in (*(block[0].weight for block in blocks[-len(widths) :]), *token):
                nn.init.trunc_normal_(weight, std=0.02)
        for name in ("norm", "fc_norm", "attn_pool", "head", "head_dist"):
            if getattr(donor, name, None) is not None:
                setattr(model, name, getattr(donor, name))
        model.num_features = model.head_hidden_size = before
        self.init_args |= {"width": width, "num_heads": num_heads}
        if checkpoint and begun:
            start_from(model, arch, checkpoint)

    def _donor(self, width: int, num_heads: int) -> Any:
        """Returns timm's network of the student's `arch` at another width."""
        sizes = {**(self.init_args["model_args"] or {}), "embed_dim": width, "num_heads": num_heads}
        try:
            return create_timm_model(**{**self.init_args, "model_args": sizes})
        except ValueError as error:
            arch = self.init_args["arch"]
            raise ValueError(
                f"WideLastViT: timm has no blocks of {arch} at width {width} with {num_heads} heads; choose another "
                f"width, or LiftViT. ({error})"
            ) from error

    def named_layers(self) -> dict[str, int]:
        """The wide last block."""
        return {"wide_last": self.depth - 1}


def _head_count(block: Any) -> int:
    count: int = next(each.num_heads for each in block.modules() if hasattr(each, "num_heads"))
    return count


def _heads(widths: Sequence[int], num_heads: int | list[int] | None, head_dim: int, depth: int) -> list[int]:
    if not 1 <= len(widths) <= depth or min(widths) < 1:
        raise ValueError(
            f"WideLastViT: width must be 1 to {depth} positive widths for {depth} blocks, got {list(widths)}."
        )
    by_width = [max(wide // head_dim, 1) for wide in widths]
    heads = [num_heads] * len(widths) if isinstance(num_heads, int) else num_heads or by_width
    if len(heads) != len(widths):
        raise ValueError(
            f"WideLastViT: {len(widths)} widths need as many num_heads (or one for all), got {len(heads)}."
        )
    for wide, count in zip(widths, heads, strict=True):
        if count < 1 or wide % count:
            raise ValueError(
                f"WideLastViT: width {wide} does not divide into {count} heads. Choose num_heads that divides it, or a "
                f"multiple of the head dimension {head_dim}."
            )
    return heads


def _check_rope(arch: str, mixed: bool, widths: Sequence[int], heads: Sequence[int], head_dim: int) -> None:
    if mixed:
        raise ValueError(
            f"WideLastViT: {arch} learns a rotary position embedding for each head of each block, and wide blocks have "
            "other heads. Choose LiftViT, or a network with another position embedding."
        )
    for wide, count in zip(widths, heads, strict=True):
        if wide != count * head_dim:
            raise ValueError(
                f"WideLastViT: the rotary position embedding of {arch} is made for heads of {head_dim} channels, and "
                f"width {wide} has {count} of {wide // count}. Choose multiples of {head_dim}, and leave num_heads out."
            )
