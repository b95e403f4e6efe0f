"""What networks cost: operations, and times by a clock that the networks themselves move."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdvit.models import Network
from kdvit.models.cost import WARM_UP, forward_cost, round_times_ms
from kdvit.models.timm_network import TimmNetwork
from kdvit.structures import Layer, ViTOutput
from tests.tiny import FORMAT


class Timed(Network):
    """Takes a second more each time; `first` the first time it is timed, after a pass that shows that it has logits."""

    def __init__(self, name: str, first: float, ran: list[tuple[str, tuple[int, ...]]], clock: list[float]) -> None:
        super().__init__(1, FORMAT)
        self.weight = nn.Parameter(torch.zeros(()))
        self.name, self.takes, self.ran, self.clock = name, first - 1, ran, clock

    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> ViTOutput:
        assert torch.is_inference_mode_enabled()
        self.ran.append((self.name, tuple(image.shape)))
        self.clock[0] += self.takes
        self.takes += 1
        return ViTOutput(torch.zeros(len(image), 2), ())


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch):
    """Makes networks that move the clock; what has run stands in `make.ran`."""
    ran: list[tuple[str, tuple[int, ...]]] = []
    clock = [0.0]
    monkeypatch.setattr("kdvit.models.cost.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return SimpleNamespace(network=lambda name, first=1.0: Timed(name, first, ran, clock), ran=ran)


def test_every_network_runs_once_a_round_and_not_always_behind_the_same(make) -> None:
    names = "abc"
    times = round_times_ms([make.network(name) for name in names], batch_size=4, rounds=20)
    assert [len(each) for each in times] == [20] * 3
    rounds = [make.ran[i : i + 3] for i in range(3, len(make.ran), 3)]
    assert len(rounds) == WARM_UP + 20
    assert all(sorted(name for name, _ in each) == list(names) for each in rounds)
    assert {each[0][0] for each in rounds} == set(names)
    assert {shape for _, shape in make.ran} == {(4, 3, 16, 16)}


def test_each_gets_its_own_time_and_the_warm_up_does_not_count(make) -> None:
    one, other = round_times_ms([make.network("a", 1), make.network("b", 100)], rounds=3)
    assert one == [1000.0 * (WARM_UP + n) for n in (1, 2, 3)]
    assert other == [1000.0 * (WARM_UP + n) for n in (100, 101, 102)]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_is_shown_a_progress_bar(is_terminal: bool, make, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", shown)
    round_times_ms([make.network("a")], batch_size=2)
    assert ("Timing 2 at once" in shown.getvalue()) is is_terminal


class Recorded(TimmNetwork):
    """Notes the layers that it is asked for."""

    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> ViTOutput:
        asked.append(tuple(layers))
        return super().forward(image, layers, logits)


asked: list[tuple[Layer, ...]] = []


@pytest.mark.parametrize("classes", [5, 0])
def test_operations_and_time_are_those_of_the_whole_network_with_and_without_a_head(classes: int) -> None:
    width, depth, tokens, mlp = 8, 3, 17, 4
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": 2}
    network = Recorded(timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=classes), FORMAT)
    patches = 16 * 48 * width
    linear = tokens * width * width * (3 + 1 + 2 * mlp)  # queries, keys and values; projection; MLP
    attention = 2 * tokens * tokens * width
    assert forward_cost(network).flops == 2 * (patches + depth * (linear + attention) + width * classes)
    with sdpa_kernel(SDPBackend.MATH):
        assert forward_cost(network).flops == 2 * (patches + depth * (linear + attention) + width * classes)
    asked.clear()
    round_times_ms([network], rounds=4)
    assert asked[1:] == [() if classes else ("pooled",)] * (WARM_UP + 4)
