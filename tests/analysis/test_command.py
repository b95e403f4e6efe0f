"""`kdvit analyze`, by the command line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from kdvit.analysis import measure
from kdvit.analysis.published import PUBLISHED, published
from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from kdvit.cli.images import Images, choose
from kdvit.cli.lookup import find_networks
from kdvit.models import TimmStudent, TimmTeacher, export_student, load_student
from kdvit.models.checkpoint import student_spec
from tests.runs import SHORT, fit
from tests.tiny import FORMAT, WIDE, student, teacher

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few:UserWarning")
QUICK = ["--images", "12", "--permutations", "2", "--num_workers", "0", "--out", "out"]


DRAWN = (
    "test_a_model_and_a_folder_become_a_table_and_files",
    "test_a_config_gives_its_pair_its_data_and_its_trained_student",
)


@pytest.fixture(autouse=True)
def _few_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws figures in two tests alone: they take most of the time of a small analysis."""
    if request.node.name not in DRAWN:
        monkeypatch.setattr(importlib.import_module("kdvit.analysis.save"), "figures", lambda _: {})


def _report() -> dict:
    return json.loads(Path("out/report.json").read_text())


@pytest.fixture
def folder() -> str:
    """Images in the layout of ImageNet: 5 classes of 3."""
    for split in ("train", "val"):
        for i, name in enumerate("abcde"):
            home = Path("images", split, name)
            home.mkdir(parents=True)
            for j in range(3):
                pixels = np.random.default_rng(10 * i + j).integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(home / f"{j}.png")
    return "images"


def _exported(name: str, network: object) -> str:
    export_student(network, student_spec(network, FORMAT), name)
    return name


def test_a_model_and_a_folder_become_a_table_and_files(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["analyze", "--model", _exported("student", student("lift")), "--data", folder, "--layers", "all", *QUICK])
    shown = capsys.readouterr().out
    assert "SVD rank p99 at 80/90/95/99 %" in shown
    assert "To read: out/report.html. Numbers: out/report.json." in shown
    report = _report()
    assert report["networks"][0]["images"] == 12
    assert report["networks"][0]["data"] == str(Path(folder).absolute())
    assert [layer["layer"] for layer in report["networks"][0]["layers"]] == ["0", "1", "2", "lift"]
    assert report["advice"] is None


@pytest.mark.slow
def test_several_models_by_timm_name_each_get_the_images_in_their_own_format() -> None:
    models = ["--model", "cait_xxs24_224", "resnet18", "--pretrained", "false"]
    main(["analyze", *models, "--data", "Digits", *QUICK, "--images", "2", "--energies", "0.99", "0.5"])
    report = _report()
    assert [network["name"] for network in report["networks"]] == ["cait_xxs24_224", "resnet18"]
    assert [network["layers"][0]["tokens"] for network in report["networks"]] == [196, 49]
    assert list(report["networks"][0]["layers"][0]["svd_rank"]) == ["0.5", "0.99"]


def test_the_papers_figures_stand_beside_the_models_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pretrained", "false", "--data", "Digits", *QUICK, "--images", "2", "--against", "published"]
    main(["analyze", "--model", "vit_tiny_patch16_224", *options])
    row = "| ViT-Tiny (21k) (paper) | last | N x 192 | 1 / 2 / 7 / 52 | 1 / 17 / 71 / 154 |"
    assert row in Path("out/tables.md").read_text().splitlines()
    assert "--against" not in capsys.readouterr().out
    main(["analyze", "--model", _exported("student", student()), *options])
    said = capsys.readouterr().out
    assert "--against published: the paper's figures are of vit_tiny_patch16_224.augreg_in21k_ft_in1k, cait_" in said


def test_the_papers_fourteen_models_are_timms_and_their_figures_rise_with_the_energy() -> None:
    assert len(PUBLISHED) == len({theirs.name for theirs in PUBLISHED.values()}) == 14
    for arch, theirs in PUBLISHED.items():
        assert arch in timm.list_pretrained(arch)
        assert sorted(theirs.svd) == list(theirs.svd)
        assert sorted(theirs.pca) == list(theirs.pca)
        assert all(one <= shared <= theirs.width for one, shared in zip(theirs.svd, theirs.pca, strict=True))
    assert published("swin_small_patch4_window7_224") is None  # timm's default weights are not the paper's


def test_networks_are_measured_at_another_input_size(folder: str) -> None:
    pair = ["--teacher", "deit_small_patch16_224", "--student", "deit_tiny_patch16_224", "--pretrained", "false"]
    main(["analyze", *pair, "--data", folder, "--img_size", "64", *QUICK, "--images", "2"])
    networks = _report()["networks"]
    assert [network["layers"][0]["tokens"] for network in networks] == [16, 16]
    assert [network["image_format"]["size"] for network in networks] == [[64, 64], [64, 64]]
    config = yaml.safe_load(Path("out/advised.yaml").read_text())
    assert [config["model"][role]["init_args"]["img_size"] for role in ("teacher", "student")] == [64, 64]
    assert config["data"]["init_args"]["img_size"] == 64
    features = TimmTeacher("deit_small_patch16_224", pretrained=False, img_size=64).output_shapes((-1,)).features
    assert features == ((384, 4, 4),)


def test_outliers_are_said_first(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.random.default_rng(0).standard_normal((12, 9, 30))
    np.save("plain.npy", tokens)
    np.save("offset.npy", tokens + 10)
    main(["analyze", "--model", "plain.npy", *QUICK])
    assert "No layer has outliers" in capsys.readouterr().out
    main(["analyze", "--model", "offset.npy", *QUICK])
    said = capsys.readouterr().out
    outliers = "Outliers in offset, layer offset: a constant offset holds 99."
    assert said.index(outliers) < said.index("SVD rank p99")
    layer = _report()["networks"][0]["layers"][0]
    assert layer["outliers"]["offset"] == pytest.approx(0.99, abs=0.005)
    raw, centred = (layer["variants"][name] for name in ("raw", "centred"))
    assert (raw["svd_rank"]["0.95"]["p99"], raw["spread"]["turned"]) == (1, False)
    assert centred["svd_rank"]["0.95"]["p99"] == pytest.approx(
        measure(torch.from_numpy(tokens)).ranks.spread().rank.value, abs=1
    )
    assert outliers in Path("out/report.html").read_text()


def test_features_that_others_saved_are_analysed_without_images() -> None:
    tokens = np.random.default_rng(0).standard_normal((12, 9, 6)).astype(np.float16)
    np.save("one.npy", tokens)
    np.savez("two.npz", first=tokens, last=2 * tokens)
    main(["analyze", "--model", "one.npy", "two.npz", *QUICK])
    one, two = _report()["networks"]
    assert [layer["layer"] for layer in two["layers"]] == ["first", "last"]
    expected = measure(torch.from_numpy(tokens)).svd_rank(0.95)
    assert (
        one["layers"][0]["svd_rank"]["0.95"]["mean"] == two["layers"][1]["svd_rank"]["0.95"]["mean"] == expected.mean()
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "verdict"),
    [
        (lambda: teacher(num_classes=7), student, "Lift"),
        (lambda: teacher(model_args={**WIDE, "embed_dim": 20, "num_heads": 2}), student, "WideLast"),
        (teacher, teacher, "direct"),
        (teacher, student, "phi_s"),
        (teacher, lambda: student("lift"), "Lift"),
    ],
)
def test_the_advice_on_a_pair_is_a_config_that_check_accepts(
    folder: str, theirs: Any, ours: Any, verdict: str, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kdvit.analysis.mismatch.judge", lambda *_: (verdict, "as this test wants"))
    pair = ["--teacher", _exported("teacher", theirs()), "--student", _exported("student", ours())]
    main(["analyze", *pair, "--data", folder, *QUICK])
    assert "Advice: " in capsys.readouterr().out
    config = yaml.safe_load(Path("out/advised.yaml").read_text())
    assert config["model"]["student"]["class_path"] == (f"{verdict}ViT" if verdict[0].isupper() else "TimmStudent")
    assert ("projector: phi_s" in Path("out/advised.yaml").read_text()) == (verdict == "phi_s")
    same = yaml.safe_load(Path("teacher/config.json").read_text())["num_classes"] == 5
    assert ("logit" in config["model"]["distillers"]) == same
    main(["check", "--config", "out/advised.yaml"])
    assert "ready for `kdvit fit`" in capsys.readouterr().out


def test_an_exported_teacher_is_measured_at_the_layer_that_the_config_distils(folder: str) -> None:
    pair = ["--teacher", _exported("teacher", student("lift")), "--student", _exported("student", student())]
    main(["analyze", *pair, "--data", folder, *QUICK, "--pretrained", "false"])
    report = _report()
    assert [layer["layer"] for layer in report["networks"][0]["layers"]] == ["2"]
    assert report["advice"]["teacher_width"] == 16  # of the blocks; the lifted map has 24
    config = yaml.safe_load(Path("out/advised.yaml").read_text())
    assert config["model"]["teacher"]["init_args"] == {"arch": "local-dir:teacher"}


@pytest.mark.slow
def test_a_pair_of_timm_names_without_weights_is_advised(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--teacher", "cait_xxs24_224", "--student", "resnet18", "--pretrained", "false"]
    main(["analyze", *pair, "--data", folder, *QUICK, "--images", "2", "--layers", "0"])
    assert "To follow it: kdvit check --config out/advised.yaml" in capsys.readouterr().out
    config = yaml.safe_load(Path("out/advised.yaml").read_text())
    assert config["model"]["teacher"]["init_args"] == {"arch": "cait_xxs24_224", "pretrained": False}
    assert config["model"]["student"] == {
        "class_path": "TimmStudent",
        "init_args": {"arch": "resnet18", "num_classes": 5, "drop_path_rate": 0.0},
    }
    assert "decay_embeddings" not in config["model"]["optimizer"]
    assert "lag_epochs" not in config["model"]["schedule"]
    main(["analyze", *pair, "--data", f"{folder}/val", *QUICK, "--images", "2"])
    assert "No config is written" in capsys.readouterr().out
    assert not Path("out/advised.yaml").exists()


def test_a_network_of_ones_own_in_a_config_stays_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"class_path": "tests.models.test_checkpoint.MyNet"}
    feature = {"class_path": "FeatureDistiller", "init_args": {"projector": "linear"}}
    model = {"student": own, "teacher": own, "distillers": {"map": feature}}
    data = {"class_path": "tests.tiny.TinyData"}
    Path("own.yaml").write_text(yaml.safe_dump({"trainer": {"max_epochs": 1}, "data": data, "model": model}))
    main(["analyze", "--config", "own.yaml", *QUICK])
    assert yaml.safe_load(Path("out/advised.yaml").read_text())["model"]["student"] == own
    main(["check", "--config", "out/advised.yaml"])
    assert "ready for `kdvit fit`" in capsys.readouterr().out


def test_equal_names_are_told_apart_and_old_files_do_not_stay() -> None:
    Path("sub").mkdir()
    for file in ("one.npy", "sub/one.npy"):
        np.save(file, np.random.default_rng(0).standard_normal((12, 9, 6)))
    Path("out").mkdir()
    Path("out/advised.yaml").write_text("old")
    Path("out/depth.png").write_text("old")
    main(["analyze", "--model", "one.npy", "sub/one.npy", *QUICK])
    assert [network["name"] for network in _report()["networks"]] == ["one", "one_2"]
    assert {"one/one/sep", "one_2/one/sep"} <= set(np.load("out/curves.npz"))
    assert not Path("out/advised.yaml").exists()
    assert not Path("out/depth.png").exists()


def test_a_config_gives_its_pair_its_data_and_its_trained_student(
    demo_teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("feature", demo_teacher, *SHORT)
    main(["analyze", "--config", "run/config.yaml", *QUICK])
    report = _report()
    assert report["notes"] == ["The student is that of run/checkpoints/best.ckpt."]
    assert [network["name"] for network in report["networks"]] == ["teacher", "student"]
    assert report["advice"]["teacher_width"] == 64
    (trained,) = (each for name, each in find_networks("run/config.yaml", trained=True) if name == "run: student")
    (new,) = (each for name, each in find_networks("run/config.yaml") if name == "run: student")
    seen = load_student("run/checkpoints/best.ckpt").image_format
    assert trained.image_format == new.image_format == seen != TimmStudent("deit_tiny_patch16_224").image_format
    main(["check", "--config", "out/advised.yaml"])
    assert "ready for `kdvit fit`" in capsys.readouterr().out


def test_a_teacher_is_judged_at_the_layer_that_the_config_distils() -> None:
    config = yaml.safe_load((packaged_configs() / "demo/plain.yaml").read_text())
    teacher = {"class_path": "LiftViT", "init_args": {**config["model"]["student"]["init_args"], "width": 40}}
    objective = {"class_path": "FeatureDistiller", "init_args": {"weight": 0.2, "teacher_layers": [1]}}
    config["model"] |= {"teacher": teacher, "distillers": {"map": objective}}
    Path("own.yaml").write_text(yaml.safe_dump(config))
    main(["analyze", "--config", "own.yaml", *QUICK])
    report = _report()
    network = report["networks"][0]
    judged = network["layers"][network["compared"]]
    assert (judged["index"], judged["width"], len(judged["variants"])) == (1, 16, 5)
    assert [layer["layer"] for layer in network["layers"]][-1] == "lift"
    assert (report["advice"]["teacher_width"], report["advice"]["remedy"]) == (16, "none")
    (advised,) = yaml.safe_load(Path("out/advised.yaml").read_text())["model"]["distillers"].values()
    assert advised["init_args"]["teacher_layers"] == [1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Say what to analyse by one of: --model NAMES"),
        (["--teacher", "cait_s24_224"], "Say what to analyse by one of"),
        (["--model", "resnet18", "--pretrained", "false"], "--data: expected a folder of images, Digits or Fashion"),
        (["--model", "resnet181", "--data", "Digits"], "no model 'resnet181'. Did you mean"),
        (["--model", "resnet18", "--pretrained", "false", "--data", "nowhere"], "FashionMNIST; got 'nowhere'."),
        (["--model", "resnet18", "--pretrained", "false", "--data", "bare"], "There is no image. Files are read that"),
        (["--model", "resnet18", "--pretrained", "false", "--data", "Digits", "--layers", "9"], "has no layer 9"),
        (["--model", "x.npy"], "There is no file"),
        (["--model", "flat.npy"], "expected floating-point tokens"),
        (["--model", "pickled.npy"], "It is no array file that can be read without running code"),
        (["--model", "empty.npy"], "It is no array file that can be read without running code"),
        (["--model", "empty.npz"], "It holds no array"),
        (["--model", "x.npy", "--out", "list.yaml"], "--out 'list.yaml': cannot write there: [Errno 17] File"),
        (["--config", "demo/plain.yaml", "--data", "Digits"], "Option 'root' is not accepted. It takes: batch_size"),
        (["--config", "nothing.yaml"], "There is no config 'nothing.yaml'"),
        (["--config", "list.yaml"], "Unexpected config"),
        (["--config", "demo/lift.yaml"], "There is no exported network in"),
        (
            ["--model", "resnet18", "--data", "Digits", "--images", "0", "--pretrained", "false"],
            "images: must be above 0, got 0.",
        ),
        (["--model", "bare", "--data", "Digits", "--img_size", "32"], "network in 'bare' has a size of its own"),
        (["--config", "demo/plain.yaml", "--img_size", "32"], "With --config, sizes are the config's own"),
        (["--model", "resnet18", "--energies", "95"], "energies must be shares above 0 and below 1"),
        (["--teacher", "a.ckpt", "--student", "resnet18", "--data", "Digits"], "kdvit export --ckpt a.ckpt"),
    ],
)
def test_a_mistake_is_one_clear_message(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("flat.npy", np.zeros((3, 4)))
    np.save("pickled.npy", np.array([{}]), allow_pickle=True)
    Path("list.yaml").write_text("- 1\n")
    Path("empty.npy").touch()
    Path("bare").mkdir()
    np.savez("empty.npz")
    Path("a.ckpt").write_text("")
    with pytest.raises(SystemExit):
        main(["analyze", *args])
    assert message in capsys.readouterr().err


def test_images_are_chosen_one_of_each_class_first() -> None:
    targets = [0] * 50 + [1] * 5 + [2] * 2
    images = Images(torch.utils.data.TensorDataset(torch.zeros(57)), targets, FORMAT, None, "", None, 3)
    chosen = choose(images, 7, seed=0)
    assert chosen == sorted(set(chosen))
    assert sorted(targets[i] for i in chosen) == [0, 0, 0, 1, 1, 2, 2]
    assert choose(images, 7, seed=0) == chosen != choose(images, 7, seed=1)
    assert choose(images, 1000, seed=0) == list(range(57))
    assert len(choose(images._replace(targets=None), 7, seed=0)) == 7


@pytest.mark.parametrize(
    ("data", "model", "networks"),
    [
        ("data.yaml", {"student": "student.yaml"}, 1),
        ("Digits", {"teacher": "student.yaml", "distillers": {"logit": "LogitDistiller"}}, 2),
    ],
    ids=["files", "names of classes"],
)
def test_a_config_is_read_as_fit_reads_it(data: str, model: dict[str, Any], networks: int) -> None:
    config = yaml.safe_load((packaged_configs() / "demo/plain.yaml").read_text())
    Path("data.yaml").write_text(yaml.safe_dump(config["data"]))
    Path("student.yaml").write_text(yaml.safe_dump(config["model"]["student"]))
    config |= {"data": data, "model": config["model"] | model}
    Path("own.yaml").write_text(yaml.safe_dump(config))
    main(["check", "--config", "own.yaml"])
    main(["analyze", "--config", "own.yaml", *QUICK])
    assert [network["images"] for network in _report()["networks"]] == [12] * networks
    assert "The student is untrained" in _report()["notes"][0]


def test_the_command_takes_bfloat16_where_the_machine_computes_in_it_and_says_so(monkeypatch) -> None:
    ranks, exported = {}, _exported("student", student())
    for able, precision in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda able=able: {"avx512_bf16": able}, raising=False)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        main(["analyze", "--model", exported, "--data", "Digits", *QUICK, "--images", "20", "--out", precision])
        network = json.loads(Path(precision, "report.json").read_text())["networks"][0]
        assert network["precision"] == precision
        assert f"went through the network once, in {precision}." in Path(precision, "report.html").read_text()
        ranks[precision] = network["layers"][-1]["svd_rank"]["0.95"]["p99"]
    assert ranks["bf16-mixed"] == pytest.approx(ranks["32-true"], abs=1)
