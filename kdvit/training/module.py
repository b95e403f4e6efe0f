"""Training: a batch becomes terms, the terms a loss, and both are logged. Nothing else."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from kdvit.distillers import Distiller, Weight
from kdvit.distillers.weights import require_weight, weight_at
from kdvit.models import FrozenTeacher, Network, as_network, avoid_slow_attention, fit_to_data, freeze_parameters
from kdvit.models.checkpoint import student_spec
from kdvit.models.teacher import freeze_teachers, only_teacher
from kdvit.runtime.loggers import is_logged
from kdvit.seeding import mixed_seed, seed_torch
from kdvit.structures import Batch, ImageFormat, ViTOutput
from kdvit.training.batches import read_batch, require_same_images
from kdvit.training.calibration import calibrate
from kdvit.training.logs import log_means, log_objectives, log_scores, log_step
from kdvit.training.metrics import StepMeans, classification_scores
from kdvit.training.objectives import Objectives
from kdvit.training.optim import OptimizerOptions, gradient_norm, highest_rate, optimizer_and_schedule
from kdvit.training.schedule import ScheduleOptions
from kdvit.training.sharding import split


class DistillationModule(pl.LightningModule):
    """Trains a student on labels and, where a teacher is given, on any number of distillation objectives.

    ``loss = task_weight * cross-entropy + sum of weight * distiller(student, teacher, target)``.

    Args:
        student: The network to train; a timm model is wrapped.
        teacher: The frozen network to learn from; null for a supervised run.
        teachers: Several of them by name, instead of `teacher`; each distiller then names the one that it is of.
        distillers: Objectives by name. The name is that of the logs.
        task_weight: Weight of the cross-entropy, or its schedule; 0.1 beside a logit term of 0.9 in the paper's runs.
        label_smoothing: Label smoothing of the cross-entropy.
        optimizer: The optimizer.
        schedule: The learning rate over epochs.
        image_format: Size and normalisation of the images, as the data module has it; by default the student's.
        class_names: The classes in the order of the student's outputs; an empty list says that images have no labels.
        compile: Networks that torch.compile translates for training; checkpoints go on with or without it. It needs a
            C++ compiler (C on GPUs) and a minute for each new shape or mode of the input, and draws other dropout.
        freeze: Parameters of the student that stay as they are, by the names of `kdvit.models.freezing`.

    Raises:
        TypeError: If student or teacher is not a network.
        ValueError: If objectives contradict each other or the pair.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | None = None,
        distillers: dict[str, Distiller] | None = None,
        task_weight: Weight = 1.0,
        label_smoothing: float = 0.0,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008
        schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008
        image_format: ImageFormat | None = None,
        class_names: list[str] | None = None,
        compile: Literal["none", "student", "teacher", "both"] = "none",
        teachers: dict[str, Network] | None = None,
        freeze: list[str] | None = None,
    ) -> None:
        super().__init__()
        require_weight(task_weight, "task_weight")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}.")
        if compile in ("teacher", "both") and not (teacher or teachers):
            raise ValueError(f"compile is {compile!r}, and teacher is null. Give a teacher, or compile the student.")
        self.student = freeze_parameters(as_network(student), freeze or ())
        self.image_format, names = image_format or self.student.image_format, class_names or None
        self.num_classes = fit_to_data(self.student, self.image_format, names)
        self.supervised, self._run_seed = bool(self.num_classes) and class_names != [], torch.initial_seed()
        self.teachers = freeze_teachers(teacher, teachers, self.image_format)
        self.distillers = Objectives(distillers or {}, self.student, self.teachers, names, self.supervised)
        self.task_weight, self.label_smoothing, self.compiled = task_weight, label_smoothing, compile
        self.optimizer_options, self.schedule_options, self.class_names = optimizer, schedule, names
        self.scores, self.step_means = classification_scores(self.num_classes * self.supervised), StepMeans()
        self._spec = student_spec(self.student, self.image_format, names)  # a split student is of another class

    def setup(self, stage: str) -> None:
        """Refuses what needs labels, where there are none, and images in another format than the module's."""
        if stage != "predict":
            self.distillers.require_labels(self.task_weight, self.num_classes)
            require_same_images(self.image_format, getattr(self.trainer, "datamodule", None))

    def configure_model(self) -> None:
        """Splits student and distillers over the processes where the strategy is `sharded`; the teacher stays whole."""
        if self.device_mesh is not None:
            split(self, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Says what is converted on the way, and readies the networks for the device and precision of the training."""
        for each in self.distillers.conversions:
            rank_zero_info(each)
        if self.trainer.precision in ("bf16-mixed", "bf16-true"):
            avoid_slow_attention(self.student, self.trainer.strategy.root_device, torch.bfloat16)
        if self.compiled in ("student", "both"):
            self.student.compile()
        for teacher in self.teachers.values() if self.compiled in ("teacher", "both") else ():
            teacher.compile()

    def forward(self, image: Tensor) -> Tensor:
        """Returns the student's logits ``[B, K]``: the deployed path."""
        return self.student(image).logits  # type: ignore[no-any-return]

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The teacher of a run that has but one; see `only_teacher`."""
        return only_teacher(self.teachers)

    def terms(self, student: ViTOutput, teachers: dict[str, ViTOutput], target: Tensor) -> dict[str, Tensor]:
        """Computes every loss term, unweighted and in float32: "task", if supervised, and `Objectives.terms`."""
        terms = self.distillers.terms(student, teachers, target)
        if not self.supervised:
            return terms
        assert student.logits is not None
        return {"task": F.cross_entropy(student.logits, target, label_smoothing=self.label_smoothing), **terms}

    def weights(self) -> dict[str, float]:
        """Returns the weight of every term in the current epoch."""
        return {name: weight_at(w, self.current_epoch) for name, w in self.distillers.weights(self.task_weight).items()}

    def on_train_epoch_end(self) -> None:
        """Logs the weights that change over the epochs."""
        self.log_dict(self.distillers.changing_weights(self.task_weight, self.current_epoch))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sets the learning rate, and seeds dropout by step and rank: a resumed run does what it would have done."""
        self.lr_schedulers().set(self.current_epoch, self.trainer.global_step)  # type: ignore[union-attr]
        seed_torch(mixed_seed(self._run_seed, self.trainer.global_step, batch_idx, self.global_rank), self.device)

    def on_train_start(self) -> None:
        """Measures what distillers need to know of the teacher, unless a checkpoint has brought it."""
        calibrate(self.distillers, self.teachers, self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the loss of one batch, and keeps its terms, unweighted, as `last_terms`."""
        batch = read_batch(batch, batch_idx, self.num_classes * self.supervised, mixed=True)
        teachers = self.distillers.ask(self.teachers, batch)
        student = self.student(batch.image, self.distillers.student_layers).at_least_float32()
        with torch.autocast(self.device.type, enabled=False):
            terms = self.terms(student, teachers, batch.target)
            self.last_terms = {name: term.detach() for name, term in terms.items()}
            loss = torch.stack([weight * terms[name] for name, weight in self.weights().items()]).sum()
            if self._is_logged_step():
                log_step(self, batch.target, student, teachers, loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        """Scores the student on one batch: as a classifier, or else by its objectives, and returns the teachers'."""
        batch = read_batch(batch, batch_idx, self.num_classes * self.supervised)
        if not self.supervised:
            return log_objectives(self, self.student, batch)
        return self.scores.update(self(batch.image), batch.target)

    def on_validation_epoch_end(self) -> None:
        """Logs `acc1`, `loss` and so on over all ranks, as `val/acc1`; those of a test as `test/acc1`."""
        log_scores(self, self.scores)

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the index, the most probable class and its probability of each image, each ``[B]``."""
        batch = read_batch(batch, batch_idx, 0)
        probability, predicted = self(batch.image).float().softmax(dim=1).max(dim=1)
        return batch.index, predicted, probability

    def _is_logged_step(self) -> bool:  # a call of self.log costs as much as a small kernel
        return is_logged(self.trainer, self.trainer.global_step + 1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs what was measured of the whole step, the learning rate, and the gradient norm before clipping."""
        if self._is_logged_step():
            log_means(self, {"grad_norm": gradient_norm(optimizer), "lr": highest_rate(optimizer)})

    def configure_optimizers(self) -> Any:
        """Builds timm's optimizer and schedule."""
        modules = self.student, self.distillers
        return optimizer_and_schedule(self.trainer, modules, self.optimizer_options, self.schedule_options)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Moves the learning rate to the coming epoch or step."""
        scheduler.set(self.current_epoch + 1, self.trainer.global_step)

    def spec(self) -> dict[str, Any]:
        """Describes the student in plain types, and how it fares; see `kdvit.models.checkpoint.student_spec`."""
        scores = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        return {**self._spec, "run": {"epochs": self.current_epoch, **scores}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the student's description, by which `kdvit.load_student` works from the file alone."""
        checkpoint["kdvit"] = self.spec()
