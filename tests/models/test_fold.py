"""The fold of Lift: the same logits in the student's own width."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from kdvit import load_student
from kdvit.cli import main
from kdvit.data import Digits
from kdvit.models import LiftViT, export_student
from kdvit.models.checkpoint import student_spec
from kdvit.models.cost import forward_cost, parameter_count
from kdvit.models.fold import MahalanobisNorm
from tests.runs import SHORT, fit
from tests.tiny import FORMAT, STUDENT, student


def trained(width: int = 24, seed: int = 0, **more: object) -> LiftViT:
    """Returns a LiftViT whose every weight is away from its initial value, as after training."""
    torch.manual_seed(seed)
    network = LiftViT(**{**STUDENT, **more}, width=width)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("seed", range(12))
def test_logits_stay_for_any_width_and_eps(seed: int) -> None:
    draw = random.Random(seed)
    network = trained(width=draw.choice([1, 3, 8, 16, 17, 24, 64]), seed=seed).double()
    network.model.norm[1].eps = draw.choice([1e-12, 1e-5, 1e-2])
    with torch.no_grad():
        network.model.norm[0].weight.mul_(draw.choice([1e-6, 1.0, 1e3]))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = network.folded()
    x = images().double()
    with torch.no_grad():
        torch.testing.assert_close(folded(x).logits, network(x).logits, atol=1e-9, rtol=1e-9)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "arch", ["deit_tiny_distilled_patch16_224", "vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384"]
)
def test_logits_stay_for_other_families(arch: str) -> None:
    network = trained(arch=arch).double()
    with torch.no_grad():
        torch.testing.assert_close(network.folded()(images().double()).logits, network(images().double()).logits)
    assert network.folded().init_args["folded"] is True
    assert LiftViT(**network.folded().init_args).double().load_state_dict(network.folded().state_dict())


def test_a_projector_of_lower_rank_folds() -> None:
    network = trained().double()
    with torch.no_grad():
        network.model.norm[0].weight[:, 3:] = 0
        network.model.norm[0].weight[:, 1] = 1  # the same in every lifted channel: gone with the mean
    torch.testing.assert_close(network.folded()(images().double()).logits, network(images().double()).logits)


def test_half_precision_weights_fold_into_float32() -> None:
    network = trained().bfloat16()
    folded = network.folded()
    assert {each.dtype for each in (*folded.model.norm.parameters(), *folded.model.head.parameters())} == {
        torch.float32
    }
    exact = network.double()(images().double()).logits
    torch.testing.assert_close(folded(images()).logits.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["autocast", "half"])
def test_large_tokens_of_half_precision_do_not_vanish(how: str) -> None:
    norm = MahalanobisNorm(8, eps=1e-6)
    tokens = 300 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    exact = norm(tokens)
    with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
        found = (norm.half() if how == "half" else norm)(tokens.half())
    torch.testing.assert_close(found.float(), exact, atol=2e-3, rtol=2e-3)


def test_a_folded_deit_tiny_costs_what_the_plain_one_costs() -> None:
    lift = LiftViT("deit_tiny_patch16_224", width=384)
    folded = lift.folded()
    plain = student_plain()
    assert [parameter_count(each) for each in (lift, folded, plain)] == [5_983_528, 5_735_560, 5_717_416]
    tail = forward_cost(folded).flops - forward_cost(plain).flops
    assert tail < 0.006 * forward_cost(plain).flops
    assert (
        folded(torch.zeros(1, 3, 224, 224)).logits - lift.eval()(torch.zeros(1, 3, 224, 224)).logits
    ).abs().max() < 1e-5


def student_plain() -> nn.Module:
    from kdvit.models import TimmStudent

    return TimmStudent("deit_tiny_patch16_224")


def test_folded_from_the_start_begins_with_the_same_function_and_trains() -> None:
    torch.manual_seed(0)
    lift = LiftViT(**STUDENT, width=24).eval()
    torch.manual_seed(0)
    folded = LiftViT(**STUDENT, width=24, folded=True).eval()
    torch.testing.assert_close(folded(images()).logits, lift(images()).logits)
    folded(images()).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (folded.model.norm.factor, folded.model.head.weight))
    with pytest.raises(ValueError, match="has no layer 'lift'"):
        folded.resolve("lift")


def test_what_cannot_be_folded_is_refused() -> None:
    network = trained()
    with pytest.raises(ValueError, match="There is no lift to fold"):
        network.folded().folded()
    network.model.head = nn.Sequential(nn.Linear(24, 5))
    with pytest.raises(ValueError, match="folds into a linear head"):
        network.folded()
    network.model.head = nn.Identity()
    with pytest.raises(ValueError, match="folds into a linear head"):
        network.folded()


@pytest.mark.slow
def test_a_folded_student_loads_everywhere_and_predicts_the_same_on_every_image(demo_teacher: str, capsys) -> None:
    fit("lift", demo_teacher, *SHORT)
    lift = load_student("run/checkpoints/best.ckpt")
    for form, file in (("timm", "model.safetensors"), ("onnx", "model.onnx"), ("torch-export", "model.pt2")):
        main(["export", "--ckpt", "run/checkpoints/best.ckpt", "--out", form, "--fold", "--format", form])
        assert Path(form, file).is_file()
    shown = capsys.readouterr().out
    assert shown.count("Folded: its logits differ from PyTorch's by at most ") == 3
    assert f"{parameter_count(lift):,} parameters became " in shown
    folded = load_student("timm")
    by_timm = timm.create_model("local-dir:timm", pretrained=True).eval()
    batches = list(Digits(batch_size=250).val_dataloader())
    assert sum(len(batch.image) for batch in batches) == 500
    with torch.no_grad():
        for batch in batches:
            logits = lift(batch.image).logits
            torch.testing.assert_close(folded(batch.image).logits, logits, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(by_timm(batch.image), folded(batch.image).logits)
            assert torch.equal(folded(batch.image).logits.argmax(1), logits.argmax(1))
    assert load_student("timm").spec["init_args"]["folded"] is True


def test_a_student_without_a_lift_is_not_folded(capsys) -> None:
    wide = student("wide_last")
    export_student(wide, student_spec(wide, FORMAT), "wide")
    with pytest.raises(SystemExit):
        main(["export", "--ckpt", "wide", "--out", "out", "--fold"])
    assert "--fold is for students with a lift, and this is a WideLastViT." in capsys.readouterr().err
    assert not Path("out").exists()
