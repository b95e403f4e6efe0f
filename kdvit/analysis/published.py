"""The paper's figures (arXiv:2511.15572, tables of per-image SVD and dataset PCA), to stand beside one's own.

99th percentiles over 1,000 ImageNet validation images of the last layer's patch tokens. (8 of the paper's 14 models.
That of ViT-Base MAE rests on 196 tokens, one image.)
"""

from __future__ import annotations

from typing import NamedTuple

LEVELS = (0.8, 0.9, 0.95, 0.99)


class Published(NamedTuple):
    """One model's figures.

    Attributes:
        name: In the paper.
        width: Channels D.
        svd: Per-image SVD rank at `LEVELS`.
        pca: Dataset PCA dimension at `LEVELS`.
    """

    name: str
    width: int
    svd: tuple[int, int, int, int]
    pca: tuple[int, int, int, int]


PUBLISHED = {
    "cait_s24_224": Published("CaiT-S24", 384, (14, 34, 61, 121), (167, 247, 302, 359)),
    "deit_small_patch16_224": Published("DeiT-Small", 384, (30, 59, 89, 146), (205, 278, 324, 369)),
    "vit_tiny_patch16_224": Published("ViT-Tiny (21k)", 192, (1, 2, 7, 52), (1, 17, 71, 154)),
    "swin_small_patch4_window7_224": Published("Swin-Small, last stage", 768, (3, 7, 15, 33), (129, 336, 495, 691)),
    "vit_large_patch16_224": Published("ViT-Large (21k)", 1024, (5, 16, 39, 115), (255, 498, 694, 933)),
    "vit_base_patch14_dinov2": Published("ViT-Base DINOv2", 768, (19, 39, 67, 146), (384, 519, 606, 704)),
    "vit_base_patch16_clip_224.openai": Published("ViT-Base CLIP", 768, (6, 27, 60, 135), (129, 340, 502, 704)),
    "vit_base_patch16_224.mae": Published("ViT-Base MAE", 768, (1, 7, 34, 113), (1, 58, 235, 585)),
}
"""By the name in timm."""


def published(arch: str) -> Published | None:
    """Returns the figures of a model by its name in timm, with or without the tag of its weights.

    Example:
        >>> published("cait_s24_224.fb_dist_in1k").svd
        (14, 34, 61, 121)
        >>> published("vit_base_patch16_224") is None
        True
    """
    return PUBLISHED.get(arch) or PUBLISHED.get(arch.split(".")[0])
