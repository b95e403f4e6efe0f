"""A step that reads the teacher's outputs from a cache, against one with no teacher and the online step."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from kdvit import DistillationModule
from kdvit.cache.plan import Stored, plan
from kdvit.cache.store import CacheReader, append_records, encode
from kdvit.structures import Batch, SharedBasis, View
from tests.bench.plain_step import build, images, step
from tests.bench.rounds import Row, cost, interleave, row, speed_up

BATCH = 16


def rows(rounds: int) -> list[Row]:
    """Measures Lift, WideLast and phi_s, DeiT-Tiny from CaiT-S24 at 224, batch 16, bfloat16."""
    return [*_rows("Lift", rounds), *_rows("WideLast", rounds), _projected(rounds)]


def _rows(remedy: str, rounds: int) -> list[Row]:
    module, alone, batch = build(remedy), build(remedy, with_teacher=False), images(BATCH)
    with tempfile.TemporaryDirectory() as folder:
        reader = stored(module, batch, Path(folder), "auto")
        cached = step(module, batch, lambda: reader.read(views(batch), batch.index))
        against_none = interleave(cached, step(alone, batch), rounds)
        against_online = interleave(cached, step(module, batch), rounds)
    return [
        row(f"cached step, {remedy}: share of a step with no teacher", against_none, cost, "s", "<= 1.05"),
        row(f"cached step, {remedy}: speed-up over the online step", against_online, speed_up, "s", ">= 2.8"),
    ]


def _projected(rounds: int) -> Row:
    module, batch = build("phi_s"), images(BATCH)
    axes = torch.linalg.qr(torch.randn(384, 384, dtype=torch.float64)).Q
    module.distillers["map"].calibrate([SharedBasis(torch.linspace(2, 0.1, 384).double(), axes, torch.zeros(384))])
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        targets, maps = stored(module, batch, Path(one), "auto"), stored(module, batch, Path(other), "both")
        pairs = interleave(
            step(module, batch, lambda: targets.read(views(batch), batch.index)),
            step(module, batch, lambda: maps.read(views(batch), batch.index)),
            rounds,
        )
    return row("cached step, phi_s: stored targets, share of a step on stored maps", pairs, cost, "s", "<= 1.05")


def views(batch: Batch) -> list[View]:
    """Returns the first view of each image."""
    return [View(i) for i in batch.index.tolist()]


def stored(module: DistillationModule, batch: Batch, folder: Path, store: Stored) -> CacheReader:
    """Writes the teacher's outputs for a batch, numbered from 0, as `kdvit cache` does."""
    teacher, objectives = module.teacher, module.distillers
    assert teacher is not None
    asked = objectives.only_request()
    wanted, data = (asked.maps, asked.logits), {"images": len(batch.index), "repeats": 1}
    manifest = plan(teacher, wanted, data, views=1, store=store, topk=None, precision="bf16-mixed")
    with torch.autocast(batch.image.device.type, torch.bfloat16):
        output = teacher(batch.image, manifest.layers, asked.logits)
    kept = objectives.as_stored(output.at_least_float32(), manifest.maps)
    append_records(folder, manifest, batch.index.tolist(), encode(batch.index, kept, manifest))
    return CacheReader(folder, manifest, manifest.maps, asked.logits)
