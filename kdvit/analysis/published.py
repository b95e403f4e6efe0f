"""The paper's figures (arXiv:2511.15572, table of per-image SVD and dataset PCA), to stand beside one's own.

99th percentiles over 1,000 ImageNet validation images of the last layer's patch tokens, DINOv2 at 224 pixels. They are
of the file "Raw data/comparison/svd_pca/svd_rank_table.md" in the authors' repository. (That of ViT-Base MAE rests on
196 tokens, one image.)
"""

from __future__ import annotations

from typing import NamedTuple

import timm

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
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": Published("ViT-Tiny (21k)", 192, (1, 2, 7, 52), (1, 17, 71, 154)),
    "cait_s24_224.fb_dist_in1k": Published("CaiT-S24", 384, (14, 34, 61, 121), (167, 247, 302, 359)),
    "deit_small_patch16_224.fb_in1k": Published("DeiT-Small", 384, (30, 59, 89, 146), (205, 278, 324, 369)),
    "swin_small_patch4_window7_224.ms_in1k": Published(
        "Swin-Small, last stage", 768, (3, 7, 15, 33), (129, 336, 495, 691)
    ),
    "vit_large_patch16_224.augreg_in21k_ft_in1k": Published(
        "ViT-Large (21k)", 1024, (5, 16, 39, 115), (255, 498, 694, 933)
    ),
    "vit_huge_patch14_224.mae": Published("ViT-Huge MAE", 1280, (1, 15, 58, 164), (1, 83, 371, 977)),
    "vit_base_patch14_dinov2.lvd142m": Published("ViT-Base DINOv2", 768, (19, 39, 67, 146), (384, 519, 606, 704)),
    "vit_large_patch14_dinov2.lvd142m": Published("ViT-Large DINOv2", 1024, (30, 58, 93, 173), (525, 696, 813, 940)),
    "vit_base_patch16_224.dino": Published("ViT-Base DINO", 768, (39, 75, 109, 165), (382, 529, 624, 731)),
    "vit_small_patch16_224.dino": Published("ViT-Small DINO", 384, (41, 72, 101, 152), (232, 297, 336, 373)),
    "vit_base_patch16_224.mae": Published("ViT-Base MAE", 768, (1, 7, 34, 113), (1, 58, 235, 585)),
    "vit_large_patch16_224.mae": Published("ViT-Large MAE", 1024, (1, 9, 38, 120), (1, 49, 268, 765)),
    "vit_base_patch16_clip_224.openai": Published("ViT-Base CLIP", 768, (6, 27, 60, 135), (129, 340, 502, 704)),
    "vit_large_patch14_clip_224.openai": Published("ViT-Large CLIP", 1024, (15, 46, 89, 181), (230, 506, 713, 945)),
}
"""By the name in timm, with the tag of the weights."""


def published(arch: str) -> Published | None:
    """Returns the figures of a model by its name in timm; without a tag, timm's default weights are meant.

    Examples:
        >>> published("cait_s24_224").svd
        (14, 34, 61, 121)
        >>> published("vit_large_patch16_224.mae").name, published("vit_large_patch16_224").name
        ('ViT-Large MAE', 'ViT-Large (21k)')
    """
    default = None if "." in arch else timm.models.get_pretrained_cfg(arch)
    return PUBLISHED.get(arch if default is None else f"{arch}.{default.tag}")
