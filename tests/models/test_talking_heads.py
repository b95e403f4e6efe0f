"""The fast talking heads against timm's own."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.cait import TalkingHeadAttn
from torch import nn

from kdvit.models import TimmNetwork, TimmTeacher, use_fast_talking_heads
from kdvit.models.cost import forward_cost
from kdvit.models.talking_heads import FastTalkingHeadAttn
from tests.tiny import student

TINY = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def _pair(arch: str = "cait_xxs24_224", **more) -> tuple[nn.Module, nn.Module]:
    """Returns timm's model, its heads well mixed and its layer scale open, and the fast one of the same weights."""
    timms = timm.create_model(arch, init_values=1.0, **{**TINY, **more}).eval()
    for name, parameter in timms.named_parameters():
        if "proj_l" in name or "proj_w" in name:
            nn.init.normal_(parameter)
    fast = copy.deepcopy(timms)
    use_fast_talking_heads(fast)
    return timms, fast


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).double().norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("arch", timm.list_models("cait_*"))
def test_every_cait_gives_timms_numbers(arch: str) -> None:
    timms, fast = _pair(arch)
    assert sum(type(module) is FastTalkingHeadAttn for module in fast.modules()) == 2
    image = torch.randn(3, 3, 32, 32)
    assert _difference(fast(image), timms(image)) < 1e-6
    for ours, theirs in zip(fast.forward_intermediates(image)[1], timms.forward_intermediates(image)[1], strict=True):
        assert _difference(ours, theirs) < 1e-6


def test_under_autocast_it_is_as_near_to_float32_as_timms() -> None:
    timms, fast = _pair()
    image = torch.randn(8, 3, 32, 32)
    exact = timms(image)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fast(image), timms(image)
    assert ours.dtype == theirs.dtype
    assert _difference(ours, exact) < 1.2 * _difference(theirs, exact)


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_it_trains_as_timms_does(drop: float) -> None:
    timms, fast = _pair(attn_drop_rate=drop)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    losses = []
    for model in (timms, fast):
        torch.manual_seed(0)
        losses.append(model.double().train()(image).square().sum())
        losses[-1].backward()
    if drop == 0:  # which weights of a map are dropped depends on its layout in memory
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
        for ours, theirs in zip(fast.parameters(), timms.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    assert all(parameter.grad is not None for parameter in fast.parameters())


def test_weights_are_those_of_timm() -> None:
    timms, fast = _pair()
    assert list(fast.state_dict()) == list(timms.state_dict())
    assert all(torch.equal(value, timms.state_dict()[name]) for name, value in fast.state_dict().items())
    plain = timm.create_model("cait_xxs24_224", init_values=1.0, **TINY).eval()
    plain.load_state_dict(fast.state_dict())
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(copy.deepcopy(fast)(image), plain(image))


def test_it_exports_with_a_dynamic_batch() -> None:
    _, fast = _pair()
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(fast, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes).module()
    image = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program(image), fast(image))


def test_operations_are_counted_alike() -> None:
    timms, fast = _pair()
    assert forward_cost(TimmNetwork(fast)).flops == forward_cost(TimmNetwork(timms)).flops


@pytest.mark.parametrize(
    ("given", "expected"), [({}, FastTalkingHeadAttn), ({"fast_attention": False}, TalkingHeadAttn)]
)
def test_a_teacher_is_fast_unless_told_otherwise(given, expected) -> None:
    teacher = TimmTeacher("cait_xxs24_224", pretrained=False, img_size=32, model_args={"depth": 1}, **given)
    assert type(teacher.model.blocks[0].attn) is expected


def test_other_architectures_are_left_alone() -> None:
    network = student()
    before = [type(module) for module in network.modules()]
    use_fast_talking_heads(network)
    assert [type(module) for module in network.modules()] == before
