"""The whole online step of Lift, against a plain transcription of the loop that the paper's authors train with.

That loop (arXiv:2511.15572): the teacher returns the intermediates of all blocks and its logits, the student the maps
of all its blocks; soft distillation at 0.9, MSE of the lifted map at 0.2; torch's default AdamW; a weight average by
timm's first ModelEma after every step; the loss is read every step; all under bfloat16 autocast.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import timm
import torch
from timm.utils import ModelEma
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import DistillationModule
from kdvit.callbacks import StudentEMA, Throughput
from kdvit.distillers import LiftDistiller, LogitDistiller
from kdvit.models import LiftViT, TimmTeacher, WideLastViT
from kdvit.structures import Batch
from kdvit.training.optim import OptimizerOptions
from kdvit.training.schedule import ScheduleOptions
from tests.bench.device import CPU
from tests.bench.fit import WARM, batches, seconds_a_step
from tests.bench.plain_step import PUBLISHED, Pair
from tests.bench.rounds import Row, interleave, row, speed_up

BATCH, STEPS = 16, 3


class ReferenceLift(nn.Module):
    """DeiT-Tiny with a projector behind its last block; its own norm and head stay, unused."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.base_model = timm.create_model(**model_arguments(pair.student))
        self.projection = nn.Linear(self.base_model.embed_dim, pair.width, bias=False)
        self.layer_norm = nn.LayerNorm(pair.width)
        self.head = nn.Linear(pair.width, self.base_model.num_classes)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = self.base_model.forward_intermediates(image, intermediates_only=True)
        tokens = self.layer_norm(self.projection(maps[-1].flatten(2).transpose(1, 2)))
        lifted = tokens.transpose(1, 2).reshape(len(image), -1, *maps[-1].shape[2:])
        return self.head(tokens.mean(dim=1)), [*maps[:-1], lifted]


class ReferenceWideLast(nn.Module):
    """DeiT-Tiny whose last block is wide: kdvit's modules, for the authors' are the same."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.model = WideLastViT(**pair.student, width=pair.width).model

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        end, maps = self.model.forward_intermediates(image)
        return self.model.forward_head(end), maps


def model_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of timm's `create_model` for those of kdvit's networks."""
    args = {**given, **given.get("model_args", {})}
    args.pop("model_args", None)
    return {"model_name": args.pop("arch"), **args}


class ReferenceLoop:
    """One step of the authors' loop."""

    def __init__(self, student: nn.Module, pair: Pair = PUBLISHED, on: torch.device = CPU) -> None:
        self.student = student.to(on).train()
        self.teacher = timm.create_model(**model_arguments(pair.teacher)).to(on).eval()
        decayed = [p for p in self.student.parameters() if p.ndim > 1]
        others = [p for p in self.student.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4)
        self.average = ModelEma(self.student, decay=0.99996)

    def step(self, image: Tensor, target: Tensor) -> float:
        with torch.autocast(image.device.type, torch.bfloat16):
            with torch.no_grad():
                end, theirs = self.teacher.forward_intermediates(image)
                wanted = self.teacher.forward_head(end)
            logits, ours = self.student(image)
            task = F.cross_entropy(logits, target, label_smoothing=0.1)
            divergence = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
            loss = 0.1 * task + 0.9 * divergence + 0.2 * F.mse_loss(ours[-1], theirs[-1])
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update(self.student)
        return value


def rows(rounds: int) -> list[Row]:
    """Measures steps under Lightning, with the weight average, against steps of the plain loop."""
    torch.manual_seed(0)
    reference = ReferenceLoop(ReferenceLift(PUBLISHED))
    student = LiftViT("deit_tiny_patch16_224", width=384)
    teacher = TimmTeacher("cait_s24_224", pretrained=False)
    images = Batch(torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,)), torch.arange(BATCH))
    loader = batches(images, STEPS)

    def kdvit() -> float:
        module = DistillationModule(
            copy.deepcopy(student),
            teacher,
            {"logit": LogitDistiller(0.9), "lift": LiftDistiller(0.2)},
            task_weight=0.1,
            label_smoothing=0.1,
            optimizer=OptimizerOptions(lr_base_batch=None),
            schedule=ScheduleOptions(warmup_epochs=0),
        )
        return seconds_a_step(module, loader, "bf16-mixed", [Throughput(), StudentEMA(0.99996)])

    def plain() -> float:
        for i, batch in enumerate(loader):
            if i == WARM:
                start = time.perf_counter()
            reference.step(batch.image, batch.target)
        return (time.perf_counter() - start) / STEPS

    pairs = interleave(kdvit, plain, rounds)
    return [row("online step of Lift, bfloat16: speed-up over the authors' loop", pairs, speed_up, "s", ">= 1.4")]
