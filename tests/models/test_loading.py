"""Weights that other programs wrote, heads of any name, and input sizes: what is loaded, resized or refused."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import model_entrypoint
from torch import Tensor
from torch.nn import functional as F

from kdvit.models import FrozenTeacher, TimmNetwork, TimmStudent, TimmTeacher, fit_to_data, loading
from kdvit.structures import ImageFormat

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
VIT = {"arch": "vit_small_patch16_224", "img_size": 16, "model_args": TINY}
DINOV2 = {"arch": "vit_small_patch14_reg4_dinov2", "img_size": 16, "model_args": TINY}
DINOV3 = {"arch": "vit_small_patch16_dinov3_qkvb", "img_size": 16, "model_args": TINY}
PLUS = {**DINOV3, "arch": "vit_small_plus_patch16_dinov3_qkvb"}
MAE_ONLY = {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 17, 8), "decoder_blocks.0.attn.qkv.weight": (24, 8)}


def network(num_classes: int = 0, **given: Any) -> TimmStudent:
    """Returns a network whose every weight is random."""
    made = TimmStudent(num_classes=num_classes, **given).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return made


def weights(source: TimmStudent, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": value.clone() for name, value in source.model.state_dict().items()}


def mae(own: dict[str, Tensor]) -> Any:
    return {"model": {**own, **{name: torch.randn(shape) for name, shape in MAE_ONLY.items()}}}


def dino(own: dict[str, Tensor]) -> Any:
    student = {f"module.backbone.{name}": torch.randn_like(value) for name, value in own.items()}
    teacher = {f"backbone.{name}": value for name, value in own.items()} | {"head.mlp.0.weight": torch.randn(8, 16)}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}}
    return {"student": student, "teacher": teacher, "optimizer": optimizer, "args": argparse.Namespace(arch="vit")}


def lightning(own: dict[str, Tensor]) -> Any:
    state = {f"model.{name}": value for name, value in own.items()} | {"criterion.weight": torch.ones(2)}
    return {"state_dict": state, "hyper_parameters": {"lr": 0.1}, "epoch": 3}


def huggingface(own: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Returns a network of timm's under the names of transformers' ViTModel, Dinov2Model or DINOv3ViTModel."""
    held = dict(own)
    if kind == "dinov2":  # timm has added the class token's position to it
        position = torch.randn(1, 1, 16)
        held["cls_token"], held["pos_embed"] = own["cls_token"] - position, torch.cat([position, own["pos_embed"]], 1)
        held["mask_token"] = torch.randn(1, 16)
    new = {}
    for name, value in held.items():
        outer, block, inner = re.fullmatch(r"(blocks\.(\d+)\.)?(.*)", name).groups()
        layer = f"layer.{block}." if kind == "dinov3" else f"encoder.layer.{block}."
        for timms, theirs in NAMES[kind].items():
            inner = re.sub(rf"^{re.escape(timms)}", theirs, inner)
        if inner.startswith("attn.qkv."):
            names = ("q_proj", "k_proj", "v_proj") if kind == "dinov3" else ("query", "key", "value")
            attention = "attention." if kind == "dinov3" else "attention.attention."
            for each, part in zip(names, value.chunk(3), strict=True):
                new[f"{layer}{attention}{each}.{inner.rpartition('.')[2]}"] = part.clone()
        else:
            new[f"{layer if outer else ''}{inner}"] = value
    return new


SHARED = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token"}
SHARED |= {"reg_token": "embeddings.register_tokens", "pos_embed": "embeddings.position_embeddings"}
ENCODER = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "attn.proj": "attention.output.dense"}
NAMES = {
    "vit": {
        **SHARED,
        **ENCODER,
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "norm.": "layernorm.",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "head.": "classifier.",
    },
    "dinov2": {
        **SHARED,
        **ENCODER,
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "norm.": "layernorm.",
    },
    "dinov3": {
        **SHARED,
        "patch_embed.proj": "embeddings.patch_embeddings",
        "attn.proj": "attention.o_proj",
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
        "mlp.fc1_g": "mlp.gate_proj",
        "mlp.fc1_x": "mlp.up_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    },
}
LAYOUTS = {
    "mae": (VIT, mae, "new: nothing; left: decoder_pos_embed, decoder_blocks.0.attn.qkv.weight."),
    "dino": (VIT, dino, "new: nothing; left: student.module.backbone.cls_token, "),
    "lightning": (VIT, lightning, "new: nothing; left: criterion.weight."),
    "hf vit": (VIT, lambda own: huggingface(own, "vit"), "new: nothing; left: nothing."),
    "hf dinov2": (DINOV2, lambda own: huggingface(own, "dinov2"), "new: nothing; left: nothing."),
    "hf dinov3": (DINOV3, lambda own: huggingface(own, "dinov3"), "new: nothing; left: nothing."),
    "hf dinov3 plus": (PLUS, lambda own: huggingface(own, "dinov3"), "new: nothing; left: nothing."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backbone_in_the_layout_of_another_program_gives_what_it_gave_there(layout: str, capsys) -> None:
    given, wrap, said = LAYOUTS[layout]
    source = network(**given)
    content, file = wrap(weights(source)), Path("backbone.pth")
    if layout.startswith("hf"):
        file = Path("downloaded")
        file.mkdir()
        save_file(content, file / "model.safetensors")
    else:
        torch.save(content, file)
    image = torch.randn(2, 3, 16, 16)
    teacher = TimmTeacher(**given, checkpoint=str(file), num_classes=0).eval()
    torch.testing.assert_close(teacher.deployed(image), source.deployed(image))
    count = len(source.model.state_dict())
    assert f": {count} of {count} tensors loaded into {given['arch']}; {said}" in capsys.readouterr().err
    student = TimmStudent(**given, checkpoint=str(file), num_classes=3).eval()
    torch.testing.assert_close(student(image, ["pooled"]).features[0].flatten(1), source.deployed(image))
    assert "new: head.weight, head.bias; left: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"it has no head, and .* one of 3: .* Set num_classes to 0, for features"):
        TimmTeacher(**given, checkpoint=str(file), num_classes=3)


def test_hugging_faces_classifier_is_timms_head() -> None:
    source = network(num_classes=3, **VIT)
    inner = {f"vit.{name}": each for name, each in huggingface(weights(source), "vit").items()}
    save_file({name.replace("vit.classifier.", "classifier."): each for name, each in inner.items()}, "m.safetensors")
    image = torch.randn(2, 3, 16, 16)
    loaded = TimmTeacher(**VIT, checkpoint="m.safetensors", num_classes=3).eval()
    torch.testing.assert_close(loaded(image).logits, source(image).logits)


def test_weights_of_another_network_are_refused() -> None:
    torch.save(weights(network(**DINOV3)), "qkvb.pth")
    deeper = network(**{**VIT, "model_args": {**TINY, "depth": 3}})
    torch.save(weights(deeper), "deeper.pth")
    save_file(huggingface(weights(network(**DINOV3)), "dinov3"), "dinov3.safetensors")
    Path("torn.safetensors").write_bytes(b"torn")
    for file, given, text in (
        ("deeper.pth", VIT, "it has blocks.2.norm1.weight, .* and 8 more, which vit_small_patch16_224 has not"),
        ("deeper.pth", {**VIT, "model_args": {**TINY, "depth": 4}}, "it lacks blocks.3.norm1.weight, "),
        ("dinov3.safetensors", {**DINOV3, "arch": "vit_small_patch16_dinov3"}, "Take vit_small_patch16_dinov3_qkvb"),
        ("torn.safetensors", VIT, "'torn.safetensors' is damaged"),
    ):
        with pytest.raises(ValueError, match=rf"The checkpoint '{file}' does not fit .*{text}"):
            TimmStudent(**given, checkpoint=file)


GRIDS = {  # a network, its tiny arguments, and the name of its positions
    "cait": ("cait_xxs24_224", {"embed_dim": 16, "depth": 1, "num_heads": 2, "depth_token_only": 1}),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "stages": (1, 1, 1, 1)}),
    "pit": ("pit_ti_224", {"base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 2, 2)}),
}


@pytest.mark.parametrize("name", GRIDS)
def test_positions_are_resized_where_timm_leaves_them(name: str) -> None:
    arch, tiny = GRIDS[name]
    source = network(arch=arch, img_size=224, model_args=tiny, num_classes=3)
    torch.save(source.model.state_dict(), "native.pth")
    overlay = {"pretrained_cfg_overlay": {"file": "native.pth", "num_classes": 3, "hf_hub_id": None, "url": ""}}
    published = {"pretrained": True, "model_args": {**tiny, **overlay}}
    local = {"checkpoint": "native.pth", "num_classes": 3, "model_args": tiny}
    for given in (local, published):
        teacher = TimmTeacher(arch, img_size=(448, 448), **given)
        assert teacher.image_format.size == (448, 448)
        native, resized = source.model.pos_embed, teacher.model.pos_embed
        if native.ndim == 3:
            side, larger = (int(each.shape[1] ** 0.5) for each in (native, resized))
            native, resized = native.reshape(1, side, side, -1), resized.reshape(1, larger, larger, -1)
        if name != "pit":
            native, resized = native.permute(0, 3, 1, 2), resized.permute(0, 3, 1, 2)
        expected = F.interpolate(native, size=resized.shape[2:], mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(resized, expected)
        assert teacher.output_shapes((-1,)).classes == 3


def test_positions_of_rows_and_columns_are_resized_and_of_blocks_are_not() -> None:
    positions = torch.randn(1, 14, 14, 8)  # VOLO's
    expected = F.interpolate(positions.permute(0, 3, 1, 2), size=(28, 21), mode="bicubic", antialias=True)
    resized = loading.resized_positions(positions, (1, 28, 21, 8), torch.nn.Identity())
    torch.testing.assert_close(resized, expected.permute(0, 2, 3, 1))
    assert loading.resized_positions(torch.randn(1, 16, 196, 8), (1, 16, 784, 8), torch.nn.Identity()) is None  # NesT's


def test_a_size_that_a_network_cannot_take_is_refused_in_a_sentence_and_any_other_is_its_own() -> None:
    source = network(arch="levit_128s", num_classes=3)
    torch.save(source.model.state_dict(), "levit.pth")
    text = r"size mismatch for stages.0.*attention_biases is \[4, 196\] there.*cannot be resized.*leave img_size out"
    with pytest.raises(ValueError, match=text):
        TimmTeacher("levit_128s", checkpoint="levit.pth", img_size=256, num_classes=3)
    with pytest.raises(ValueError, match=r"TimmStudent levit_128s does not take images of 3 x 256 x 256 \(channels"):
        fit_to_data(source, source.image_format._replace(size=(256, 256)))
    with pytest.raises(ValueError, match="img_size must be a number, or height and width, got "):
        TimmStudent("resnet10t", img_size=(1, 2, 3))
    for arch in ("resnet10t", "repvit_m0_9", "mobilevit_xxs"):
        found = TimmTeacher(arch, pretrained=False, img_size=(64, 96), num_classes=0)
        assert found.image_format.size == (64, 96)
        ((_, height, width),) = found.output_shapes((-1,)).features
        assert (height, width) == (2, 3)


def test_values_are_stated_or_refused_and_grey_images_reach_a_teacher_of_colours() -> None:
    grey = {"arch": "resnet10t", "pretrained": False, "in_chans": 1}
    with pytest.raises(ValueError, match="mean and std of resnet10t are those of colour images, and its"):
        TimmTeacher(**grey)
    with pytest.raises(ValueError, match=r"images of 3 channel.s., and mean and std have 1 and 3: give both"):
        TimmStudent("resnet10t", mean=(0.5,))
    stated = TimmStudent("resnet10t", num_classes=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ValueError, match=r"The student states mean and std .* and the data gives .* Leave them out"):
        fit_to_data(stated, ImageFormat((32, 32), (0.1,) * 3, (0.5,) * 3))
    teacher = TimmTeacher(**grey, mean=(0.4,), std=(0.2,), num_classes=2)
    assert teacher.image_format[1:3] == ((0.4,), (0.2,))
    assert teacher.blank_image().shape == (1, 1, 176, 176)
    images = ImageFormat((16, 16), (0.1,), (0.5,))
    with pytest.raises(ValueError, match="The teacher takes grey images and the data gives colour ones"):
        FrozenTeacher(teacher, ImageFormat((16, 16), (0.1,) * 3, (0.5,) * 3))
    colours = TimmTeacher("resnet10t", pretrained=False, img_size=16, mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    pixels = torch.rand(2, 1, 16, 16)
    expected = (pixels.expand(-1, 3, -1, -1) - torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)) / torch.tensor(
        [0.5, 0.6, 0.7]
    ).view(3, 1, 1)
    torch.testing.assert_close(FrozenTeacher(colours, images).convert((pixels - 0.1) / 0.5), expected)


def test_a_first_convolution_of_colours_is_summed_for_grey_images() -> None:
    source = network(num_classes=2, **VIT)
    torch.save(source.model.state_dict(), "rgb.pth")
    grey = TimmStudent(**VIT, num_classes=2, in_chans=1, checkpoint="rgb.pth").eval()
    image = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(grey(image).logits, source(image.expand(-1, 3, -1, -1)).logits)


SMALL = "test_|atto|femto|pico|nano|xxt|xxs|tiny|_s0|_m0|xs|18|_ti|_s"


def one_of_each_module() -> list[str]:
    """Returns a name for each of timm's files of networks, a small one where names tell."""
    names: dict[str, list[str]] = {}
    for name in timm.list_models():
        names.setdefault(model_entrypoint(name).__module__, []).append(name)
    smallest = [min(each, key=lambda name: (not re.search(SMALL, name), len(name))) for each in names.values()]
    return [name for name in smallest if model_entrypoint(name).__module__.startswith("timm.")]


REFUSED = {"efficientformer_l1", "efficientformerv2_s0", "gcvit_tiny", "gmlp_s16_224", "levit_384_s8", "nest_tiny"}
REFUSED |= {"samvit_base_patch16"}
"""Networks whose weights timm does not take to twice their size."""


@pytest.mark.slow
def test_every_network_of_timms_takes_another_head_no_head_and_another_size_or_says_why_not(monkeypatch) -> None:
    held: dict[str, Tensor] = {}
    monkeypatch.setattr(loading, "read_weights", lambda path: dict(held))
    Path("weights.pth").touch()
    from_file, refused = {"checkpoint": "weights.pth"}, {}
    with torch.device("meta"), torch.no_grad():
        for name in one_of_each_module():
            source = TimmNetwork(timm.create_model(name, num_classes=7))
            held = source.model.state_dict()
            TimmStudent(name, num_classes=5, **from_file)
            size = tuple(2 * each for each in source.image_format.size)
            try:
                larger = TimmTeacher(name, num_classes=0, img_size=size, **from_file)
                classes = larger.output_shapes((-1,)).classes
            except ValueError as error:
                if "meta tensors" not in str(error):  # Gemma 4's looks at values
                    refused[name] = str(error)
            else:
                assert (larger.image_format.size, classes) == (size, None)
    assert refused.keys() == REFUSED
    assert all(re.search("cannot be resized|does not take images of", each) for each in refused.values())
