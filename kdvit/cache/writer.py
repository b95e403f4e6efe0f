"""Filling a cache, and comparing it with its teacher: a run of the Trainer over the training views."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from kdvit.cache.bases import load_bases, save_bases
from kdvit.cache.manifest import FILE, CacheError, Manifest, differing
from kdvit.cache.store import CacheReader, append_records, encode, missing_shards, record_type, shard_rows
from kdvit.files import existing
from kdvit.models import FrozenTeacher
from kdvit.runtime.processes import end_launched
from kdvit.runtime.signals import REQUESTS, REQUEUE, STOP, Stopped, requeue_job, signal_name
from kdvit.structures import Batch, SharedBasis, View, ViTOutput, as_batch
from kdvit.tables import as_size

LoaderOf = Callable[["RowBatches"], DataLoader[Any]]
Calibrate = Callable[[dict[str, SharedBasis]], dict[str, SharedBasis]]


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
        objectives: The distillers, whose `as_stored` makes the targets; none where whole maps are stored.
        calibrate: Fixes them by the axes that the cache holds, or measures these; returns all, by name.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        folder: Path,
        manifest: Manifest,
        batch_size: int,
        loader_of: LoaderOf,
        objectives: Any = None,
        calibrate: Calibrate = dict,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.teacher, self.folder, self.manifest = teacher, folder, manifest
        self.batch_size, self.loader_of = batch_size, loader_of
        self.objectives, self.calibrate = objectives, calibrate
        self.bases: dict[str, SharedBasis] = {}

    def batches(self) -> list[Sequence[int]]:
        """Returns the records of each of this rank's batches."""
        raise NotImplementedError

    def take(self, rows: Sequence[int], images: Tensor, output: ViTOutput) -> None:
        """Receives the teacher's output for records, and the numbers of the images that were shown."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Fixes the targets, on all ranks by the same axes."""
        if self.manifest.targets:
            self.bases = self.calibrate(self.trainer.strategy.broadcast(load_bases(self.folder)))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the views of `batches`."""
        self._batches = self.batches()
        return self.loader_of(RowBatches(self.manifest, self._batches))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Runs the teacher on one batch."""
        batch = as_batch(batch)
        output = self.teacher(batch.image, self.manifest.layers, self.manifest.classes is not None)
        if self.manifest.targets:
            with torch.autocast(self.device.type, enabled=False):
                output = self.objectives.as_stored(output.at_least_float32(), self.manifest.maps)
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
        super().setup(stage)
        if self.trainer.is_global_zero and self.bases:
            save_bases(self.folder, self.bases)
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
            end_launched(self.trainer, seconds=60)  # the folder's lock ends with this process
            rank_zero_info(f"Stopped by {signal_name(stop)}. The same command goes on from what is written.")
            raise Stopped(128 + stop if self.trainer.is_global_zero else 0)

    def teardown(self, stage: str) -> None:
        """Waits until all ranks have written their shards."""
        self.trainer.strategy.barrier()


class CacheComparison(TeacherPass):
    """Recomputes records drawn at random and keeps the largest errors, in `errors` by name.

    With top-k logits the error is that of the class probabilities, as the logits of the other classes are not stored.
    """

    def __init__(self, *args: Any, samples: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.samples = min(samples, self.manifest.rows)
        maps = self.manifest.maps
        foreign = [str(each) for each in maps if each.target and each not in self.objectives.only_request().maps]
        if foreign:
            raise CacheError(
                f"The cache {str(self.folder)!r} holds {', '.join(foreign)}, which no distiller of this config makes. "
                "Give the config that it was written with."
            )
        self.reader = CacheReader(self.folder, self.manifest, maps, self.manifest.classes is not None)
        self.errors: dict[str, tuple[float, float]] = {}

    def batches(self) -> list[Sequence[int]]:
        """Returns the records drawn, the same on every rank."""
        rows = sorted(random.Random(0).sample(range(self.manifest.rows), self.samples))
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def take(self, rows: Sequence[int], images: Tensor, output: ViTOutput) -> None:
        """Compares records with what is stored."""
        stored = self.reader.read([self.manifest.view(row) for row in rows], images)
        for each, ours, theirs in zip(self.manifest.maps, output.features, stored.features, strict=True):
            self._note(f"features of {each}", ours, theirs)
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
    free = shutil.disk_usage(existing(folder)).free
    if needed > free:
        raise CacheError(
            f"The cache needs {as_size(needed)} more, and the disk of {str(folder)!r} has {as_size(free)} free. "
            "Choose another --out, fewer --views, --store logits, or --topk."
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
    rank_zero_info(f"{manifest.rows:,} records of {record:,} bytes: {as_size(needed)} to write, {as_size(free)} free.")
    if missing_shards(folder, manifest):
        trainer.predict(writing, return_predictions=False)
    missing = len(missing_shards(folder, manifest))
    if missing:
        raise CacheError(f"{missing} shards of {str(folder)!r} are missing. The same command again goes on with them.")
    written = sum(file.stat().st_size for file in folder.iterdir())
    return (
        f"{folder}: {as_size(written)}, {manifest.views} view(s) of {manifest.images:,} images. Next: kdvit fit "
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
