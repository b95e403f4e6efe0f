"""Bad images in a run: one line by default, another image on request, and never one fewer in an evaluation."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest
import torch

from kdvit.cache.manifest import Manifest
from kdvit.cache.store import missing_shards
from kdvit.cli import main
from kdvit.data import ImageFolder
from kdvit.data.cached import ViewBatches
from kdvit.structures import View
from tests.data.test_data_modules import image_folder
from tests.runs import QUIET
from tests.several import together

SKIP = ["--data.init_args.on_error", "skip"]
STUDENT = {
    "arch": "deit_tiny_patch16_224",
    "num_classes": 2,
    "img_size": 16,
    "model_args": '{"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}',
}


def command(name: str, *more: str, workers: int = 0) -> list[str]:
    data = {"root": "images", "batch_size": 4, "num_workers": workers, "img_size": 16}
    given = [f"--data.init_args.{key}={value}" for key, value in data.items()]
    given += [f"--model.student.init_args.{key}={value}" for key, value in STUDENT.items()]
    run = ["--trainer.default_root_dir", "run", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", *QUIET]
    return [name, "--data", "ImageFolder", "--model.student", "TimmStudent", *given, *run, *more]


def spoil(*names: str) -> None:
    for name in names:
        Path("images", name).write_bytes(b"no image")


def last_line(args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_a_run_with_one_line_that_names_it(workers: int, capfd) -> None:
    image_folder(Path("images"))
    spoil("train/dog/2.jpg")
    message = last_line(command("fit", workers=workers), capfd)
    assert message.startswith("kdvit: error: Cannot read the image '")
    assert "images/train/dog/2.jpg': it is no image of a known format. Repair or remove it." in message
    assert "remove it. (Or skip it in training: --data.init_args.on_error skip.) Then give the same" in message
    assert "a run goes on from its last checkpoint" in message
    assert len(message) < 500


def test_a_bad_validation_image_is_never_passed_over(capfd) -> None:
    image_folder(Path("images"))
    spoil("val/cat/1.jpg")
    message = last_line(command("fit", *SKIP), capfd)
    assert "images/val/cat/1.jpg'" in message
    assert "skip" not in message
    shutil.copy("images/val/cat/0.jpg", "images/val/cat/1.jpg")
    main(command("fit"))
    spoil("val/cat/1.jpg")
    assert "images/val/cat/1.jpg'" in last_line(command("validate", *SKIP, workers=2), capfd)
    network = ["--model", "vit_tiny_patch16_224", "--pretrained", "false", "--images", "6"]
    assert "images/val/cat/1.jpg'" in last_line(["analyze", *network, "--data", "images"], capfd)


def rows(name: str) -> list[str]:
    with Path("run/metrics.csv").open() as stream:
        return [row[name] for row in csv.DictReader(stream) if row.get(name)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_takes_its_place_and_it_is_counted_and_told_once(workers: int, caplog) -> None:
    image_folder(Path("images"))
    spoil("train/dog/2.jpg", "train/cat/0.jpg")
    main(command("fit", *SKIP, workers=workers))
    assert rows("train/bad_images") == ["2.0", "4.0"]
    told = [line for line in caplog.messages if "Another image takes its place" in line]
    assert len(told) == 2
    assert all(any(name in line for line in told) for name in ("train/dog/2.jpg", "train/cat/0.jpg"))


def test_a_run_goes_on_past_an_image_that_has_come_to_harm(capfd) -> None:
    image_folder(Path("images"))
    main(command("fit", "--trainer.max_steps", "3"))
    spoil("train/dog/2.jpg")
    assert "dog/2.jpg'" in last_line(command("fit"), capfd)
    main(command("fit", *SKIP))
    assert rows("train/bad_images") == ["1.0"]


def test_the_count_goes_on_in_a_run_that_was_stopped_within_an_epoch() -> None:
    image_folder(Path("images"))
    spoil("train/dog/2.jpg", "train/cat/0.jpg")
    often = ["--last_checkpoint.every_n_train_steps", "4"]
    main(command("fit", *SKIP, *often, "--trainer.max_steps", "4"))
    main(command("fit", *SKIP, *often))
    assert rows("train/bad_images") == ["2.0", "3.0", "4.0"]


@pytest.mark.slow
def test_two_processes_count_what_one_does_and_one_without_a_batch_does_not_hang() -> None:
    image_folder(Path("images"))
    spoil("train/dog/2.jpg", "train/cat/0.jpg")
    main(command("fit", *SKIP))
    one = rows("train/bad_images")
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    elsewhere = ["--trainer.default_root_dir", "two", "--data.init_args.batch_size=2"]
    told = "".join(together(2, command("fit", *SKIP, *ranks, *elsewhere)))
    assert told.count("Another image takes its place") == 2
    Path("two/metrics.csv").replace("run/metrics.csv")
    assert rows("train/bad_images") == one
    teacher = ["--model.teacher", "TimmStudent"]
    teacher += [f"--model.teacher.init_args.{key}={value}" for key, value in STUDENT.items()]
    logit = '{"logit": {"class_path": "LogitDistiller"}}'
    together(2, command("cache", *SKIP, *ranks, *teacher, "--model.distillers", logit, "--out", "cache"))
    assert not missing_shards(Path("cache"), Manifest.load(Path("cache")))


def data(**more) -> ImageFolder:
    return ImageFolder("images", batch_size=4, img_size=16, seed=7, **{"num_workers": 0, "on_error": "skip", **more})


def test_what_takes_its_place_follows_from_the_view_alone() -> None:
    image_folder(Path("images"))
    clean = data().dataset("train")
    spoil("train/dog/2.jpg", "train/cat/0.jpg")
    views = [View(image, epoch) for image in range(12) for epoch in range(3)]
    dataset = data().dataset("train")
    one, other = dataset.__getitems__(views), dataset.__getitems__(views[::-1])
    assert torch.equal(one.image, other.image.flip(0))
    assert torch.equal(one.index, other.index.flip(0))
    asked = torch.tensor([view.image for view in views])
    replaced = one.index != asked
    assert asked[replaced].unique().tolist() == [0, 8]
    assert len(one.bad) == int(replaced.sum()) == 6
    assert not set(one.index.tolist()) & {0, 8}
    assert one.index[replaced].unique().numel() > 1
    assert torch.equal(one.target, one.index // 6)
    expected = clean.__getitems__([view for view, lost in zip(views, replaced.tolist(), strict=True) if not lost])
    assert torch.equal(one.image[~replaced], expected.image)

    batches = [list(data(num_workers=workers).train_dataloader()) for workers in (0, 2)]
    for field in ("image", "target", "index"):
        ours, theirs = (torch.cat([getattr(batch, field) for batch in each]) for each in batches)
        assert torch.equal(ours, theirs)


def test_a_cache_replays_the_images_that_took_a_place() -> None:
    image_folder(Path("images"))
    assert data(on_error="raise").fingerprint() == data().fingerprint()  # each record says which image was shown
    spoil("train/dog/2.jpg")
    views = [View(8, epoch) for epoch in range(4)]
    seen = next(iter(data(num_workers=1).replay_dataloader([views])))
    trained = ViewBatches(data().dataset("train"))[views]
    assert torch.equal(seen.image, trained.image)
    assert torch.equal(seen.target, trained.target)
    assert len(seen.bad) == 4


@pytest.mark.slow
def test_a_cache_of_a_folder_with_a_bad_image_trains_like_its_teacher(demo_teacher: str, caplog) -> None:
    image_folder(Path("images"))
    spoil("train/dog/2.jpg")
    teacher = [
        "--model.teacher=TimmTeacher",
        f"--model.teacher.init_args.arch={demo_teacher}",
        '--model.distillers={"map": {"class_path": "FeatureDistiller", "init_args": {"projector": "linear"}}}',
    ]
    main(command("cache", *SKIP, *teacher, "--out", "stored", "--views", "2"))
    assert "train/dog/2.jpg': it is no image of a known format" in caplog.text
    plain = ["--trainer.max_epochs", "2", "--trainer.default_root_dir"]
    main(command("fit", *SKIP, *teacher, *plain, "online"))
    main(command("fit", *SKIP, *teacher, *plain, "cached", "--data.init_args.cache", "stored"))
    losses = []
    for root in ("online", "cached"):
        with Path(root, "metrics.csv").open() as stream:
            losses.append([float(row["train/map"]) for row in csv.DictReader(stream) if row["train/map"]])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_file_that_was_mended_since_is_not_paired_with_what_its_substitute_gave(
    workers: int, demo_teacher: str, capfd
) -> None:
    image_folder(Path("images"))
    file = Path("images/train/dog/2.jpg")
    whole = file.read_bytes()
    file.write_bytes(b"no image".ljust(len(whole)))  # of the same size
    teacher = ["--model.teacher=TimmTeacher", f"--model.teacher.init_args.arch={demo_teacher}"]
    given = [
        *SKIP,
        *teacher,
        '--model.distillers={"map": {"class_path": "FeatureDistiller", "init_args": {"projector": "pool"}}}',
    ]
    main(command("cache", *given, "--out", "stored"))
    file.write_bytes(whole)
    message = last_line(command("fit", *given, "--data.init_args.cache", "stored", workers=workers), capfd)
    assert message.startswith(
        "kdvit: error: For training image 8 the student is shown image 8, and the teacher was shown image "
    )
    assert (
        "a file has come to harm, or has been mended, since. Bring the files back as they were, or make another"
        in message
    )


def test_training_ends_where_hardly_any_image_can_be_read(capfd) -> None:
    image_folder(Path("images"))
    spoil(*(str(file.relative_to("images")) for file in Path("images/train").rglob("*.jpg")))
    assert "(Of 10 others in its place, none can be read.)" in last_line(command("fit", *SKIP), capfd)


def test_names_that_are_no_utf_8_are_read_hashed_and_told(capfd) -> None:
    image_folder(Path("images"))
    for split in ("train", "val"):
        os.rename(os.fsencode(f"images/{split}/dog"), f"images/{split}".encode() + b"/dog\xff")
        odd = f"images/{split}".encode() + b"/dog\xff"
        os.rename(odd + b"/1.jpg", odd + b"/\xe9t\xe9.jpg")
    assert data().fingerprint()
    main(command("fit"))
    main(command("predict"))
    written = Path("run/predictions.csv").read_bytes()
    assert b"val/dog\xff/\xe9t\xe9.jpg" in written
    file = b"images/val/dog\xff/\xe9t\xe9.jpg"
    Path(os.fsdecode(file)).write_bytes(b"no image")
    shutil.rmtree("run")
    assert r"images/val/dog\udcff/\udce9t\udce9.jpg" in last_line(command("fit"), capfd)
    shutil.rmtree(os.fsencode("images/val/dog") + b"\xff")
    assert "only in train: dog" in last_line(command("fit"), capfd)


def test_one_image_a_class_is_trained_on_and_one_in_all_is_told(capfd) -> None:
    image_folder(Path("images"), train=1, val=1)
    main(command("fit"))
    assert len(rows("val/acc1")) == 2
    for split in ("train", "val"):
        shutil.rmtree(f"images/{split}/dog")
    assert data().fingerprint()
    message = last_line(command("fit", "--trainer.default_root_dir", "other"), capfd)
    assert "Expected 2 classes or more, got 2 of the student and 1 of the data." in message
