"""Training images that travel to a GPU as uint8 are those that workers make, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data.transforms import MaybeToTensor
from torch.overrides import TorchFunctionMode
from torchvision.transforms import Compose, Lambda, Normalize, Resize, ToTensor
from torchvision.transforms.functional import to_tensor

from kdvit import DistillationModule
from kdvit.cli import main
from kdvit.data import ImageFolder
from kdvit.data.listed import ListedImages
from kdvit.distillers import FeatureDistiller
from kdvit.structures import Pixels, as_batch
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


@pytest.mark.parametrize(
    ("precision", "projector"),
    [("32-true", "phi_s"), ("64-true", "phi_s"), ("bf16-true", "phi_s"), ("16-true", "phi_s")],
)
def test_a_training_on_pixels_ends_at_the_same_weights(
    precision: str, projector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(tmp_path)
    found, seen = [], list[list[torch.Tensor]]()
    for sends in (False, True):
        monkeypatch.setattr(ListedImages, "sends_pixels", lambda self, sends=sends: sends)
        data = folder(tmp_path, mixup=0.8, random_erasing=1.0)
        torch.manual_seed(0)
        distillers = {"map": FeatureDistiller(projector=projector, calibration_images=4)}
        options = OptimizerOptions(lr_base_batch=None)
        network = student(num_classes=data.num_classes)
        seen.append([])
        network.register_forward_pre_hook(lambda _, given: seen[-1].append(given[0]))
        module = DistillationModule(network, teacher(), distillers, image_format=data.image_format, optimizer=options)
        trainer(tmp_path, max_epochs=2, limit_val_batches=0, precision=precision).fit(module, datamodule=data)
        found.append(module.state_dict())
    assert len(seen[0]) >= 6
    torch.testing.assert_close(seen[1], seen[0], rtol=0.01, atol=0.02)  # mean and std are rounded to half precision
    same = all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert same or precision in ("bf16-true", "16-true")


class AsCudaDivides(TorchFunctionMode):
    """Multiplies by the reciprocal in place of a division by a number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.div_ and not isinstance(args[1], torch.Tensor):
            func, args = torch.Tensor.mul_, (args[0], torch.tensor(1.0) / args[1])
        return func(*args, **(kwargs or {}))


def test_pixels_become_the_same_images_where_a_division_by_a_number_is_no_division() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    as_they_are = Pixels(torch.zeros(1), torch.ones(1), (), torch.empty(0))
    with AsCudaDivides():
        assert not torch.equal(pixels.float().div_(255), pixels / torch.tensor(255.0))
        assert torch.equal(as_they_are.normalise(pixels)[0], to_tensor(pixels[0].numpy()))


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


@pytest.mark.parametrize("last", [[ToTensor(), Normalize(0.5, 0.5)], [MaybeToTensor()], [MaybeToTensor(), Lambda(abs)]])
def test_a_transform_of_ones_own_makes_its_images_whole(
    last: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(tmp_path)
    found = []
    for sends in (False, True):
        monkeypatch.setattr(ListedImages, "sends_pixels", lambda self, sends=sends: sends)
        data = folder(tmp_path)
        data.train_transform = Compose([Resize((16, 16)), *last])
        found.append(next(iter(data.train_dataloader())).image)
    assert found[1].dtype == torch.float32
    assert torch.equal(*found)


def test_only_a_gpu_is_sent_pixels(tmp_path: Path) -> None:
    image_folder(tmp_path)
    data = folder(tmp_path)
    assert not data.sends_pixels()
    data.trainer = trainer(tmp_path)
    assert not data.sends_pixels()
    data.trainer.strategy._root_device = torch.device("cuda", 0)
    assert data.sends_pixels()
