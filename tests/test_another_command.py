"""A run that goes on under another command: what may change is said and written down, what may not is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from kdvit.cli import main
from tests.runs import QUIET, column, demo_fit, fit

EPOCHS = [*QUIET, "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2"]
CONFIG = Path("run/config.yaml")


def refused(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_is_new_is_said_and_stands_on_top_of_the_config(caplog) -> None:
    fit("plain", "", *EPOCHS, "--trainer.max_epochs=1")
    new = [
        "--trainer.max_epochs=2",
        "--trainer.gradient_clip_val=0.5",
        "--ema.decay=0.9",
        "--data.init_args.batch_size=32",
    ]
    fit("plain", "", *EPOCHS, *new)
    said = [
        "data.init_args.batch_size is 32 and was 64",
        "ema.decay is 0.9 and was None",
        "trainer.gradient_clip_val is 0.5 and was None",
        "trainer.max_epochs is 2 and was 1",
    ]
    assert f"New since the last start: {'; '.join(said)}." in caplog.text
    fit("plain", "", *EPOCHS, *new, "--trainer.max_epochs=3")
    lines = CONFIG.read_text().splitlines()
    assert lines[:5] == [
        *(f"# from step 3: {each}" for each in said),
        "# from step 6: trainer.max_epochs is 3 and was 2",
    ]
    assert yaml.safe_load(CONFIG.read_text())["trainer"]["max_epochs"] == 3


def test_a_finished_run_stays_what_it_was(plain_run: str, caplog) -> None:
    before = CONFIG.read_text(), Path("run/checkpoints/last.ckpt").read_bytes()
    fit("plain", "", *EPOCHS, "--trainer.max_epochs=2", "--ema.decay=0.9", "--trainer.gradient_clip_val=1")
    assert (CONFIG.read_text(), Path("run/checkpoints/last.ckpt").read_bytes()) == before
    assert "has 2 epochs and 6 steps: nothing is left to train." in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--trainer.max_epochs=1",
            "'run' holds a run of 2 epochs and 6 steps, and max_epochs 1 asks for fewer. Raise it",
        ),
        (
            "--trainer.max_steps=4",
            "'run' holds a run of 2 epochs and 6 steps, and max_steps 4 asks for fewer. Raise it",
        ),
        ("--trainer.fast_dev_run=true", "'run' holds a run, which fast_dev_run would overwrite: choose another"),
    ],
)
def test_a_run_is_not_taken_back(option: str, message: str, plain_run: str, capsys) -> None:
    before = sorted((str(file), file.read_bytes()) for file in Path("run").rglob("*") if file.is_file())
    assert message in refused(capsys, demo_fit("plain", "", *EPOCHS, "--trainer.max_epochs=2", option))
    assert sorted((str(file), file.read_bytes()) for file in Path("run").rglob("*") if file.is_file()) == before


def test_a_student_without_a_best_checkpoint_is_scored_by_its_last_and_an_untrained_one_not_at_all(
    plain_run: str, capsys, caplog
) -> None:
    Path("run/checkpoints/best.ckpt").unlink()
    main(["validate", *demo_fit("plain", "", *QUIET)[1:]])
    assert "The student is that of run/checkpoints/last.ckpt." in caplog.text
    Path("run/checkpoints/last.ckpt").unlink()
    for command in ("validate", "test", "predict"):
        message = refused(capsys, [command, *demo_fit("plain", "", *QUIET)[1:]])
        assert "There is no checkpoint in 'run/checkpoints', and an untrained student has no score." in message


def test_a_seed_that_is_drawn_is_written_down_and_kept(monkeypatch, capsys) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")  # of an earlier process
    monkeypatch.delenv("PL_GLOBAL_SEED")
    for epochs in (1, 2):
        fit("plain", "", *EPOCHS, f"--trainer.max_epochs={epochs}", "--seed_everything", "false")
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        if epochs == 1:
            drawn = yaml.safe_load(CONFIG.read_text())["seed_everything"]
    assert isinstance(drawn, int)
    assert yaml.safe_load(CONFIG.read_text())["seed_everything"] == drawn
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    monkeypatch.setenv("WORLD_SIZE", "2")
    other = ["--trainer.default_root_dir=other", "--seed_everything=false"]
    assert "seed_everything: give a number, for each of these processes would draw another one." in refused(
        capsys, demo_fit("plain", "", *EPOCHS, *other)
    )


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_of_another_student_is_named(command: str, plain_run: str, capsys) -> None:
    more = ["--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.default_root_dir", "other"]
    wide = ["--model.student.init_args.model_args.embed_dim=32"]
    message = refused(capsys, [command, *demo_fit("plain", "", *QUIET)[1:], *more, *wide])
    assert "'run/checkpoints/last.ckpt' holds another student than the config builds: " in message
    assert "student.model_args.embed_dim is 32 in the config and 16 there" in message


def test_a_student_of_other_classes_has_no_score(plain_run: str, capsys) -> None:
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    names = checkpoint["kdvit"]["class_names"]
    checkpoint["kdvit"]["class_names"] = ["zero", *names[1:]]
    torch.save(checkpoint, "run/checkpoints/best.ckpt")
    message = refused(capsys, ["validate", *demo_fit("plain", "", *QUIET)[1:]])
    assert "The student was trained on other classes than those of the data: '0'. It knows 'zero', '1', " in message


def test_a_run_is_not_overwritten_by_one_that_goes_on_from_elsewhere(plain_run: str, capsys, caplog) -> None:
    shutil.copytree("run", "other")
    more = ["--trainer.max_epochs=3", "--ckpt_path=other/checkpoints/last.ckpt"]
    message = refused(capsys, demo_fit("plain", "", *EPOCHS, *more))
    assert "'run' holds a run, which one that goes on from 'other/checkpoints/last.ckpt' would overwrite" in message
    third = ["--trainer.default_root_dir=third", "--ckpt_path=other/checkpoints/last.ckpt", "--trainer.max_epochs=2"]
    fit("plain", "", *EPOCHS, *third)
    assert "other/checkpoints/last.ckpt has 2 epochs and 6 steps: nothing is left to train." in caplog.text
    assert not Path("third").exists()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_folder_that_cannot_be_written_is_named(plain_run: str, capsys) -> None:
    Path("file").touch()
    predict = ["--ckpt_path=run/checkpoints/last.ckpt", "--trainer.default_root_dir=file/x"]
    for args in (["predict", *demo_fit("plain", "", *QUIET, *predict)[1:]], ["compare", "run", "--out", "file/x"]):
        message = refused(capsys, args)
        assert message.startswith("kdvit: error: ")
        assert "Not a directory: " in message


def test_weights_of_other_programs_are_no_checkpoint(capsys) -> None:
    torch.save({"model": {}}, "weights.pth")
    message = refused(capsys, ["validate", *demo_fit("plain", "", *QUIET)[1:], "--ckpt_path=weights.pth"])
    assert "'weights.pth' is no checkpoint of `kdvit fit`. Weights of other programs go into" in message


@pytest.mark.slow
def test_a_student_with_a_remedy_is_scored_by_the_weights_that_it_starts_from(demo_teacher: str, capsys) -> None:
    fit("lift", demo_teacher, *EPOCHS, "--trainer.max_epochs=1")
    (logged,) = (each for each in column("run", ("val/acc1",)) if "nan" not in each)
    for begun in ("run/student", "run/checkpoints/last.ckpt"):
        given = ["--trainer.default_root_dir=none", f"--model.student.init_args.checkpoint={begun}"]
        capsys.readouterr()
        main(["validate", *demo_fit("lift", demo_teacher, *EPOCHS, *given)[1:]])
        assert f" images: accuracy {float(logged.strip('(,)')):.2%}, " in capsys.readouterr().out
    more = [*EPOCHS, *given, "--model.student.init_args.num_classes=5"]  # a new head
    message = refused(capsys, ["validate", *demo_fit("lift", demo_teacher, *more)[1:]])
    assert "There is no checkpoint in 'none/checkpoints', and an untrained student has no score." in message
