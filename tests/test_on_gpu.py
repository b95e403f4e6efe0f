"""What only a GPU can show. Where there is none, these tests are skipped; the others run on the CPU everywhere."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from kdvit import DistillationModule, load_student
from kdvit.callbacks import NonFiniteError, NonFiniteGuard
from kdvit.cli import main
from kdvit.cli.machine import network_costs, process_bytes
from kdvit.distillers import LogitDistiller
from kdvit.models import FrozenTeacher, TimmTeacher
from kdvit.structures import Pixels
from kdvit.training.schedule import ScheduleOptions
from tests.bench.device import waits
from tests.bench.gpu import WAIT, _waiting
from tests.bench.plain_step import build, images, step
from tests.callbacks.test_nonfinite import Breaks, _module
from tests.data.test_data_modules import image_folder
from tests.data.test_pixels import OPTIONS, folder
from tests.models.test_teacher import TEACHERS
from tests.runs import QUIET, SHORT, assert_same_end, fit, numbers
from tests.test_gpu_bench import TINY
from tests.test_stopping import EVERYTHING, signal_at, stopped
from tests.tiny import TinyData, student, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = ["--trainer.accelerator", "gpu"]
ON = torch.device("cuda")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("method", ["lift", "wide_last", "fixed_target"])
def test_a_run_trains_scores_and_leaves_a_student_for_any_machine(
    method: str, precision: str, demo_teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*QUIET, *GPU, "--trainer.max_epochs", "4", "--trainer.precision", precision, "--ema.decay", "0.9"]
    fit(method, demo_teacher, *more)
    losses = numbers("run", "val/loss")
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.02
    main(["test", "--config", "run/config.yaml", "--ckpt_path", "last", *GPU])
    assert "Test on 500 images" in capsys.readouterr().out
    exported = load_student("run/student").eval()
    image = torch.randn(4, 3, *exported.image_format.size)
    alone = exported(image).logits
    torch.testing.assert_close(exported.to(ON)(image.to(ON)).logits.cpu(), alone, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_that_is_stopped_ends_where_the_whole_one_ends(
    precision: str, demo_teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    same = [*EVERYTHING, *GPU, "--trainer.precision", precision, "--trainer.deterministic", "true"]
    try:
        fit("lift", demo_teacher, *same, "--trainer.default_root_dir", "whole")
        stopped("lift", demo_teacher, *same, *signal_at("on_train_batch_start", 7))
        fit("lift", demo_teacher, *same)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_end("run", "whole")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", TEACHERS)
def test_a_teacher_cast_once_gives_what_autocast_gives(arch: str, dtype: torch.dtype) -> None:
    size = None if "convnext" in arch or "resnet" in arch else 32
    network = TimmTeacher(arch, pretrained=False, img_size=size, model_args=TEACHERS[arch])
    image, layers = torch.randn(2, 3, 32, 32, device=ON), [-1, 0]
    network.image_format = network.image_format._replace(size=(32, 32))
    plain, holder = copy.deepcopy(network).eval().to(ON), FrozenTeacher(network)
    with torch.no_grad(), torch.autocast("cuda", dtype):
        expected, output = plain(image, layers), holder(image, layers)
    assert torch.equal(output.logits, expected.logits)
    assert all(map(torch.equal, output.features, expected.features))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"mode": "reduce-overhead"}, marks=pytest.mark.xfail(reason="torch 2.11: the graph is empty"))],
    ids=["", "CUDA graphs"],
)
def test_a_compiled_teacher_gives_its_outputs(options: dict[str, Any]) -> None:
    model_args = {**TEACHERS["cait_xxs24_224"], "num_classes": 5}
    network = TimmTeacher("cait_xxs24_224", pretrained=False, img_size=32, model_args=model_args)
    holder, compiled = FrozenTeacher(network), FrozenTeacher(copy.deepcopy(network))
    compiled.compile(**options)
    for seed in range(4):  # graphs are recorded at the second and third
        image = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(ON)
        with torch.autocast("cuda", torch.bfloat16):
            ours, theirs = compiled(image, [-1]), holder(image, [-1])
        torch.testing.assert_close(ours.logits, theirs.logits, atol=0.05, rtol=0.05)
        torch.testing.assert_close(ours.features[0], theirs.features[0], atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("what", ["student", "teacher", "both"])
def test_a_compiled_run_learns_what_an_eager_one_learns(
    what: str, demo_teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile, compiled = torch.compile, []

    def noted(*args: Any, **options: Any) -> Any:
        compiled.append(args)
        return compile(*args, **options)

    monkeypatch.setattr(torch, "compile", noted)
    same = [*SHORT, *GPU, "--trainer.limit_train_batches", "8", "--trainer.log_every_n_steps", "1"]
    fit("lift", demo_teacher, *same, "--model.compile", what)
    fit("lift", demo_teacher, *same, "--trainer.default_root_dir", "eager")
    losses = [numbers(root, "train/loss") for root in ("run", "eager")]
    assert len(losses[0]) == 16
    assert compiled
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("name", OPTIONS)
def test_pixels_become_on_a_gpu_the_images_that_workers_make(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(tmp_path)
    expected = list(folder(tmp_path, **OPTIONS[name]).train_dataloader())
    normalise, places, seen = Pixels.normalise, [], []

    def noted(pixels: Pixels, image: torch.Tensor) -> torch.Tensor:
        places.append((image.dtype, image.device.type))
        return normalise(pixels, image)

    class Sees(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch.image.cpu())

    monkeypatch.setattr(Pixels, "normalise", noted)
    data = folder(tmp_path, **{**OPTIONS[name], "num_workers": 1})
    network = student(num_classes=data.num_classes, in_chans=len(data.image_format.mean))
    module = DistillationModule(network, image_format=data.image_format, schedule=ScheduleOptions(warmup_epochs=0))
    trainer(tmp_path, accelerator="gpu", callbacks=[Sees()], limit_val_batches=0).fit(module, datamodule=data)
    assert places == [(torch.uint8, "cuda")] * len(expected) != []
    assert all(torch.equal(ours, theirs.image) for ours, theirs in zip(seen, expected, strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("gradient", [False, True], ids=["term", "gradient"])
def test_steps_that_are_not_finite_leave_the_weights(gradient: bool, precision: str, tmp_path: Path) -> None:
    module, guard = _module(Breaks([0, 1, 2, 3, 4], gradient)), NonFiniteGuard(skip_steps=5)
    run = trainer(tmp_path, accelerator="gpu", precision=precision, callbacks=[guard])
    run.fit(module, datamodule=TinyData())
    for name, value in _module(Breaks([])).state_dict().items():
        assert torch.equal(module.state_dict()[name].cpu(), value), name
    assert guard.skipped == (0 if gradient and precision == "16-mixed" else 5)  # which the scaler has skipped


def test_a_number_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, accelerator="gpu", precision="bf16-mixed", callbacks=[NonFiniteGuard()])
    with pytest.raises(NonFiniteError, match=r"^At step 3 of epoch 0, loss term 'odd' is nan"):
        run.fit(_module(Breaks([3])), datamodule=TinyData())
    assert (tmp_path / "nonfinite/step_3.ckpt").is_file()


def test_an_overflow_of_float16_is_left_to_the_scaler(tmp_path: Path) -> None:
    guard, seen = NonFiniteGuard(), []

    class Scales(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(trainer.precision_plugin.scaler.get_scale())

    run = trainer(tmp_path, accelerator="gpu", precision="16-mixed", callbacks=[guard, Scales()], max_epochs=4)
    run.fit(_module(LogitDistiller(1e3)), datamodule=TinyData())
    assert seen[-1] < seen[0] <= 65536
    assert guard.skipped == 0
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


@pytest.mark.parametrize("method", ["Lift", "WideLast"])
def test_no_step_that_is_not_logged_waits_for_the_gpu(method: str) -> None:
    found = _waiting(TINY, ON, method)
    assert found.result == 0, found.what
    assert "in 5 steps" in found.what
    with waits(ON) as places:
        torch.ones(1, device=ON).item()
    assert [WAIT in str(each.message) for each in places] == [True]


def test_check_tells_the_memory_that_a_step_takes() -> None:
    torch.cuda.empty_cache()
    before, batch = torch.cuda.memory_allocated(), 64
    torch.cuda.reset_peak_memory_stats()
    module, given = build("Lift", on=ON), images(batch)
    given = given._replace(image=given.image.to(ON), target=given.target.to(ON))
    run = step(module, given)
    for _ in range(3):
        run()
    peak = torch.cuda.max_memory_allocated() - before
    planned = build("Lift")
    told = process_bytes(planned, network_costs(planned), batch, 0)[0] * 0.6  # as beside_machine takes half precision
    assert 0.8 < told / peak < 2


def test_a_run_on_a_cache_ends_near_the_online_run(demo_teacher: str) -> None:
    same = [*QUIET, *GPU, "--trainer.max_epochs", "2", "--trainer.precision", "bf16-mixed"]
    arch = ["--model.teacher.init_args.arch", demo_teacher]
    main(["cache", "--config", "demo/lift.yaml", *QUIET, *GPU, *arch, "--out", "cache", "--views", "2"])
    fit("lift", demo_teacher, *same, "--data.init_args.cache", "cache", "--trainer.default_root_dir", "cached")
    fit("lift", demo_teacher, *same)
    assert numbers("cached", "val/loss") == pytest.approx(numbers("run", "val/loss"), rel=0.02)


def test_an_analysis_measures_what_it_measures_on_the_cpu(demo_teacher: str) -> None:
    run = ["analyze", "--model", demo_teacher, "--data", "Digits", "--images", "128", "--num_workers", "0"]
    found = {}
    for place in ("cpu", "gpu"):
        main([*run, "--trainer.accelerator", place, "--trainer.precision", "32-true", "--out", place])
        found[place] = json.loads(Path(place, "report.json").read_text())
    told = [_numbers(found[place]) for place in ("cpu", "gpu")]
    assert len(told[0]) == len(told[1]) > 50
    assert told[1] == pytest.approx(told[0], rel=0.02, abs=0.02)


def _numbers(tree: Any) -> list[float]:
    """Returns the numbers of a report, in its order."""
    if isinstance(tree, dict):
        return [number for key, each in tree.items() for number in _numbers(each)]
    if isinstance(tree, list):
        return [number for each in tree for number in _numbers(each)]
    return [float(tree)] if isinstance(tree, int | float) and not isinstance(tree, bool) else []


def test_a_probe_runs_on_a_gpu(demo_teacher: str) -> None:
    main(["probe", demo_teacher, "--data", "Digits", "--k", "5", "--num_workers", "0", "--out", "probe.json", *GPU])
    (network,) = json.loads(Path("probe.json").read_text())["networks"]
    assert min(network["knn"], network["linear"]) > 0.3  # of ten classes, by the features of a teacher at chance


def test_benchmark_times_a_gpu() -> None:
    main(["benchmark", "deit_tiny_patch16_224", "--device", "cuda", "--precision", "bf16", "--out", "costs.json"])
    written = json.loads(Path("costs.json").read_text())
    assert written["machine"]["device"] == torch.cuda.get_device_name(0)
    assert 0.05 < written["networks"][0]["latency_ms"] < 50


def test_init_and_check_know_the_card(demo_teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["init", "--images", str(image_folder(Path("photographs"), 40)), "--teacher", "deit_small_patch16_224"])
    written = Path("kdvit.yaml").read_text()
    assert "precision: bf16-mixed" in written
    assert "batch_size: 8 " in written  # ten steps an epoch of 80 images
    main(["check", "--config", "demo/lift.yaml", *GPU, "--model.teacher.init_args.arch", demo_teacher])
    told = capsys.readouterr().out
    assert re.search(r"and \S+ [MG]B on each GPU", told), told


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # Lightning wraps the module on another
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_one_process_goes_through_nccl(strategy: str, demo_teacher: str) -> None:
    try:
        fit("lift", demo_teacher, *SHORT, *GPU, "--trainer.strategy", strategy, "--trainer.precision", "bf16-mixed")
        assert torch.distributed.get_backend() == "nccl"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert Path("run/student/model.safetensors").is_file()
