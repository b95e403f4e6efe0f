"""Which views a rank sees, and what a resumed loader goes on with."""

from __future__ import annotations

import collections
import random

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler

from kdvit.data.base import collate, even_batch_size
from kdvit.data.in_memory import InMemoryImages
from kdvit.data.sampling import ResumableLoader, View, ViewSampler
from kdvit.seeding import mixed_seed, seeded
from kdvit.structures import ImageFormat


def _ranks(size: int, replicas: int, **more) -> list[list[View]]:
    samplers = [ViewSampler(size, num_replicas=replicas, rank=rank, **more) for rank in range(replicas)]
    for sampler in samplers:
        sampler.set_epoch(3)
    dealt = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(views) for views in dealt]
    return dealt


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [7, 255, 256, 1000])
def test_repeated_augmentation_shows_each_chosen_image_thrice_over_the_ranks(size: int, replicas: int) -> None:
    dealt = _ranks(size, replicas, training=True, repeats=3)
    assert len({len(views) for views in dealt}) == 1
    assert dealt[0]
    views = [view for step in zip(*dealt, strict=True) for view in step]
    assert len(set(views)) == len(views)
    counts = collections.Counter(view.image for view in views)
    partly = len([count for count in counts.values() if count != 3])
    assert partly <= 1  # where the epoch is cut
    per_epoch = size // 256 * 256 if size >= 256 else size
    assert per_epoch - replicas < len(views) < per_epoch + replicas


@pytest.mark.parametrize("replicas", [2, 3])
def test_the_repeats_of_an_image_are_on_different_ranks(replicas: int) -> None:
    dealt = _ranks(300, replicas, training=True, repeats=replicas)
    for step in zip(*dealt, strict=True):
        assert len({view.image for view in step}) == 1
        assert sorted(view.repeat for view in step) == list(range(replicas))


def test_plain_training_shows_every_image_and_pads_the_ranks_alike() -> None:
    dealt = _ranks(10, 3, training=True)
    assert [len(views) for views in dealt] == [4, 4, 4]
    assert {view.image for views in dealt for view in views} == set(range(10))


@pytest.mark.parametrize("size", [7, 300, 1000])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_repeated_augmentation_deals_as_timms_sampler_does(size: int, replicas: int) -> None:
    whole = [view.image for view in _ranks(size, 1, training=True)[0]]
    for rank, views in enumerate(_ranks(size, replicas, training=True, repeats=3)):
        theirs = RepeatAugSampler(range(size), replicas, rank, shuffle=False)
        assert [view.image for view in views] == [whole[position] for position in theirs]


def test_start_leaves_views_out_of_the_next_iteration_only() -> None:
    sampler = ViewSampler(10, training=True)
    whole = list(sampler)
    sampler.start = 4
    assert len(sampler) == 10
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole


def test_lightning_leaves_the_sampler_in_its_place() -> None:
    assert isinstance(ViewSampler(10, training=True), DistributedSampler)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_all_ranks_have_equally_many_evaluation_batches(ranks: int) -> None:
    assert even_batch_size(0, ranks, 8) == 8
    for images in range(ranks, 60):
        for batch_size in range(1, 12):
            size = even_batch_size(images, ranks, batch_size)
            assert size >= batch_size
            assert len({-(-len(range(rank, images, ranks)) // size) for rank in range(ranks)}) == 1


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_evaluation_shows_each_image_once(replicas: int) -> None:
    dealt = _ranks(10, replicas, training=False, repeats=3)
    assert sorted(view.image for views in dealt for view in views) == list(range(10))


def test_the_order_changes_with_epoch_and_seed_and_nothing_else() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ViewSampler(50, training=True, seed=seed)
        sampler.set_epoch(epoch)
        return [view.image for view in sampler]

    torch.manual_seed(123)
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(5, 0)


def _images(seed: int | None = 0) -> InMemoryImages:
    pixels = torch.randint(0, 255, (20, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = ImageFormat((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return InMemoryImages(pixels, torch.arange(20), images, seed, padding=2, hflip=0.5)


def test_a_view_is_a_function_of_its_seed_whatever_batch_it_is_in() -> None:
    views = [View(i, 1, i % 3) for i in range(20)]
    whole = _images().__getitems__(views).image
    random.seed(9)
    for i in (0, 7, 19):
        assert torch.equal(_images()[views[i]][0], whole[i])
    later = [view._replace(epoch=2) for view in views]
    assert not torch.equal(_images().__getitems__(later).image, whole)
    assert not torch.equal(_images(seed=1).__getitems__(views).image, whole)


def test_a_crop_and_flip_is_what_it_says() -> None:
    data = _images()
    plain = _images(seed=None)
    pixels = data.pixels / 255
    padded = torch.nn.functional.pad(pixels, [2] * 4)[:, 0]
    for i in range(20):
        image = (data[View(i, 4)][0] * 0.5 + 0.5)[0]
        crops = [padded[i, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        assert any(torch.allclose(image, crop) or torch.allclose(image, crop.flip(1)) for crop in crops)
        assert torch.allclose(plain[View(i)][0] * 0.5 + 0.5, pixels[i].expand(3, 8, 8))


def test_seeding_inside_leaves_the_outside_as_it_was() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(mixed_seed(1, 2)):
        inside = draws()
    assert draws() == expected
    with seeded(mixed_seed(1, 2)):
        assert draws() == inside


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_its_state_was_taken(workers: int) -> None:
    def loader() -> ResumableLoader:
        sampler = ViewSampler(20, training=True)
        return ResumableLoader(
            _images(),
            batch_size=3,
            sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def batches(of: ResumableLoader, epoch: int) -> list[list[int]]:
        of.sampler.set_epoch(epoch)
        return [batch.index.tolist() for batch in of]

    first = loader()
    epochs = [batches(first, epoch) for epoch in range(3)]
    assert len(epochs[0]) == len(first) == 7
    interrupted = loader()
    interrupted.sampler.set_epoch(1)
    stream = iter(interrupted)
    seen = [next(stream).index.tolist() for _ in range(4)]
    state = interrupted.state_dict()
    assert state == {"epoch": 1, "batches": 4, "images": 3, "size": 20, "digest": ""}

    resumed = loader()
    resumed.load_state_dict(state)
    assert seen + batches(resumed, 1) == epochs[1]
    assert batches(resumed, 2) == epochs[2]
    after_whole_epoch = loader()
    after_whole_epoch.load_state_dict(state)
    assert batches(after_whole_epoch, 2) == epochs[2]


@pytest.mark.parametrize("size", [7, 95, 96, 97, 191, 300, 1000])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_step_shows_the_same_views_to_any_number_of_ranks(size: int, repeats: int) -> None:
    def steps(replicas: int, step: int) -> list[collections.Counter]:
        dealt = _ranks(size, replicas, training=True, repeats=repeats, step=step)
        each = [[collections.Counter(views[i : i + step]) for i in range(0, len(views), step)] for views in dealt]
        return [sum(parts, collections.Counter()) for parts in zip(*each, strict=True)]

    one = steps(1, 24)
    for replicas in (2, 3, 4):
        several = steps(replicas, 24 // replicas)
        assert len(several) == len(one) == max(1, (size // 256 * 256 if repeats > 1 and size >= 256 else size) // 24)
        if size >= 24:
            assert several == one
            assert {views.total() for views in one} == {24}
        else:
            assert set(several[0]) >= set(one[0])
