"""Lightning's Trainer with two commands more: a check of a run, and the storing of a teacher's outputs."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kdvit.analysis import GeometryMonitor
from kdvit.cache import open_cache
from kdvit.cache.plan import Stored, plan
from kdvit.cache.writer import CacheComparison, CacheWriting, compare, fill
from kdvit.callbacks import BadImages, StudentExport
from kdvit.cli.messages import unforeseen
from kdvit.data import ImageDataModule
from kdvit.errors import UserError, shown
from kdvit.runtime.checkpoints import require_monitors
from kdvit.runtime.lock import run_lock
from kdvit.structures import BatchError
from kdvit.training.calibration import calibrate
from kdvit.training.module import DistillationModule

CHECKED_IMAGES = 4


class Trainer(pl.Trainer):
    """Lightning's Trainer, which can also check a run, and store a teacher's outputs."""

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Run Lightning's own, and show in one line what a callback lacks (logger, package), or what is no batch."""
        with shown((MisconfigurationException, ModuleNotFoundError, BatchError)):
            super().fit(*args, **kwargs)

    def validate(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """Run Lightning's own, whose table `callbacks.ScoreLine` replaces."""
        return super().validate(**kwargs, verbose=False)

    def test(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """Run Lightning's own, whose table `callbacks.ScoreLine` replaces."""
        return super().test(**kwargs, verbose=False)

    def check(
        self, model: DistillationModule, datamodule: pl.LightningDataModule, images_per_second: float | None = None
    ) -> None:
        """Build everything, show what a run will do, and take one training and one validation batch on the CPU.

        Args:
            images_per_second: Rate of a process's steps, to be told how many loader workers it needs.
        """
        if isinstance(datamodule, ImageDataModule):
            datamodule.batch_size = min(datamodule.batch_size, CHECKED_IMAGES)
        callbacks: list[pl.Callback] = self.callbacks  # type: ignore[has-type]
        for each in callbacks:
            if isinstance(each, StudentExport):
                each.require_loadable(model)
        self.callbacks = [
            each for each in callbacks if not isinstance(each, (Checkpoint, StudentExport, GeometryMonitor))
        ]
        with unforeseen("The first batches failed."):
            self.fit(model, datamodule=datamodule)
        require_monitors(callbacks, self.callback_metrics)
        said = f"A training and a validation batch of at most {CHECKED_IMAGES} images went through."
        print(f"{said} This config is ready for `kdvit fit`.")

    def cache(
        self,
        model: DistillationModule,
        datamodule: pl.LightningDataModule,
        out: str | None = None,
        views: int = 1,
        store: Stored = "auto",
        topk: int | None = None,
        check: str | None = None,
        samples: int = 64,
    ) -> None:
        """Run the teacher once over augmented views of the training images, and store what the distillers ask of it.

        Args:
            out: Folder to write. The same command again goes on where it was stopped.
            views: Views of an image; epoch e of a training shows view e % views.
            store: What to store. auto is what the distillers of the config ask for: of a layer that they project (pca,
                phi_s, pool) the projected map alone. features and both keep whole maps, for students of any width.
            topk: Store the probabilities of so many classes instead of all logits. The rest is spread evenly.
            check: A cache to compare with what the teacher gives now, instead of writing one.
            samples: Number of its records to compare.
        """
        if not isinstance(datamodule, ImageDataModule):
            raise UserError(
                f"Only data modules of kdvit can be replayed, got {type(datamodule).__name__}. Give its data sets to "
                "`Images`, which makes one of them."
            )
        if (out is None) == (check is None):
            raise UserError("Give either --out, the folder to write, or --check, a folder to compare.")
        self.callbacks = [each for each in self.callbacks if isinstance(each, (BadImages, ProgressBar))]
        teacher, objectives, data = model.teacher, model.distillers, datamodule.fingerprint()
        wanted = objectives.only_request()
        datamodule.trainer = self
        measure = partial(calibrate, objectives, model.teachers, self, datamodule)
        loading = datamodule.batch_size, datamodule.replay_dataloader, objectives, measure
        if out is not None:
            options: dict[str, Any] = {"views": views, "store": store, "topk": topk, "precision": str(self.precision)}
            manifest = plan(teacher, (wanted.maps, wanted.logits), data, **options)
            assert teacher is not None
            with run_lock(out, "--out") if self.is_global_zero else nullcontext():
                done = fill(self, CacheWriting(teacher, Path(out), manifest, *loading))
        else:
            folder = Path(check or "")
            manifest = open_cache(folder, teacher, (), False, data).manifest
            assert teacher is not None
            done = compare(self, CacheComparison(teacher, folder, manifest, *loading, samples=samples))
        if self.is_global_zero:
            print(done)
