"""Every vision transformer of timm's takes the remedies, or is refused for a reason that is told."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import model_entrypoint
from timm.models.eva import Eva

from kdvit import load_student
from kdvit.cli import main
from kdvit.models import LiftViT, TimmStudent, WideLastViT, export_student
from kdvit.models.checkpoint import student_spec
from tests.runs import SHORT, fit

WIDTH = 72
FAMILIES = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
NO_WIDE_BLOCK = "timm has no blocks of {name} at width 72 with . heads; choose another width, or LiftViT."
ROPE_OF_HEADS = (
    "{name} learns a rotary position embedding for each head of each block, and wide blocks have other heads."
)
REFUSED = {  # by WideLastViT; LiftViT takes all
    "vitamin_*": NO_WIDE_BLOCK,
    "vit_base_mci_224": NO_WIDE_BLOCK,
    "vit_*_rope_mixed_*": ROPE_OF_HEADS,
}

CALLED = "vit|VisionTransformer|beit"
OTHERS = (  # one of each other class that timm calls a vision transformer, in its name or the network's; refused
    "beit_base_patch16_224",
    "coatnet_0_224",
    "convit_base",
    "crossvit_9_240",
    "davit_base",
    "deepseek_vit_412m",
    "deepseek_vit_412m_enc",
    "efficientvit_b0",
    "efficientvit_m0",
    "fastvit_ma36",
    "gcvit_base",
    "gemma4_vit_167m",
    "gemma4_vit_167m_enc",
    "levit_128",
    "mobilevit_s",
    "mvitv2_base",
    "naflexvit_base_patch16_gap",
    "nextvit_base",
    "pit_b_224",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "qwen3_vit_88m_enc",
    "repvit_m0_9",
    "samvit_base_patch16",
    "shvit_s1",
    "test_vit_relpos",
    "tiny_vit_5m_224",
)


def class_of(name: str) -> str:
    """Returns the class that timm's entry point says it returns, or its module where it says nothing."""
    entry = model_entrypoint(name)
    said = entry.__annotations__.get("return")
    return entry.__module__.rpartition(".")[2] if said is None else getattr(said, "__name__", str(said))


def sizes(name: str) -> dict[str, Any]:
    """Returns what makes a network of timm's tiny, as far as it lets itself be made so."""
    module = model_entrypoint(name).__module__.rpartition(".")[2]
    if module == "vitamin" or name == "vit_base_mci_224":  # as wide as their stems
        return {"img_size": 32, "model_args": {"depth": 1}}
    tiny = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    if module == "vision_transformer_hybrid":
        return {"img_size": 128, "model_args": tiny}
    if name.endswith("_sapiens2"):  # a number for each of its many blocks
        tiny["num_kv_heads"] = 1
    return {"img_size": 16, "model_args": {**tiny, "patch_size": 4}}


def structure(model: torch.nn.Module) -> str:
    """Describes a network by its modules, their plain attributes, and the shapes of its weights."""
    plain = (bool, int, float, str, tuple, type(None))
    modules = [
        (name, type(module), {key: value for key, value in vars(module).items() if isinstance(value, plain)})
        for name, module in model.named_modules()
    ]
    return repr((modules, [(name, value.shape) for name, value in model.state_dict().items()]))


def one_of_each_structure() -> Iterator[str]:
    """Yields a name for each structure among timm's networks of the families."""
    seen = set()
    for name in timm.list_models():
        if class_of(name) in FAMILIES:
            described = structure(TimmStudent(name, num_classes=3, **sizes(name)).model)
            if described not in seen:
                seen.add(described)
                yield name


def check(network: TimmStudent, layer: str, folder: Path) -> None:
    """Asserts that a remedied student keeps its promises: shapes, gradients, reloading, and the fold."""
    with torch.no_grad():
        for parameter in network.eval().parameters():  # away from its initial value, as after training
            parameter.add_(0.1 * torch.randn_like(parameter))
    image = torch.randn(2, 3, *network.image_format.size)
    output = network(image, [layer, 0])
    first = network.model.embed_dim if network.depth > 1 or layer == "lift" else WIDTH
    assert output.logits.shape == (2, 3)
    assert [feature.shape[1] for feature in output.features] == [WIDTH, first]
    assert output.features[0].shape[2:] == output.features[1].shape[2:]
    output.logits.square().sum().backward()
    assert [name for name, each in network.named_parameters() if each.grad is None] == []
    export_student(network, student_spec(network, network.image_format), folder)
    with torch.no_grad():
        assert torch.equal(load_student(folder)(image).logits, output.logits)
        if isinstance(network, LiftViT):
            network, image = network.double(), image.double()
            torch.testing.assert_close(network.folded()(image).logits, network(image).logits, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_every_vision_transformer_of_timms_takes_the_remedies_or_says_why_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    refused = set()
    for name in one_of_each_structure():
        args = {"arch": name, "width": WIDTH, "num_classes": 3, **sizes(name)}
        check(LiftViT(**args), "lift", tmp_path)
        pattern = next((each for each in REFUSED if fnmatch.fnmatch(name, each)), None)
        if pattern is None:
            check(WideLastViT(**args), "wide_last", tmp_path)
        else:
            refused.add(pattern)
            with pytest.raises(ValueError, match=REFUSED[pattern].format(name=name)):
                WideLastViT(**args)
    assert refused == set(REFUSED)


@pytest.mark.slow
def test_every_other_vision_transformer_of_timms_is_refused() -> None:
    names = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm.")]
    vision = {class_of(name) for name in names if re.search(CALLED, f"{name} {class_of(name)}", re.IGNORECASE)}
    assert {class_of(name) for name in OTHERS} == vision - set(FAMILIES)
    for name in OTHERS:
        for remedy in (LiftViT, WideLastViT):
            text = f"{remedy.__name__} is for timm's VisionTransformer and Eva; {name} is a "
            with pytest.raises(ValueError, match=text), torch.device("meta"):
                remedy(name, width=WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "fold"), [("lift", ["--fold"]), ("wide_last", [])])
def test_a_dinov3_student_is_trained_and_exported_by_the_command_line(
    method: str, fold: list, demo_teacher: str
) -> None:
    tiny = "{patch_size: 2, embed_dim: 16, depth: 2, num_heads: 2}"
    student = ["--model.student.init_args.arch", "vit_small_patch16_dinov3"]
    fit(method, demo_teacher, *SHORT, *student, "--model.student.init_args.model_args", tiny)
    main(["export", "--ckpt", "run/checkpoints/best.ckpt", "--out", "out", *fold])
    image = torch.randn(2, 3, 8, 8)
    logits = load_student("run/checkpoints/best.ckpt")(image).logits
    torch.testing.assert_close(load_student("out")(image).logits, logits)
    assert isinstance(load_student("out").model, Eva)
