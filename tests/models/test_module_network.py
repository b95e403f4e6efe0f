"""`ModuleNetwork`: networks of torchvision, Hugging Face and one's own, against what these return themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdvit import load_student
from kdvit.errors import UserError
from kdvit.models import ModuleNetwork, TimmTeacher, export_student
from kdvit.models.checkpoint import require_loadable, student_spec
from kdvit.testing import check_network
from kdvit.training.optim import parameter_groups
from tests.tiny import FORMAT

IMAGES: dict[str, Any] = {"input_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
RESNET = {"module": "torchvision.models.resnet18", "args": {"num_classes": 5}, "layers": ["layer?"], "head": "fc"}
VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16}
HERE = "tests.models.test_module_network"


def hugging_face(name: str, **config: Any) -> dict[str, Any]:
    """Returns the arguments of a tiny network of random weights."""
    pytest.importorskip("transformers")
    args = {**VIT, "patch_size": 4, "num_labels": 5, **config}
    return {
        "module": f"transformers.{name}ForImageClassification",
        "args": {"config": {"class_path": f"transformers.{name}Config", "init_args": args}},
        "layers": [{"ViT": "vit.layers.*", "Dinov2": "dinov2.encoder.layer.*"}[name]],
        "prefix_tokens": 1,
        "logits": "logits",
        "head": "classifier",
    }


class Plain(nn.Module):
    """Maps with the channels last, an idle part, a part that is changed in place, and logits in a tuple."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.turn, self.idle, self.head = nn.Identity(), nn.Identity(), nn.Linear(width, classes)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.turn(self.relu(self.norm(self.stem(image))).movedim(1, -1))
        pooled = tokens.mean((1, 2))
        return pooled, self.head(pooled)


def plain(**changed: Any) -> ModuleNetwork:
    given = {"module": f"{HERE}.Plain", "layers": ["turn"], "channels_last": True, "logits": 1, "head": "head"}
    return ModuleNetwork(**{**IMAGES, **given, **changed})


def test_torchvisions_resnet_gives_what_torchvisions_own_extraction_gives() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    network = ModuleNetwork(**IMAGES, **RESNET)
    check_network(network, (0, "layer3", -1, 0.5))
    nodes = {"layer2": "layer2", "layer4": "layer4", "flatten": "pooled", "fc": "logits"}
    image = torch.randn(2, 3, 16, 16)
    expected = create_feature_extractor(network.model, nodes).eval()(image)
    output = network.eval()(image, ("layer4", 0.5, "pooled"))
    assert torch.equal(output.logits, expected["logits"])
    for ours, name in zip(output.features, ("layer4", "layer2", "pooled"), strict=True):
        assert torch.equal(ours.flatten(1), expected[name].flatten(1))


@pytest.mark.parametrize("name", ["ViT", "Dinov2"])
def test_hugging_faces_networks_give_their_own_hidden_states(name: str) -> None:
    given = hugging_face(name, **({"use_mask_token": False} if name == "Dinov2" else {}))
    network = ModuleNetwork(**IMAGES, **given)
    check_network(network, (0, -1))
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        theirs = network.eval().model(image, output_hidden_states=True)
        output = network(image, (0, 1, "pooled"))
        assert torch.equal(output.logits, theirs.logits)
        for ours, hidden in zip(output.features[:2], theirs.hidden_states[1:3], strict=True):
            assert ours.shape == (2, 16, 4, 4)
            assert torch.equal(ours.flatten(2), hidden[:, 1:].transpose(1, 2))
        torch.testing.assert_close(network.model.classifier(output.features[2][:, :, 0, 0]), theirs.logits)


def test_a_trained_one_of_hugging_face_needs_neither_the_folder_nor_the_weights_it_began_with(tmp_path: Path) -> None:
    given = hugging_face("Dinov2")
    network = ModuleNetwork(**IMAGES, **given)
    network.model.save_pretrained(tmp_path / "hub")
    loaded = "transformers.AutoModelForImageClassification.from_pretrained"
    args = {"pretrained_model_name_or_path": str(tmp_path / "hub")}
    student = ModuleNetwork(**{**IMAGES, **given, "module": loaded, "args": args}).eval()
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(student(image).logits, network.eval()(image).logits)
    (tmp_path / "hub").rename(tmp_path / "moved")
    spec = student_spec(student, FORMAT)
    require_loadable(student, spec)
    export_student(student, spec, tmp_path / "out")
    again = load_student(tmp_path / "out")
    assert torch.equal(again(image, (0,)).features[0], student(image, (0,)).features[0])
    with pytest.raises(ValueError, match=r"'.*out' holds a student that timm cannot build.*kdvit.load_student"):
        TimmTeacher(f"local-dir:{tmp_path / 'out'}")


def test_a_module_of_ones_own_keeps_the_contract_and_comes_back(tmp_path: Path) -> None:
    network = plain(args={"width": 12})
    check_network(network, (0, "turn"))
    assert network.output_shapes((0, "pooled")).features == ((12, 4, 4), (12, 1, 1))
    export_student(network, student_spec(network, FORMAT), tmp_path)
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_student(tmp_path)(image).logits, network.eval()(image).logits)
    again = plain(args={"width": 12}, weights=str(tmp_path))
    assert torch.equal(again.eval()(image).logits, network(image).logits)
    with pytest.raises(ValueError, match=r"(?s)does not fit Plain: .*size mismatch for head.weight"):
        plain(args={"width": 12, "classes": 7}, weights=str(tmp_path))
    assert plain(args={"width": 12, "classes": 7}, weights=str(tmp_path), new_head=True).output_shapes().classes == 7


def test_a_copy_and_a_compiled_one_record_their_own_maps() -> None:
    network = plain().eval()
    copied = copy.deepcopy(network)
    with torch.no_grad():
        copied.model.stem.weight.zero_()
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(copied(image, (0,)).features[0], network(image, (0,)).features[0])
        expected = network(image, (0, "pooled"))
        network.compile(backend="eager")
        for ours, theirs in zip(network(image, (0, "pooled")).features, expected.features, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_tokens_and_position_embeddings_are_not_decayed() -> None:
    network = ModuleNetwork(**IMAGES, **hugging_face("ViT"))
    still, _ = (group["params"] for group in parameter_groups([network], 0.05))
    embeddings: Any = network.model.vit.embeddings
    for each in (embeddings.cls_token, embeddings.position_embeddings):
        assert any(each is other for other in still)


@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
def test_tokens_are_a_grid_of_the_images_shape(size: tuple[int, int]) -> None:
    given = hugging_face("ViT", image_size=list(size))
    network = ModuleNetwork(**{**IMAGES, "input_size": list(size)}, **given)
    assert network.output_shapes((0,)).features == ((16, size[0] // 4, size[1] // 4),)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"layers": ["turm"]}, ValueError, r"Plain has no module 'turm'. Did you mean turn\?"),
        ({"layers": ["idle"]}, ValueError, r"idle does not run when an image goes through. Name another module"),
        ({"layers": ["norm"]}, ValueError, r"what norm returns is changed in place by what comes behind it"),
        ({"layers": ["head"]}, ValueError, r"head gives \[1, 5\], and 0 prefix_tokens: expected maps"),
        (
            {"logits": "output"},
            ValueError,
            r"there is no \[B, K\] there but tuple of 0 \[1, 8\], 1 \[1, 5\]. Say where",
        ),
        ({"logits": 2}, ValueError, r"logits is 2, and there is no \[B, K\] there"),
        ({"args": {"depth": 2}}, UserError, r"Plain raises TypeError: .* unexpected keyword argument 'depth'"),
        ({"module": "torchvision.models.resnet81"}, UserError, r"resnet81 raises AttributeError: .* no attribute"),
        ({"module": "not_there.Net"}, UserError, r"not_there.Net raises ModuleNotFoundError: there is no module of"),
        ({"module": "builtins.dict"}, TypeError, r"builtins.dict makes a dict; expected a torch.nn.Module"),
        ({"weights": "gone.pth"}, FileNotFoundError, r"There is no file of weights '.*gone.pth'"),
        ({"mean": [0.5]}, ValueError, r"expected a height and width, 3 means and 3 stds, got \[16, 16\], \[0.5\]"),
    ],
)
def test_what_it_cannot_be_is_said_at_construction(changed: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        plain(**changed)


def test_layers_that_nobody_has_named_are_asked_for_in_vain() -> None:
    network = plain(layers=[])
    with pytest.raises(
        ValueError, match=r"has no layer -1: name paths in `layers`. Its modules: stem, norm, relu, turn"
    ):
        network.resolve(-1)


def test_one_whose_only_layer_is_what_its_head_reads_comes_back() -> None:
    network = plain(layers=[], logits=None)
    require_loadable(network, student_spec(network, network.image_format))
    with pytest.raises(ValueError, match="has no layer 'pooled': name its last linear layer as `head`"):
        plain(head=None).resolve("pooled")


def build(width: int) -> nn.Module:
    """Makes a network, as a function does that a user has written."""
    return Plain(width)


STRANGERS: dict[str, Any] = {
    "module": {"module": "os.system", "args": {"command": "touch pwned"}},
    "through": {"module": "torchvision.models._api.importlib.import_module", "args": {"name": "pwned"}},
    "argument": {
        "module": f"{HERE}.Plain",
        "args": {"width": {"class_path": "os.system", "init_args": {"command": "x"}}},
    },
    "function": {"module": f"{HERE}.build", "args": {"width": 8}},
    "remote": {
        "module": "transformers.AutoModel.from_pretrained",
        "args": {"pretrained_model_name_or_path": "x", "trust_remote_code": True},
    },
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_students_file_calls_networks_and_nothing_else(name: str, tmp_path: Path) -> None:
    if name == "remote":
        pytest.importorskip("transformers")
    network = plain()
    spec = student_spec(network, FORMAT)
    export_student(network, {**spec, "init_args": {**spec["init_args"], **STRANGERS[name]}}, tmp_path)
    with pytest.raises(ValueError, match=r"it needs (os|torchvision|transformers|tests)\..* add --import"):
        load_student(tmp_path)
    assert not Path("pwned").exists()


def test_a_function_of_ones_own_is_called_once_its_package_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kdvit.models.own.IMPORTED", set())
    network = plain(module=f"{HERE}.build", args={"width": 8})
    spec = student_spec(network, FORMAT)
    require_loadable(network, spec)
    export_student(network, spec, tmp_path)
    image = torch.randn(2, 3, 16, 16)
    loaded = load_student(tmp_path, imports=[HERE])
    assert torch.equal(loaded(image).logits, network.eval()(image).logits)


def test_a_cache_knows_what_was_read_where() -> None:
    from kdvit.cache.manifest import describe_origin
    from kdvit.models import FrozenTeacher

    one, other = (describe_origin(FrozenTeacher(plain(layers=layers)), {}) for layers in (["turn"], ["stem", "turn"]))
    assert one["teacher.init_args"]["layers"] == ["turn"]
    assert one["teacher.init_args"] != other["teacher.init_args"]
    assert plain(layers=["turn"]).canonical(-1) == "turn"
