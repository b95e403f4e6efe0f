"""Lift: the lifting projector that stays at inference (arXiv:2511.15572)."""

from __future__ import annotations

import copy
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from kdvit.models.families import check_family
from kdvit.models.fold import fold_lift
from kdvit.models.layouts import read_spec
from kdvit.models.one_token import has_head
from kdvit.models.own import class_path
from kdvit.models.timm_model import start_from
from kdvit.models.timm_network import TimmStudent


class LiftViT(TimmStudent):
    """A vision transformer of timm's whose patch tokens are lifted to the teacher's width before the head.

    ``X_hat = LayerNorm(X P)`` on the un-normed tokens of the last block, P of shape ``[D_S, width]`` without bias;
    ``logits = head(mean over patch tokens of X_hat)``. In timm's terms: the final norm is replaced by Linear and
    LayerNorm, the pooling is "avg" (whatever `arch` pools by), the head has the new width. Every parameter is used.
    The layer "lift" is X_hat.

    A DeiT with distillation token keeps its two heads: class and distillation token are lifted like the patch tokens,
    and each head reads its own. (kdvit's own; the paper lifts plain DeiT.)

    Once trained, it costs nothing: `folded` returns the same classifier in the student's own width; see
    `kdvit.models.fold`, also for what that says about the method.

    Args:
        arch: timm's name of the narrow architecture, a VisionTransformer or Eva (`kdvit.models.families`).
        width: Width after the lift: the teacher's.
        num_classes: Number of classes.
        folded: Train in the folded form from the start, as a control: from the same initial function, without a map to
            distil.
        published_init: Leave the head at torch's own initialisation, uniform and with a bias (std 0.029 at width 384),
            as the authors' code does. The default is better founded: timm's, which every other student here has (std
            0.02, no bias).
        checkpoint: Start from weights of `arch` as it is in timm (see TimmStudent), or from a LiftViT that kdvit has
            trained, the lift included.
        kwargs: Those of TimmStudent.

    Raises:
        ValueError: If the architecture is neither a VisionTransformer nor an Eva, or `width` is not positive.
    """

    def __init__(
        self,
        arch: str,
        width: int,
        num_classes: int = 1000,
        folded: bool = False,
        published_init: bool = False,
        checkpoint: str | None = None,
        **kwargs: Any,
    ) -> None:
        if width < 1:
            raise ValueError(f"LiftViT: width must be positive, got {width}.")
        own = read_spec(checkpoint) if checkpoint else {}
        begun = own.get("class") == class_path(type(self)) and not kwargs.get("pretrained")
        super().__init__(arch, num_classes, checkpoint=None if begun else checkpoint, **kwargs)
        check_family("LiftViT", arch, self.model)
        model: Any = self.model
        model.norm = nn.Sequential(nn.Linear(model.embed_dim, width, bias=False), nn.LayerNorm(width, eps=1e-5))
        model.fc_norm = nn.Identity()
        model.head = _head(width, num_classes, published_init)
        if isinstance(model, VisionTransformerDistilled):
            model.head_dist = _head(width, num_classes, published_init)
        else:
            model.global_pool, model.attn_pool = "avg", None
            model.pool_include_prefix = False
        model.num_features = model.head_hidden_size = width
        self.init_args["width"] = width
        of_folded = bool((own.get("init_args") or {}).get("folded"))
        if checkpoint and begun and not of_folded:
            start_from(model, arch, checkpoint)
        if folded:
            self._fold()
        if checkpoint and begun and of_folded:
            start_from(model, arch, checkpoint)

    def folded(self) -> LiftViT:
        """Returns a copy with the same logits, to rounding, in the student's own width (`kdvit.models.fold`).

        Raises:
            ValueError: If there is no lift any more, or a head is no linear one.
        """
        folded = copy.deepcopy(self)
        folded._fold()
        return folded

    @property
    def folds(self) -> bool:
        """Whether there is a lift to fold, and a head to fold it into."""
        return bool(self.named_layers()) and has_head(self.model)

    def _fold(self) -> None:
        fold_lift(self.model)
        self.init_args = {**self.init_args, "folded": True}
        if self.spec:
            self.spec = {**self.spec, "init_args": self.init_args}

    def named_layers(self) -> dict[str, int]:
        """The lifted map, behind the last block, where it is not folded."""
        return {} if self.init_args.get("folded") else {"lift": self.depth}

    def end_map(self, image: Tensor, end: Tensor | None) -> Tensor:
        """Returns X_hat as a map ``[B, width, H, W]``."""
        assert end is not None
        model: Any = self.model
        height, width = model.patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))
        tokens: Tensor = end[:, model.num_prefix_tokens :].transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], height, width)


def _head(width: int, num_classes: int, published_init: bool) -> nn.Linear | nn.Identity:
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    if not published_init:
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
    return head
