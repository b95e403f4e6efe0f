"""The ImageNet configs, as the objects that the command line builds of them, against the published recipe.

Recipe: arXiv:2511.15572 and the authors' code. Only the data set and the teacher's weights are stand-ins.
"""

from __future__ import annotations

import functools
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from kdvit.data.sampling import ViewSampler
from kdvit.models.timm_model import create_timm_model
from kdvit.training.optim import optimizer_and_schedule
from kdvit.training.schedule import RunLength

RUNS = {
    "supervised": ("TimmStudent", {}, 1.0),
    "feature": ("TimmStudent", {"feature": (0.2, "spectral")}, 1.0),
    "logit": ("TimmStudent", {"logit": (0.9, None)}, 0.1),
    "lift": ("LiftViT", {"logit": (0.9, None), "lift": (0.2, "spectral")}, 0.1),
    "wide_last": ("WideLastViT", {"logit": (0.9, None), "wide_last": (0.2, "mse")}, 0.1),
    "lift_mse": ("LiftViT", {"lift": (0.2, "mse")}, 1.0),
    "lift_soft_kd": ("LiftViT", {"logit": (0.9, None)}, 0.1),
    "lift_soft_kd_mse": ("LiftViT", {"logit": (0.9, None), "lift": (0.2, "mse")}, 0.1),
    "wide_last_mse": ("WideLastViT", {"wide_last": (0.2, "mse")}, 1.0),
    "wide_last_soft_kd": ("WideLastViT", {"logit": (0.9, None)}, 0.1),
    "wide_last_soft_kd_spectral": ("WideLastViT", {"logit": (0.9, None), "wide_last": (0.2, "spectral")}, 0.1),
    "lift_no_teacher": ("LiftViT", {}, 1.0),
    "wide_last_no_teacher": ("WideLastViT", {}, 1.0),
    "uniform_wide": ("TimmStudent", {}, 1.0),
}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a thousand classes of one tiny image each."""
    root = tmp_path_factory.mktemp("imagenet")
    stream = io.BytesIO()
    Image.new("RGB", (20, 20), (90, 120, 150)).save(stream, "JPEG")
    for split in ("train", "val"):
        for i in range(1000):
            folder = root / split / f"n{i:08d}"
            folder.mkdir(parents=True)
            (folder / "0.jpg").write_bytes(stream.getvalue())
    return root


@functools.cache
def _teacher(given: str) -> Any:
    return create_timm_model(**json.loads(given))


def _build(name: str, imagenet: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> SimpleNamespace:
    built = SimpleNamespace()

    def keep(trainer: Any, model: Any, datamodule: Any, images_per_second: float | None = None) -> None:
        built.module, built.data, built.callbacks = model, datamodule, trainer.callbacks

    monkeypatch.setattr("kdvit.cli.trainer.Trainer.check", keep)
    monkeypatch.setattr("kdvit.cli.fit.describe", lambda *_: "")
    made_once = "kdvit.models.teacher.create_timm_model"  # of 47 million parameters
    monkeypatch.setattr(made_once, lambda **given: _teacher(json.dumps(given)))
    given = ["--data.init_args.root", str(imagenet), "--data.init_args.num_workers", "0"]
    built.yaml = yaml.safe_load((packaged_configs() / f"{name}.yaml").read_text())
    if "teacher" in built.yaml["model"]:
        given += ["--model.teacher.init_args.pretrained", "false"]
    main(["check", "--config", f"{name}.yaml", *given, *more])
    return built


def test_what_else_the_authors_scripts_can_be_asked_for_is_an_option(imagenet: Path, monkeypatch) -> None:
    control = ["--model.student.init_args.model_args", "{embed_dim: 219}", "--model.optimizer.decay_embeddings", "true"]
    erasing = ["--data.init_args.erasing_mode", "rand", "--data.init_args.erasing_count", "3"]
    run = _build("feature", imagenet, monkeypatch, *control, *erasing)
    attention, (theirs,) = run.module.student.model.blocks[0].attn, run.module.distillers["feature"].widths
    assert (attention.num_heads, attention.head_dim, theirs) == (3, 73, (219, 384))
    _assert_groups(run.module, plain=False)
    transform = run.data.train_transform.transforms[-1]
    assert (transform.rand_color, transform.max_count) == (True, 3)
    lift = "--model.distillers.lift.init_args"
    layers = [f"{lift}.lifted_blocks", "3", f"{lift}.growth", "exponential", f"{lift}.teacher_layer", "[19, 21, 23]"]
    distiller = _build("lift", imagenet, monkeypatch, *layers).module.distillers["lift"]
    assert (distiller.student_layers, distiller.teacher_layers) == ((-3, -2, "lift"), (19, 21, 23))
    assert [len(each[0].weight) for each in distiller.projectors] == [241, 304]


TABLE = ("supervised", "feature", "logit", "lift", "wide_last", "uniform_wide")  # the others vary them by a term


@pytest.mark.parametrize(
    "name", [each if each in TABLE else pytest.param(each, marks=pytest.mark.slow) for each in RUNS]
)
def test_a_published_run_is_built_as_published(name: str, imagenet: Path, monkeypatch) -> None:
    run = _build(name, imagenet, monkeypatch)
    module, data, trainer = run.module, run.data, run.yaml["trainer"]
    remedy, terms, task_weight = RUNS[name]

    assert type(module.student).__name__ == remedy
    assert module.num_classes == 1000
    assert {key: (each.weight, getattr(each, "loss", None)) for key, each in module.distillers.items()} == terms
    assert module.task_weight == pytest.approx(task_weight)
    assert module.label_smoothing == 0.1
    if "logit" in terms:
        assert module.distillers["logit"].temperature == 1.0
    if terms:
        assert type(module.teacher.network.model).__name__ == "Cait"
        assert module.teacher.network.depth == 24
        assert not module.teacher.converts_size
        assert not module.teacher.converts_values
    if "feature" in terms:
        assert module.distillers["feature"].projector == "pool"
    if remedy != "TimmStudent":
        layer = {"LiftViT": "lift", "WideLastViT": "wide_last"}[remedy]
        assert module.student.output_shapes([layer]).features == ((384, 14, 14),)
    assert all(getattr(block, "drop_prob", 0.0) == 0.0 for block in module.student.modules())

    assert (trainer["max_epochs"], trainer["devices"], data.batch_size) == (300, 4, 512)
    assert trainer["devices"] * data.batch_size == 2048
    assert trainer["precision"] == "16-mixed"
    assert "gradient_clip_val" not in trainer
    (ema,) = (callback for callback in run.callbacks if type(callback).__name__ == "StudentEMA")
    assert ema.decay == 0.99996
    assert (data.mixup, data.cutmix, data.repeats) == (0.0, 0.0, 3)
    _assert_transforms(data)
    _assert_learning_rates(module)
    _assert_groups(module, plain=name in ("supervised", "feature", "logit"))
    _assert_first_weights(module.student.model, remedy)


def _assert_transforms(data: Any) -> None:
    names = [type(step).__name__ for step in data.train_transform.transforms]
    policy = ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment"]
    assert names == [*policy, "MaybeToTensor", "Normalize", "RandomErasing"]
    crop, flip, augment, _, normalise, erasing = data.train_transform.transforms
    assert (crop.size, crop.interpolation.value) == ((224, 224), "bicubic")
    assert (crop.scale, crop.ratio, flip.p) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (augment.num_layers, len(augment.ops)) == (2, 15)
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in augment.ops} == {(9, 0.5, 0.5)}
    assert normalise.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert normalise.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert (erasing.probability, erasing.rand_color, erasing.per_pixel) == (0.25, False, True)
    resize, centre, *_ = data.eval_transform.transforms
    assert (resize.size, resize.interpolation.value, centre.size) == (256, "bicubic", (224, 224))


def _assert_learning_rates(module: Any) -> None:
    optimizer = module.optimizer_options.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}], 2048)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["eps"] == 1e-8
    assert module.optimizer_options.weight_decay == 0.05
    schedule = module.schedule_options.build(optimizer, RunLength(300))
    peak = 5e-4 * 2048 / 512
    for epoch in range(300):
        schedule.set(epoch, step=0)
        late = max(epoch - 1, 0)  # the authors' loop moves the rate after an epoch
        warm = 1e-6 + late * (peak - 1e-6) / 5
        cosine = 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * late / 300)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(warm if late < 5 else cosine, rel=1e-9)


def _assert_groups(module: Any, plain: bool) -> None:
    """Checks what is decayed: position embedding and class token too, but for plain students."""
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(train_dataloader=lambda: SimpleNamespace(batch_size=512)),
        world_size=4,
        accumulate_grad_batches=1,
        max_epochs=300,
        max_steps=-1,
        callbacks=[],
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        precision_plugin=None,
        scaler=None,
    )
    built = optimizer_and_schedule(
        trainer, (module.student, module.distillers), module.optimizer_options, module.schedule_options
    )
    groups = built["optimizer"].param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    embeddings = ("pos_embed", "cls_token") if plain else ()
    for name, parameter in module.student.named_parameters():
        exempt = parameter.ndim == 1 or name.endswith(embeddings)
        assert decay[id(parameter)] == (0.0 if exempt else 0.05), name


def _assert_first_weights(model: Any, remedy: str) -> None:
    stds = {
        "TimmStudent": {"cls_token": 1e-6, "head.weight": 0.02, "head.bias": 0.0},
        "LiftViT": {"cls_token": 1e-6, "head.weight": 0.0294, "head.bias": 0.0296},
        "WideLastViT": {"cls_token": 0.02, "head.weight": 0.02, "head.bias": 0.0, "blocks.11.0.weight": 0.02},
    }
    for name, std in stds[remedy].items():
        assert model.state_dict()[name].std().item() == pytest.approx(std, rel=0.2), name


@pytest.mark.slow
def test_repeated_augmentation_at_the_size_of_imagenet() -> None:
    samplers = [ViewSampler(1_281_167, training=True, repeats=3, num_replicas=4, rank=rank) for rank in range(4)]
    per_rank = 1_281_167 // 256 * 256 // 4
    assert [len(sampler) for sampler in samplers] == [per_rank] * 4
    assert per_rank // 512 == 625  # steps an epoch, as in DeiT at this batch
    views = [view for step in zip(*(list(sampler)[:3000] for sampler in samplers), strict=True) for view in step]
    counts: dict[int, set[int]] = {}
    for view in views:
        counts.setdefault(view.image, set()).add(view.repeat)
    assert all(repeats == {0, 1, 2} for repeats in counts.values())
