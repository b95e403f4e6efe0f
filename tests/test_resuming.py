"""Files of a run that a kill or a bad disk has damaged: the same command goes on, or says in one line what to do."""

from __future__ import annotations

import errno
import functools
import os
import struct
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from kdvit.cli import main
from kdvit.runtime.loggers import read_table
from kdvit.runtime.saved import newest_checkpoint
from tests.runs import SHORT, column, fit

LONGER = [*SHORT, "--trainer.max_epochs", "3"]
CHECKPOINTS = Path("run/checkpoints")


def refused(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit("plain", "", *more)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def damage(file: Path, part: str, seed: int) -> None:
    """Changes up to eight bytes, drawn at random, of a part of a checkpoint."""
    with zipfile.ZipFile(file) as archive:
        info = next(each for each in archive.infolist() if each.filename.endswith(part))
    content, draw = bytearray(file.read_bytes()), np.random.default_rng(seed)
    names = struct.unpack_from("<2H", content, info.header_offset + 26)
    for place in info.header_offset + 30 + sum(names) + draw.integers(info.file_size, size=8):
        content[place] = int(draw.integers(256))
    file.write_bytes(content)


def test_a_checkpoint_with_other_numbers_inside_is_passed_over_and_refused_where_it_is_named(
    plain_run: str, caplog, capsys
) -> None:
    last = CHECKPOINTS / "last.ckpt"
    damage(last, "/data/2", 0)
    torch.load(last, weights_only=True)  # torch itself sees nothing
    told = "last.ckpt is no whole checkpoint (its part archive/data/2 is damaged)."
    assert told in refused(capsys, *LONGER, "--ckpt_path", "last")
    fit("plain", "", *LONGER)
    assert f"{told} It is skipped." in caplog.text
    assert "Going on from run/checkpoints/best.ckpt, step" in caplog.text
    assert newest_checkpoint(CHECKPOINTS) == last


def test_training_does_not_go_on_from_weights_alone(capsys) -> None:
    torch.save({"state_dict": {}}, "weights.ckpt")
    message = refused(capsys, *SHORT, "--ckpt_path", "weights.ckpt")
    assert message.endswith("weights.ckpt is no whole checkpoint (it has no global_step, loops, optimizer_states).")
    assert not Path("run").exists()


def test_checkpoints_of_which_none_is_whole_are_not_overwritten(plain_run: str, capsys) -> None:
    for file in CHECKPOINTS.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    before = [file.read_bytes() for file in CHECKPOINTS.iterdir()]
    assert (
        "Training can go on from none of the checkpoints in 'run/checkpoints' (the lines above say why), and a run"
        in refused(capsys, *LONGER)
    )
    assert [file.read_bytes() for file in CHECKPOINTS.iterdir()] == before


@pytest.mark.slow
def test_no_damage_ends_the_search_for_a_whole_checkpoint(plain_run: str) -> None:
    last = CHECKPOINTS / "last.ckpt"
    content = last.read_bytes()
    for seed in range(200):
        damage(last, "data.pkl", seed)
        assert newest_checkpoint(CHECKPOINTS) == CHECKPOINTS / "best.ckpt"
        last.write_bytes(content)
    assert newest_checkpoint(CHECKPOINTS) == last


def change_config(change: Callable[[dict[str, Any]], object]) -> None:
    """Changes ``run/config.yaml``, as another version of kdvit might have written it."""
    file = Path("run/config.yaml")
    config = yaml.safe_load(file.read_text())
    change(config)
    file.write_text(yaml.safe_dump(config))


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_newer_options(capsys) -> None:
    def age(config: dict[str, Any]) -> None:
        del config["model"]["compile"], config["model"]["schedule"]["warmup_lr"]
        del config["model"]["student"]["init_args"]["drop_path_rate"], config["data"]["init_args"]["cutmix"]

    plain = ["--model.schedule.warmup_lr", "1e-6"]  # the default
    fit("plain", "", *SHORT, *plain)
    change_config(age)
    for given, key in (
        (
            ["--model.student.init_args.drop_path_rate", "0.1"],
            "model.student.init_args.drop_path_rate is 0.1 and was 0.0",
        ),
        (["--data.init_args.cutmix", "1"], "data.init_args.cutmix is 1.0 and was 0.0"),
        (["--model.student.init_args.model_args.depth", "3"], "model.student.init_args.model_args.depth is 3 and was "),
    ):
        assert f"'run' holds a run with other settings: {key}" in refused(capsys, *LONGER, *plain, *given)
    fit("plain", "", *LONGER, *plain, "--data.init_args.num_workers", "1")
    assert len([row for row in column("run", ("step", "val/acc1")) if "nan" not in row]) == 3


def test_an_option_that_is_no_more_is_named(plain_run: str, capsys) -> None:
    written = Path("run/config.yaml").read_text()
    for place in ("model", "model/optimizer", "data/init_args", "model/student/init_args"):
        config = yaml.safe_load(written)
        functools.reduce(dict.__getitem__, place.split("/"), config)["bygone"] = 3
        Path("run/config.yaml").write_text(yaml.safe_dump(config))
        message = refused(capsys, *LONGER)
        assert message.startswith("kdvit: error: 'run/config.yaml' has what this version of kdvit does not take: ")
        assert "bygone'" in message
        assert "Go on with the version that its line `# kdvit==` names" in message


def test_a_torn_config_is_named(plain_run: str, capsys) -> None:
    for torn in ("", "model: [", "- 1", "# kdvit==0.1.0\n"):
        Path("run/config.yaml").write_text(torn)
        for more in ([], ["--seed_everything", "true"]):
            assert "'run/config.yaml' is no whole config. Restore it, or remove it" in refused(capsys, *LONGER, *more)
        with pytest.raises(SystemExit):
            main(["compare", "run"])
        assert "'run/config.yaml' is no whole config." in capsys.readouterr().err


def test_a_config_is_written_whole_or_not_at_all(plain_run: str, capsys, monkeypatch) -> None:
    before = Path("run/config.yaml").read_text()
    assert before.startswith("# kdvit==")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert "cannot write 'run/config.yaml': No space left on device." in refused(capsys, *LONGER)
    assert Path("run/config.yaml").read_text() == before
    assert not list(Path("run").glob("*.tmp"))


def test_a_config_is_in_the_run_wherever_the_logs_are() -> None:
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: run, name: logs}}"
    fit("plain", "", *SHORT, "--trainer.logger", logger)
    assert Path("run/config.yaml").is_file()
    assert not list(Path("run/logs").rglob("config.yaml"))
    fit("plain", "", *LONGER, "--trainer.logger", logger)
    steps = [float(row["step"]) for row in read_table(Path("run/metrics.csv")) if "val/acc1" in row]
    assert steps == [2, 5, 8]


class WandbLogger(Logger):
    """W&B's, as far as it tells its runs apart: by an id of its own, unless the environment has one."""

    name = "wandb"

    @functools.cached_property
    def version(self) -> str:
        return os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Logs nothing."""

    log_hyperparams = log_metrics


def test_a_run_of_wandb_goes_on_and_another_run_has_its_own() -> None:
    logger = ["--trainer.logger", "tests.test_resuming.WandbLogger"]

    def ids(root: str) -> list[str]:
        return [line for line in Path(root, "config.yaml").read_text().splitlines() if line.startswith("# W&B run ")]

    fit("plain", "", *SHORT, *logger)
    (first,) = ids("run")
    fit("plain", "", *LONGER, *logger)
    assert ids("run") == [first]
    assert "WANDB_RUN_ID" not in os.environ
    main(["fit", "--config", "run/config.yaml", "--trainer.default_root_dir", "other"])
    assert ids("other") != [first]


def test_settings_and_best_score_reach_the_logs(plain_run: str) -> None:
    assert yaml.safe_load(Path("run/hparams.yaml").read_text())["model"]["optimizer"]["lr"] == 4e-3
    events = EventAccumulator("run").Reload()
    content = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert content.session_start_info.hparams["model/optimizer/lr"].number_value == 4e-3
    (best,) = events.Scalars("best/val/acc1")
    assert best.value == pytest.approx(max(row.value for row in events.Scalars("1_val/acc1")))


def test_a_torn_table_loses_the_torn_rows_alone(plain_run: str) -> None:
    scores = ("step", "train/loss", "val/acc1")
    table = Path("run/metrics.csv")
    before = column("run", scores)
    lines = table.read_text().splitlines(keepends=True)
    table.write_text(
        "".join([*lines[:3], lines[3][:9], *lines[4:], "2,2", lines[1], "\x00\x00\n", "x" + lines[2], "1,5"])
    )
    fit("plain", "", *LONGER, "--trainer.log_every_n_steps=1")
    assert (
        column("run", scores)[: len(before) - 2] == before[:2] + before[4:]
    )  # the row behind is glued to the torn one
    assert len(column("run", scores)) > len(before)


def test_damaged_lines_of_a_table_lose_no_others(plain_run: str) -> None:
    table, scores = Path("run/metrics.csv"), ("step", "train/loss", "val/acc1")
    before = column("run", scores)
    lines = table.read_text().splitlines(keepends=True)
    for place, torn in enumerate(("\0" * 140_000, '"', '2,"', '"2"3'), start=1):
        lines.insert(2 * place, torn + "\n")
    table.write_text("".join(lines))
    fit("plain", "", *LONGER, "--trainer.log_every_n_steps=1")
    assert column("run", scores)[: len(before)] == before


def test_a_validation_that_is_held_again_has_one_row() -> None:
    often = ["--last_checkpoint.every_n_train_steps", "3"]  # at an epoch's end, before its validation
    fit("plain", "", *SHORT, *often)
    fit("plain", "", *LONGER, *often, "--ckpt_path", "last")
    steps = [row.split(",")[0] for row in column("run", ("step", "val/acc1")) if "nan" not in row]
    assert steps == ["(2.0", "(5.0", "(8.0"]


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("--last_checkpoint.every_n_train_steps=2", marks=pytest.mark.slow),
        "--last_checkpoint.train_time_interval=0:0:0",
    ],
)
def test_no_checkpoint_is_saved_amid_accumulated_batches(when: str, monkeypatch) -> None:
    saved = []

    def note(self: pl.Trainer, path: str, *args: object, **kwargs: object) -> None:
        saved.append(self.fit_loop.batch_idx)
        save(self, path, *args, **kwargs)

    save = pl.Trainer.save_checkpoint
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", note)
    fit("plain", "", *SHORT, when, "--trainer.accumulate_grad_batches=3", "--trainer.limit_train_batches=9")
    fit("plain", "", *LONGER, when, "--trainer.accumulate_grad_batches=3", "--trainer.limit_train_batches=9")
    assert {batch % 3 for batch in saved} == {2}
    assert len(saved) >= 6


class Foreign(pl.Callback):
    """A callback whose state looks a little like that of Lightning's checkpoints."""

    def state_dict(self) -> dict[str, str]:
        return {"dirpath": "somewhere"}


def test_states_of_other_callbacks_are_left_alone_in_a_run_that_was_moved() -> None:
    given = ["--trainer.callbacks", "tests.test_resuming.Foreign"]
    fit("plain", "", *SHORT, *given, "--trainer.default_root_dir", "before")
    Path("before").rename("run")
    fit("plain", "", *LONGER, *given)
    states = torch.load(CHECKPOINTS / "last.ckpt", weights_only=True)["callbacks"]
    assert states["Foreign"] == {"dirpath": "somewhere"}
