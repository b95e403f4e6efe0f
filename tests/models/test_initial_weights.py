"""The weights that students start from: by default the draws of timm and torch, on request the authors' moments."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from kdvit.models import LiftViT, WideLastViT
from tests.tiny import STUDENT, student

DEIT = "deit_tiny_patch16_224"
NORM = ("weight", "bias")


def _uniform(inputs: int) -> float:
    """Returns the standard deviation of torch's own Linear and Conv2d with so many inputs: uniform in 1 / sqrt."""
    return 1 / math.sqrt(3 * inputs)


def _assert_moments(weights: dict[str, Tensor], special: dict[str, float]) -> None:
    """Checks mean and std of every weight: of norms 1 and 0, of biases 0 and 0, of others 0 and 0.02, or `special`."""
    for name, value in weights.items():
        norm = value.ndim == 1 and re.search(r"norm|\.1\.(weight|bias)$", name) is not None
        std = special.get(name, 0.0 if norm or name.endswith("bias") else 0.02)
        error = 5 / math.sqrt(value.numel())
        mean = float(norm and name.endswith("weight"))
        assert value.mean().item() == pytest.approx(mean, abs=error * std), name
        assert value.std().item() == pytest.approx(std, rel=error), name


EMBEDDING = {"patch_embed.proj.weight": _uniform(768), "patch_embed.proj.bias": _uniform(768)}


@pytest.mark.parametrize(
    ("published", "head"),
    [(True, {"head.weight": _uniform(384), "head.bias": _uniform(384)}), (False, {})],
)
def test_lift_starts_with_these_moments(published: bool, head: dict[str, float]) -> None:
    torch.manual_seed(0)
    weights = LiftViT(DEIT, 384, published_init=published).model.state_dict()
    _assert_moments(weights, {**EMBEDDING, "cls_token": 1e-6, "norm.0.weight": _uniform(192), **head})


@pytest.mark.parametrize("width", [384, [240, 312, 384]])
@pytest.mark.parametrize("published", [True, False])
def test_wide_last_starts_with_these_moments(published: bool, width: Any) -> None:
    torch.manual_seed(0)
    weights = WideLastViT(DEIT, width, 3, published_init=published).model.state_dict()
    firsts = {key: value.shape[1] for key, value in weights.items() if key.endswith(".0.weight")}
    assert len(firsts) == (1 if width == 384 else 3)
    linear = {} if published else {key: _uniform(inputs) for key, inputs in firsts.items()}
    _assert_moments(weights, {**EMBEDDING, "cls_token": 0.02 if published else 1e-6, **linear})


def test_a_class_token_that_was_loaded_is_not_drawn_anew(tmp_path) -> None:
    weights = timm.create_model(DEIT, img_size=16, num_classes=5, **STUDENT["model_args"]).state_dict()
    weights["cls_token"] = torch.arange(16.0).view(1, 1, 16)
    torch.save(weights, tmp_path / "narrow.pth")
    given = {"checkpoint": str(tmp_path / "narrow.pth")}
    token = student("wide_last", published_init=True, **given).model.cls_token
    assert torch.equal(token, weights["cls_token"])


def _lift_draws() -> dict[str, Tensor]:
    narrow = timm.create_model(DEIT, img_size=16, num_classes=5, **STUDENT["model_args"])
    projection, head = nn.Linear(16, 24, bias=False), nn.Linear(24, 5)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    drawn = {key: value for key, value in narrow.state_dict().items() if not key.startswith(("norm.", "head."))}
    return {**drawn, "norm.0.weight": projection.weight, "head.weight": head.weight, "head.bias": head.bias}


def _wide_last_draws() -> dict[str, Tensor]:
    narrow, wide = (
        timm.create_model(DEIT, img_size=16, num_classes=5, **{**STUDENT["model_args"], **sizes}).state_dict()
        for sizes in ({}, {"embed_dim": 24, "num_heads": 3})
    )
    drawn = {key: value for key, value in narrow.items() if not key.startswith(("blocks.2.", "norm.", "head."))}
    last = {key.replace("blocks.2.", "blocks.2.2."): wide[key] for key in wide if key.startswith("blocks.2.")}
    ends = {key: wide[key] for key in wide if key.startswith(("norm.", "head."))}
    return {**drawn, **last, **ends, "blocks.2.0.weight": nn.Linear(16, 24, bias=False).weight}


@pytest.mark.parametrize(("remedy", "draws"), [("lift", _lift_draws), ("wide_last", _wide_last_draws)])
def test_the_default_draws_are_those_of_timm_and_torch_to_the_bit(remedy: str, draws: Any) -> None:
    torch.manual_seed(7)
    weights = student(remedy).model.state_dict()
    torch.manual_seed(7)
    expected = draws()
    assert {*weights} - {*expected} <= {f"{norm}.{each}" for norm in ("norm.1", "blocks.2.1") for each in NORM}
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
