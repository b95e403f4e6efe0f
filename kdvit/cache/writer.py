"""Filling a cache, and comparing it with its teacher: a run of the Trainer over the training views."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from kdvit.cache.manifest import FILE, CacheError, Manifest, describe_origin, differing
from kdvit.cache.store import CacheReader, append_records, encode, missing_shards, record_type, shard_rows
from kdvit.models import FrozenTeacher
from kdvit.runtime.signals import REQUESTS, REQUEUE, STOP, Stopped, requeue_job, signal_name
from kdvit.structures import Batch, Layer, View, ViTOutput

Stored = Literal["auto", "logits", "features", "both"]
LoaderOf = Callable[["RowBatches"], DataLoader[Any]]


class RowBatches(DistributedSampler[Any]):
    """Deals out given records as batches of views. (A DistributedSampler, for Lightning replaces any other.)

    Args:
        manifest: Tells the view of a record.
        batches: The records of each batch.
    """

    def __init__(self, manifest: Manifest, batches: Sequence[Sequence[int]]) -> None:
        super().__init__(range(len(batches)), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        self.manifest, self.batches = manifest, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[View]]:
        for rows in self.batches:
            yield [self.manifest.view(row) for row in rows]


class TeacherPass(pl.LightningModule):
    """Runs a teacher over records of a cache, for `trainer.predict`.

    Args:
        teacher: The teacher.
        folder: The cache.
        manifest: What it is to hold.
        batch_size: Records a step.
        loader_of: Makes the loader that yields the batches of a sampler.
    """

    def __init__(
        self, teacher: FrozenTeacher, folder: Path, manifest: Manifest, batch_size: int, loader_of: LoaderOf
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.teacher, self.folder, self.manifest = teacher, folder, manifest
        self.batch_size, self.loader_of = batch_size, loader_of

    def batches(self) -> list[Sequence[int]]:
        """Returns the records of each of this rank's batches."""
        raise NotImplementedError

    def take(self, rows: Sequence[int], images: Tensor, output: ViTOutput) -> None:
        """Receives the teacher's output for records, and the numbers of the images that were shown."""
        raise NotImplementedError

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the views of `batches`."""
        self._batches = self.batches()
        return self.loader_of(RowBatches(self.manifest, self._batches))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Runs the teacher on one batch."""
        output = self.teacher(batch.image, self.manifest.layers, self.manifest.classes is not None)
        self.take(self._batches[batch_idx], batch.index, output)
        return batch.index


class CacheWriting(TeacherPass):
    """Writes the shards that are missing, each by one rank.

    A batch never crosses shards: the bytes depend neither on the number of ranks nor on where a run was stopped.
    """

    def batches(self) -> list[Sequence[int]]:
        """Returns the records of this rank's share of the missing shards."""
        shards = self._missing[self.trainer.global_rank :: self.trainer.world_size]
        rows = [shard_rows(self.manifest, shard) for shard in shards]
        return [each[i : i + self.batch_size] for each in rows for i in range(0, len(each), self.batch_size)]

    def setup(self, stage: str) -> None:
        """Writes the manifest before the first shard, here as a rank without a shard gets no prediction hooks.

        The first rank broadcasts what is missing: another may write already when one of them looks.
        """
        if self.trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manifest.save(self.folder)
        self._missing: list[int] = self.trainer.strategy.broadcast(missing_shards(self.folder, self.manifest))

    def on_predict_start(self) -> None:
        """Takes over the signals."""
        REQUESTS.listen(*REQUEUE, *STOP)

    def take(self, rows: Sequence[int], images: Tensor, output: ViTOutput) -> None:
        """Appends records to their shard."""
        append_records(self.folder, self.manifest, rows, encode(images, output, self.manifest))
        self._leave()

    def _leave(self) -> None:
        """Ends the run if a signal has asked for it; what is written stays."""
        if REQUESTS.requeue:  # whichever rank is first to end a batch; Slurm then ends the others
            REQUESTS.requeue = False
            refused = requeue_job()
            if not refused:
                print("Slurm has requeued the job, which goes on from what is written.", file=sys.stderr, flush=True)
                raise Stopped(0)
            rank_zero_info(f"The job is not requeued by this process: {refused}")
        if REQUESTS.stop:
            stop = REQUESTS.stop
            REQUESTS.clear()
            rank_zero_info(f"Stopped by {signal_name(stop)}. The same command goes on from what is written.")
            raise Stopped(128 + stop if self.trainer.is_global_zero else 0)

    def teardown(self, stage: str) -> None:
        """Marks the cache complete once all ranks have written their shards."""
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero and not missing_shards(self.folder, self.manifest):
            replace(self.manifest, complete=True).save(self.folder)
        self.trainer.strategy.barrier()


class CacheComparison(TeacherPass):
    """Recomputes records drawn at random and keeps the largest errors, in `errors` by name.

    With top-k logits the error is that of the class probabilities, as the logits of the other classes are not stored.
    """

    def __init__(self, *args: Any, samples: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.samples = min(samples, self.manifest.rows)
        layers, logits = self.manifest.layers, self.manifest.classes is not None
        self.reader = CacheReader(self.folder, self.manifest, layers, logits)
        self.errors: dict[str, tuple[float, float]] = {}

    def batches(self) -> list[Sequence[int]]:
        """Returns the records drawn, the same on every rank."""
        rows = sorted(random.Random(0).sample(range(self.manifest.rows), self.samples))
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def take(self, rows: Sequence[int], images: Tensor, output: ViTOutput) -> None:
        """Compares records with what is stored."""
        stored = self.reader.read([self.manifest.view(row) for row in rows], images)
        for layer, ours, theirs in zip(self.manifest.layers, output.features, stored.features, strict=True):
            self._note(f"features of layer {layer}", ours, theirs)
        if output.logits is not None and stored.logits is not None:
            logits = output.logits.float(), stored.logits.float()
            if self.manifest.topk is None:
                self._note("logits", *logits)
            else:
                self._note("probabilities", *(each.softmax(dim=1) for each in logits))

    def _note(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        ours, theirs = ours.float().cpu(), theirs.float()
        error, largest = self.errors.get(name, (0.0, 0.0))
        self.errors[name] = max(error, float((ours - theirs).abs().max())), max(largest, float(ours.abs().max()))


def plan(
    teacher: FrozenTeacher | None,
    wanted: tuple[Sequence[Layer], bool],
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
        wanted: Teacher layers as the manifest names them, and whether logits, as the distillers want them.
        data: Fingerprint of the training data.
        views: Views of an image.
        store: What to store; "auto" is what the distillers want.
        topk: Number of classes to keep of the logits; None for all.
        precision: The Trainer's precision.

    Raises:
        CacheError: If that cannot be.
    """
    if teacher is None:
        raise CacheError("This config has no teacher whose outputs could be stored.")
    if views < 1:
        raise CacheError(f"--views must be 1 or more, got {views}.")
    layers = () if store == "logits" else tuple(sorted(set(wanted[0]), key=teacher.network.resolve))
    logits = wanted[1] if store == "auto" else store != "features"
    if store in ("features", "both") and not layers:
        raise CacheError(f"--store {store}: no distiller of this config wants a feature map of the teacher.")
    shapes = teacher.output_shapes(layers, logits)
    if topk is not None and not (shapes.classes and 0 < topk < shapes.classes):
        raise CacheError(f"--topk must be between 1 and the stored classes less one ({shapes.classes}), got {topk}.")
    count, repeats = data["images"], data["repeats"]
    origin = describe_origin(teacher, data)
    return Manifest(count, views, repeats, layers, shapes.features, shapes.classes, topk, precision, origin)


def check_begun(folder: Path, planned: Manifest) -> None:
    """Raises CacheError if the folder holds a cache of other settings than planned."""
    if not (folder / FILE).exists():
        return
    if differences := differing(planned.settings, Manifest.load(folder).settings):
        raise CacheError(
            f"{str(folder)!r} holds a cache of other settings: {'; '.join(differences)}. Go on with its own, or choose "
            "another --out."
        )


def check_room(folder: Path, manifest: Manifest) -> tuple[int, int]:
    """Returns the bytes that are yet to be written, and those that are free.

    Raises:
        CacheError: If they do not fit.
    """
    rows = sum(len(shard_rows(manifest, shard)) for shard in missing_shards(folder, manifest))
    needed = rows * record_type(manifest).itemsize
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CacheError(
            f"The cache needs {needed / 1e9:,.3f} GB more, and the disk of {str(folder)!r} has {free / 1e9:,.3f} GB "
            "free. Choose another --out, fewer --views, --store logits, or --topk."
        )
    return needed, free


def fill(trainer: pl.Trainer, writing: CacheWriting) -> str:
    """Writes what a cache lacks, and returns what was done as one line.

    Raises:
        CacheError: If the folder holds another cache, the disk has no room, or something is missing at the end.
    """
    folder, manifest = writing.folder, writing.manifest
    check_begun(folder, manifest)
    needed, free = check_room(folder, manifest)
    record = record_type(manifest).itemsize
    rank_zero_info(
        f"{manifest.rows:,} records of {record:,} bytes: {needed / 1e9:,.3f} GB to write, {free / 1e9:,.3f} GB free."
    )
    if missing_shards(folder, manifest) or not Manifest.load(folder).complete:
        trainer.predict(writing, return_predictions=False)
    missing = len(missing_shards(folder, manifest))
    if missing:
        raise CacheError(f"{missing} shards of {str(folder)!r} are missing. The same command again goes on with them.")
    size = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{folder}: {size / 1e9:,.3f} GB, {manifest.views} view(s) of {manifest.images:,} images. Next: kdvit fit "
        f"--config ... --data.init_args.cache {folder}"
    )


def compare(trainer: pl.Trainer, comparison: CacheComparison) -> str:
    """Recomputes samples of a cache, and returns the largest errors, a line each."""
    trainer.predict(comparison, return_predictions=False)
    lines = [
        f"{name}: largest error {error:.3g}, largest value {largest:.3g}"
        for name, (error, largest) in comparison.errors.items()
    ]
    return "\n".join([f"{comparison.samples} of {comparison.manifest.rows:,} records recomputed.", *lines])
