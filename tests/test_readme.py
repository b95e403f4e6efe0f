"""The README's Python runs, its commands parse, and what it names is there."""

from __future__ import annotations

import configparser
import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torchvision
import yaml
from PIL import Image

import kdvit.data
import kdvit.distillers
import kdvit.models
from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from tests.data.test_data_modules import image_folder
from tests.runs import SHORT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LOADING = re.findall(r"```python\n(.*?)```", (Path(kdvit.models.__file__).parent / "README.md").read_text(), re.DOTALL)[
    0
]
CONFIGS = (packaged_configs() / "README.md").read_text()
PUBLISHED = sorted(set(re.findall(r"^\|.*\| `(\w+\.yaml)` \|$", CONFIGS, re.MULTILINE)))


def test_it_is_read_in_a_minute() -> None:
    assert len(README.split()) <= 1200
    assert max(map(len, README.splitlines())) <= 100


def test_its_badges_are_true() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    oldest = setup["options"]["python_requires"].removeprefix(">=")
    badges = re.findall(r"img.shields.io/badge/(\w+)-(.*)-blue", README)
    assert badges == [("python", f"%E2%89%A5{oldest}"), ("licence", setup["metadata"]["license"].replace("-", "--"))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_its_python_runs(capsys) -> None:
    main(["fit", "--config", "demo/teacher.yaml", *SHORT])
    main(["fit", "--config", "demo/wide_last.yaml", *SHORT])
    Image.new("L", (30, 20), 128).save("photograph.jpg")
    spaces: list[dict[str, Any]] = []
    for code in (*PYTHON, LOADING):
        spaces.append({"__name__": "readme"})
        exec(code, spaces[-1])
    (module,) = (space["module"] for space in spaces if "module" in space)
    assert float(module.trainer.callback_metrics["val/acc1"]) > 0.15  # of ten classes


@pytest.mark.parametrize("what", ["class AttentionTransfer", "DistillationModule("])
def test_a_distiller_of_ones_own_and_a_run_in_python_take_15_lines(what: str) -> None:
    code = next(code for code in PYTHON if what in code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_every_published_config_is_in_its_table() -> None:
    assert [file.name for file in sorted(packaged_configs().glob("*.yaml"))] == PUBLISHED


def test_its_start_is_what_the_commands_take(demo_teacher: str, capsys) -> None:
    image_folder(Path("images"))
    start = re.search(r"^kdvit init .*?(?=  )", README, re.MULTILINE)[0]
    *command, teacher = shlex.split(start.replace("DIR", "images"))[1:]
    assert timm.is_model(teacher)
    main([*command, demo_teacher.removeprefix("local-dir:")])
    assert "Next: kdvit check --config kdvit.yaml" in capsys.readouterr().out


def test_the_table_of_objectives_names_each_and_its_demo() -> None:
    page = (Path(kdvit.distillers.__file__).parent / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `") and "Distiller` |" in line]
    named = {re.findall(r"`(\w+)`", row)[0]: row for row in rows}
    assert set(named) == {name for name in kdvit.distillers.__all__ if name.endswith("Distiller")} - {"Distiller"}
    demos = {demo: name for name, row in named.items() for demo in re.findall(r"`(\w+)`", row.rsplit("|", 2)[1])}
    files = {file.stem: yaml.safe_load(file.read_text())["model"] for file in (packaged_configs() / "demo").iterdir()}
    assert set(demos) == set(files) - {"teacher", "plain"}
    for demo, name in demos.items():
        assert name in {each["class_path"] for each in files[demo]["distillers"].values()}


TINY = {"embed_dim": 12, "depth": 2, "num_heads": 2, "patch_size": 8}


def tiny_networks(given: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with networks and images that take no time, its networks otherwise as they are."""
    for name in ("student", "teacher"):
        args = given["model"][name]["init_args"]
        args |= {"img_size": 16, "model_args": TINY} | ({"pretrained": False} if name == "teacher" else {})
    given["data"]["init_args"] |= {"img_size": 16, "batch_size": 4, "num_workers": 0}
    return given


class CIFAR100(torchvision.datasets.FakeData):
    """Stands for torchvision's, which is a download."""

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(size=8, image_size=(3, 32, 32), num_classes=2)
        self.targets, self.classes = [0, 1] * 4, ["cat", "dog"]


def write_other_forms() -> None:
    """Writes the images of "photographs" as the page's tables, tar files and arrays."""
    for split in ("train", "val"):
        paths = sorted(path.relative_to("photographs") for path in Path("photographs", split).rglob("*.jpg"))
        rows = [f"{path},{path.parent.name}" for path in paths]
        Path(f"{split}.csv").write_text("\n".join(["path,label", *rows]))
        with tarfile.open(f"photographs/{split}.tar", "w") as tar:
            for path in paths:
                tar.add(Path("photographs", path), arcname=str(Path(*path.parts[1:])))
    np.savez("medmnist.npz", train_images=np.zeros((20, 28, 28), np.uint8), train_labels=np.arange(20) % 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_of_images_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR100", CIFAR100)
    page = (Path(kdvit.data.__file__).parent / "README.md").read_text()
    image_folder(Path("labelled"))
    image_folder(Path("photographs"))
    write_other_forms()
    run = [*SHORT, "--trainer.accelerator", "cpu"]
    for kind, block in re.findall(r"```(yaml|bash|python)\n(.*?)```", page, re.DOTALL):
        if kind == "yaml" and "model" not in yaml.safe_load(block):  # the data of any config
            student = {"class_path": "TimmStudent", "init_args": {"arch": "resnet10t", "num_classes": 2}}
            given = {**yaml.safe_load(block), "model": {"student": student}, "trainer": {"max_epochs": 1}}
            Path("data.yaml").write_text(yaml.safe_dump(given))
            main(["check", "--config", "data.yaml", "--data.init_args.batch_size", "2"])
        elif kind == "yaml":
            Path(block.split()[1]).write_text(yaml.safe_dump(tiny_networks(yaml.safe_load(block))))
        elif kind == "python":
            exec(block, {"__name__": "images"})
        for command in block.splitlines() if kind == "bash" else ():
            _, *args = shlex.split(command)
            of_a_trainer = args[0] in ("fit", "test", "predict")
            main([*args, *(run if of_a_trainer else ["--pretrained", "false", "--num_workers", "0", "--k", "3"])])


MOVING = (packaged_configs() / "MOVING.md").read_text()


def short_keys(given: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields every key of a config with those above it, without `init_args`, which the command line may leave out."""
    for name, value in given.items():
        key = prefix if name == "init_args" else f"{prefix}.{name}".strip(".")
        yield key
        yield from short_keys(value, key) if isinstance(value, dict) else ()


def test_pages_for_newcomers_name_keys_and_classes_that_exist(capsys) -> None:
    pages = MOVING + (packaged_configs().parent / "kdvit/cli/FAQ.md").read_text()
    with pytest.raises(SystemExit):
        main(["fit", "--config", "lift.yaml", "--print_config"])
    known = {*short_keys(yaml.safe_load(capsys.readouterr().out))}
    named = re.findall(
        r"`((?:trainer|data|model|ema|checkpoint|callbacks|schedule|teacher)\.[\w.]+|seed_everything)", pages
    )
    assert len(named) > 80
    inside = {key.partition(".")[2] for key in known}  # as under `model`
    assert {key.replace(".init_args", "") for key in named} - known - inside == set()
    classes = {*re.findall(r"`(\w+Distiller)", pages)}
    assert classes - {*kdvit.distillers.__all__} == set()


@pytest.mark.filterwarnings("ignore")
def test_the_config_of_those_who_come_from_deit_runs(capsys) -> None:
    image_folder(Path("photographs"))
    given = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", MOVING, re.DOTALL)[0])
    given["model"]["teacher"]["init_args"]["arch"] = "vit_tiny_patch16_224"
    tiny_networks(given)
    for name in ("student", "teacher"):
        given["model"][name]["init_args"]["num_classes"] = 2
    Path("deit.yaml").write_text(yaml.safe_dump(given))
    main(["check", "--config", "deit.yaml"])
    assert "This config is ready for `kdvit fit`" in capsys.readouterr().out


def test_the_recipe_for_contributors_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = (Path(__file__).parent.parent / ".github" / "CONTRIBUTING.md").read_text()
    distiller, tests = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
    Path("cosine.py").write_text(distiller)
    monkeypatch.setattr(kdvit.distillers, "__path__", [*kdvit.distillers.__path__, "."])
    names: dict[str, Any] = {}
    exec(tests, names)
    for name in re.findall(r"def (test_\w+)", tests):
        names[name]()
