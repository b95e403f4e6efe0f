"""The report as one page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdvit.analysis.layer_report import bandwidths
from kdvit.analysis.report import FIRST, Cells, NetworkReport, Report
from kdvit.analysis.rule import RULE
from kdvit.analysis.variants import shown
from kdvit.pages import render

SOURCES = (
    "features in a file",
    "each went through the network once, in {}",
    "each went through the network twice, in {}, as the tokens did not fit into the memory that was allowed",
)
"""How images reached a network, by its passes; with its precision."""


def page(report: Report, pictures: Mapping[str, Path]) -> str:
    """Returns the HTML page of a report.

    Args:
        report: The report.
        pictures: PNG files by the name of the figure; they are written into the page.
    """
    ranks = {
        **FIRST,
        **report.level_columns(),
        "rotation": "{0[rotation_0.95]:.2f}",
        "spread": "{0[participation]:.3f}",
        "in shared axes": "{0[participation_shared]:.3f}",
    }
    sources = [
        f"{each.face.images:,} images of {each.data}: {SOURCES[each.passes].format(each.precision)}."
        for each in report.networks
    ]
    return render(
        Path(__file__).with_name("page.html.jinja"),
        pictures,
        report=report,
        sources=list(dict.fromkeys(sources)),
        rule=RULE,
        ranks=ranks,
        sep=_sep_table(report),
        networks=_networks(report.networks),
    )


def _sep_table(report: Report) -> Cells:
    head = (
        *("network", "layer", "energy", "mean curve", "permutations", "Gaussian", "channel mean"),
        *("of an image", "permuted minus own"),
    )
    rows = []
    for network, layer in report.layers():
        of_images = [(shown(own, ".4f"), shown(added, "+.4f")) for own, added in layer.bandwidths]
        for i, (level, of) in enumerate(bandwidths(layer).items()):
            figures = (
                f"{of['tokens']:.3f}",
                f"{of['permuted_min']:.3f} to {of['permuted_max']:.3f}",
                f"{of['gaussian']:.3f}",
                f"{100 * layer.dc_share:.1f} %",
                *(of_images[i] if of_images else ("", "")),
            )
            rows.append((network.name, layer.layer, f"{100 * float(level):g} %", *figures))
    return head, rows


def _networks(networks: list[NetworkReport]) -> Cells:
    head = ("network", "kind", "parameters", "GFLOP", "input", "weights (SHA-256)")
    rows = []
    for each in networks:
        size = "" if each.image_format is None else " x ".join(map(str, each.image_format.size))
        cost = (f"{each.parameters:,}", f"{each.flops / 1e9:.3g}") if each.parameters else ("", "")
        rows.append((each.name, each.kind, *cost, size, each.weights_sha256[:16]))
    return head, rows
