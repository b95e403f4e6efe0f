"""The report as one page that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from kdvit.analysis.geometry import BANDWIDTH_LEVELS, bandwidths, p99

if TYPE_CHECKING:
    from kdvit.analysis.report import NetworkReport, Report

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.82rem; } .scroll { overflow-x: auto; }
th, td { padding: 0.25rem 0.4rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #444; font-size: 0.92rem; }
.advice { background: #eef5fb; border-left: 4px solid #0072B2; padding: 0.6rem 1rem; }
code { background: #f2f2f2; padding: 0 0.2rem; }
"""
CAPTIONS = {
    "ranks": (
        "How many directions hold 95 % of an image's energy",
        "Blue: of one image alone (per-image SVD). Orange: of the axes that all images share (dataset PCA). Dashed: the 99th "
        "percentile. Blue far left of orange means that every image is low-rank, but each in a subspace of its own: an "
        "encoding mismatch for a student whose width is below the orange line.",
    ),
    "energy": (
        "Energy in the leading directions",
        "Lines: the median image; bands: 10 to 90 % and 1 to 99 % of the images. Dotted: 95 %. Blue: each image in its own "
        "best directions; orange: in the axes that all share.",
    ),
    "sep": (
        "Spectral Energy Pattern (SEP), with its controls",
        "The cumulative share of a token's energy over the frequencies along its channels; below, the same minus the "
        "diagonal. What it can show: structure along the channel axis, where the tokens' curve leaves the band of the "
        "permuted channels. What it cannot show: how many channels a token needs. Channels have no natural order, and the "
        "spectrum of a real vector is symmetric, so that tokens without such structure lie on the diagonal, whether they are "
        "noise, of full rank or confined to ten directions; the controls lie there too. A curve on the diagonal is therefore "
        "no evidence of a full use of the channels. A step at the left is the channel mean (frequency 0).",
    ),
    "depth": (
        "Over the depth",
        "99th percentiles of SVD rank (solid) and PCA dimension (dashed) at 95 % of the energy, by share of the depth. A "
        "remedy's map stands behind the last block.",
    ),
}


def page(report: Report, pictures: Mapping[str, Path]) -> str:
    """Returns the HTML page of a report.

    Args:
        report: The report.
        pictures: PNG files by the name of the figure; they are written into the page.
    """
    names = ", ".join(network.name for network in report.networks)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f'<link rel="icon" href="data:,"><title>kdvit analyze: {escape(names)}</title><style>{STYLE}</style></head><body>',
        f"<h1>{escape(names)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in dict.fromkeys(map(_source, report.networks))),
        *(f"<p>{escape(note)}</p>" for note in report.notes),
        *_advice(report),
        "<h2>Ranks</h2>",
        _ranks_table(report),
        "<p>Ranks and dimensions are 99th percentiles over the images. <em>Rotation</em> is PCA dimension over SVD rank at "
        "95&nbsp;%. <em>Spread</em> is the participation ratio of "
        "a token's channels (1: all alike; 1/3: Gaussian; 1/D: one channel), a measure of kdvit's own that does not depend on "
        "the channels' order; beside it the same in the shared axes.</p>",
        *(_figure(name, file) for name, file in pictures.items()),
        f"<details><summary>SEP in numbers</summary>{_sep_table(report)}",
        "<p>The share of frequencies that holds a share of the energy, with 95&nbsp;% bootstrap intervals over the images; minus "
        "that of the mean over all permutations of the channels, on the same resamples; the range over "
        f"{report.options.permutations} random permutations; Gaussian noise of the same shape; and the energy in the channel "
        "mean (frequency 0).</p></details>",
        "<h2>Networks</h2>",
        _networks(report),
        f"<p>Options: seed {report.options.seed}, {report.options.permutations} permutations, dataset PCA "
        f"{'centred' if report.options.centred else 'not centred'}. kdvit {version('kdvit')}.</p>",
        "<p>Method: arXiv:2511.15572. Every number is in <code>report.json</code>, the curves are in <code>curves.npz</code>.</p>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _source(network: NetworkReport) -> str:
    how = (
        "features in a file",
        "each went through the network once",
        "each went through the network twice, as the tokens did not fit into the memory that was allowed",
    )[network.passes]
    return f"{network.face.images:,} images of {network.data}: {how}."


def _advice(report: Report) -> list[str]:
    if report.advice is None:
        return []
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in report.advice.facts())
    head = ("student", "distilled width", "parameters", "GFLOP")
    rows = [(c.student, str(c.width), f"{c.parameters:,}", f"{c.flops / 1e9:.3g}") for c in report.advice.costs]
    return [
        f'<h2>Advice</h2><div class="advice"><strong>{escape(report.advice.why)}</strong><ul>{facts}</ul></div>',
        "<p>The rule is kdvit's, not the paper's: a student narrower than the shared axes need gets a remedy; WideLast where it "
        "costs at most a third more, or where single images already need more than the student has; else Lift. It rests on one "
        "pair of one paper and on linear subspaces, and does not say how much is gained. The config that follows it is in "
        "<code>advised.yaml</code>.</p>",
        _html_table(head, rows),
    ]


def _ranks_table(report: Report) -> str:
    levels = [f"{100 * level:g} %" for level in report.options.energies]
    svd, pca = ([f"{name} {level}" for level in levels] for name in ("SVD", "PCA"))
    head = ("network", "layer", "N x D", *svd, *pca, "rotation", "spread", "in shared axes")
    rows = [
        (
            network.name,
            layer.layer,
            f"{layer.tokens} x {layer.width}",
            *(f"{p99(layer.svd_rank(level)):.0f}" for level in report.options.energies),
            *(f"{p99(layer.pca_dimension(level)):.0f}" for level in report.options.energies),
            f"{layer.rotation():.2f}",
            f"{layer.participation.mean():.3f}",
            f"{layer.participation_shared.mean():.3f}",
        )
        for network in report.networks
        for layer in network.layers
    ]
    return _html_table(head, rows)


def _sep_table(report: Report) -> str:
    head = ("network", "layer", "energy", "tokens", "minus permuted", "permutations", "Gaussian", "channel mean")
    rows = []
    for network in report.networks:
        for layer in network.layers:
            controls = bandwidths(layer)
            for level, (ours, difference) in zip(BANDWIDTH_LEVELS, layer.bandwidths, strict=True):
                of = controls[f"{level:g}"]
                rows.append(
                    (
                        network.name,
                        layer.layer,
                        f"{100 * level:g} %",
                        f"{ours.value:.3f} [{ours.low:.3f}, {ours.high:.3f}]",
                        f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]",
                        f"{of['permuted_min']:.3f} to {of['permuted_max']:.3f}",
                        f"{of['gaussian']:.3f}",
                        f"{100 * layer.dc_share:.1f} %",
                    )
                )
    return _html_table(head, rows)


def _networks(report: Report) -> str:
    head = ("network", "kind", "parameters", "GFLOP", "input", "weights (SHA-256)")
    rows = []
    for network in report.networks:
        size = "" if network.image_format is None else " x ".join(map(str, network.image_format.size))
        cost = (f"{network.parameters:,}", f"{network.flops / 1e9:.3g}") if network.parameters else ("", "")
        rows.append((network.name, network.kind, *cost, size, network.weights_sha256[:16]))
    return _html_table(head, rows)


def _html_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def row(tag: str, cells: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (
        '<div class="scroll"><table>' + row("th", head) + "".join(row("td", cells) for cells in rows) + "</table></div>"
    )


def _figure(name: str, file: Path) -> str:
    title, caption = CAPTIONS[name]
    content = base64.b64encode(file.read_bytes()).decode()
    return f'<h2>{title}</h2><figure><img alt="{title}" src="data:image/png;base64,{content}"><figcaption>{caption}</figcaption></figure>'
