"""A step under Lightning and kdvit against a bare PyTorch loop of the same work."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch.nn import functional as F

from kdvit import DistillationModule
from kdvit.callbacks import Throughput
from kdvit.distillers import LiftDistiller
from kdvit.models import FrozenTeacher, LiftViT, Network, TimmTeacher, avoid_slow_attention
from kdvit.structures import Batch, ImageFormat
from kdvit.training.optim import OptimizerOptions, parameter_groups
from kdvit.training.schedule import ScheduleOptions
from tests import tiny as small
from tests.bench.fit import EVERY, WARM, batches, seconds_a_step
from tests.bench.rounds import Row, cost, interleave, milliseconds, row


class ThreeScalars(DistillationModule):
    """Logs three scalars, as the bare loop does."""

    def _is_logged_step(self) -> bool:
        return False

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if super()._is_logged_step():
            self.log_dict({"loss": loss.detach(), "task": self.last_terms["task"], "lift": self.last_terms["lift"]})
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass


def compare(student: Network, teacher: Network, images: Batch, steps: int, precision: str, rounds: int) -> Any:
    """Returns the seconds a step of both sides, round by round."""
    loader = batches(images, steps)
    options = OptimizerOptions(lr_base_batch=None)
    half = precision == "bf16-mixed"

    def kdvit() -> float:
        module = ThreeScalars(
            copy.deepcopy(student),
            teacher,
            {"lift": LiftDistiller(0.2)},
            optimizer=options,
            schedule=ScheduleOptions(warmup_epochs=0),
        )
        return seconds_a_step(module, loader, precision, [Throughput()])

    def bare() -> float:
        network, master = copy.deepcopy(student).train(), FrozenTeacher(teacher, student.image_format)
        if half:
            avoid_slow_attention(network, torch.device("cpu"), torch.bfloat16)
        optimizer = options.build(parameter_groups([network], 0.05), 1, fused=True)
        logs = []
        for i, batch in enumerate(loader):
            if i == WARM:
                start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                wanted = master(batch.image, [-1], logits=False)
                given = network(batch.image, ["lift"])
            task = F.cross_entropy(given.logits.float(), batch.target)
            lift = F.mse_loss(given.features[0].float(), wanted.features[0].float())
            loss = task + 0.2 * lift
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (i + 1) % EVERY == 0:
                logs.append((loss.item(), task.item(), lift.item()))
        return (time.perf_counter() - start) / steps

    return interleave(kdvit, bare, rounds)


def tiny(rounds: int) -> list[Row]:
    """A model whose arithmetic is next to nothing."""
    torch.manual_seed(0)
    images = next(iter(small.TinyData().train_dataloader()))
    student, teacher = small.student("lift"), small.teacher()
    student.image_format = teacher.image_format = small.FORMAT
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one would only wait
    pairs = compare(student, teacher, images, 400, "32-true", rounds)
    torch.set_num_threads(threads)
    return [row("step of a tiny model: ms more than a bare loop", pairs, milliseconds, "ms", "<= 1.0")]


def deit(rounds: int) -> list[Row]:
    """Lift from CaiT-S24 to DeiT-Tiny at 224, batch 16."""
    torch.manual_seed(0)
    images = Batch(torch.randn(16, 3, 224, 224), torch.randint(1000, (16,)), torch.arange(16))
    student = LiftViT("deit_tiny_patch16_224", width=384)
    teacher = TimmTeacher("cait_s24_224", pretrained=False)
    student.image_format = teacher.image_format = ImageFormat((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pairs = compare(student, teacher, images, 4, "bf16-mixed", rounds)
    return [row("step of DeiT-Tiny from CaiT-S24, bfloat16: share of a bare loop", pairs, cost, "s", "<= 1.02")]
