"""Training: a batch becomes terms, the terms a loss, and both are logged. Nothing else."""

from __future__ import annotations

from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

from kdvit.distillers import Distiller
from kdvit.models import FrozenTeacher, Network, as_network, avoid_slow_attention
from kdvit.models.checkpoint import student_spec
from kdvit.structures import Batch, ImageFormat, Layer, ViTOutput
from kdvit.training.metrics import classification_scores
from kdvit.training.optim import FUSED_DEVICES, OptimizerOptions, ScheduleOptions, gradient_norm, parameter_groups


class DistillationModule(pl.LightningModule):
    """Trains a student on labels and, where a teacher is given, on any number of distillation objectives.

    ``loss = task_weight * cross-entropy + sum of weight * distiller(student, teacher, target)``.

    Args:
        student: The network to train; a timm model is wrapped.
        teacher: The frozen network to learn from; null for a supervised run.
        distillers: Objectives by name. The name is that of the logs.
        task_weight: Weight of the cross-entropy; 0.1 beside a logit term of 0.9 in the paper's runs, else 1.
        label_smoothing: Label smoothing of the cross-entropy.
        optimizer: The optimizer.
        schedule: The learning rate over epochs.
        image_format: Size and normalisation of the images that arrive; by default the student's own. On the command
            line it is taken from the data.
        class_names: Names of the classes, in the order of the student's outputs; on the command line taken from the data.
        compile: Networks that torch.compile translates for training, in place: checkpoints have the same keys and go on
            with or without it. It needs a C++ compiler on CPUs, costs a minute or so at the start and again for each new
            shape or mode of the input (a smaller last batch, validation), and draws dropout and stochastic depth otherwise.

    Attributes:
        last_terms: The loss terms of the last training batch, unweighted, on the device.

    Raises:
        TypeError: If student or teacher is not a network.
        ValueError: If objectives contradict each other or the pair.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | None = None,
        distillers: dict[str, Distiller] | None = None,
        task_weight: float = 1.0,
        label_smoothing: float = 0.0,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008
        schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008
        image_format: ImageFormat | None = None,
        class_names: list[str] | None = None,
        compile: Literal["none", "student", "teacher", "both"] = "none",
    ) -> None:
        super().__init__()
        self.student = as_network(student)
        self.image_format = image_format or self.student.image_format
        self.teacher = None if teacher is None else FrozenTeacher(as_network(teacher), self.image_format)
        self.distillers = self._named(distillers or {})
        self.task_weight = task_weight
        self.label_smoothing = label_smoothing
        self.optimizer_options = optimizer
        self.schedule_options = schedule
        self.class_names = class_names
        self.compiled = compile
        self._run_seed = torch.initial_seed()
        self.num_classes = self._check_task()
        self._build_distillers()
        self._spec = student_spec(self.student, self.image_format, class_names)  # a split student is of another class
        self.val_scores = classification_scores(self.num_classes)
        self.test_scores = classification_scores(self.num_classes)

    @staticmethod
    def _named(distillers: dict[str, Distiller]) -> nn.ModuleDict:
        try:
            if "task" in distillers:
                raise KeyError("that is the name of the cross-entropy")
            return nn.ModuleDict(distillers)
        except KeyError as error:
            raise ValueError(
                f"distillers: {list(distillers)} has a name that cannot be used: {error.args[0]}."
            ) from error

    def _check_task(self) -> int:
        if self.task_weight < 0:
            raise ValueError(f"task_weight must be 0 or more, got {self.task_weight}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}.")
        if self.student.image_format.size != self.image_format.size and _has_fixed_size(self.student):
            raise ValueError(
                f"The student takes images of {self.student.image_format.size} pixels and the data gives "
                f"{self.image_format.size}. Set img_size of the student, or of the data, so that they agree."
            )
        self.student.image_format = self.image_format
        classes = self.student.output_shapes().classes
        assert classes is not None
        if min(classes, len(self.class_names or range(classes))) < 2:
            raise ValueError(
                f"There is nothing to tell apart: expected 2 classes or more, got {classes} of the student"
                f"{'' if self.class_names is None else f' and {len(self.class_names)} of the data'}."
            )
        if self.class_names is not None and len(self.class_names) != classes:
            raise ValueError(
                f"The student has {classes} classes and the data {len(self.class_names)}. Set num_classes of the student to "
                f"{len(self.class_names)}."
            )
        return classes

    def _build_distillers(self) -> None:
        if self.distillers and self.teacher is None:
            raise ValueError(
                f"The distillers {list(self.distillers)} need a teacher, and teacher is null. Give a teacher, or leave the "
                "distillers out for a supervised run."
            )
        if self.compiled in ("teacher", "both") and self.teacher is None:
            raise ValueError(
                f"compile is {self.compiled!r}, and teacher is null. Give a teacher, or compile the student."
            )
        if self.teacher is not None and not self.distillers:
            raise ValueError(
                "A teacher is given, but nothing is distilled from it. Add distillers, or set teacher: null."
            )
        self._student_layers: tuple[Layer, ...] = ()
        self._teacher_layers: tuple[Layer, ...] = ()
        self._teacher_logits = False
        self._resized: list[str] = []
        for name, distiller in self.objectives().items():
            assert self.teacher is not None
            try:
                student = self.student.output_shapes(distiller.student_layers)
                teacher = self.teacher.output_shapes(distiller.teacher_layers, distiller.needs_teacher_logits)
                distiller.build(student, teacher)
            except ValueError as error:
                raise ValueError(f"distillers.{name}: {error}") from error
            if [shape[1:] for shape in student.features] != [shape[1:] for shape in teacher.features]:
                self._resized.append(f"distillers.{name}: {student.features} and {teacher.features}")
            self._student_layers += distiller.student_layers
            self._teacher_layers += distiller.teacher_layers
            self._teacher_logits |= distiller.needs_teacher_logits

    def objectives(self) -> dict[str, Distiller]:
        """Returns the distillers by name."""
        return cast("dict[str, Distiller]", dict(self.distillers.items()))

    def setup(self, stage: str) -> None:
        """Chooses the attention kernels, and compiles, once device and precision of the training are known."""
        if stage != "fit":
            return
        if self.trainer.precision in ("bf16-mixed", "bf16-true"):
            avoid_slow_attention(self.student, self.trainer.strategy.root_device, torch.bfloat16)
        if self.compiled in ("student", "both"):
            self.student.compile()
        if self.compiled in ("teacher", "both") and self.teacher is not None:
            self.teacher.network.compile()

    def configure_model(self) -> None:
        """Splits student and distillers over the processes where the strategy is `sharded`; the teacher stays whole."""
        if self.device_mesh is None or isinstance(self.student, FSDPModule):
            return
        self.load_state_dict(self.trainer.strategy.broadcast(self.state_dict()))  # parts of one student, not of several
        mesh = self.device_mesh["data_parallel"]
        for block in getattr(getattr(self.student, "model", None), "blocks", ()):
            fully_shard(block, mesh=mesh)
        fully_shard(self.student, mesh=mesh, reshard_after_forward=True)
        for distiller in self.objectives().values():
            if next(distiller.parameters(), None) is not None:
                fully_shard(
                    distiller, mesh=mesh, reshard_after_forward=False
                )  # its metrics are taken after its forward

    def teacher_request(self) -> tuple[tuple[int, ...], bool]:
        """Returns the teacher's layers that the distillers want, by index and in their order, and whether logits too."""
        if self.teacher is None:
            return (), False
        return tuple(self.teacher.network.resolve(layer) for layer in self._teacher_layers), self._teacher_logits

    # One batch

    def forward(self, image: Tensor) -> Tensor:
        """Returns the student's logits ``[B, K]``: the deployed path."""
        logits: Tensor | None = self.student(image).logits
        assert logits is not None
        return logits

    def teacher_output(self, batch: Batch) -> ViTOutput | None:
        """Returns what the distillers want of the teacher, from the cache or computed; None where there is no teacher."""
        output = batch.teacher
        if output is None and self.teacher is not None:
            output = self.teacher(batch.image, self._teacher_layers, self._teacher_logits)
        return None if output is None else output.at_least_float32()

    def terms(self, student: ViTOutput, teacher: ViTOutput | None, target: Tensor) -> dict[str, Tensor]:
        """Computes every loss term, unweighted and in float32: "task" and one for each distiller.

        Args:
            student: The student's output, with the layers of all distillers in their order.
            teacher: The same for the teacher; None where there is none.
            target: Class indices ``[B]``, or probabilities ``[B, K]``.
        """
        assert student.logits is not None
        terms = {"task": F.cross_entropy(student.logits, target, label_smoothing=self.label_smoothing)}
        for name, distiller, ours, theirs in self._shares(student, teacher):
            terms[name] = distiller(ours, theirs, target)
        return terms

    def _shares(
        self, student: ViTOutput, teacher: ViTOutput | None
    ) -> list[tuple[str, Distiller, ViTOutput, ViTOutput]]:
        """Cuts the outputs into what each distiller asked for."""
        shares = []
        i = j = 0
        for name, distiller in self.objectives().items():
            assert teacher is not None
            m, n = i + len(distiller.student_layers), j + len(distiller.teacher_layers)
            ours = ViTOutput(student.logits, student.features[i:m])
            theirs = ViTOutput(teacher.logits, teacher.features[j:n])
            shares.append((name, distiller, ours, theirs))
            i, j = m, n
        return shares

    def weights(self) -> dict[str, float]:
        """Returns the weight of every term."""
        return {"task": self.task_weight, **{name: each.weight for name, each in self.objectives().items()}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the loss of one batch."""
        teacher = self.teacher_output(batch)
        student = self.student(batch.image, self._student_layers).at_least_float32()
        with torch.autocast(self.device.type, enabled=False):
            terms = self.terms(student, teacher, batch.target)
            self.last_terms = {name: term.detach() for name, term in terms.items()}
            weights = self.weights()
            loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
            if self._is_logged_step():
                self._log_step(batch, student, teacher, terms, loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores the student on one batch."""
        self.val_scores.update(self(batch.image), batch.target)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/acc1`, `val/acc5` and `val/loss` over all ranks."""
        self.log_dict(
            {f"val/{name}": value for name, value in self.val_scores.compute().items()}, prog_bar=True, sync_dist=True
        )
        self.val_scores.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores the student on one batch."""
        self.test_scores.update(self(batch.image), batch.target)

    def on_test_epoch_end(self) -> None:
        """Logs `test/acc1`, `test/acc5` and `test/loss` over all ranks."""
        self.log_dict({f"test/{name}": value for name, value in self.test_scores.compute().items()}, sync_dist=True)
        self.test_scores.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the index, the most probable class and its probability of each image, each ``[B]``."""
        probability, predicted = self(batch.image).float().softmax(dim=1).max(dim=1)
        return batch.index, predicted, probability

    # Logs: only on the steps that the Trainer writes, for a call of self.log costs as much as a small kernel

    def _is_logged_step(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    @torch.no_grad()
    def _log_step(
        self, batch: Batch, student: ViTOutput, teacher: ViTOutput | None, terms: dict[str, Tensor], loss: Tensor
    ) -> None:
        assert student.logits is not None
        target = batch.target if batch.target.ndim == 1 else batch.target.argmax(dim=1)
        accuracy = (student.logits.argmax(dim=1) == target).float().mean()
        self.log_dict({"train/loss": loss.detach(), "train/acc1": accuracy}, prog_bar=True)
        for name, weight in self.weights().items():
            self.log_dict(
                {f"train/{name}": terms[name].detach(), f"train/{name}_weighted": weight * terms[name].detach()}
            )
        for name, distiller, ours, theirs in self._shares(student, teacher):
            measured = distiller.metrics(ours, theirs)
            self.log_dict({f"train/{name}_{metric}": value for metric, value in measured.items()})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the learning rate and the gradient norm before clipping."""
        if self._is_logged_step():
            self.log("train/grad_norm", gradient_norm(self))
            self.log("train/lr", optimizer.param_groups[0]["lr"])

    # Optimisation

    def global_batch(self) -> int:
        """Returns the number of images behind one optimizer step, over all processes and accumulated batches.

        Raises:
            ValueError: If the training loader does not say its batch size.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            _ = self.trainer.estimated_stepping_batches  # builds the loader
            loader: Any = self.trainer.train_dataloader
        else:
            loader = data.train_dataloader()  # of its own: the Trainer's, if built before a resume, would not go on
        size = getattr(loader, "batch_size", None)
        if size is None:
            raise ValueError(
                "The training loader has no batch_size by which to scale the learning rate. Set optimizer.lr_base_batch: null "
                "and give the learning rate itself."
            )
        return int(size) * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def configure_optimizers(self) -> Any:
        """Builds timm's optimizer and schedule."""
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(f"The schedule needs the number of epochs: set trainer.max_epochs (it is {epochs}).")
        groups = parameter_groups([self.student, self.distillers], self.optimizer_options.weight_decay)
        scaled = self.optimizer_options.lr_base_batch is not None
        # a fused step could unscale fp16 gradients by itself, too late for their norm: Lightning clips none in mixed precision
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        clipped = bool(self.trainer.gradient_clip_val)
        fused = self.device.type in FUSED_DEVICES and self.trainer.scaler is None and not (mixed and clipped)
        optimizer = self.optimizer_options.build(groups, self.global_batch() if scaled else 1, fused)
        schedule = self.schedule_options.build(optimizer, epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:  # type: ignore[override]
        """Moves timm's schedule to the coming epoch."""
        scheduler.step(epoch=self.current_epoch + 1)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds dropout and stochastic depth by step and rank, so that a resumed run draws what it would have drawn."""
        # torch.manual_seed keeps a stack trace of every call for GPUs that are not in use
        seed = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        seed(hash((self._run_seed, self.trainer.global_step, batch_idx, self.global_rank)))

    def on_fit_start(self) -> None:
        """Says what is converted on the way: the teacher's input, and maps of unequal grids."""
        if self.teacher is not None and self.teacher.converts_size:
            rank_zero_info(f"The teacher's input is resized to {self.teacher.network.image_format.size}.")
        if self.teacher is not None and self.teacher.converts_values:
            rank_zero_info("The teacher's input is converted to its own mean and standard deviation.")
        for shapes in self._resized:
            rank_zero_info(f"Of maps with unequal grids, the finer is resized. [C, H, W] in {shapes}.")

    # Checkpoints

    def spec(self) -> dict[str, Any]:
        """Describes the student in plain types, and how it fares; see `kdvit.models.checkpoint.student_spec`."""
        measured = self.trainer.callback_metrics.items()
        run = {"epochs": self.current_epoch, **{name: float(v) for name, v in measured if name.startswith("val/")}}
        return {**self._spec, "run": run}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the student's description, by which `kdvit.load_student` works from the file alone."""
        checkpoint["kdvit"] = self.spec()


def _has_fixed_size(network: Network) -> bool:
    model: Any = getattr(network, "model", network)
    return bool(getattr(getattr(model, "patch_embed", None), "strict_img_size", False))
