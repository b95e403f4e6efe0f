"""Networks and images in, a report out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.utils.data import DataLoader
from torchmetrics import Metric

from kdvit.analysis import Options, Report, analyze, as_tokens, measure, p99
from kdvit.analysis.geometry import LayerGeometry
from kdvit.analysis.plots import figures
from kdvit.analysis.run import analysis_trainer, chosen_layers
from kdvit.analysis.save import save
from kdvit.models import TimmNetwork
from kdvit.structures import Batch
from tests.tiny import FORMAT, TinyData, student, teacher

FEW = Options(permutations=2)
pytestmark = pytest.mark.filterwarnings("ignore:.*images are few:UserWarning")


def _loader(images: torch.Tensor, batch_size: int = 4) -> DataLoader:
    return DataLoader(torch.utils.data.TensorDataset(images), batch_size=batch_size)


FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 3},
    "cait_xxs24_224": {"img_size": 32, "depth": 3},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, "depth": 2},
    "vit_base_patch16_clip_224": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 0},
    "vit_base_patch16_224.mae": {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 0},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)},
    "convnext_atto": {},
    "resnet18": {},
}


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_patch_tokens_of_every_family_are_measured_at_every_layer(arch: str) -> None:
    model = timm.create_model(arch, **FAMILIES[arch]).eval()
    size = FAMILIES[arch].get("img_size", 64)
    images = torch.randn(5, 3, size, size)
    network = TimmNetwork(model)
    network.image_format = network.image_format._replace(size=(size, size))
    report = analyze(network, _loader(images), "all", FEW)
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True)
    assert len(report.networks[0].layers) == len(maps) == network.depth
    for layer, feature in zip(report.networks[0].layers, maps, strict=True):
        expected = measure(as_tokens(feature), FEW)
        assert (layer.tokens, layer.width) == (feature.shape[2] * feature.shape[3], feature.shape[1])
        np.testing.assert_allclose(layer.svd_energy, expected.svd_energy, atol=1e-5)
        np.testing.assert_allclose(layer.pca_energy, expected.pca_energy, atol=1e-4)
        np.testing.assert_allclose(layer.sep(), expected.sep(), atol=1e-5)


def test_without_memory_the_images_pass_twice_and_no_number_changes() -> None:
    pair, loader = {"teacher": teacher(), "student": student("lift")}, TinyData().val_dataloader()
    kept, twice = (analyze(pair, loader, options=FEW, memory=memory) for memory in (1.0, 0.0))
    assert [[network.passes for network in report.networks] for report in (kept, twice)] == [[1, 1], [2, 2]]
    for name, curve in kept.curves().items():
        np.testing.assert_array_equal(twice.curves()[name], curve)


@pytest.mark.parametrize("robust", [False, True])
def test_memory_counts_every_number_that_is_kept_of_an_image(robust: bool) -> None:
    geometry = LayerGeometry(12, FEW, robust)
    geometry.update(torch.randn(200, 7, 12))
    geometry.find_axes()
    geometry.update(torch.randn(200, 7, 12))
    metrics = [(name, each) for name, each in geometry.named_modules() if isinstance(each, Metric)]
    kept = [
        part.nbytes
        for name, metric in metrics
        for state in metric.metric_state.values()
        for part in (state if isinstance(state, list) and name != "shuffled" else [])
    ]
    assert sum(kept) == 200 * geometry.curve_bytes(7)


def test_curves_beyond_the_memory_are_told_beforehand() -> None:
    with pytest.warns(UserWarning, match=r"The curves of 12 images take .*e-05 GB a process, and are kept in any"):
        analyze(teacher(), _loader(torch.randn(12, 3, 16, 16)), options=FEW, memory=1e-6)


@pytest.mark.filterwarnings("ignore:Your `test_dataloader`'s sampler has shuffling enabled")
def test_two_passes_over_a_shuffled_loader_tell_the_images_apart() -> None:
    loader = TinyData().val_dataloader()
    shuffled = DataLoader(loader.dataset, batch_size=7, shuffle=True, collate_fn=loader.collate_fn)
    network = teacher()
    twice = analyze(network, shuffled, options=FEW, memory=0).networks[0].face
    expected = analyze(network, loader, options=FEW).networks[0].face
    np.testing.assert_allclose(twice.svd_energy, expected.svd_energy, atol=1e-6)
    np.testing.assert_allclose(twice.pca_energy, expected.pca_energy, atol=1e-6)


def test_a_list_of_batches_is_taken_and_a_generator_is_refused() -> None:
    batches = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    assert analyze(teacher(), batches, options=FEW).networks[0].face.images == 12
    with pytest.raises(TypeError, match=r"batches that can be read twice.* got a generator"):
        analyze(teacher(), (batch for batch in batches), options=FEW)


def test_a_network_comes_back_as_it_was() -> None:
    network = student()
    network.train()
    next(network.parameters()).requires_grad_(False)
    before = [parameter.requires_grad for parameter in network.parameters()]
    modes = [module.training for module in network.modules()]
    analyze(network, TinyData().val_dataloader(), options=FEW)
    assert [parameter.requires_grad for parameter in network.parameters()] == before
    assert [module.training for module in network.modules()] == modes


def test_a_layer_that_only_the_student_has_is_asked_of_the_student() -> None:
    report = analyze({"t": teacher(), "s": student("lift")}, TinyData().val_dataloader(), ["lift", 0], FEW)
    assert [[layer.layer for layer in network.layers] for network in report.networks] == [
        ["0", "3"],
        ["0", "2", "lift"],
    ]


def test_the_teacher_gets_the_images_in_its_own_size_and_normalisation() -> None:
    pair = {"student": student(), "teacher": teacher(img_size=32)}
    pair["teacher"].image_format = FORMAT._replace(size=(32, 32), mean=(0.1, 0.2, 0.3))
    report = analyze(pair, TinyData().val_dataloader(), options=FEW)
    assert [network.face.tokens for network in report.networks] == [16, 64]


def test_layers_are_asked_for_like_those_of_a_distiller() -> None:
    assert chosen_layers(student(), None) == (-1,)
    assert chosen_layers(student("lift"), None) == (-1, "lift")
    assert chosen_layers(student("wide_last"), None) == ("wide_last",)
    assert chosen_layers(student("lift"), "all") == (0, 1, 2, "lift")
    assert chosen_layers(student(), [0.34, 0]) == (0, 0.34, -1)  # the last is always there
    assert chosen_layers(student("lift"), [0]) == (0, -1, "lift")
    with pytest.raises(ValueError, match="has no layer 7"):
        chosen_layers(student(), [7])


def test_bfloat16_runs_the_network_and_not_the_moments() -> None:
    network = teacher()
    loader = TinyData().val_dataloader()
    exact = analyze(network, loader, options=FEW).networks[0].face
    half = analyze(network, loader, options=FEW, trainer=_quiet(precision="bf16-mixed")).networks[0].face
    assert half.pca_spectrum.dtype == np.float64
    assert 0 < np.abs(half.svd_energy - exact.svd_energy).max() < 0.02
    assert half.pca_energy[:, -1] == pytest.approx(1, abs=1e-12)


def _quiet(**more: object) -> object:
    return analysis_trainer(**more, callbacks=[], enable_progress_bar=False)


@pytest.mark.filterwarnings("ignore:Total length of")
def test_a_loader_without_images_and_few_images_are_said() -> None:
    with pytest.raises(ValueError, match="There is no image to analyse"):
        analyze(teacher(), _loader(torch.randn(0, 3, 16, 16)), options=FEW)
    with pytest.warns(UserWarning, match="5 images are few.*The paper has 1,000"):
        analyze(teacher(), _loader(torch.randn(5, 3, 16, 16)), options=FEW)


@pytest.fixture
def report() -> Report:
    pair = {"<b>teacher</b>": teacher(), "student": student("lift")}
    return analyze(pair, TinyData().val_dataloader(), "all", FEW, data="<script>alert(1)</script>")


def test_a_report_is_written_as_page_tables_numbers_curves_and_figures(report: Report, tmp_path: Path) -> None:
    files = {file.name for file in save(report, tmp_path / "out")}
    drawn = {f"{name}.{kind}" for name in ("ranks", "energy", "sep", "depth") for kind in ("png", "pdf")}
    tables = {f"tables.{kind}" for kind in ("csv", "md", "tex")}
    assert files == {"report.html", "report.json", "curves.npz"} | tables | drawn
    assert files == {file.name for file in (tmp_path / "out").iterdir()}
    numbers = json.loads((tmp_path / "out/report.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    layers = numbers["networks"][1]["layers"]
    assert [layer["layer"] for layer in layers] == ["0", "1", "2", "lift"]
    assert [layer["width"] for layer in layers] == [16, 16, 16, 24]
    face = report.networks[1].face
    assert layers[-1]["svd_rank"]["0.95"]["mean"] == face.svd_rank(0.95).mean()
    with (tmp_path / "out/tables.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 8
    assert float(rows[-1]["pca_dimension_p99_0.95"]) == layers[-1]["pca_dimension"]["0.95"]["p99"]
    curves = np.load(tmp_path / "out/curves.npz")
    np.testing.assert_array_equal(curves["student/lift/sep"], face.sep())
    assert curves["student/lift/svd_rank"].shape == (40, 4)


def test_a_remedys_map_alone_makes_no_depth() -> None:
    loader = TinyData().val_dataloader()
    assert "depth" not in figures(analyze({"student": student("lift")}, loader, options=FEW))
    assert "depth" in figures(analyze(student("lift"), loader, [0], FEW))


@pytest.mark.slow
def test_tables_for_a_paper_have_its_figures_beside_ones_own(report: Report, tmp_path: Path) -> None:
    teacher, student = report.networks
    cait = teacher._replace(name="my_cait", kind="TimmTeacher cait_s24_224.fb_dist_in1k", layers=teacher.layers[-2:])
    last = student._replace(layers=student.layers[-1:], compared=0)
    own = report._replace(networks=[cait._replace(compared=1), last])
    save(own, tmp_path, against=True)
    table = (tmp_path / "tables.md").read_text().splitlines()
    assert table[0] == "| network | layer | N x D | SVD rank p99 at 80/90/95/99 % | PCA dim p99 at 80/90/95/99 % |"
    assert [line.split(" | ")[0] for line in table[2:]] == ["| my_cait"] * 2 + ["| CaiT-S24 (paper)", "| student"]
    assert table[4] == "| CaiT-S24 (paper) | last | N x 384 | 14 / 34 / 61 / 121 | 167 / 247 / 302 / 359 |"
    ranks = " / ".join(f"{p99(teacher.face.svd_rank(level)):.0f}" for level in (0.8, 0.9, 0.95, 0.99))
    assert ranks in table[3]
    latex = (tmp_path / "tables.tex").read_text()
    assert r"my\_cait & 3 & 16 x 24 & " + ranks in latex
    assert r"at 80/90/95/99 \%" in latex
    save(own, tmp_path)
    assert "paper" not in (tmp_path / "tables.md").read_text()


def test_names_on_the_page_are_escaped_and_nothing_is_fetched(report: Report, tmp_path: Path) -> None:
    save(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "<b>teacher" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count('src="data:image/png;base64,') == 4
    assert page.count("src=") == 4
    assert "http" not in page


def test_the_weights_are_fingerprinted() -> None:
    network = teacher()
    loader = TinyData().val_dataloader()
    one, same = (analyze(network, loader, options=FEW).networks[0].weights_sha256 for _ in range(2))
    with torch.no_grad():
        next(network.parameters()).flatten()[0] += 1e-3
    assert one == same != analyze(network, loader, options=FEW).networks[0].weights_sha256


def test_images_without_an_index_are_told_by_their_place_whatever_the_batch_size() -> None:
    images, network = torch.randn(90, 3, 16, 16), student()
    indexed = [
        Batch(part, torch.zeros(len(part)).long(), numbers)
        for part, numbers in zip(images.split(32), torch.arange(90).split(32), strict=True)
    ]
    expected = analyze(network, indexed, options=FEW).networks[0].face
    for batches in (images.split(3), images.split(90)):
        face = analyze(network, list(batches), options=FEW).networks[0].face
        assert face.ranks.spread().shuffled == expected.ranks.spread().shuffled
        np.testing.assert_allclose(face.participation, expected.participation, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [("TimmStudent", "DeiT-Small"), ("LiftViT", None), ("WideLastViT", None)])
def test_the_papers_figures_stand_behind_the_architecture_alone(kind: str, name: str | None) -> None:
    (network,) = analyze(student(), TinyData().val_dataloader(), options=FEW).networks
    report = Report([network._replace(kind=f"{kind} deit_small_patch16_224.fb_in1k")], FEW)
    rows = report.publishable(against=True)[1]
    assert [row[0] for row in rows[1:]] == ([f"{name} (paper)"] if name else [])
