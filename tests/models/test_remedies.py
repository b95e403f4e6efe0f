"""Lift and WideLast against the authors' modules, and what holds for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdvit.models import LiftViT, Network, TimmNetwork, TimmStudent, TimmTeacher, WideLastViT
from kdvit.models.checkpoint import export_student, student_spec
from kdvit.models.cost import forward_cost, parameter_count
from tests.reference import ARRAYS, NUMBERS, reference_image, reference_weights
from tests.tiny import FORMAT, STUDENT, student


def _mapped_lift() -> dict[str, torch.Tensor]:
    mapped = {}
    for key, value in reference_weights("lift").items():
        if key.startswith("base_model."):
            if not key.startswith(("base_model.norm.", "base_model.head.")):  # the dead ones
                mapped["model." + key.removeprefix("base_model.")] = value
        else:
            renamed = key.replace("projections.11", "norm.0").replace("layer_norms.11", "norm.1")
            mapped["model." + renamed] = value
    return mapped


def _mapped_wide_last() -> dict[str, torch.Tensor]:
    mapped = {}
    for key, value in reference_weights("widelast").items():
        if key.startswith("blocks.11."):
            inner = key.removeprefix("blocks.11.")
            first = inner.split(".")[0]
            place = {"proj_in": "0", "proj_norm": "1"}.get(first)
            inner = inner.replace(first, place, 1) if place else f"2.{inner}"
            key = f"blocks.11.{inner}"
        mapped["model." + key] = value
    return mapped


@pytest.mark.parametrize(
    ("cls", "name", "layer", "mapped", "parameters"),
    [
        (LiftViT, "lift", "lift", _mapped_lift, 5_983_528),
        (WideLastViT, "widelast", "wide_last", _mapped_wide_last, 7_313_896),
    ],
)
def test_remedy_equals_the_authors_module(cls, name: str, layer: str, mapped, parameters: int) -> None:
    network = cls("deit_tiny_patch16_224", width=384).eval()
    assert parameter_count(network) == parameters
    network.load_state_dict(mapped())
    with torch.no_grad():
        output = network(reference_image(name), [layer])
    (feature,) = output.features
    entry = NUMBERS["models"][name]
    assert list(feature.shape) == entry["feature_shape"]
    torch.testing.assert_close(output.logits, ARRAYS[f"{name}_logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(feature[:, ::48, ::3, ::3], ARRAYS[f"{name}_feature_slice"], atol=1e-5, rtol=1e-5)
    assert feature.mean().item() == pytest.approx(entry["feature_mean"], abs=1e-6)
    assert feature.std().item() == pytest.approx(entry["feature_std"], rel=1e-5)


def test_flops_are_those_measured_for_the_published_models() -> None:
    assert forward_cost(TimmStudent("deit_tiny_patch16_224")).flops / 1e9 == pytest.approx(2.51, abs=0.01)
    assert forward_cost(LiftViT("deit_tiny_patch16_224", 384)).flops / 1e9 == pytest.approx(2.54, abs=0.01)
    assert forward_cost(WideLastViT("deit_tiny_patch16_224", 384)).flops / 1e9 == pytest.approx(3.09, abs=0.01)


TINY: dict[str, Any] = {"img_size": 32, "num_classes": 5}
ROPE = "vit_small_patch16_dinov3"
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize(
    ("cls", "arch", "more"),
    [
        (LiftViT, "deit_tiny_patch16_224", {"width": 40}),
        (LiftViT, "deit3_small_patch16_224", {"width": 40}),
        (LiftViT, "vit_base_patch16_clip_224", {"width": 17}),
        (LiftViT, "vit_small_patch14_reg4_dinov2", {"width": 40}),
        (LiftViT, "deit_tiny_distilled_patch16_224", {"width": 40}),
        (LiftViT, "vit_base_patch16_siglip_224", {"width": 40}),
        (LiftViT, "vit_small_patch16_dinov3", {"width": 40}),
        (LiftViT, "eva02_tiny_patch14_224", {"width": 40}),
        (WideLastViT, "deit_tiny_patch16_224", {"width": 36}),
        (WideLastViT, "deit_tiny_distilled_patch16_224", {"width": 36}),
        (WideLastViT, "deit3_small_patch16_224", {"width": [28, 36], "num_heads": [2, 3]}),
        (WideLastViT, "vit_small_patch14_reg4_dinov2", {"width": [28, 32, 36], "num_heads": 2}),
        (WideLastViT, "vit_small_patch16_18x2_224", {"width": 36}),
        (WideLastViT, "vit_pwee_patch16_reg1_gap_256", {"width": 36}),
        (WideLastViT, "vit_small_patch16_dinov3", {"width": [36, 48]}),
        (WideLastViT, "eva02_tiny_patch14_224", {"width": 36}),
    ],
)
def test_every_parameter_of_every_remedy_gets_a_gradient(cls, arch: str, more: dict) -> None:
    network = cls(arch, **TINY, **more, model_args=SMALL)
    output = network(torch.randn(2, 3, 32, 32))
    assert output.logits.shape == (2, 5)
    output.logits.square().sum().backward()
    dead = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert dead == []


def test_lift_is_layer_norm_of_the_projected_unnormed_patch_tokens() -> None:
    network = student("lift").eval()
    image = torch.randn(2, 3, 16, 16)
    output = network(image, ["lift", -1])
    projection, norm = network.model.norm
    lifted = norm(output.features[1].flatten(2).transpose(1, 2) @ projection.weight.T)
    torch.testing.assert_close(output.features[0].flatten(2).transpose(1, 2), lifted)
    torch.testing.assert_close(output.logits, network.model.head(lifted.mean(1)))


ROTARY = ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"]


@pytest.mark.parametrize("arch", ["vit_base_patch16_siglip_224", *ROTARY])
def test_lift_pools_the_patch_tokens_whatever_the_architecture_pools_by(arch: str) -> None:
    network = LiftViT(arch, 40, **TINY, model_args={**SMALL, "embed_dim": 32}).eval()
    output = network(torch.randn(2, 3, 32, 32), ["lift", -1])
    projection, norm = network.model.norm
    lifted = norm(output.features[1].flatten(2).transpose(1, 2) @ projection.weight.T)
    torch.testing.assert_close(output.features[0].flatten(2).transpose(1, 2), lifted)
    torch.testing.assert_close(output.logits, network.model.head(lifted.mean(1)))


def test_lift_keeps_both_heads_of_a_distilled_deit_on_their_tokens() -> None:
    network = LiftViT("deit_tiny_distilled_patch16_224", 40, **TINY, model_args=SMALL).eval()
    seen = []
    network.model.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    output = network(torch.randn(2, 3, 32, 32), ["lift"])
    projection, norm = network.model.norm
    lifted = norm(seen[0] @ projection.weight.T)
    torch.testing.assert_close(output.features[0].flatten(2).transpose(1, 2), lifted[:, 2:])
    heads = network.model.head(lifted[:, 0]), network.model.head_dist(lifted[:, 1])
    torch.testing.assert_close(output.logits, sum(heads) / 2)


@pytest.mark.parametrize("arch", ROTARY)
def test_a_wide_block_gets_the_rotary_position_embedding_of_the_narrow_ones(arch: str) -> None:
    network = WideLastViT(arch, 48, **TINY, model_args={**SMALL, "embed_dim": 32, "init_values": 1.0}).eval()
    wide, seen = network.model.blocks[-1], []
    wide.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    (feature,) = network(torch.randn(2, 3, 32, 32), ["wide_last"]).features
    tokens = wide[1](seen[0] @ wide[0].weight.T)
    with_rope = wide[2](tokens, rope=network.model.rope.get_embed((4, 4)))[:, network.model.num_prefix_tokens :]
    torch.testing.assert_close(feature.flatten(2).transpose(1, 2), with_rope)
    without = wide[2](tokens)[:, network.model.num_prefix_tokens :]
    assert not torch.allclose(with_rope, without, atol=1e-4)


def test_wide_last_keeps_head_dimension_and_drop_path_of_the_last_block() -> None:
    network = WideLastViT("deit_tiny_patch16_224", 384, drop_path_rate=0.1)
    block = network.model.blocks[-1][2]
    assert block.attn.num_heads == 6
    assert block.drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("schedule", "widths", "heads"),
    [
        ({"width": 384}, [384], [6]),
        ({"width": 384, "num_heads": 3}, [384], [3]),
        ({"width": [256, 320, 384]}, [256, 320, 384], [4, 5, 6]),
        ({"width": [240, 312, 384], "num_heads": 3}, [240, 312, 384], [3, 3, 3]),
    ],
)
def test_the_authors_widening_schedules(schedule: dict, widths: list[int], heads: list[int]) -> None:
    network = WideLastViT("deit_tiny_patch16_224", **schedule)
    wide = network.model.blocks[-len(widths) :]
    assert [block[2].attn.qkv.in_features for block in wide] == widths
    assert [block[2].attn.num_heads for block in wide] == heads
    assert network.model.head.in_features == 384


def test_the_uniform_control_needs_no_class_of_its_own() -> None:
    wide = TimmStudent("deit_tiny_patch16_224", model_args={"embed_dim": 204})
    assert wide.output_shapes([-1]).features == ((204, 14, 14),)
    assert 6.3e6 < parameter_count(wide) < 6.6e6


ARCHS = [
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "cait_xxs24_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "resnet18",
]


@pytest.mark.parametrize("arch", ARCHS)
def test_any_family_gives_logits_and_maps_at_chosen_layers(arch: str) -> None:
    small = {"depth": 2} if arch.startswith(("deit", "vit", "beit", "cait")) else {}
    network = TimmStudent(arch, num_classes=7, model_args=small)
    layers = [-1, 0, 0.5, -1]
    shapes = network.output_shapes(layers)
    assert shapes.classes == 7
    assert shapes.features[0] == shapes.features[3]
    info = network.model.feature_info
    channels = [info[network.resolve(layer)]["num_chs"] for layer in layers]
    assert [shape[0] for shape in shapes.features] == channels
    assert all(height == width for _, height, width in shapes.features)
    without = network.output_shapes(layers, logits=False)
    assert without == shapes._replace(classes=None)


def test_features_are_patch_tokens_before_the_final_norm() -> None:
    network = TimmStudent("deit_tiny_distilled_patch16_224", img_size=32, model_args={"depth": 2}).eval()
    image = torch.randn(1, 3, 32, 32)
    seen = []
    network.model.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    (feature,) = network(image, [-1]).features
    torch.testing.assert_close(feature.flatten(2).transpose(1, 2), seen[0][:, 2:])


def test_without_logits_the_network_stops_after_the_last_layer_needed() -> None:
    network = student()
    ran = []
    for i, block in enumerate(network.model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    network(torch.randn(1, 3, 16, 16), [1], logits=False)
    assert ran == [0, 1]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: TimmStudent("deit_tny_patch16_224"), ValueError, "Did you mean deit_tiny_patch16_224"),
        (lambda: TimmStudent("resnet18", model_args={"embed": 3}), ValueError, "does not take these arguments"),
        (lambda: TimmStudent("resnet18", checkpoint="no.pth"), FileNotFoundError, "no checkpoint file '.*no.pth'"),
        (lambda: TimmStudent("local-dir:nowhere"), FileNotFoundError, "no exported network in '.*nowhere'"),
        (lambda: LiftViT("resnet18", 64), ValueError, "VisionTransformer and Eva; resnet18 is a ResNet"),
        (lambda: LiftViT("deit_tiny_patch16_224", 0), ValueError, "width must be positive, got 0"),
        (lambda: WideLastViT("cait_xxs24_224", 64), ValueError, "cait_xxs24_224 is a Cait"),
        (lambda: WideLastViT(**STUDENT, width=25), ValueError, "25 does not divide into 3 heads"),
        (lambda: WideLastViT(**STUDENT, width=24, num_heads=0), ValueError, "24 does not divide into 0 heads"),
        (lambda: WideLastViT(**STUDENT, width=[1, 2, 3, 4]), ValueError, "1 to 3 positive widths for 3 blocks"),
        (lambda: WideLastViT(**STUDENT, width=[24, 32], num_heads=[2]), ValueError, "as many num_heads"),
        (
            lambda: WideLastViT(ROPE, 28, **TINY, model_args=SMALL),
            ValueError,
            "heads of 12 channels, and width 28 has 2",
        ),
        (
            lambda: WideLastViT(ROPE, 36, 2, **TINY, model_args=SMALL),
            ValueError,
            "width 36 has 2 of 18. Choose multiples",
        ),
        (lambda: WideLastViT("vit_small_patch16_rope_mixed_224", 768), ValueError, "for each head of each block"),
        (lambda: WideLastViT("vitamin_small_224", 768), ValueError, "no blocks of vitamin_small_224 at width 768"),
        (lambda: TimmNetwork(torch.nn.Linear(1, 1)), TypeError, "subclass of kdvit.models.Network"),
    ],
)
def test_bad_networks_say_what_to_do(make, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("layer", [3, -4, 0.0, 1.5, "lift"])
def test_a_layer_that_does_not_exist_names_those_that_do(layer) -> None:
    with pytest.raises(ValueError, match=r"no layer .*0 to 2 \(or -3 to -1\), a fraction.*'lift' comes with LiftViT"):
        student().output_shapes([layer])


def test_layers_are_resolved_by_index_fraction_and_name() -> None:
    network = student("lift")
    assert [network.resolve(layer) for layer in (0, 2, -1, 0.5, 1.0, 0.01, "lift")] == [0, 2, 2, 1, 2, 0, 3]
    assert isinstance(network, Network)


@pytest.mark.parametrize(
    ("key", "prefix"), [("model", ""), ("state_dict", "module."), ("model", "_orig_mod."), (None, "")]
)
def test_checkpoints_of_timm_and_deit_start_a_student_or_make_a_teacher(key, prefix: str, tmp_path) -> None:
    source = TimmStudent(**STUDENT).eval()
    weights = {f"{prefix}{name}": value for name, value in source.model.state_dict().items()}
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / "weights.pth")
    given = {"img_size": 16, "checkpoint": str(tmp_path / "weights.pth")}
    sizes = {**STUDENT["model_args"], "num_classes": 5}
    image = torch.randn(2, 3, 16, 16)
    for network in (TimmStudent(**{**STUDENT, **given}), TimmTeacher(STUDENT["arch"], **given, model_args=sizes)):
        assert torch.equal(network.eval()(image).logits, source(image).logits)
    larger = TimmTeacher(STUDENT["arch"], **{**given, "img_size": 24}, model_args=sizes)
    assert larger.model.pos_embed.shape == (1, 37, 16)


def test_a_local_checkpoint_starts_a_student_on_another_grid(tmp_path, capsys) -> None:
    source = TimmStudent(**STUDENT)
    torch.save({"model": {f"module.{k}": v for k, v in source.model.state_dict().items()}}, tmp_path / "deit.pth")
    larger = TimmStudent(**{**STUDENT, "img_size": 24}, checkpoint=str(tmp_path / "deit.pth"))
    assert larger.model.pos_embed.shape == (1, 37, 16)
    assert torch.equal(larger.model.head.weight, source.model.head.weight)
    other = LiftViT(**{**STUDENT, "num_classes": 6}, width=24, checkpoint=str(tmp_path / "deit.pth"))
    said = capsys.readouterr().err
    assert "deit.pth: 42 of 44 tensors loaded into deit_tiny_patch16_224; new: head.weight, head.bias; left: " in said
    assert torch.equal(other.model.pos_embed, source.model.pos_embed)
    with pytest.raises(ValueError, match=r"deit.pth' does not fit deit_tiny_patch16_224"):
        TimmStudent("deit_tiny_patch16_224", num_classes=5, checkpoint=str(tmp_path / "deit.pth"))
    sizes = {**STUDENT["model_args"], "num_classes": 6}
    with pytest.raises(ValueError, match=r"does not fit .*it has a head of 5 classes.*Set num_classes to 5"):
        TimmTeacher(STUDENT["arch"], checkpoint=str(tmp_path / "deit.pth"), img_size=16, model_args=sizes)


def test_flops_of_a_network_with_batch_norm_leave_it_as_it_was() -> None:
    network = TimmStudent("resnet18", num_classes=3)
    network.image_format = FORMAT
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert forward_cost(network).flops > 0
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_fractions_of_depth_are_not_moved_by_rounding() -> None:
    network = Network(depth=25, image_format=FORMAT)
    assert [network.resolve(layer) for layer in (0.28, 0.56, 0.04)] == [6, 13, 0]


@pytest.mark.parametrize("form", ["exported folder", "checkpoint of a run"])
def test_a_student_starts_from_one_that_kdvit_trained(form: str, tmp_path, capsys) -> None:
    source = TimmStudent(**STUDENT)
    start = tmp_path / "student"
    if form == "exported folder":
        export_student(source, student_spec(source, FORMAT), start)
    else:
        state = {f"student.{name}": value for name, value in source.state_dict().items()}
        torch.save({"state_dict": {**state, "distillers.a.weight": torch.ones(2)}, "kdvit": {}}, start)
    again = TimmStudent(**STUDENT, checkpoint=str(start))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in source.state_dict().items())
    other = TimmStudent(**{**STUDENT, "num_classes": 6}, checkpoint=str(start))
    assert "new: head.weight, head.bias" in capsys.readouterr().err
    assert torch.equal(other.model.pos_embed, source.model.pos_embed)


def test_maps_of_dropped_patches_are_refused() -> None:
    student = TimmStudent(**{**STUDENT, "model_args": {**STUDENT["model_args"], "patch_drop_rate": 0.5}})
    assert student.output_shapes().classes == STUDENT["num_classes"]
    with pytest.raises(ValueError, match="patch_drop_rate leaves no whole map of a layer in training: set it to 0"):
        student.output_shapes([-1])
