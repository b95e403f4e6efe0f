"""A step that reads the teacher's outputs from a cache, against one with no teacher and the online step."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from kdvit.cache.manifest import Manifest
from kdvit.cache.store import CacheReader, append_records, encode
from kdvit.structures import View
from tests.bench.plain_step import build, images, step
from tests.bench.rounds import Row, cost, interleave, row, speed_up

BATCH = 16


def rows(rounds: int) -> list[Row]:
    """Measures Lift and WideLast, DeiT-Tiny from CaiT-S24 at 224, batch 16, bfloat16."""
    return [each for remedy in ("Lift", "WideLast") for each in _rows(remedy, rounds)]


def _rows(remedy: str, rounds: int) -> list[Row]:
    module, alone, batch = build(remedy), build(remedy, with_teacher=False), images(BATCH)
    assert module.teacher is not None
    layers, logits = module.teacher_request()
    with tempfile.TemporaryDirectory() as folder, torch.autocast("cpu", torch.bfloat16):
        manifest = Manifest(BATCH, 1, 1, layers, ((384, 14, 14),), 1000, None, "bf16-mixed", {})
        append_records(
            Path(folder),
            manifest,
            range(BATCH),
            encode(batch.index, module.teacher(batch.image, layers, logits), manifest),
        )
        reader = CacheReader(Path(folder), manifest, layers, logits)
        views = [View(i) for i in range(BATCH)]
        cached = step(module, batch, lambda: reader.read(views, batch.index))
        against_none = interleave(cached, step(alone, batch), rounds)
        against_online = interleave(cached, step(module, batch), rounds)
    return [
        row(f"cached step, {remedy}: share of a step with no teacher", against_none, cost, "s", "<= 1.05"),
        row(f"cached step, {remedy}: speed-up over the online step", against_online, speed_up, "s", ">= 2.8"),
    ]
