"""How good the teacher is on the data of the run."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset, Subset

from kdvit.distillers.classes import first_difference, numbers_by_name
from kdvit.models import FrozenTeacher
from kdvit.runtime.loggers import boards
from kdvit.runtime.processes import gather
from kdvit.structures import Batch, as_batch
from kdvit.training.metrics import classification_scores


class TeacherScores(pl.Callback):
    """Scores each teacher once on validation images, at the start of a run, and logs `teacher/acc1` and so on.

    A teacher far below its published accuracy has the wrong weights, input size or normalisation. A resumed run does
    not repeat it. A teacher that knows more classes than the data has is scored among all that it knows, if names tell
    which they are; one with other classes or without a head is not scored, and none is without labels.

    Args:
        images: Number of validation images, evenly spaced over the data set; null for all. The accuracy on 2,000 has a
            standard error of 1.1 points at most.
    """

    def __init__(self, images: PositiveInt | None = 2000) -> None:
        self.images = images

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Runs each teacher over the images, each rank over its share."""
        if trainer.val_dataloaders is not None and trainer.global_step == 0 and pl_module.supervised:
            for teacher in pl_module.teachers.values():
                self._score(trainer, pl_module, teacher)

    def _score(self, trainer: pl.Trainer, pl_module: Any, teacher: FrozenTeacher) -> None:
        ours, theirs = pl_module.class_names, teacher.network.class_names
        classes, numbers = teacher.output_shapes().classes, numbers_by_name(ours, theirs)
        if classes is None:
            return
        if numbers is None and (classes != pl_module.num_classes or first_difference(ours, theirs)):
            rank_zero_info(f"The {teacher.label} has other classes than the data, so its accuracy is not measured.")
            return
        among = "" if classes == pl_module.num_classes else f" among its {classes:,} classes, matched by name"
        known = torch.tensor(numbers or range(classes), device=pl_module.device)
        scores = classification_scores(classes).to(pl_module.device)
        seen = 0
        for batch in map(as_batch, self._batches(trainer)):
            image, target = batch.image.to(pl_module.device), batch.target.to(pl_module.device)  # never mixed
            with trainer.precision_plugin.forward_context():
                logits = teacher(image).logits
            scores.update(logits, known[target])
            seen += len(image)
        measured = {f"{teacher.label}/{name}": float(value) for name, value in scores.compute().items()}
        for logger in trainer.loggers:
            logger.log_metrics(measured, step=0)
        acc1 = measured[f"{teacher.label}/acc1"]
        images = sum(gather(trainer, seen))
        told = f"{teacher.label.capitalize()} on {images:,} validation images: {acc1:.2%} top-1{among}."
        rank_zero_info(told)
        for board in boards(trainer):
            board.add_text(teacher.label, told, 0)
        if is_chance(acc1, classes, images):
            rank_zero_info(
                f"Warning: the {teacher.label} is at chance on these images. Its classes may be in another order than "
                "the data's, or its weights, mean or std (kdvit check shows both) may be others."
            )

    def _batches(self, trainer: pl.Trainer) -> Iterable[Batch]:
        """Returns this rank's share of the images, within the Trainer's limit; reads a stream to its end."""
        loader: Any = trainer.val_dataloaders
        limit, ranks = trainer.num_val_batches[0], trainer.world_size
        if self.images is not None and loader.batch_size and not isinstance(loader.dataset, IterableDataset):
            size = len(loader.dataset)
            images = min(self.images, limit * loader.batch_size * ranks)
            if images < size:
                share = np.linspace(0, size - 1, int(images)).astype(int)[trainer.global_rank :: ranks]
                same = ("batch_size", "num_workers", "collate_fn", "worker_init_fn", "multiprocessing_context")
                options = {name: getattr(loader, name) for name in same}
                loader = DataLoader(Subset(loader.dataset, share.tolist()), **options)
        return islice(loader, None if limit == float("inf") else int(limit))


def is_chance(acc1: float, classes: int, images: int) -> bool:
    """Tells whether an accuracy is that of guessing, to within two standard errors.

    So few images that these reach half of the way to a perfect score tell nothing.

    Examples:
        >>> is_chance(0.95, classes=10, images=500), is_chance(0.11, classes=10, images=500)
        (False, True)
        >>> is_chance(0.0, classes=10, images=4), is_chance(1.0, classes=2, images=4)
        (True, False)
    """
    share = 1 / classes
    error: float = (share * (1 - share) / images) ** 0.5
    return error < (1 - share) / 4 and acc1 <= share + 2 * error
