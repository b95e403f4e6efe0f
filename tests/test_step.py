"""Ten optimiser steps of a run against a plain PyTorch loop, written from the paper's formulas.

In float64, where the two may differ by rounding alone.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdvit import DistillationModule
from kdvit.distillers import FeatureDistiller, LiftDistiller, LogitDistiller, WideLastDistiller
from kdvit.training.optim import OptimizerOptions
from kdvit.training.schedule import ScheduleOptions
from tests.tiny import FORMAT, TinyData, student, teacher, trainer

EPOCHS, LR, BATCH = 2, 1e-3, 16


def soft_kd(ours: Tensor, theirs: Tensor) -> Tensor:
    p = theirs.exp() / theirs.exp().sum(1, keepdim=True)
    q = ours.exp() / ours.exp().sum(1, keepdim=True)
    return (p * (p.log() - q.log())).sum() / len(ours)


def smoothed_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    classes = logits.shape[1]
    wanted = torch.full_like(logits, 0.1 / classes)
    wanted[torch.arange(len(target)), target] += 0.9
    return -(wanted * logits.log_softmax(1)).sum() / len(target)


def mse(ours: Tensor, theirs: Tensor) -> Tensor:
    return ((ours - theirs) ** 2).sum() / ours.numel()


def spectral(ours: Tensor, theirs: Tensor) -> Tensor:
    difference = torch.fft.rfft2(ours - theirs, norm="ortho")
    return (difference.real**2 + difference.imag**2).sum() / (2 * difference.numel())


def pooled_spectral(ours: Tensor, theirs: Tensor) -> Tensor:
    wide, narrow = theirs.shape[1], ours.shape[1]
    bounds = [(i * wide // narrow, -(-(i + 1) * wide // narrow)) for i in range(narrow)]
    return spectral(ours, torch.stack([theirs[:, low:high].mean(1) for low, high in bounds], dim=1))


RUNS: dict[str, tuple[Any, ...]] = {
    "lift": ("lift", "lift", {"kd": LogitDistiller(0.9), "map": LiftDistiller(0.2, "spectral")}, 0.9, spectral),
    "wide_last": ("wide_last", -1, {"kd": LogitDistiller(0.9), "map": WideLastDistiller(0.2)}, 0.9, mse),
    "naive": (None, -1, {"map": FeatureDistiller(0.2, loss="spectral", projector="pool")}, 0.0, pooled_spectral),
    "feature-only": ("lift", "lift", {"map": LiftDistiller(0.2)}, 0.0, mse),
}


def _loop(network: Any, master: Any, layer: Any, alpha: float, feature_loss: Any) -> list[float]:
    named = dict(network.named_parameters())
    decayed = [name for name in named if named[name].ndim > 1 and not name.endswith(("pos_embed", "cls_token"))]
    groups = [
        {"params": [named[name] for name in decayed], "weight_decay": 0.05},
        {"params": [named[name] for name in named if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    losses = []
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-5 + (LR * BATCH / 512 - 1e-5) * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        for batch in TinyData(BATCH).train_dataloader():
            image = batch.image.double()
            with torch.no_grad():
                wanted = master(image, [-1])
            given = network(image, [layer])
            loss = (1 - alpha) * smoothed_cross_entropy(given.logits, batch.target)
            loss = loss + alpha * soft_kd(given.logits, wanted.logits)
            loss = loss + 0.2 * feature_loss(given.features[0], wanted.features[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_equal_a_plain_loop(name: str, tmp_path) -> None:
    remedy, layer, distillers, alpha, feature_loss = RUNS[name]
    network, master = student(remedy).double(), teacher().double().eval()
    master.image_format = FORMAT
    losses: list[float] = []

    class Recording(DistillationModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    module = Recording(
        copy.deepcopy(network),
        teacher=copy.deepcopy(master),
        distillers=distillers,
        task_weight=1 - alpha,
        label_smoothing=0.1,
        optimizer=OptimizerOptions(lr=LR),
        schedule=ScheduleOptions(warmup_epochs=0),
        image_format=FORMAT,
    )
    trainer(tmp_path, max_epochs=EPOCHS, precision="64-true").fit(module, datamodule=TinyData(BATCH))
    expected = _loop(network, master, layer, alpha, feature_loss)
    assert len(losses) == len(expected) == 10
    assert losses == pytest.approx(expected, rel=1e-9)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(module.student.state_dict()[key], value, rtol=0, atol=1e-8, msg=key)
