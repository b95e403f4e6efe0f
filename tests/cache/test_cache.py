"""Stored teacher outputs: what training gets of them, how they are written, and when they are refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdvit import DistillationModule, load_student
from kdvit.cache import CacheError, Manifest
from kdvit.cache import store as cache_store
from kdvit.cache.store import encode, expand_logits, record_type, shard_file, shrink_logits
from kdvit.cache.writer import CacheWriting
from kdvit.cli import main
from kdvit.data import Digits
from kdvit.data.sampling import ViewSampler
from kdvit.models import FrozenTeacher
from kdvit.runtime.lock import run_lock
from kdvit.structures import View, ViTOutput
from tests.runs import QUIET, SHORT, fit

EPOCHS = [*QUIET, "--trainer.max_epochs", "2"]


def cache(teacher: str, *more: str, method: str = "lift", out: str = "cache") -> None:
    arch = ["--model.teacher.init_args.arch", teacher]
    main(["cache", "--config", f"demo/{method}.yaml", *QUIET, *arch, "--out", out, *more])


def check_of(method: str, teacher: str) -> list[str]:
    return ["check", "--config", f"demo/{method}.yaml", "--model.teacher.init_args.arch", teacher]


def cached(out: str = "cache") -> list[str]:
    return ["--data.init_args.cache", out]


def weights(root: str) -> dict[str, Tensor]:
    return load_student(f"{root}/student").state_dict()


def contents(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def _stored(demo_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "cache"
    cache(demo_teacher, out=str(folder))
    return folder


@pytest.fixture
def stored(_stored: Path) -> None:
    """Copies the outputs of the demo's teacher for Lift into the test's folder as "cache"."""
    shutil.copytree(_stored, "cache")


def refusal(capsys: Any, *args: Any, **more: Any) -> str:
    run = more.pop("run", fit)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*args, **more)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


class Recorder:
    """Keeps every training batch, and counts the teacher's runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.teacher_runs = 0
        step, run = DistillationModule.training_step, FrozenTeacher.__call__

        def recorded(module: DistillationModule, batch: Any, batch_idx: int) -> Tensor:
            self.images.append(batch.image)
            self.indices.append(batch.index)
            before = self.teacher_runs
            loss = step(module, batch, batch_idx)
            assert (self.teacher_runs == before) == (batch.teacher is not None)
            return loss

        def counted(teacher: FrozenTeacher, *args: Any) -> ViTOutput:
            self.teacher_runs += 1
            return run(teacher, *args)

        monkeypatch.setattr(DistillationModule, "training_step", recorded)
        monkeypatch.setattr(FrozenTeacher, "__call__", counted)


# Training


@pytest.mark.parametrize(
    "method",
    ["lift", *(pytest.param(name, marks=pytest.mark.slow) for name in ("soft_kd", "feature", "pooled"))],
)
def test_a_cached_run_ends_where_the_online_run_on_rounded_outputs_ends(
    method: str, demo_teacher: str, monkeypatch
) -> None:
    store = "both" if method == "feature" else "auto"  # pooled maps: see test_targets.py
    repeats = ["--data.init_args.repeats", "1" if method == "lift" else "3"]
    cache(demo_teacher, "--views", "2", "--store", store, *repeats, method=method)
    more = [*SHORT, *repeats, "--ema.decay", "0.9"]
    fit(method, demo_teacher, *more, *cached(), "--trainer.default_root_dir", "cached")
    run = FrozenTeacher.__call__

    def rounded(teacher: FrozenTeacher, *args: Any) -> ViTOutput:
        logits, features = run(teacher, *args)
        return ViTOutput(None if logits is None else logits.half(), tuple(each.half() for each in features))

    monkeypatch.setattr(FrozenTeacher, "__call__", rounded)
    fit(method, demo_teacher, *more, "--trainer.default_root_dir", "online")
    for ema in (False, True):
        one, other = (load_student(f"{r}/checkpoints/last.ckpt", ema).state_dict() for r in ("cached", "online"))
        for name, value in one.items():
            assert torch.equal(value, other[name]), (name, (value - other[name]).abs().max())


@pytest.mark.slow
def test_epoch_e_shows_view_e_modulo_views_in_an_order_of_its_own_and_the_teacher_rests(
    demo_teacher: str, monkeypatch
) -> None:
    cache(demo_teacher, "--views", "2")
    recorder = Recorder(monkeypatch)
    workers = ["--data.init_args.num_workers", "1"]
    fit("lift", demo_teacher, *QUIET, "--trainer.max_epochs", "4", *workers, *cached())
    assert recorder.teacher_runs == 8  # the validation set once, at the start of the run
    epochs = [slice(20 * epoch, 20 * (epoch + 1)) for epoch in range(4)]
    shown = []
    for epoch in epochs:
        images, indices = torch.cat(recorder.images[epoch]), torch.cat(recorder.indices[epoch]).tolist()
        shown.append(dict(zip(indices, images, strict=True)))
    for one, other, same in ((0, 2, True), (1, 3, True), (0, 1, False)):
        both = shown[one].keys() & shown[other].keys()
        assert len(both) > 1000
        assert all(torch.equal(shown[one][i], shown[other][i]) for i in both) == same
    assert list(shown[0]) != list(shown[2])


def test_views_come_again_with_every_rank_and_repeat() -> None:
    for rank in (0, 1):
        plain, cyclic = (
            ViewSampler(300, training=True, repeats=3, num_replicas=2, rank=rank, views=views) for views in (None, 2)
        )
        for sampler in (plain, cyclic):
            sampler.set_epoch(5)
        assert [view._replace(epoch=1) for view in plain] == list(cyclic)


def test_a_trained_run_is_read_without_its_cache(stored: None, demo_teacher: str) -> None:
    fit("lift", demo_teacher, *SHORT, *cached())
    shutil.rmtree("cache")
    main(["validate", "--config", "run/config.yaml", *QUIET])


# Writing


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_to_the_same_bytes(demo_teacher: str, monkeypatch, capsys) -> None:
    views = ["--views", "3"]
    cache(demo_teacher, *views, out="whole")
    take = CacheWriting.take

    def killed(run: CacheWriting, rows: Any, images: Tensor, output: ViTOutput) -> None:
        if rows[0] > 1500:
            raise KeyboardInterrupt("killed")
        take(run, rows, images, output)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriting, "take", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            cache(demo_teacher, *views)
    left = {file.name for file in Path("cache").iterdir()}
    assert left == {"manifest.json", "000000.npy", "000001.npy.tmp"}
    assert "'cache' is not complete: 3 of 4 shards are missing or cut off" in refusal(
        capsys, "lift", demo_teacher, *EPOCHS, *cached()
    )
    first = Path("cache/000000.npy").stat().st_mtime_ns
    cache(demo_teacher, *views)
    assert contents("cache") == contents("whole")
    assert Path("cache/000000.npy").stat().st_mtime_ns == first
    monkeypatch.setattr(CacheWriting, "take", killed)
    capsys.readouterr()
    cache(demo_teacher, *views)
    assert "Next: kdvit fit --config " in capsys.readouterr().out


def test_missing_shards_are_dealt_out_evenly_however_they_came_to_be_missing() -> None:
    manifest = Manifest(cache_store.ROWS * 8, 1, 1, (), (), 10, None, "32-true", {})
    whole = np.zeros(cache_store.ROWS, record_type(manifest))
    for done in (0, 2, 4):  # as if the one of two ranks had been faster
        np.save(shard_file(Path(), done), whole)
    np.save(shard_file(Path(), 6), whole[:-1])  # cut off
    rows: list[list[int]] = []
    heard: list[list[int]] = []
    for rank in range(2):
        writing = CacheWriting(None, Path(), manifest, cache_store.ROWS, None)
        strategy = SimpleNamespace(broadcast=lambda missing: heard.append(missing) or heard[0])
        writing.trainer = SimpleNamespace(world_size=2, global_rank=rank, is_global_zero=rank == 0, strategy=strategy)
        writing.setup("predict")
        np.save(shard_file(Path(), 1), whole)  # the first rank has written before the other looks
        rows.append([batch[0] // cache_store.ROWS for batch in writing.batches()])
    assert rows == [[1, 5, 7], [3, 6]]


@pytest.mark.parametrize("harm", [(b"\x93", b"\0"), (b"'<u4'", b"'>u4'"), (b"'descr'", b"'descr;")])
def test_a_shard_whose_head_has_come_to_harm_is_told_and_written_again(
    harm: tuple[bytes, bytes], stored: None, demo_teacher: str, capsys
) -> None:
    before, shard = contents("cache"), Path("cache/000001.npy")
    shard.write_bytes(shard.read_bytes().replace(*harm, 1))
    said = refusal(capsys, "lift", demo_teacher, *EPOCHS, *cached())
    assert "cache/000001.npy' has come to harm: its head is none of this cache's (" in said
    assert "Remove it, and the `kdvit cache` that made the cache writes it anew." in said
    shard.unlink()
    cache(demo_teacher)
    assert contents("cache") == before


def test_a_cut_off_shard_is_told_and_written_again(stored: None, demo_teacher: str, capsys) -> None:
    before, shard = contents("cache"), Path("cache/000001.npy")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "1 of 2 shards are missing or cut off" in refusal(capsys, "lift", demo_teacher, *EPOCHS, *cached())
    cache(demo_teacher)
    assert contents("cache") == before


def test_a_cache_is_written_by_one_command_at_a_time(demo_teacher: str, capsys) -> None:
    with run_lock("cache"):
        message = refusal(capsys, demo_teacher, run=cache)
    assert "'cache' is in use: process " in message
    assert "or choose another --out." in message


def test_too_little_disk_is_said_before_anything_is_written(demo_teacher: str, monkeypatch, capsys) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 2_000_000))
    message = refusal(capsys, demo_teacher, run=cache)
    assert " MB more, and the disk of 'cache' has 2.0 MB free" in message
    assert not Path("cache").exists()


def test_a_cache_of_other_settings_is_not_gone_on_with(stored: None, demo_teacher: str, capsys) -> None:
    message = refusal(capsys, demo_teacher, "--views", "2", "--topk", "3", "--seed_everything", "5", run=cache)
    assert "other settings: data.seed is 5 and was 0; topk is 3 and was None; views is 2 and was 1. " in message


def test_what_is_stored_is_what_is_asked_for(stored: None, demo_teacher: str, capsys) -> None:
    assert record_type(Manifest.load(Path("cache"))).names == ("image", "logits", "layer3")
    for method, store, fields in (
        ("soft_kd", "auto", ["logits"]),
        ("lift", "features", ["layer3"]),
        ("lift", "logits", ["logits"]),
        ("feature", "both", ["logits", "layer3"]),
    ):
        out = f"{method}_{store}"
        cache(demo_teacher, "--store", store, method=method, out=out)
        assert list(np.load(f"{out}/000000.npy", mmap_mode="r").dtype.names) == ["image", *fields]
    fit("soft_kd", demo_teacher, *SHORT, *cached("feature_both"))
    lift = ["--trainer.default_root_dir", "lift", *EPOCHS]
    message = refusal(capsys, "lift", demo_teacher, *lift, *cached("lift_features"))
    assert "The distillers want logits of the teacher, which the cache 'lift_features' does not hold" in message
    assert "no distiller of this config wants a feature map" in refusal(
        capsys, demo_teacher, "--store", "features", method="soft_kd", run=cache
    )
    assert "--topk must be between 1 and" in refusal(capsys, demo_teacher, "--topk", "10", out="k", run=cache)


def test_layers_of_one_token_are_stored_by_their_name(demo_teacher: str, capsys) -> None:
    cache(demo_teacher, method="pooled")
    manifest = Manifest.load(Path("cache"))
    assert (manifest.layers, manifest.shapes) == (("pooled",), ((64, 1, 1),))
    assert record_type(manifest).names == ("image", "layerpooled")
    capsys.readouterr()
    main([*check_of("pooled", demo_teacher), *cached()])
    shown = capsys.readouterr().out
    assert "FeatureDistiller x 1; student pooled [16, 1, 1] <- teacher pooled [64, 1, 1]" in shown
    other = ["--model.distillers.pooled.teacher_layers", "[class_token]"]
    said = refusal(capsys, "pooled", demo_teacher, *EPOCHS, *cached(), *other)
    assert "The distillers want layer class_token of the teacher, which the cache 'cache' does not hold." in said


def test_a_value_beyond_half_precision_is_an_error() -> None:
    manifest = Manifest(4, 1, 1, (2,), ((3, 2, 2),), None, None, "32-true", {})
    feature = torch.randn(4, 3, 2, 2)
    records = encode(torch.arange(len(feature)), ViTOutput(None, (feature,)), manifest)
    assert records.dtype == record_type(manifest)
    np.testing.assert_array_equal(records["layer2"], feature.numpy().astype(np.float16))
    feature[1, 1, 1, 1] = -70_000
    with pytest.raises(
        CacheError, match=r"layer2 of the teacher reaches 70000, beyond the 65504 of the stored float16"
    ):
        encode(torch.arange(len(feature)), ViTOutput(None, (feature,)), manifest)


def test_records_and_views_are_numbered_alike() -> None:
    manifest = Manifest(5, 3, 2, (), (), 10, None, "32-true", {})
    views = [View(image, epoch, repeat) for epoch in range(3) for image in range(5) for repeat in range(2)]
    assert [manifest.view(row) for row in range(manifest.rows)] == views
    assert [manifest.row(view) for view in views] == list(range(30))


def test_top_k_keeps_the_probabilities_of_k_classes_and_spreads_the_rest() -> None:
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)) * 4
    exact = logits.double().numpy()
    probabilities = np.exp(exact) / np.exp(exact).sum(1, keepdims=True)
    expected = np.empty_like(probabilities)
    for row, wanted in zip(probabilities, expected, strict=True):
        kept = np.argsort(row)[-7:]
        wanted[:] = (1 - row[kept].sum()) / 13
        wanted[kept] = row[kept]
    given = expand_logits(*shrink_logits(logits, 7), 20).softmax(dim=1)
    np.testing.assert_allclose(given.numpy(), expected, rtol=2e-5)


def test_top_k_keeps_classes_of_any_number() -> None:
    """As of ImageNet-21k and larger: the numbers of the classes are no values of half precision."""
    logits = torch.zeros(2, 70_000)
    logits[0, 66_000], logits[1, 69_999] = 5, 7
    manifest = Manifest(2, 1, 1, (), (), 70_000, 2, "32-true", {})
    records = encode(torch.arange(2), ViTOutput(logits), manifest)
    assert records["classes"][:, 0].tolist() == [66_000, 69_999]


def test_top_k_logits_train(demo_teacher: str) -> None:
    cache(demo_teacher, "--topk", "3", method="soft_kd")
    fit("soft_kd", demo_teacher, *SHORT, *cached())
    assert record_type(Manifest.load(Path("cache"))).itemsize == 4 + 2 * 3 + 2 * 4


# Checking


def test_check_prints_the_largest_errors(stored: None, demo_teacher: str, capsys) -> None:
    given = ["--config", "demo/lift.yaml", "--model.teacher.init_args.arch", demo_teacher, *QUIET]
    capsys.readouterr()
    main(["cache", "--check", "cache", "--samples", "100", *given])
    shown = capsys.readouterr().out
    assert "100 of 1,297 records recomputed." in shown
    for name in ("features of layer 3", "logits"):
        (line,) = (line for line in shown.splitlines() if line.startswith(name))
        error, largest = (float(part.split()[-1]) for part in line.split(","))
        assert 0 < error < largest * 2**-10
    shard = np.load("cache/000000.npy", mmap_mode="r+")
    shard["logits"][:] += 1
    shard.flush()
    main(["cache", "--check", "cache", *given])
    assert any(
        float(line.split("error ")[1].split(",")[0]) == pytest.approx(1, abs=0.01)
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("logits")
    )


DIFFERENT = {
    "--seed_everything=3": ["data.seed is 3 and was 0"],
    "--data.init_args.seed=4": ["data.seed is 4 and was 0"],
    "--data.init_args.padding=2 --data.init_args.mean=[0.4,0.4,0.4] --data.init_args.repeats=2": [
        *["data.padding is 2 and was 1", "data.mean is [0.4, 0.4, 0.4] and was [0.305", "data.repeats is 2 and was 1"]
    ],
}


def test_every_mismatch_of_the_settings_is_named(stored: None, demo_teacher: str, capsys) -> None:
    for given, expected in DIFFERENT.items():
        message = refusal(capsys, "lift", demo_teacher, *EPOCHS, *cached(), *given.split())
        assert "The cache 'cache' was made of something else: " in message
        assert all(each in message for each in expected)
        assert ("--data.init_args.seed 0 shows its views to students of any seed" in message) == ("seed" in given)


def test_other_weights_images_and_versions_are_named(stored: None, demo_teacher: str, capsys) -> None:
    manifest = json.loads(Path("cache/manifest.json").read_text())
    versions = ("version.torch", "version.Pillow", "version.records")
    names = ("teacher.weights", "teacher.class", "data.content", "data.images", *versions)
    other = {**manifest, "origin": {**manifest["origin"], **dict.fromkeys(names, "other")}}
    Path("cache/manifest.json").write_text(json.dumps(other))
    message = refusal(capsys, "lift", demo_teacher, *EPOCHS, *cached())
    for name in names:
        assert f"{name} is {manifest['origin'][name]!r} and was 'other'" in message


def test_one_changed_weight_or_pixel_or_file_changes_the_fingerprint(tmp_path) -> None:
    from kdvit.data import ImageFolder
    from kdvit.models.checkpoint import weights_sha256
    from tests.data.test_data_modules import image_folder
    from tests.tiny import teacher

    network = teacher()
    before = weights_sha256(network)
    assert weights_sha256(network) == before
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1
    assert weights_sha256(network) != before

    digits = Digits()
    before = digits.fingerprint()
    digits.parts["train"][0][digits.numbers["train"][5], 3, 3] += 1
    assert {name for name, value in digits.fingerprint().items() if value != before[name]} == {"content"}

    def folder(root: Path, **more: Any) -> dict[str, Any]:
        return ImageFolder(str(root), img_size=16, **more).fingerprint()

    before = folder(image_folder(tmp_path / "one"))
    assert folder(image_folder(tmp_path / "two")) == before
    for more, names in (
        ({"auto_augment": "rand-m5"}, {"auto_augment", "transform"}),
        ({"random_erasing": 0.1}, {"random_erasing", "transform"}),
        ({"erasing_mode": "rand"}, {"erasing_mode", "erasing_count", "transform"}),
    ):
        changed = {name for name, value in folder(tmp_path / "one", **more).items() if value != before.get(name)}
        assert changed == names
    with (tmp_path / "one/train/cat/0.jpg").open("ab") as stream:
        stream.write(b"more")
    assert folder(tmp_path / "one")["content"] != before["content"]


def test_a_cache_that_is_not_there_is_said(demo_teacher: str, capsys) -> None:
    assert "no cache of teacher outputs in 'cache'" in refusal(capsys, "lift", demo_teacher, *EPOCHS, *cached())
    assert "the run has no teacher" in refusal(capsys, "plain", demo_teacher, *EPOCHS, *cached())
    assert "Give either --out" in refusal(
        capsys, ["cache", "--config", "demo/lift.yaml", "--model.teacher.init_args.arch", demo_teacher], run=main
    )
    assert "no teacher whose outputs" in refusal(
        capsys, ["cache", "--config", "demo/plain.yaml", "--out", "c"], run=main
    )


@pytest.mark.parametrize("which", ["mixup", "cutmix"])
def test_mixing_images_beside_a_cache_is_refused_at_construction(which: str) -> None:
    with pytest.raises(ValueError, match="is no mixture of its outputs"):
        Digits(**{which: 0.8}, cache="cache")
