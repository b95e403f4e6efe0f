"""`check_network`: networks that keep the contract, and what each broken promise is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdvit.models import LiftViT, Network, TimmTeacher
from kdvit.structures import Layer, ViTOutput
from kdvit.testing import check_network
from tests.tiny import FORMAT, STUDENT, student, teacher

OURS: dict[str, Callable[[], Network]] = {
    "student": student,
    "lift": lambda: student("lift"),
    "folded": lambda: LiftViT(**STUDENT, width=24).folded(),
    "wide_last": lambda: student("wide_last"),
    "teacher": teacher,
    "two_heads": lambda: student(arch="deit_tiny_distilled_patch16_224"),
    "wide_two_heads": lambda: student("wide_last", arch="deit_tiny_distilled_patch16_224"),
    "no_head": lambda: student("lift", num_classes=0),
    "grey": lambda: student(in_chans=1, img_size=(16, 8)),
    "cnn": lambda: TimmTeacher("resnet10t", pretrained=False, model_args={"num_classes": 3}),
}


@pytest.mark.parametrize("name", OURS)
def test_our_networks_keep_the_contract(name: str) -> None:
    network = OURS[name]()
    check_network(network, (*network.named_layers(), 0, -1))


class Good(Network):
    def __init__(self) -> None:
        super().__init__(depth=2, image_format=FORMAT)
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> Any:
        maps = [self.stem(image)]
        maps.append(self.block(maps[0]))
        wanted = tuple(maps[self.resolve(layer)] for layer in layers)
        return ViTOutput(self.head(maps[1].mean((2, 3))) if logits else None, wanted)


class Pooled(Good):
    def token_layers(self) -> dict[str, int]:
        return {"pooled": 2}

    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> Any:
        last = super().forward(image, (-1,)).features[0].mean((2, 3), keepdim=True)
        output = super().forward(image, [layer for layer in layers if layer != "pooled"], logits)
        maps = iter(output.features)
        return output._replace(features=tuple(last if layer == "pooled" else next(maps) for layer in layers))


class NotPooled(Good):
    def token_layers(self) -> dict[str, int]:
        return {"pooled": 1}


class Tokens(Good):
    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> Any:
        output = super().forward(image, layers, logits)
        return output._replace(features=tuple(x.flatten(2).transpose(1, 2) for x in output.features))


class Tuple(Good):
    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> Any:
        return tuple(super().forward(image, layers, logits))


class Sorted(Good):
    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> Any:
        return super().forward(image, sorted(layers, key=self.resolve), logits)


class Always(Good):
    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> Any:
        return super().forward(image, layers, True)


class Random(Good):
    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> Any:
        return super().forward(image + torch.rand(()), layers, logits)


class OverTheBatch(Good):
    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> Any:
        return super().forward(image - image.mean(), layers, logits)


class InPlace(Good):
    def forward(self, image: Tensor, layers: Sequence[Layer] = (), logits: bool = True) -> Any:
        return super().forward(image.mul_(0.5), layers, logits)


class Dead(Good):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Tokens, r"layer 0 must give a map \[B, C, H, W\], got \[2, 16, 8\] \(tokens \[B, N, C\] become a map by"),
        (Tuple, "forward must return a ViTOutput, got tuple"),
        (Sorted, "maps must come in the order"),
        (Always, "logits=False must give no logits"),
        (Random, "in eval, the same images must give the same output"),
        (OverTheBatch, "an image must give the same alone as in a batch"),
        (InPlace, "must not edit its input"),
        (NotPooled, r"'pooled' is one of token_layers and must give \[B, C, 1, 1\], got \[2, 8, 4, 4\]"),
        (Dead, r"logits must depend on every parameter.*'unused.weight', 'unused.bias'"),
    ],
)
def test_a_broken_promise_is_named(network: Callable[[], Network], message: str) -> None:
    check_network(Good())
    check_network(Pooled())
    with pytest.raises(AssertionError, match=message):
        check_network(network())
