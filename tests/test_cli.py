"""The command line: every config, a whole run, and what a user's mistakes are answered with."""

from __future__ import annotations

import csv
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdvit import distillers, load_student
from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from kdvit.runtime.loggers import run_loggers
from tests.data.test_data_modules import fashion_root, image_folder
from tests.runs import QUIET, SHORT, demo_fit, fit

CONFIGS = packaged_configs()
IMAGENET = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
METHODS = ["plain", "soft_kd", "feature", "lift", "wide_last"]
OBJECTIVES = ["fixed_target", "vkd", "pooled", "standardized", "dkd", "dist", "distillation_token"]
OBJECTIVES += ["token_relations", "attention_transfer", "rkd", "vitkd"]


def test_there_are_the_configs_of_the_published_runs() -> None:
    remedies = {"lift", "wide_last", "lift_no_teacher", "wide_last_no_teacher", "uniform_wide"}
    terms = {"lift_mse", "lift_soft_kd", "lift_soft_kd_mse"}
    terms |= {"wide_last_mse", "wide_last_soft_kd", "wide_last_soft_kd_spectral"}
    assert set(IMAGENET) == remedies | terms | {"logit", "feature", "supervised"}
    more = {"demo": OBJECTIVES, "fashion_mnist": [], "replication": ["uniform_wide"]}
    for folder, others in more.items():
        assert {file.stem for file in (CONFIGS / folder).glob("*.yaml")} == {"teacher", *METHODS, *others}


def test_there_is_a_demo_of_every_objective() -> None:
    configs = [yaml.safe_load(file.read_text())["model"] for file in (CONFIGS / "demo").glob("*.yaml")]
    shown = {each["class_path"] for config in configs for each in config.get("distillers", {}).values()}
    assert shown == {name for name in distillers.__all__ if name.endswith("Distiller")} - {"Distiller"}


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: str(file.relative_to(CONFIGS)))
def test_the_first_line_of_every_config_is_its_command(file: Path) -> None:
    first = file.read_text().splitlines()[0]
    assert first.startswith(f"# kdvit fit --config configs/{file.relative_to(CONFIGS)}")


@pytest.mark.parametrize("name", ["supervised", "logit", "feature", "lift", "wide_last", "uniform_wide"])
def test_an_imagenet_config_goes_through_a_step_on_tiny_stand_ins(name: str, capsys) -> None:
    image_folder(Path("imagenet"))
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    stand_ins = {"data.init_args": {"root": "imagenet", "batch_size": 4, "num_workers": 0, "img_size": 32}}
    model_args = {**config["model"]["student"]["init_args"].get("model_args", {}), "depth": 2}
    stand_ins["model.student.init_args"] = {"img_size": 32, "num_classes": 2, "model_args": model_args}
    if "teacher" in config["model"]:
        teacher = {"depth": 2, "num_classes": 2}
        stand_ins["model.teacher.init_args"] = {"pretrained": False, "img_size": 32, "model_args": teacher}
    given = [f"--{key}.{name}={_plain(value)}" for key, values in stand_ins.items() for name, value in values.items()]
    main(["check", "--config", f"configs/{name}.yaml", *given])
    shown = capsys.readouterr().out
    assert " 16 = 4 images x 4 processes x 1" in shown
    assert "A training and a validation batch of at most 4 images went through" in shown


def _text(events: EventAccumulator, name: str) -> str:
    (event,) = events.Tensors(f"{name}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def _plain(value) -> str:
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)


def test_the_teacher_of_fashion_mnist_trains_and_a_config_with_it_goes_through_a_step(capsys) -> None:
    root = ["--data.init_args.root", str(fashion_root(Path("fashion")))]
    main(["fit", "--config", "fashion_mnist/teacher.yaml", *root, "--data.init_args.batch_size", "10", *SHORT])
    assert Path("runs/fashion_mnist/teacher/student").is_dir()
    main(["check", "--config", "fashion_mnist/lift.yaml", *root])
    assert "went through" in capsys.readouterr().out


@pytest.mark.parametrize("method", OBJECTIVES)  # METHODS train in the tests below
def test_every_demo_of_an_objective_trains(method: str, demo_teacher: str) -> None:
    fit(method, demo_teacher, *SHORT)
    assert load_student("run/student")(torch.randn(2, 3, 8, 8)).logits.shape == (2, 10)


def test_a_run_leaves_what_it_promises_and_reads_back_its_numbers(demo_teacher: str, capsys, caplog) -> None:
    fit("lift", demo_teacher, *QUIET, "--trainer.max_epochs=2", "--ema.decay=0.9", "--trainer.log_every_n_steps=5")
    run = Path("run")
    assert {"config.yaml", "metrics.csv", "checkpoints", "student"} <= {file.name for file in run.iterdir()}
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    events = EventAccumulator(str(run)).Reload()
    pair = {f"train/lift_{name}" for name in ("cosine", "explained_variance", "r2", "r2_median")}
    terms = {f"train/{term}{suffix}" for term in ("task", "logit", "lift") for suffix in ("", "_weighted")}
    others = {"train/lr", "train/grad_norm", "train/images_per_second", "train/loss", "train/acc1", "teacher/acc1"}
    scores = {f"val/{name}{suffix}" for name in ("acc1", "acc5", "loss") for suffix in ("", "_ema")}
    with (run / "metrics.csv").open() as stream:
        assert pair | terms | others | scores <= set(next(csv.reader(stream)))
    scalars = sorted(events.Tags()["scalars"])  # as TensorBoard shows them
    groups = dict.fromkeys(name.split("/")[0] for name in scalars)
    assert list(groups) == ["1_val", "2_train", "3_weighted", "4_data", "best"]
    assert {name for name in scalars if name.startswith("3_")} == {
        f"3_weighted/{name}_weighted" for name in ("task", "logit", "lift")
    }
    assert {f"2_{name}" for name in pair | {"train/task", "train/logit", "train/lift"}} <= set(scalars)
    assert not [name for name in scalars if "teacher" in name]
    told = _text(events, "teacher")
    assert told.startswith("Teacher on 500 validation images: ")
    assert 0 < float(_text(events, "teacher/acc5")) <= 1
    capsys.readouterr()
    main(["check", *demo_fit("lift", demo_teacher, *QUIET, "--trainer.max_epochs=2")[1:]])
    plan = _text(events, "plan").splitlines()
    assert len(plan) > 10
    assert {line.strip() for line in plan} < {line.strip() for line in capsys.readouterr().out.splitlines()}
    (picture,) = events.Images("4_data/first_batch")
    assert picture.width > 600

    with (run / "metrics.csv").open() as stream:
        table = [row for row in csv.DictReader(stream) if row["val/acc1"]]
    best = max(float(row["val/acc1"]) for row in table)
    for command, key in (("validate", "Validation"), ("test", "Test")):
        caplog.clear()
        capsys.readouterr()
        main([command, "--config", "run/config.yaml", "--ckpt_path", "best", *QUIET])
        assert capsys.readouterr().out.startswith(f"{key} on 500 images: accuracy {best:.2%}, top-5 accuracy ")
        assert [each for each in caplog.messages if "best.ckpt" in each] == [
            "The student is that of run/checkpoints/best.ckpt."
        ]

    main(["predict", "--config", "run/config.yaml", "--ckpt_path", "best", *QUIET])
    with (run / "predictions.csv").open() as stream:
        predictions = list(csv.DictReader(stream))
    assert len(predictions) == 500
    assert list(predictions[0]) == ["path", "label", "class", "probability"]
    from sklearn.datasets import load_digits

    targets = load_digits(return_X_y=True)[1]
    right = [int(row["class"]) == targets[int(row["path"].removeprefix("digits/"))] for row in predictions]
    assert sum(right) / 500 == pytest.approx(best, abs=1e-6)
    assert [row["label"] for row in predictions[:50]] == [
        str(targets[int(row["path"].removeprefix("digits/"))]) for row in predictions[:50]
    ]


def test_no_file_of_a_run_holds_a_weight_of_the_teacher(demo_teacher: str) -> None:
    fit("lift", demo_teacher, *SHORT, "--ema.decay", "0.9")
    teacher = load_file(Path(demo_teacher.removeprefix("local-dir:")) / "model.safetensors").values()
    secret = [weight.numpy().tobytes() for weight in teacher if weight.numel() > 100]
    files = [file for file in Path("run").rglob("*") if file.is_file()]
    assert {"best.ckpt", "last.ckpt", "model.safetensors", "metrics.csv"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        assert not [weight for weight in secret if weight in content], file


def test_a_finished_run_is_compared_with_others(plain_run: str, capsys) -> None:
    with Path("run/metrics.csv").open("a") as stream:
        stream.write('2,"\n\0\0\n2,2')  # a last kill has torn it
    main(["compare", "run", "run", "--out", "side_by_side"])
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith("run ")]
    assert [row[0] for row in rows[1:]] == ["run"] * 2
    assert all("13,818" in row for row in rows[1:])
    assert Path("side_by_side/curves.png").stat().st_size > 10_000
    numbers = json.loads(Path("side_by_side/comparison.json").read_text())
    assert [len(run["curves"]["val/acc1"]) for run in numbers] == [2, 2]
    assert [run["notes"] for run in numbers] == [[], []]


def test_what_a_run_lacks_is_blank_in_a_comparison_and_the_note_says_why(plain_run: str, capsys) -> None:
    main(["export", "--ckpt", "run/checkpoints/last.ckpt", "--out", "exported"])
    for name in ("again", "unbuildable", "unfinished"):
        shutil.copytree("run", name)
    main(["export", "--ckpt", "run/checkpoints/last.ckpt", "--out", "again/student"])
    config = Path("unbuildable/student/config.json")
    config.write_text(config.read_text().replace('"class": "TimmStudent"', '"class": "Elsewhere"'))
    shutil.rmtree("unfinished/student")
    Path("table/student").mkdir(parents=True)
    Path("table/metrics.csv").write_text("epoch,train/loss\n0,1\n")
    capsys.readouterr()
    main(["compare", "run", "again", "exported", "unbuildable", "unfinished", "table", "--out", "compared"])
    head, *lines = capsys.readouterr().out.splitlines()
    names = ["run", "best (%)", "after epochs", "last (%)", "parameters", "latency (ms)", "seconds"]
    assert re.split("  +", head) == names
    ends = [len("unbuildable"), *(head.index(name) + len(name) for name in names[1:])]
    cells = [[bool(line[a:b].strip()) for a, b in pairwise(ends)] for line in lines[:6]]
    shown = {line.split()[0]: row for line, row in zip(lines[:6], cells, strict=True)}
    assert shown == {
        "run": [True] * 6,
        "again": [True, True, True, True, True, False],
        "exported": [False, False, True, True, True, False],
        "unbuildable": [True, True, True, False, False, False],
        "unfinished": [True, True, True, False, False, False],
        "table": [False] * 6,
    }
    notes = lines[7:]
    assert "again: no seconds, as its student was not written by the training itself." in notes
    for name in ("exported", "table"):
        assert f"{name}: no curve, as no metrics.csv of it has val/acc1 or val/loss." in notes
    (note,) = (line for line in notes if line.startswith("unbuildable: "))
    assert (
        "no parameters, latency and seconds: The student in 'unbuildable/student' is of the class 'Elsewhere', and "
        in note
    )
    assert any(
        line.startswith("unfinished: no parameters, latency and seconds: There is no exported") for line in notes
    )


def test_a_run_is_not_gone_on_with_under_other_settings(plain_run: str, capsys) -> None:
    before = Path("run/config.yaml").read_text()
    with pytest.raises(SystemExit):
        fit("plain", "", *SHORT, "--model.optimizer.lr", "0.9")
    message = capsys.readouterr().err.splitlines()[-1]
    assert "'run' holds a run with other settings: model.optimizer.lr is 0.9 and was 0.004" in message
    assert Path("run/config.yaml").read_text() == before
    fit("plain", "", *SHORT, "--trainer.max_epochs", "3", "--data.init_args.num_workers", "1")
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


def test_the_config_of_a_resumed_run_starts_a_new_one_elsewhere(plain_run: str) -> None:
    fit("plain", "", *SHORT, "--trainer.max_epochs", "3")
    assert yaml.safe_load(Path("run/config.yaml").read_text())["ckpt_path"] is None
    main(["fit", "--config", "run/config.yaml", "--trainer.default_root_dir", "other"])
    one, other = (load_student(f"{root}/student").state_dict() for root in ("run", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_validate_takes_the_best_checkpoint_unless_told_otherwise(plain_run: str, capsys) -> None:
    with Path("run/metrics.csv").open() as stream:
        best = max(float(row["val/acc1"]) for row in csv.DictReader(stream) if row["val/acc1"])
    main(["validate", "--config", "run/config.yaml"])
    assert f"images: accuracy {best:.2%}, " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_other_ranks_of_a_resumed_run_leave_its_table_alone(plain_run: str, monkeypatch) -> None:
    before = Path("run/metrics.csv").read_text()
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1, raising=False)
    run_loggers("run", "run/checkpoints/last.ckpt")
    assert Path("run/metrics.csv").read_text() == before
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 0, raising=False)
    run_loggers("run", "run/checkpoints/last.ckpt")
    assert len(Path("run/metrics.csv").read_text().splitlines()) == len(before.splitlines())


def test_nothing_is_logged_where_nothing_is_asked_for(demo_teacher: str) -> None:
    fit("lift", demo_teacher, *SHORT, "--trainer.log_every_n_steps", "0")


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.filterwarnings("ignore:You passed `Trainer:UserWarning")
def test_mixed_precision_trains_weights_in_float32(precision: str, demo_teacher: str) -> None:
    fit("wide_last", demo_teacher, *SHORT, "--trainer.precision", precision)
    weights = load_student("run/student").state_dict().values()
    assert all(weight.dtype == torch.float32 and torch.isfinite(weight).all() for weight in weights)


@pytest.mark.filterwarnings("ignore:You passed `Trainer:UserWarning")
def test_distillers_stay_in_float32_where_the_networks_do_not(demo_teacher: str) -> None:
    bf16 = ["--trainer.precision", "bf16-true", "--model.distillers.feature.init_args.projector", "phi_s"]
    fit("feature", demo_teacher, *SHORT, *bf16)
    weights = torch.load("run/checkpoints/last.ckpt")["state_dict"]
    kinds = {name.partition(".")[0]: weight.dtype for name, weight in weights.items() if weight.is_floating_point()}
    assert kinds == {"student": torch.bfloat16, "distillers": torch.float32}


def test_one_value_in_a_distiller_is_changed_from_the_command_line(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "lift.yaml", "--model.distillers.lift.weight", "2", "--print_config"])
    assert end.value.code in (None, 0)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["distillers"]["lift"]["init_args"]["weight"] == 2.0
    assert printed["model"]["distillers"]["logit"]["init_args"]["weight"] == 0.9


def test_all_commands_are_listed_and_a_mistyped_one_is_named(capsys) -> None:
    main(["--help"])
    shown = capsys.readouterr().out
    names = {line.split()[0] for line in shown.splitlines() if line.startswith("  ")}
    ours = {
        "analyze",
        "benchmark",
        "cache",
        "check",
        "compare",
        "completion",
        "distillers",
        "export",
        "import",
        "init",
        "probe",
    }
    assert names == ours | {"fit", "validate", "test", "predict", "slurm"}
    with pytest.raises(SystemExit):
        main(["analize"])
    message = capsys.readouterr().err
    assert "there is no command 'analize'. Did you mean analyze? Commands: check, fit" in message


def test_callbacks_that_kdvit_adds_are_shown_and_can_be_switched_off(capsys) -> None:
    off = ["--callbacks.student_export", "null", "--callbacks.throughput", "null", "--callbacks.first_batch", "null"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "demo/plain.yaml", *off, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["callbacks"]
    assert {name for name, each in shown.items() if each is None} == {"student_export", "throughput", "first_batch"}
    assert shown["teacher_scores"]["class_path"].endswith("TeacherScores")
    names = {"bad_images", "throughput", "teacher_scores", "student_export", "predictions", "preemption", "first_batch"}
    assert set(shown) == names
    main(["fit", "--config", "demo/plain.yaml", "--trainer.default_root_dir", "run", *SHORT, *off])
    assert not Path("run/student").exists()
    assert "images_per_second" not in Path("run/metrics.csv").read_text()
    assert EventAccumulator("run").Reload().Tags()["images"] == []


def test_distillers_are_listed(capsys) -> None:
    main(["distillers"])
    assert re.search("LiftDistiller +Lift: the lifted map of a LiftViT", capsys.readouterr().out)


def test_a_check_leaves_nothing_behind(capsys) -> None:
    main(["check", "--config", "demo/plain.yaml"])
    assert re.search(r"steps an epoch +20\n", capsys.readouterr().out)
    assert list(Path().iterdir()) == []


def test_a_check_tells_how_many_workers_a_rate_needs(monkeypatch, capsys) -> None:
    clock = iter([0.0, 0.16])
    monkeypatch.setattr("kdvit.cli.commands.check.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    workers = ["--data.init_args.num_workers", "12", "--images_per_second", "2500"]
    main(["check", "--config", "demo/plain.yaml", *workers])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("loading"))
    assert "200 training images/s a worker, on this machine; 12 workers a process feed at most 2,400" in line
    assert line.endswith("2,500 a process need 13 workers")


def test_a_network_of_ones_own_is_student_or_teacher_by_its_class_path(capsys) -> None:
    own = "tests.models.test_checkpoint.MyNet"
    images = ["--data", "tests.tiny.TinyData", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", *QUIET]
    supervised = ["--model.student", own, "--trainer.default_root_dir", "teacher"]
    main(["fit", *images, *supervised])
    assert load_student("teacher/student")(torch.randn(1, 3, 16, 16)).logits.shape == (1, 5)
    pair = json.dumps({"map": {"class_path": "FeatureDistiller", "init_args": {"projector": "linear"}}})
    main(["fit", *images, "--model.student", own, "--model.teacher", own, "--model.distillers", pair])
    assert "train/map" in Path("runs/default/metrics.csv").read_text()
