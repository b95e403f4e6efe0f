"""A run resumed from any checkpoint sees what an uninterrupted one sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.cli import main
from kdvit.data import Digits, ImageFolder
from kdvit.data.cached import collate
from kdvit.data.sampling import ResumableLoader, ShareError, ViewSampler
from tests.data.test_bad_images import command
from tests.data.test_data_modules import image_folder
from tests.tiny import trainer


def digits(**options: Any) -> Digits:
    return Digits(batch_size=200, repeats=3, seed=0, **options)


def epoch_of(loader: ResumableLoader, epoch: int) -> list[Tensor]:
    loader.sampler.set_epoch(epoch)
    return [batch.image for batch in loader]


@pytest.mark.parametrize("next_epoch", [3, 4])
def test_the_state_after_a_whole_epoch_means_the_beginning_of_the_next(next_epoch: int) -> None:
    loader = digits().train_dataloader()
    epoch_of(loader, 3)
    resumed = digits().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert len(epoch_of(resumed, next_epoch)) == len(resumed) == 6


def test_a_resumed_loader_has_the_length_of_a_whole_epoch() -> None:
    loader = digits().train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 4, "images": 200})
    assert len(list(loader)) == 2
    assert len(loader) == len(list(loader)) == 6


def of_ranks(ranks: int, batch_size: int) -> list[ResumableLoader]:
    """Returns the loaders of as many processes, in epoch 1."""
    images = digits().dataset("train")
    options = {"training": True, "repeats": 3, "num_replicas": ranks, "step": batch_size}
    samplers = [ViewSampler(len(images), rank=rank, **options) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(1)
    return [ResumableLoader(images, batch_size, sampler=sampler, collate_fn=collate) for sampler in samplers]


def test_an_epoch_is_gone_on_with_in_batches_of_as_many_images_as_it_began() -> None:
    began, resumed, whole = of_ranks(2, 64)[0], of_ranks(4, 32), of_ranks(1, 128)[0]
    batches = iter(began)
    for _ in range(3):
        next(batches)
    for loader in resumed:
        loader.load_state_dict(began.state_dict())
    steps = zip(*resumed, strict=True)
    seen = [torch.stack([batch.image for batch in step], dim=1).flatten(0, 1) for step in steps]
    torch.testing.assert_close(seen, [batch.image for batch in whole][3:], rtol=0, atol=0)
    assert len(seen) == len(whole) - 3 > 0


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 64), (2, 32), (4, 64)])
def test_batches_of_other_sizes_amid_an_epoch_are_refused(ranks: int, batch_size: int) -> None:
    loader = of_ranks(ranks, batch_size)[0]
    loader.load_state_dict({"epoch": 1, "batches": 4, "images": 128})
    said = "amid epoch 1, which began in batches of 128 images over all processes, "
    said += f"and in batches of {ranks * batch_size} "
    with pytest.raises(ShareError, match=f"{said}.* Go on with 128 .*saved at the end of an epoch"):
        next(iter(loader))
    assert len(epoch_of(loader, 2)) == len(loader)


def folder_loader() -> ResumableLoader:
    loader = ImageFolder("images", batch_size=2, num_workers=0, img_size=16, seed=0).train_dataloader()
    assert isinstance(loader, ResumableLoader)
    return loader


def test_the_same_images_in_another_place_and_a_state_that_tells_nothing_of_them_pass(caplog) -> None:
    image_folder(Path("images"))
    state = folder_loader().state_dict()
    Path("images").rename("moved")
    Path("images").symlink_to("moved")
    folder_loader().load_state_dict(state)
    Path("images/train/dog/1.jpg").unlink()
    folder_loader().load_state_dict({key: state[key] for key in ("epoch", "batches", "images")})
    assert not caplog.messages
    folder_loader().load_state_dict(state)
    assert "12 then, 11 now" in caplog.text


@pytest.mark.parametrize("now", [11, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:`ModelCheckpoint.* could not find the monitored key")  # the epoch has no batch left
def test_a_run_that_goes_on_with_other_images_says_so(now: int, caplog) -> None:
    image_folder(Path("images"))
    often = ["--last_checkpoint.every_n_train_steps", "2"]
    main(command("fit", *often, "--trainer.max_steps", "2"))
    file = Path("images/train/dog/1.jpg")
    file.rename(file.with_name("9.jpg")) if now == 12 else file.unlink()
    main(command("fit", *often))
    said = f"The training images are no longer those of the checkpoint: 12 then, {now} now, or of other names. An epoch"
    assert sum(line.startswith(said) for line in caplog.messages) == 1
    caplog.clear()
    main(command("fit", *often, "--trainer.max_epochs", "3"))
    assert "no longer" not in caplog.text


def test_persistent_workers_serve_the_epoch_that_was_set_last() -> None:
    loader = digits(num_workers=2).train_dataloader()
    assert loader.persistent_workers
    iterator = iter(loader)
    loader.sampler.set_epoch(1)
    assert torch.equal(next(iterator).image, epoch_of(digits().train_dataloader(), 1)[0])
    assert torch.equal(epoch_of(loader, 2)[5], epoch_of(digits().train_dataloader(), 2)[5])


class Recorder(pl.LightningModule):
    """Notes what it is trained on; saves a checkpoint after a given number of batches."""

    def __init__(self, save_after: int = -1, path: str = "") -> None:
        super().__init__()
        self.head = nn.Linear(192, 10)
        self.save_after, self.path = save_after, path
        self.seen: list[tuple[int, int, Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, batch.image.clone(), batch.target.clone()))
        return F.cross_entropy(self.head(batch.image.flatten(1)), batch.target)

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.seen) == self.save_after:
            self.trainer.save_checkpoint(self.path)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("after", "workers"), [(8, 0), (6, 0), (8, 2)], ids=["mid-epoch", "last of an epoch", "two workers"]
)
def test_a_resumed_run_sees_the_same_pixels_and_mixtures(tmp_path: Path, after: int, workers: int) -> None:
    path = str(tmp_path / "last.ckpt")
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    whole, resumed = Recorder(after, path), Recorder()
    trainer(tmp_path, **options).fit(whole, digits(num_workers=workers, mixup=0.8))
    trainer(tmp_path, **options).fit(resumed, digits(num_workers=workers, mixup=0.8), ckpt_path=path)
    assert len(whole.seen) == 18
    torch.testing.assert_close(resumed.seen, whole.seen[after:], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_a_run_can_overfit_a_few_batches(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer(tmp_path, overfit_batches=2, max_epochs=2, limit_val_batches=0).fit(recorder, digits())
    torch.testing.assert_close(
        [seen[2] for seen in recorder.seen[:2]], [seen[2] for seen in recorder.seen[2:]], rtol=0, atol=0
    )
