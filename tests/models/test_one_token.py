"""Layers of one token: what the head reads, the class token, and who does not have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdvit.analysis import analyze
from kdvit.cli import main
from kdvit.models import FrozenTeacher, LiftViT, TimmStudent
from tests.models.test_contract import Good
from tests.tiny import STUDENT, student

SMALL: dict[str, Any] = {"depth": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"img_size": 32, "model_args": SMALL},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, "model_args": SMALL},
    "vit_base_patch16_siglip_224": {"img_size": 32, "model_args": {**SMALL, "embed_dim": 48, "num_heads": 2}},
    "cait_xxs24_224": {"img_size": 32, "model_args": SMALL},
    "beit_base_patch16_224": {"img_size": 32, "model_args": {**SMALL, "embed_dim": 48, "num_heads": 2}},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "model_args": {"window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)},
    },
    "convnext_atto": {},
    "resnet18": {},
}
WITHOUT = ("vit_base_patch16_siglip_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet18")


@pytest.mark.parametrize("arch", FAMILIES)
def test_pooled_is_what_the_head_of_every_family_reads(arch: str) -> None:
    network = TimmStudent(arch, num_classes=7, **FAMILIES[arch]).eval()
    image = torch.randn(2, 3, *network.image_format.size)
    read: list[Tensor] = []
    network.model.get_classifier().register_forward_pre_hook(lambda module, args: read.append(args[0]))
    output = network(image, ["pooled", 0, "pooled"])
    assert output.features[0].shape[2:] == (1, 1)
    assert torch.equal(output.features[0].flatten(1), read[0])
    assert torch.equal(output.features[2], output.features[0])
    assert network.output_shapes(["pooled"], logits=False).features == ((read[0].shape[1], 1, 1),)
    assert network(image, ["pooled"], logits=False).logits is None


@pytest.mark.parametrize("arch", [arch for arch in FAMILIES if arch not in WITHOUT])
def test_the_class_token_is_the_first_behind_the_final_norm(arch: str) -> None:
    network = TimmStudent(arch, num_classes=7, **FAMILIES[arch]).eval()
    seen: list[Tensor] = []
    network.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    (token,) = network(torch.randn(2, 3, *network.image_format.size), ["class_token"]).features
    assert torch.equal(token, seen[0][:, 0, :, None, None])


@pytest.mark.parametrize("arch", WITHOUT)
def test_a_network_without_a_class_token_names_what_it_has(arch: str) -> None:
    network = TimmStudent(arch, num_classes=7, **FAMILIES[arch])
    with pytest.raises(ValueError, match=r"no layer 'class_token': it has no class token; take 'pooled', which"):
        network.output_shapes(["class_token"])


def test_what_else_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it has no distillation head; take one .* deit_tiny_distilled_patch16_224"):
        student().output_shapes(["distillation_logits"])
    with pytest.raises(ValueError, match=r"Good has no layer 'pooled': its class does not offer it; name it in token"):
        Good().output_shapes(["pooled"])
    with pytest.raises(ValueError, match=r"fraction of the depth in \(0, 1\], 'pooled', 'class_token'. \("):
        student().output_shapes(["patch"])
    with pytest.raises(ValueError, match="no layer 4"):
        student().output_shapes([4])  # its index


@pytest.mark.parametrize("remedy", ["lift", "folded", "wide_last"])
def test_remedies_pool_in_the_width_of_their_head(remedy: str) -> None:
    network = LiftViT(**STUDENT, width=24).folded() if remedy == "folded" else student(remedy)
    output = network.eval()(torch.randn(2, 3, 16, 16), ["pooled", "class_token"])
    pooled, token = (each.flatten(1) for each in output.features)
    torch.testing.assert_close(network.model.head(pooled), output.logits)
    assert pooled.shape == token.shape == (2, 16 if remedy == "folded" else 24)
    assert torch.equal(pooled, token) == (remedy == "wide_last")


def test_a_lift_pools_the_map_that_it_is_distilled_at() -> None:
    output = student("lift").eval()(torch.randn(2, 3, 16, 16), ["lift", "pooled"])
    torch.testing.assert_close(output.features[0].mean((2, 3), keepdim=True), output.features[1])


def test_two_heads_read_two_tokens_of_which_pooled_is_the_mean() -> None:
    network = student(arch="deit_tiny_distilled_patch16_224").eval()
    seen: list[Tensor] = []
    network.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    output = network(torch.randn(2, 3, 16, 16), ["pooled", "class_token", "distillation_logits"])
    pooled, token, logits = (each.flatten(1) for each in output.features)
    torch.testing.assert_close(pooled, seen[0][:, :2].mean(1))
    assert torch.equal(token, seen[0][:, 0])
    assert torch.equal(logits, network.model.head_dist(seen[0][:, 1]))
    torch.testing.assert_close(output.logits, (network.model.head(token) + logits) / 2)


@pytest.mark.parametrize("arch", ["deit_tiny_patch16_224", "resnet18"])
def test_pooled_is_taken_before_the_heads_dropout(arch: str) -> None:
    args = {"drop_rate": 0.5, **(SMALL if arch.startswith("deit") else {})}
    network = TimmStudent(arch, num_classes=7, model_args=args)
    for module in network.modules():  # what is random in the blocks is not asked here
        if isinstance(module, nn.Dropout) and module is not getattr(network.model, "head_drop", None):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    modes = [module.training for module in network.modules()]
    image = torch.randn(2, 3, 224, 224)
    first, again = network(image, ["pooled"]), network(image, ["pooled"])
    assert torch.equal(first.features[0], again.features[0])
    assert not torch.equal(first.logits, again.logits)
    assert [module.training for module in network.modules()] == modes


def test_a_teacher_stops_nowhere_before_its_end() -> None:
    holder = FrozenTeacher(student())
    image = torch.randn(2, 3, 16, 16)
    pooled, block = holder(image, ["pooled", 1], logits=False).features
    assert (pooled.shape, block.shape) == ((2, 16, 1, 1), (2, 16, 4, 4))
    assert [holder.network.canonical(layer) for layer in ("pooled", -1, 0.5)] == ["pooled", 2, 1]


def test_an_analysis_of_one_token_is_refused_at_once(capsys) -> None:
    with pytest.raises(ValueError, match="'pooled' has one token an image, whose rank is 1 whatever the network"):
        analyze(student(), [], ["pooled"])
    named = ["--model", "vit_tiny_patch16_224", "--pretrained=false", "--data", "Digits"]
    with pytest.raises(SystemExit) as end:
        main(["analyze", *named, "--layers", "class_token"])
    assert end.value.code == 2
    assert "'class_token' has one token an image" in capsys.readouterr().err.splitlines()[-1]
