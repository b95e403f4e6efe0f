"""k-NN and the linear probe against scikit-learn's, alone and in several processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from kdvit import load_student
from kdvit.analysis import ProbeOptions, probe
from kdvit.analysis.probes import LabelledFeatures, fit_linear, knn_hits, nearest, votes
from kdvit.analysis.run import analysis_trainer
from kdvit.cli import main
from kdvit.cli.config_files import packaged_configs
from kdvit.cli.lookup import find_networks
from kdvit.data import Digits
from kdvit.models import TimmStudent
from tests import tiny
from tests.runs import SHORT, fit, numbers

CLASSES = 4


def features(count: int, seed: int) -> LabelledFeatures:
    """Returns features of overlapping classes, of very unlike scales, one of them constant."""
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, CLASSES, count)
    centres = np.random.default_rng(0).normal(size=(CLASSES, 6))
    numbers = (centres[targets] + draw.normal(size=(count, 6))) * [1, 10, 0.1, 3, 1, 1] + [0, 100, 0, 0, 5, 0]
    found = LabelledFeatures(count, 7)
    found.add(torch.tensor(np.hstack([numbers, np.full((count, 1), 0.3)])).float(), torch.tensor(targets))
    return found


def arrays(found: LabelledFeatures) -> tuple[np.ndarray, np.ndarray]:
    return found.features.double().numpy(), found.targets.numpy()


@pytest.fixture(scope="module")
def parts() -> tuple[LabelledFeatures, LabelledFeatures]:
    return features(300, 1), features(400, 2)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (1000, 0.07), (20, 0.005)])
def test_knn_votes_as_scikit_learns_with_dinos_weights(parts, k: int, temperature: float) -> None:
    """Also where exp(1 / temperature) is beyond float32."""
    train, val = parts
    options = ProbeOptions(k, temperature=temperature)
    theirs = KNeighborsClassifier(min(k, 300), metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    expected = theirs.fit(*arrays(train)).predict_proba(arrays(val)[0])
    given = votes(*nearest(train, val.features, k), CLASSES, options.temperature)
    np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-4)
    hits = knn_hits(analysis_trainer(accelerator="cpu"), train, val, CLASSES, options)
    assert hits == (expected.argmax(1) == val.targets.numpy()).sum()


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_the_linear_probe_is_scikit_learns_logistic_regression(parts, c: float) -> None:
    train, val = parts
    found = fit_linear(analysis_trainer(accelerator="cpu"), train, CLASSES, c)
    scaler = StandardScaler().fit(arrays(train)[0])
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10000)
    theirs.fit(scaler.transform(arrays(train)[0]), train.targets.numpy())
    np.testing.assert_allclose(found.weight, theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())
    ours = found.logits(val.features).softmax(dim=1)
    expected = theirs.predict_proba(scaler.transform(arrays(val)[0]))
    np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_it_needs_a_class_for_each_image_and_finite_features() -> None:
    found = LabelledFeatures(2, 3)
    with pytest.raises(ValueError, match="needs images with one class each, and there are some without"):
        found.add(torch.zeros(2, 3), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="features of an image are not finite"):
        found.add(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"k must be 1 or more, temperature and c above 0; got 0, 0\.07 and 1\.0"):
        ProbeOptions(0).check()


SMALL = ["--data", "Digits", "--k", "5", "--num_workers", "0", "--trainer.accelerator", "cpu", "--out", "probe.json"]


@pytest.mark.filterwarnings("ignore")
def test_the_command_sets_networks_side_by_side(demo_teacher: str, capsys) -> None:
    """Of the exported teacher and, as a config's, of the untrained student; the former as scikit-learn scores it."""
    folder = demo_teacher.removeprefix("local-dir:")
    main(["probe", folder, "demo/plain.yaml", *SMALL])
    table, noise = capsys.readouterr()
    assert "it/s" not in table + noise
    assert "1,297 images to learn from, 500 held out, of Digits.\n" in table
    teacher, plain = json.loads(Path("probe.json").read_text())["networks"]
    assert (teacher["name"], plain["name"]) == (folder, "demo/plain: student")
    assert (teacher["width"], plain["width"]) == (64, 16)
    for each in (teacher, plain):
        assert f"{each['knn']:.2%}        {each['linear']:.2%}" in table
    network = load_student(folder)
    data = Digits(mean=network.image_format.mean, std=network.image_format.std)
    found = []
    for split in ("train", "val"):
        batches = list(data.plain_dataloader(split))
        with torch.no_grad():
            pooled = [network(batch.image, ["pooled"]).features[0].flatten(1) for batch in batches]
        found.append((torch.cat(pooled).numpy(), torch.cat([batch.target for batch in batches]).numpy()))
    (train, targets), (val, expected) = found
    knn = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(train, targets)
    assert teacher["knn"] == pytest.approx(knn.score(val, expected), abs=0.003)
    scaler = StandardScaler().fit(train)
    linear = LogisticRegression(max_iter=1000).fit(scaler.transform(train), targets)
    assert teacher["linear"] == pytest.approx(linear.score(scaler.transform(val), expected), abs=0.005)


def test_a_network_comes_back_as_it_was_and_a_layer_can_be_named() -> None:
    network = TimmStudent(**{**tiny.STUDENT, "num_classes": 10, "img_size": 8}).train()
    trainer = analysis_trainer(accelerator="cpu", enable_progress_bar=False, callbacks=[])
    by_layer = [probe(network, Digits(batch_size=256), ProbeOptions(layer=layer), trainer) for layer in ("pooled", 0)]
    assert by_layer[0].knn != by_layer[1].knn
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(ValueError, match="has no layer 9"):
        probe(network, Digits(), ProbeOptions(layer=9), trainer)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["no_such_net", "--data", "Digits"], "has no model 'no_such_net'"),
        (["vit_tiny_patch16_224", "--data", "nowhere"], "vit_tiny_patch16_224: Expected layout: ROOT/train/CLASS"),
        (["vit_tiny_patch16_224", "--data", "Digits", "--layer", "99"], "vit_tiny_patch16_224: .*has no layer 99"),
        (
            ["vit_tiny_patch16_224", "--data", "Digits", "--trainer.strategy", "x"],
            "invalid strategy name: `strategy='x'`",
        ),
    ],
)
def test_a_mistake_is_answered_in_one_line(args: list[str], text: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["probe", *args, "--pretrained", "false", "--num_workers", "0", "--trainer.accelerator", "cpu"])
    assert re.search(text, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
def test_a_config_keeps_the_weights_of_its_exported_teacher_and_gives_its_networks_the_name_of_its_run(
    demo_teacher: str,
) -> None:
    config = yaml.safe_load((packaged_configs() / "demo" / "lift.yaml").read_text())
    config["model"]["teacher"]["init_args"]["arch"] = demo_teacher
    Path("run").mkdir()
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    networks = dict(find_networks("run/config.yaml"))  # pretrained false: random weights for names of timm
    assert list(networks) == ["run: student", "run: teacher"]
    expected = load_student(demo_teacher.removeprefix("local-dir:")).state_dict()
    found = networks["run: teacher"].state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_teacher_that_lacks_the_students_layer_is_probed_at_its_own(demo_teacher: str, caplog) -> None:
    probe = ["--probe.images", "Digits", "--probe.k", "3", "--probe.every_n_epochs", "9", "--probe.layer", "lift"]
    fit("lift", demo_teacher, *SHORT, "--trainer.max_epochs", "1", *probe)
    (said,) = (each for each in caplog.messages if "is probed at" in each)
    assert said.startswith("The teacher is probed at 'pooled': TimmTeacher has no layer 'lift'.")
    (score,) = numbers("run", "teacher/knn_acc1")
    assert 0 < score <= 1
