"""Images routed to several bases: what they need, against NumPy, and beside random routing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdvit.analysis import Options, analyze, measure
from kdvit.analysis.subspaces import cluster, routed_dimensions
from kdvit.cli import main
from tests.tiny import TinyData, student

pytestmark = pytest.mark.filterwarnings("ignore:.*images are few:UserWarning")


def _kinds(images: int = 40, kinds: int = 4, rank: int = 5, width: int = 24) -> tuple[torch.Tensor, np.ndarray]:
    """Images of kinds, each with a mean and a subspace of its own, and their kinds."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    kind = torch.randperm(images, generator=generator) % kinds
    bases = torch.stack([axes[rank * k : rank * (k + 1)] for k in range(kinds)])
    return (torch.randn(images, 30, rank, generator=generator).double() + 1) @ bases[kind], kind.numpy()


def _dimensions(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Shared axes for 95 % of each image, in the axes of its cluster."""
    needed = np.empty(len(x), dtype=int)
    for label in np.unique(labels):
        mine = x[labels == label]
        axes = np.linalg.svd(mine.reshape(-1, x.shape[2]))[2].T
        energy = ((mine @ axes) ** 2).sum(1).cumsum(1)
        needed[labels == label] = (energy < 0.95 * energy[:, -1:]).sum(1) + 1
    return needed


def test_kinds_of_images_need_the_axes_of_their_kind_alone() -> None:
    tokens, kind = _kinds()
    numbers = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1)) + 7
    parts = list(zip(tokens.split(9), numbers.split(9), strict=True))
    routed = routed_dimensions(parts, 5)
    assert [each.bases for each in routed] == [1, 2, 4, 5]
    of_all, of_kinds = _dimensions(tokens.numpy(), np.zeros(len(tokens))), _dimensions(tokens.numpy(), kind)
    assert routed[0].by_mean_token == routed[0].at_random
    assert routed[0].by_mean_token.p99.value == np.percentile(of_all, 99)
    four = routed[2]
    assert (four.by_mean_token.p99.value, four.by_mean_token.median) == (
        np.percentile(of_kinds, 99),
        np.median(of_kinds),
    )
    assert four.by_mean_token.p99.high <= 5 < 12 < four.at_random.p99.low
    ordered = numbers.argsort()
    assert routed_dimensions([(tokens[ordered], numbers[ordered])], 5) == routed


def test_images_of_one_kind_gain_nothing_on_random_routing() -> None:
    tokens = torch.randn(60, 40, 16, generator=torch.Generator().manual_seed(0))
    for each in routed_dimensions([(tokens, torch.arange(60))], 4):
        assert each.at_random.p99.low <= each.by_mean_token.p99.value <= each.at_random.p99.high
        assert each.by_mean_token.median == pytest.approx(each.at_random.median, abs=0.5)


def test_clusters_are_those_of_lloyds_algorithm_at_rest() -> None:
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = cluster(points, 6, torch.Generator().manual_seed(0)).numpy()
    centres = np.stack([points.numpy()[labels == label].mean(0) for label in range(6)])
    distances = np.linalg.norm(points.numpy()[:, None] - centres, axis=2)
    np.testing.assert_array_equal(distances.argmin(1), labels)


def test_outliers_do_not_hide_the_kinds() -> None:
    tokens, kind = _kinds()
    tokens[:, 0] = 100 * tokens.norm(dim=2).mean() * torch.eye(24)[3]
    variant, routed = measure(tokens, Options(permutations=1, subspaces=4)).subspaces
    assert variant == "unit"
    at_one = tokens / tokens.norm(dim=2, keepdim=True)
    assert routed[-1].by_mean_token.p99.value == np.percentile(_dimensions(at_one.numpy(), kind), 99)
    assert measure(tokens, Options(permutations=1, subspaces=4), robust=False).subspaces is None


def test_the_command_shows_routed_images_in_table_page_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    tokens, kind = _kinds()
    np.save("kinds.npy", tokens)
    options = ["--permutations", "2", "--out", "out"]
    main(["analyze", "--model", "kinds.npy", "--subspaces", "4", *options])
    found = json.loads(Path("out/report.json").read_text())["networks"][0]["layers"][0]["subspaces"]
    assert (found["variant"], [each["bases"] for each in found["routed"]]) == ("raw", [1, 2, 4])
    expected = np.percentile(_dimensions(tokens.numpy(), kind), 99)
    assert found["routed"][2]["by_mean_token"]["p99"]["value"] == expected
    said = capsys.readouterr().out
    assert "where images are routed to several bases" in said
    assert f"<td>{expected:.0f} [{expected:.0f}, {expected:.0f}]</td>" in Path("out/report.html").read_text()
    main(["analyze", "--model", "kinds.npy", *options])
    assert "several bases" not in Path("out/report.html").read_text()
    for args, message in (
        (["41"], "41 bases need as many images or more, got 40"),
        (["-1"], "subspaces: must be 0 or more, got -1"),
    ):
        with pytest.raises(SystemExit):
            main(["analyze", "--model", "kinds.npy", "--subspaces", *args, *options])
        assert message in capsys.readouterr().err


def test_routing_needs_all_tokens_in_memory() -> None:
    with pytest.raises(ValueError, match=r"do not fit into memory: 1e-06 GB a process\. Allow more, take fewer images"):
        analyze(student(), TinyData().val_dataloader(), options=Options(permutations=1, subspaces=2), memory=1e-6)
