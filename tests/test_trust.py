"""Files from strangers: checkpoints, arrays and configs run no code, and configs write in their run directory alone."""

from __future__ import annotations

import copy
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import yaml

from kdvit import load_student
from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from tests.runs import QUIET, SHORT, fit

DEMO = packaged_configs() / "demo"
RUN = {"class_path": "os.system", "init_args": {"command": "touch pwned"}}
SPAWN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "pwned"]}}
NESTED = {"class_path": "TimmStudent", "init_args": {"arch": "resnet18", "model_args": json.dumps({"x": RUN})}}


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert not Path("pwned").exists()
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("kdvit: error: ")
    assert len(message) < 800
    return message


def config(change: dict[str, Any], name: str = "lift", **more: Any) -> list[str]:
    """Writes a config with values changed, and returns the arguments that name it."""
    tree = copy.deepcopy(yaml.safe_load((DEMO / f"{name}.yaml").read_text()))
    for path, value in change.items():
        *keys, last = path.split("/")
        place = tree
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = value
    Path("stranger.yaml").write_text(yaml.safe_dump(tree, **more))
    return ["--config", "stranger.yaml"]


@pytest.mark.parametrize("spec", [RUN, SPAWN, NESTED], ids=["function", "class", "text in a network"])
@pytest.mark.parametrize(
    "place",
    [
        "model/student/init_args/model_args/norm",
        "model/teacher/init_args/model_args",
        "model/optimizer/args/betas",
        "model/schedule/args/x",
        "model/student",
        "model/distillers/x",
        "data",
        "trainer/callbacks",
        "trainer/strategy",
    ],
)
def test_a_config_cannot_have_a_program_run_by_its_name(place: str, spec: dict[str, Any], capsys) -> None:
    before = {"trainer/default_root_dir": "run", "model/teacher/init_args/model_args": {}}
    refused(["fit", *config({**before, place: spec})], capsys)
    assert not Path("run").exists()


def test_a_logger_is_not_handed_a_program(capsys) -> None:
    for more in ({"x": RUN}, {"save_dir": "run", "prefix": RUN}):
        logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "run"}}
        for place in ("init_args", "dict_kwargs"):
            logger[place] = {**logger.get(place, {}), **more}
        refused(["fit", *config({"trainer/logger": logger}, "plain")], capsys)


EVALUATED = {"signature": "x", "expr": "__import__('os').system('touch pwned')"}
LAMBDA = {"class_path": "sympy.Lambda", "init_args": EVALUATED}
CALLABLES = [
    [LAMBDA],
    "os.abort",
    "torch.hub.load",
    "sympy.Lambda",
    {"class_path": "sympy.Symbol"},
    {"class_path": "torch.nn.Identity"},
    {"class_path": "functools.partial", "init_args": {"func": "os.system", "args": "touch pwned"}},
]
TAKERS = {
    "trainer/callbacks": ("lightning.pytorch.callbacks.LambdaCallback", "on_fit_start"),
    "trainer/strategy": ("lightning.pytorch.strategies.DDPStrategy", "ddp_comm_hook"),
    "trainer/profiler": ("lightning.pytorch.profilers.PyTorchProfiler", "schedule"),
}


@pytest.mark.parametrize(
    ("place", "given"),
    [*((place, LAMBDA) for place in TAKERS), *(("trainer/callbacks", given) for given in CALLABLES)],
    ids=str,
)
def test_what_is_called_is_not_for_a_config_to_choose(place: str, given: Any, capsys) -> None:
    path, name = TAKERS[place]
    spec: Any = {"class_path": path, "init_args": {name: given}}
    stranger = config(
        {"trainer/default_root_dir": "run", place: [spec] if place == "trainer/callbacks" else spec}, "plain"
    )
    message = refused(["fit", *stranger, *QUIET], capsys)
    assert place.replace("/", ".") in message
    assert name in message
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("place", "path", "given"),
    [
        ("data", "lightning.pytorch.LightningDataModule.from_datasets", {}),
        ("model/student", "kdvit.load_student", {"path": "x"}),
    ],
)
def test_a_function_is_no_class(place: str, path: str, given: dict[str, str], capsys) -> None:
    stranger = config({place: {"class_path": path, "init_args": given}}, "plain")
    assert f"{place.replace('/', '.')}: {path!r} is no class" in refused(["check", *stranger], capsys)


OWN = """
from collections.abc import Callable
import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F

def measure(given, loss: Callable = F.l1_loss): return loss

class Own(pl.Callback):
    def __init__(self, act: nn.Module, loss: Callable = F.mse_loss, norm: Callable[..., nn.Module] = nn.LayerNorm,
                 bound: Callable = torch.tanh, **more):
        assert isinstance(act, nn.ReLU) and loss is F.mse_loss and isinstance(norm(4), nn.LayerNorm)
        assert bound is torch.tanh
        assert measure(0, **more) is F.l1_loss
"""


def test_a_class_of_ones_own_keeps_its_functions(monkeypatch, capsys) -> None:
    Path("own_callback.py").write_text(OWN)
    monkeypatch.syspath_prepend(".")
    own: Any = {"class_path": "own_callback.Own", "init_args": {"act": {"class_path": "torch.nn.ReLU"}}}
    mine = config({"trainer/callbacks": [own], "trainer/default_root_dir": "run"}, "plain")
    main(["fit", *mine, *SHORT])
    main(["validate", "--config", "run/config.yaml"])
    for name in ("loss", "norm", "bound"):
        own["init_args"][name] = "torch.hub.load"
        changed = config({"trainer/callbacks": [own]}, "plain")
        assert f"trainer.callbacks[0].init_args.{name}: got 'torch.hub.load'" in refused(["check", *changed], capsys)
        del own["init_args"][name]


CALLBACKS, LOGGERS, PROFILERS = (f"lightning.pytorch.{room}" for room in ("callbacks", "loggers", "profilers"))
UNNAMED = {"name": "", "version": ""}
WRITERS = [
    ("logger", f"{LOGGERS}.CSVLogger", {"save_dir": "ELSEWHERE", **UNNAMED}),
    ("logger", f"{LOGGERS}.CSVLogger", {"save_dir": "elsewhere", **UNNAMED}),
    ("logger", f"{LOGGERS}.CSVLogger", {"save_dir": "run/link", **UNNAMED}),
    ("logger", f"{LOGGERS}.CSVLogger", {"name": "../elsewhere", "save_dir": "run", "version": ""}),
    ("logger", f"{LOGGERS}.CSVLogger", {"version": "ELSEWHERE", "save_dir": "run", "name": ""}),
    ("logger", f"{LOGGERS}.TensorBoardLogger", {"save_dir": "~/elsewhere"}),
    ("logger", f"{LOGGERS}.TensorBoardLogger", {"save_dir": "$PWD/elsewhere"}),
    ("logger", f"{LOGGERS}.TensorBoardLogger", {"save_dir": "memory://elsewhere"}),
    ("logger", f"{LOGGERS}.TensorBoardLogger", {"save_dir": "reference::elsewhere/metrics.csv"}),
    ("logger", f"{LOGGERS}.TensorBoardLogger", {"sub_dir": "../../../../elsewhere", "save_dir": "run"}),
    ("logger", f"{LOGGERS}.WandbLogger", {"save_dir": "."}),
    ("logger", f"{LOGGERS}.MLFlowLogger", {"tracking_uri": "file:./elsewhere", "save_dir": "run"}),
    ("logger", f"{LOGGERS}.MLFlowLogger", {"tracking_uri": "elsewhere", "save_dir": "run"}),
    ("logger", f"{LOGGERS}.MLFlowLogger", {"artifact_location": "elsewhere", "save_dir": "run"}),
    ("callbacks", f"{CALLBACKS}.ModelCheckpoint", {"dirpath": "ELSEWHERE"}),
    ("callbacks", f"{CALLBACKS}.ModelCheckpoint", {"filename": "../../elsewhere/x"}),
    ("callbacks", f"{CALLBACKS}.ModelCheckpoint", {"filename": "http://../../../elsewhere/x"}),
    ("callbacks", f"{CALLBACKS}.ModelCheckpoint", {"filename": "a::/../../../elsewhere/x"}),
    ("callbacks", f"{CALLBACKS}.OnExceptionCheckpoint", {"dirpath": "elsewhere"}),
    ("profiler", f"{PROFILERS}.SimpleProfiler", {"dirpath": "elsewhere", "filename": "x"}),
    ("profiler", f"{PROFILERS}.PyTorchProfiler", {"filename": "ELSEWHERE/x"}),
]


@pytest.mark.parametrize(("place", "path", "given"), WRITERS, ids=str)
def test_a_config_writes_in_its_run_directory_alone(
    place: str, path: str, given: dict[str, str], capsys, tmp_path
) -> None:
    listed = place == "callbacks"
    Path("elsewhere").mkdir()
    for name in ("metrics.csv", "config.yaml"):
        Path("elsewhere", name).write_text("{}")
    Path("run").mkdir()
    Path("run/link").symlink_to("../elsewhere")
    args = {name: text.replace("ELSEWHERE", str(tmp_path / "elsewhere")) for name, text in given.items()}
    spec = {"class_path": path, "init_args": args}
    stranger = config({f"trainer/{place}": [spec] if listed else spec, "trainer/default_root_dir": "run"}, "plain")
    message = refused(["fit", *stranger, *SHORT], capsys)
    assert message.startswith(f"kdvit: error: trainer.{place}{'[0]' if listed else ''}.")
    assert f".{next(iter(given))}: " in message
    assert "leads out of the run directory 'run'" in message
    assert [file.read_text() for file in Path("elsewhere").iterdir()] == ["{}", "{}"]
    assert [file.name for file in Path("run").iterdir()] == ["link"]


def test_writers_inside_the_run_directory_go_on(tmp_path) -> None:
    logger = {"class_path": f"{LOGGERS}.CSVLogger", "init_args": {"save_dir": str(tmp_path / "run"), "name": "table"}}
    profiler = {"class_path": f"{PROFILERS}.SimpleProfiler", "init_args": {"dirpath": "run/times", "filename": "x"}}
    best = {"class_path": f"{CALLBACKS}.ModelCheckpoint", "init_args": {"monitor": "val/loss", "filename": "{epoch}"}}
    writers = {"trainer/logger": logger, "trainer/profiler": profiler, "trainer/callbacks": [best]}
    main(["fit", *config({**writers, "trainer/default_root_dir": "run"}, "plain"), *SHORT])
    assert Path("run/table/version_0/metrics.csv").is_file()
    assert Path("run/times/fit-x.txt").is_file()
    assert {each.name for each in Path().iterdir()} == {"run", "stranger.yaml"}


def test_other_folders_of_a_config_are_refused(capsys) -> None:
    downloads = config({"model/student/init_args/model_args/cache_dir": "elsewhere"}, "plain")
    assert "model.student.init_args.model_args.cache_dir: 'elsewhere'" in refused(["fit", *downloads], capsys)
    rest = {
        "class_path": f"{LOGGERS}.TensorBoardLogger",
        "init_args": {"save_dir": "."},
        "dict_kwargs": {"log_dir": "/x"},
    }
    logs = config({"trainer/logger": [rest], "trainer/default_root_dir": "."}, "plain")
    assert "trainer.logger[0].dict_kwargs.log_dir: '/x' leads out" in refused(["fit", *logs], capsys)
    cache = config({"out": "elsewhere"})
    assert "out: a config chooses no folder" in refused(["cache", *cache], capsys)
    assert "out: a config chooses no folder" in refused(["cache", "--out", "mine", *cache], capsys)
    assert "out: a config chooses no folder" in refused(["cache", *config({"out": "cache"})], capsys)
    for root in ("memory://run", "reference::refs.json", "run\ntouch pwned\n"):
        given = config({"trainer/default_root_dir": root}, "plain")
        for command in (["fit"], ["slurm", "--dry_run"]):
            assert "trainer.default_root_dir: expected a folder of this" in refused([*command, *given], capsys)
    assert [each.name for each in Path().iterdir()] == ["stranger.yaml"]


def test_parts_of_a_config_are_read_from_files_alone(capsys) -> None:
    data = yaml.safe_load((DEMO / "plain.yaml").read_text())["data"]
    fsspec.filesystem("memory").pipe_file("/data.yaml", yaml.safe_dump(data).encode())
    Path("data.yaml").write_text(yaml.safe_dump(data))
    main(["check", *config({"data": "data.yaml"}, "plain")])
    assert "'memory://data.yaml'" in refused(["check", *config({"data": "memory://data.yaml"}, "plain")], capsys)


def test_networks_of_a_strangers_config_are_refused_by_analyses_too(capsys) -> None:
    given = config({"model/student/init_args/model_args/norm": RUN, "model/teacher": None})
    for command in (["analyze", *given, "--out", "report"], ["benchmark", "stranger.yaml"]):
        assert "unexpected keyword argument 'norm'" in refused(command, capsys)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor for the tag"),
        ("model: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("a: &a [*a]", "aliases write out to more than 100,000 values"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
            "aliases write out to more than 100,000 values",
        ),
    ],
    ids=["call", "name", "circle", "billion laughs"],
)
def test_yaml_is_values_alone_and_cannot_grow(text: str, said: str, capsys) -> None:
    Path("stranger.yaml").write_text(text)
    since = time.monotonic()
    assert said in refused(["fit", "--config", "stranger.yaml"], capsys)
    assert said in refused(["analyze", "--config", "stranger.yaml"], capsys)
    assert time.monotonic() - since < 10


def test_an_alias_may_be_used() -> None:
    text = (DEMO / "plain.yaml").read_text().replace("mean: [", "mean: &grey [")
    head, std, rest = text.partition("    std: ")
    Path("mine.yaml").write_text(f"{head}{std}*grey\n{rest.partition(chr(10))[2]}")
    main(["check", "--config", "mine.yaml"])


def bombs() -> list[Path]:
    """Writes pickles that would run a program: as torch saves them, in a checkpoint's shape, and bare."""
    torch.save(Bomb(), "zip.pth")
    whole = {"state_dict": {}, "model": {}, "epoch": 0, "global_step": 1, "loops": {}, "optimizer_states": []}
    torch.save({**whole, "kdvit": Bomb(), "callbacks": {}}, "shaped.pth")
    Path("bare.pth").write_bytes(pickle.dumps({"model": Bomb()}, protocol=2))
    return [Path(name) for name in ("zip.pth", "shaped.pth", "bare.pth")]


@pytest.fixture
def run_of_plain(demo_teacher: str) -> None:
    fit("plain", demo_teacher, *SHORT)


@pytest.mark.slow
@pytest.mark.usefixtures("run_of_plain")
def test_no_checkpoint_runs_code(capsys, caplog) -> None:
    plain = ["--config", "demo/plain.yaml", *SHORT]
    lift = ["--config", "demo/lift.yaml", *SHORT]
    for file in bombs():
        own = ["--trainer.default_root_dir", "new"]
        for command in ("fit", "validate", "test", "predict"):
            assert str(file) in refused([command, *plain, *own, "--ckpt_path", str(file)], capsys), command
        given = [
            ["fit", *plain, "--model.student.init_args.checkpoint", str(file)],
            [
                "fit",
                *lift,
                "--model.teacher.init_args.arch=vit_tiny_patch16_224",
                "--model.teacher.init_args.checkpoint",
                str(file),
            ],
            ["import", str(file), "--out", "imported"],
            ["export", "--ckpt", str(file), "--out", "exported"],
            ["analyze", "--model", str(file), "--data", "Digits"],
            ["benchmark", str(file)],
        ]
        for args in given:
            assert str(file) in refused(args, capsys), args
        with pytest.raises(ValueError, match=str(file)):
            load_student(file)
        Path("run/checkpoints/last.ckpt").write_bytes(file.read_bytes())
        Path("run/checkpoints/best.ckpt").write_bytes(file.read_bytes())
        assert "best.ckpt" in refused(["validate", *plain, "--trainer.default_root_dir", "run"], capsys)
        caplog.clear()
        again = ["fit", *plain, "--trainer.default_root_dir", "run"]
        assert "From none of the checkpoints in 'run/checkpoints' can training go on" in refused(again, capsys)
        assert "last.ckpt is no whole checkpoint" in caplog.text
        assert not Path("pwned").exists()


def test_a_config_cannot_ask_for_unsafe_checkpoints(capsys) -> None:
    given = config({"weights_only": False}, "plain")
    for command in ("fit", "validate"):
        assert "weights_only: false would let a checkpoint run code" in refused([command, *given], capsys)


def test_a_checkpoint_does_not_change_the_config(capsys) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"student": RUN}}, "changing.ckpt")
    message = refused(["validate", "--config", "demo/plain.yaml", "--ckpt_path", "changing.ckpt"], capsys)
    assert "'changing.ckpt' is no checkpoint of `kdvit fit`: it would change the config" in message


def test_the_switch_of_torch_does_not_open_checkpoints(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Bomb(), "zip.pth")
    for args in (
        ["import", "zip.pth", "--out", "x"],
        ["validate", "--config", "demo/plain.yaml", "--ckpt_path", "zip.pth"],
    ):
        refused(args, capsys)


def test_features_and_exported_folders_run_no_code(capsys) -> None:
    np.save("objects.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    np.savez("objects.npz", x=np.array([Bomb()], dtype=object))
    Path("raw.npy").write_bytes(pickle.dumps(Bomb()))
    for file in ("objects.npy", "objects.npz", "raw.npy"):
        assert file in refused(["analyze", "--model", file], capsys)
    folder = Path("folder")
    folder.mkdir()
    description = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "pretrained_cfg": {"num_classes": 10}}
    (folder / "config.json").write_text(json.dumps(description))
    torch.save(Bomb(), folder / "pytorch_model.bin")
    given = config({"model/teacher/init_args/arch": "local-dir:folder"})
    refused(["fit", *given], capsys)


@pytest.mark.parametrize("key", ["checkpoint", "last_checkpoint"])
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "{epoch}/../../../x"])
def test_a_checkpoint_stays_in_its_run(key: str, name: str, capsys) -> None:
    given = config({key: {"filename": name}}, "plain")
    assert f"{key}.filename: expected a name inside the run's" in refused(["fit", *given, *QUIET], capsys)


def test_a_config_does_not_choose_another_folder_for_checkpoints(tmp_path) -> None:
    folders = {key: {"dirpath": str(tmp_path / "elsewhere")} for key in ("checkpoint", "last_checkpoint")}
    main(["fit", *config(folders, "plain"), *SHORT, "--trainer.default_root_dir", "run"])
    assert not Path("elsewhere").exists()
    assert {file.name for file in Path("run/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.filterwarnings("ignore:.*images are few:UserWarning")
def test_names_in_a_report_are_text_and_name_no_file() -> None:
    name = """../../x<script>alert("1")</script>' onerror='y"""
    tokens = np.random.default_rng(0).standard_normal((4, 9, 6)).astype(np.float32)
    folder = Path("<script>")
    folder.mkdir()
    np.savez(folder / "features.npz", **{name: tokens})
    main(["analyze", "--model", str(folder / "features.npz"), "--permutations", "2", "--out", "deep/er/out"])
    page = Path("deep/er/out/report.html").read_text()
    assert "<script" not in page.lower()
    assert "' onerror='" not in page
    assert "../../x&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&#x27; onerror=&#x27;y" in page
    written = {file.parent for file in Path().rglob("*") if file.is_file()}
    assert written == {folder, Path("deep/er/out")}
