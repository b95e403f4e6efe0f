"""Training images that travel to a GPU as uint8 are those that workers make, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdvit import DistillationModule
from kdvit.cli import main
from kdvit.data import ImageFolder
from kdvit.data.listed import ListedImages
from kdvit.distillers import FeatureDistiller
from kdvit.structures import as_batch
from kdvit.training.optim import OptimizerOptions
from tests.data.test_data_modules import image_folder
from tests.data.test_forms import config, spec
from tests.runs import QUIET
from tests.tiny import student, teacher, trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "no policy, all erased": {"auto_augment": None, "random_erasing": 1.0},
    "several colours": {"random_erasing": 1.0, "erasing_mode": "rand", "erasing_count": 3},
    "zeros of grey images": {"random_erasing": 1.0, "erasing_mode": "const", "mean": [0.4], "std": [0.2]},
    "no erasing": {"random_erasing": 0.0},
}


def folder(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(str(root), batch_size=4, img_size=16, seed=0, **{"num_workers": 0, **options})


@pytest.mark.parametrize("name", OPTIONS)
def test_pixels_become_the_same_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path)
    data = folder(tmp_path, **OPTIONS[name])
    expected, fingerprint = list(data.train_dataloader()), data.fingerprint()
    monkeypatch.setattr(ListedImages, "sends_pixels", lambda self: True)
    sent = list(folder(tmp_path, **{**OPTIONS[name], "num_workers": 1}).train_dataloader())
    assert data.fingerprint() == fingerprint  # so that a cache holds for both
    assert len(sent) == len(expected) > 0
    for ours, theirs in zip(sent, expected, strict=True):
        assert ours.image.dtype == torch.uint8
        assert 4 * ours.image.nbytes == theirs.image.nbytes
        assert torch.equal(as_batch(ours).image, theirs.image)
        assert as_batch(ours).image.is_contiguous()
        assert torch.equal(ours.index, theirs.index)


def test_a_training_on_pixels_ends_at_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path)
    found = []
    for sends in (False, True):
        monkeypatch.setattr(ListedImages, "sends_pixels", lambda self, sends=sends: sends)
        data = folder(tmp_path, mixup=0.8, random_erasing=1.0)
        torch.manual_seed(0)
        distillers = {"map": FeatureDistiller(projector="phi_s", calibration_images=4)}
        options = OptimizerOptions(lr_base_batch=None)
        network = student(num_classes=data.num_classes)
        module = DistillationModule(network, teacher(), distillers, image_format=data.image_format, optimizer=options)
        trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(module, datamodule=data)
        found.append(module.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.slow
def test_a_cache_written_of_pixels_has_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(Path("images"))
    name = config(spec("ImageFolder", root="images"))
    shards = []
    for sends in (False, True):
        monkeypatch.setattr(ListedImages, "sends_pixels", lambda self, sends=sends: sends)
        out = f"cache_{sends}"
        main(["cache", "--config", name, *QUIET, "--out", out, "--views", "2"])
        shards.append([file.read_bytes() for file in sorted(Path(out).glob("*.npy"))])
    assert shards[0] == shards[1]
    assert shards[0]


def test_only_a_gpu_is_sent_pixels(tmp_path: Path) -> None:
    image_folder(tmp_path)
    data = folder(tmp_path)
    assert not data.sends_pixels()
    data.trainer = trainer(tmp_path)
    assert not data.sends_pixels()
    data.trainer.strategy._root_device = torch.device("cuda", 0)
    assert data.sends_pixels()
