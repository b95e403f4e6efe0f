"""A student is scored on a part of its classes, or on all in another order, by their names."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdvit import load_student
from kdvit.cli import main
from tests.runs import QUIET
from tests.tiny import STUDENT

TRAINED = ["apple", "bean", "corn", "date", "egg"]


def images(root: str, splits: dict[str, int], names: dict[str, int]) -> None:
    """Writes images whose grey says their number."""
    for split, count in splits.items():
        for name, number in names.items():
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.RandomState(i).randint(0, 90, (16, 16, 3)) + 40 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


def command(name: str, root: str, *more: str) -> list[str]:
    data = {"root": root, "img_size": 16, "batch_size": 5, "num_workers": 0, "auto_augment": None, "random_erasing": 0}
    student = ["--model.student", "TimmStudent", "--model.student.init_args", json.dumps(STUDENT)]
    run = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "6", "--trainer.default_root_dir", "run"]
    given = ["--data", "ImageFolder", "--data.init_args", json.dumps(data), *student, *run, *QUIET]
    return [name, *given, "--ema.decay", "0.5", "--model.optimizer.lr_base_batch", "null", *more]


@pytest.fixture
def trained() -> None:
    images("all", {"train": 10, "val": 4}, {name: number for number, name in enumerate(TRAINED)})
    main(command("fit", "all", "--model.schedule.warmup_epochs", "1", "--model.optimizer.lr", "0.03"))


def accuracy(files: list[Path], ema: bool) -> float:
    student = load_student("run/checkpoints/best.ckpt", ema)
    answers = [student(student.transform(Image.open(file))[None]).logits.argmax() for file in files]
    return float(np.mean([TRAINED[answer] == file.parent.name for answer, file in zip(answers, files, strict=True)]))


def test_a_part_of_the_classes_is_scored_and_predicted_by_name(trained: None, capsys, caplog) -> None:
    images("part", {"val": 3, "test": 6}, {"egg": 4, "corn": 2, "apple": 0})
    capsys.readouterr()
    main(command("test", "part"))
    assert "The data has 3 of the 5 classes of the student, matched by name. Any of the 5 may be" in caplog.text
    told = capsys.readouterr().out
    files = sorted(Path("part/test").rglob("*.png"))
    right = accuracy(files, ema=False)
    assert told.startswith(f"Test on {len(files)} images: accuracy {right:.2%}, ")
    assert f"accuracy (EMA) {accuracy(files, ema=True):.2%}, " in told
    assert right > 0.5
    main(command("predict", "part"))
    with Path("run/predictions.csv").open() as stream:
        found = [row["class"] == row["path"].split("/")[1] for row in csv.DictReader(stream)]
    assert np.mean(found) == pytest.approx(right)


@pytest.mark.parametrize(
    "weights",
    [
        "--ckpt_path=run/checkpoints/last.ckpt",
        pytest.param("--model.student.init_args.checkpoint=run/student", marks=pytest.mark.slow),
    ],
)
def test_a_class_that_the_student_does_not_know_is_named(weights: str, trained: None, capsys) -> None:
    images("other", {"val": 1}, {"zero": 0, "corn": 1, "egg": 4, "date": 3, "bean": 2})
    with pytest.raises(SystemExit) as end:
        main(command("validate", "other", weights, "--trainer.default_root_dir=scores"))
    assert end.value.code == 2
    message = (
        "trained on other classes than those of the data: 'zero'. It knows 'apple', 'bean', 'corn', 'date' and 1 more."
    )
    assert message in capsys.readouterr().err.splitlines()[-1]
