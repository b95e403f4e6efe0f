"""What networks cost: times by a clock that the networks themselves move."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kdvit.models import Network
from kdvit.models.cost import WARM_UP, round_times_ms
from kdvit.structures import Layer, ViTOutput
from tests.tiny import FORMAT


class Timed(Network):
    """Takes a second more each time, from `first` on."""

    def __init__(self, name: str, first: float, ran: list[tuple[str, tuple[int, ...]]], clock: list[float]) -> None:
        super().__init__(1, FORMAT)
        self.weight = nn.Parameter(torch.zeros(()))
        self.name, self.takes, self.ran, self.clock = name, first, ran, clock

    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> ViTOutput:
        assert torch.is_inference_mode_enabled()
        self.ran.append((self.name, tuple(image.shape)))
        self.clock[0] += self.takes
        self.takes += 1
        return ViTOutput(None, ())


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
    rounds = [make.ran[i : i + 3] for i in range(0, len(make.ran), 3)]
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
