"""Students on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as TF

from kdvit import load_student
from kdvit.models import Network, TimmStudent, TimmTeacher, export_student
from kdvit.models.checkpoint import student_spec
from kdvit.structures import ImageFormat, ViTOutput
from tests.tiny import FORMAT, STUDENT, student


class MyNet(Network):
    """The example of Network's documentation."""

    def __init__(self) -> None:
        super().__init__(depth=1, image_format=ImageFormat((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, image, layers=(), logits=True):
        feature = self.stem(image)
        return ViTOutput(self.head(feature.mean((2, 3))) if logits else None, (feature,) * len(layers))


@pytest.mark.parametrize(
    "network", [student(), student("lift"), student("wide_last"), MyNet()], ids=lambda n: type(n).__name__
)
def test_an_exported_student_comes_back_as_it_was(network: Network, tmp_path) -> None:
    export_student(network, student_spec(network, FORMAT, list("abcde")), tmp_path)
    loaded = load_student(tmp_path)
    image = torch.rand(2, 3, 16, 16)
    assert not loaded.training
    assert torch.equal(loaded(image).logits, network.eval()(image).logits)
    assert loaded.image_format == FORMAT
    assert json.loads((tmp_path / "config.json").read_text())["kdvit"]["class_names"] == list("abcde")


@pytest.mark.parametrize("remedy", [None, "lift", "wide_last"])
def test_an_exported_folder_is_one_of_timms(remedy: str | None, tmp_path) -> None:
    network = student(remedy, drop_path_rate=0.1).eval()
    export_student(network, student_spec(network, FORMAT), tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(image), network(image).logits)
    assert tuple(model.pretrained_cfg["mean"]) == FORMAT.mean
    teacher = TimmTeacher(f"local-dir:{tmp_path}").eval()
    assert torch.equal(teacher(image).logits, network(image).logits)
    assert teacher.image_format == FORMAT


BEGUN = {
    "plain": lambda: student(),
    "lift": lambda: student("lift"),
    "any_size": lambda: TimmStudent(
        **{**STUDENT, "img_size": None, "model_args": {**STUDENT["model_args"], "dynamic_img_size": True}}
    ),
    "convolutional": lambda: TimmStudent("resnet10t", 5),
}


@pytest.mark.parametrize("name", BEGUN)
def test_a_student_begun_from_a_folder_does_not_need_it_afterwards(name: str, tmp_path) -> None:
    source = BEGUN[name]().eval()
    export_student(source, student_spec(source, FORMAT), tmp_path / "source")
    begun = TimmStudent(f"local-dir:{tmp_path / 'source'}", 5, pretrained=True).eval()
    assert begun.image_format.size == FORMAT.size
    (tmp_path / "source").rename(tmp_path / "moved")
    export_student(begun, student_spec(begun, FORMAT), tmp_path / "own")
    image = torch.rand(2, 3, 16, 16)
    expected = source(image).logits
    assert torch.equal(load_student(tmp_path / "own")(image).logits, expected)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'own'}", pretrained=True).eval()(image), expected)
    teacher = TimmTeacher(f"local-dir:{tmp_path / 'own'}").eval()
    assert teacher.image_format.size == FORMAT.size  # where any size goes: that of its training
    assert torch.equal(teacher(image).logits, expected)


@pytest.mark.slow
def test_a_plain_student_loads_with_timm_alone(tmp_path) -> None:
    export_student(student(), student_spec(student(), FORMAT), tmp_path)
    load = f"import sys, timm; timm.create_model('local-dir:{tmp_path}', pretrained=True)"
    load += "; assert 'kdvit' not in sys.modules"
    subprocess.run([sys.executable, "-c", load], check=True)


def test_a_student_brings_the_transform_of_its_images(tmp_path) -> None:
    images = FORMAT._replace(crop_pct=0.5, interpolation="bilinear")
    export_student(student(), student_spec(student(), images), tmp_path)
    loaded = load_student(tmp_path)
    photograph = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8))
    resized = TF.resize(photograph, 32, TF.InterpolationMode.BILINEAR)
    expected = (TF.to_tensor(TF.center_crop(resized, [16, 16])) - 0.5) / 0.5
    torch.testing.assert_close(loaded.transform(photograph), expected)
    assert loaded(loaded.transform(photograph)[None]).logits.shape == (1, 5)


def test_what_is_no_student_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no exported folder or checkpoint '.*nothing'"):
        load_student(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"expected config.json and model.safetensors"):
        load_student(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="neither a checkpoint of `kdvit fit` nor one of the authors' code"):
        load_student(tmp_path / "other.ckpt")
    torch.save({"kdvit": {"class": "Gone", "init_args": {}}, "state_dict": {}}, tmp_path / "gone.ckpt")
    with pytest.raises(ValueError, match="is of the class 'Gone', and cannot be built: there is no such"):
        load_student(tmp_path / "gone.ckpt")
    with pytest.raises(ValueError, match="had no EMA"):
        load_student(tmp_path / "gone.ckpt", ema=True)


@pytest.mark.parametrize(
    ("remedy", "more"),
    [("lift", {}), ("lift", {"folded": True}), ("wide_last", {"width": [20, 24], "num_heads": [2, 3]})],
)
def test_a_remedied_student_starts_from_one_like_it_also_with_other_classes(
    remedy: str, more: dict[str, Any], tmp_path, capsys
) -> None:
    trained = student(remedy, **more).eval()
    spec, state = student_spec(trained, FORMAT), trained.state_dict()
    export_student(trained, spec, tmp_path / "out")
    checkpoint = {"kdvit": spec, "state_dict": {f"student.{name}": value for name, value in state.items()}}
    torch.save(checkpoint, tmp_path / "best.ckpt")
    image = torch.randn(2, 3, 16, 16)
    for begun in (tmp_path / "out", tmp_path / "best.ckpt"):
        network = student(remedy, checkpoint=str(begun), **more).eval()
        assert torch.equal(network(image).logits, trained(image).logits)
        assert "new: nothing; left: nothing." in capsys.readouterr().err
        other = student(remedy, checkpoint=str(begun), num_classes=3, **more).eval()
        assert "new: head.weight, head.bias; left: head." in capsys.readouterr().err
        assert other(image).logits.shape == (2, 3)
        rest = {name: value for name, value in other.state_dict().items() if ".head." not in name}
        assert all(torch.equal(value, state[name]) for name, value in rest.items())
        assert "checkpoint" not in network.init_args


def test_a_student_that_is_folded_from_the_start_folds_the_lift_of_a_file(tmp_path) -> None:
    trained, image = student("lift").eval(), torch.randn(2, 3, 16, 16)
    export_student(trained, student_spec(trained, FORMAT), tmp_path)
    folded = student("lift", checkpoint=str(tmp_path), folded=True).eval()
    torch.testing.assert_close(folded(image).logits, trained(image).logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"does not fit deit_tiny_patch16_224: size mismatch for norm\.0\.weight"):
        student("lift", checkpoint=str(tmp_path), width=32)
    with pytest.raises(ValueError, match="give either pretrained: true or a checkpoint, not both"):
        student("lift", checkpoint=str(tmp_path), pretrained=True)
