"""Ten optimiser steps of a run against a plain PyTorch loop, written from the paper's formulas.

In float64, where the two may differ by rounding alone.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from kdvit import DistillationModule
from kdvit.cli.config_files import packaged_configs
from kdvit.distillers import FeatureDistiller, LiftDistiller, LogitDistiller, WideLastDistiller
from kdvit.training.optim import OptimizerOptions
from kdvit.training.schedule import ScheduleOptions
from tests.tiny import FORMAT, STUDENT, TinyData, student, teacher, trainer

LR = 1e-3


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


class Plan(NamedTuple):
    """Learning rate of every epoch, images a step, and names that are not decayed, besides vectors."""

    rates: list[float]
    batch_size: int
    exempt: tuple[str, ...] = ()


def _loop(network: Any, master: Any, layer: Any, alpha: float, feature_loss: Any, plan: Plan) -> list[float]:
    named = dict(network.named_parameters())
    decayed = [name for name in named if named[name].ndim > 1 and not name.endswith(plan.exempt)]
    groups = [
        {"params": [named[name] for name in decayed], "weight_decay": 0.05},
        {"params": [named[name] for name in named if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for rate in plan.rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for batch in TinyData(plan.batch_size).train_dataloader():
            image = batch.image.double()
            given = network(image, [layer])
            loss = (1 - alpha) * smoothed_cross_entropy(given.logits, batch.target)
            if feature_loss:
                with torch.no_grad():
                    wanted = master(image, [-1])
                loss = loss + alpha * soft_kd(given.logits, wanted.logits)
                loss = loss + 0.2 * feature_loss(given.features[0], wanted.features[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def _compare(network: Any, run: tuple[Any, ...], plan: Plan, folder: Path, **options: Any) -> None:
    """Trains a module and, in the plain loop, the same network, and compares losses and weights after ten steps."""
    layer, distillers, alpha, feature_loss = run
    network, master = network.double(), teacher().double().eval()
    master.image_format = FORMAT
    losses: list[float] = []

    class Recording(DistillationModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    module = Recording(
        copy.deepcopy(network),
        teacher=copy.deepcopy(master) if distillers else None,
        distillers=copy.deepcopy(distillers),
        task_weight=1 - alpha,
        label_smoothing=0.1,
        image_format=FORMAT,
        **options,
    )
    data = TinyData(plan.batch_size)
    trainer(folder, max_epochs=len(plan.rates), precision="64-true").fit(module, datamodule=data)
    expected = _loop(network, master, layer, alpha, feature_loss, plan)
    assert len(losses) == len(expected) == 10
    assert losses == pytest.approx(expected, rel=1e-9)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(module.student.state_dict()[key], value, rtol=0, atol=1e-8, msg=key)


def _cosine(epoch: int, epochs: int, peak: float) -> float:
    return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_equal_a_plain_loop(name: str, tmp_path: Path) -> None:
    remedy, *run = RUNS[name]
    plan = Plan([_cosine(epoch, 2, LR * 16 / 512) for epoch in range(2)], 16, ("pos_embed", "cls_token"))
    options = {"optimizer": OptimizerOptions(lr=LR), "schedule": ScheduleOptions(warmup_epochs=0)}
    _compare(student(remedy), tuple(run), plan, tmp_path, **options)


PUBLISHED: dict[str, tuple[Any, ...]] = {**RUNS, "uniform_wide": (None, -1, {}, 0.0, None)}


@pytest.mark.parametrize("name", ["lift", "wide_last", "uniform_wide"])
def test_ten_steps_of_a_published_config_equal_the_authors_loop(name: str, tmp_path: Path) -> None:
    """All but vectors is decayed, and the rate is one epoch late, as in their code; a step an epoch, a higher rate."""
    config = yaml.safe_load((packaged_configs() / f"{name}.yaml").read_text())["model"]
    remedy, *run = PUBLISHED[name]
    args = config["student"]["init_args"]
    wider = {"model_args": {**STUDENT["model_args"], "embed_dim": 18}} if remedy is None else {"published_init": True}
    assert wider.keys() <= args.keys()
    peak = 10 * LR * 80 / 512
    late = [max(epoch - 1, 0) for epoch in range(10)]
    rates = [1e-6 + epoch * (peak - 1e-6) / 5 if epoch < 5 else _cosine(epoch, 10, peak) for epoch in late]
    optimizer = OptimizerOptions(**{**config["optimizer"], "lr": 10 * LR})
    schedule = ScheduleOptions(**config["schedule"])
    network = student(remedy, **wider)
    _compare(network, tuple(run), Plan(rates, 80), tmp_path, optimizer=optimizer, schedule=schedule)
