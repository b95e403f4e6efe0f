"""What a cache is to hold, by what the distillers of a run want."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kdvit.cache.manifest import CacheError, Manifest, describe_origin
from kdvit.models import FrozenTeacher
from kdvit.structures import TeacherMap

Stored = Literal["auto", "logits", "features", "both"]


def plan(
    teacher: FrozenTeacher | None,
    wanted: tuple[Sequence[TeacherMap], bool],
    data: dict[str, Any],
    *,
    views: int,
    store: Stored,
    topk: int | None,
    precision: str,
) -> Manifest:
    """Says what a cache is to hold.

    Args:
        teacher: The run's teacher.
        wanted: Maps of the teacher, and whether logits, as the distillers want them.
        data: Fingerprint of the training data.
        views: Views of an image.
        store: What to store; "auto" is what the distillers want, of a layer its targets, or the whole map where one of
            them needs that; "features" and "both" are whole maps.
        topk: Number of classes to keep of the logits; None for all.
        precision: The Trainer's precision.

    Raises:
        CacheError: If that cannot be.
    """
    if teacher is None:
        raise CacheError("This config has no teacher whose outputs could be stored.")
    if views < 1:
        raise CacheError(f"--views must be 1 or more, got {views}.")
    maps = [] if store == "logits" else _chosen(wanted[0], whole=store != "auto")
    maps.sort(key=lambda each: (teacher.network.resolve(each.layer), each.target or ()))
    logits = wanted[1] if store == "auto" else store != "features"
    if store in ("features", "both") and not maps:
        raise CacheError(f"--store {store}: no distiller of this config wants a feature map of the teacher.")
    layers = tuple(each.layer for each in maps)
    if logits and teacher.output_shapes().classes is None:
        raise CacheError(
            f"--store {store}: the teacher has no head (num_classes: 0), and so no logits. Store features."
        )
    shapes = teacher.output_shapes(layers, logits)
    if topk is not None and not (shapes.classes and 0 < topk < shapes.classes):
        raise CacheError(f"--topk must be between 1 and the stored classes less one ({shapes.classes}), got {topk}.")
    stored = tuple(
        (each.target.width if each.target else c, h, w) for each, (c, h, w) in zip(maps, shapes.features, strict=True)
    )
    names = tuple(each.target.name if each.target else "" for each in maps)
    return Manifest(
        images=data["images"],
        views=views,
        repeats=data["repeats"],
        layers=layers,
        shapes=stored,
        classes=shapes.classes,
        topk=topk,
        precision=precision,
        origin=describe_origin(teacher, data),
        targets=names if any(names) else (),
    )


def _chosen(wanted: Sequence[TeacherMap], whole: bool) -> list[TeacherMap]:
    """Returns the maps to store: of each layer its targets, or the map alone where one wants it or `whole` is set."""
    maps = {each.layer for each in wanted if whole or each.target is None}
    return list({each if each.layer not in maps else TeacherMap(each.layer) for each in wanted})
