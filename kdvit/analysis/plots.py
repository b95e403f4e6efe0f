"""The figures of an analysis, in colours that colour-blind readers tell apart (Okabe and Ito)."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kdvit.analysis.layer_report import LayerReport
from kdvit.analysis.report import NetworkReport, Report
from kdvit.analysis.variants import LEVEL, p99
from kdvit.pages import PALETTE

BLUE, ORANGE, GREEN, *_ = PALETTE
GREY = "#777777"
MARKERS = "osD^vPX"
FIGURES = ("ranks", "energy", "sep", "depth")
WIDTH = 7.0
"""Inches."""
BANDS = ((1, 99, 0.15), (10, 90, 0.3))


def figures(report: Report) -> dict[str, Figure]:
    """Draws all figures of a report, as wide as a page.

    Returns:
        Figures by name: ``ranks`` (histograms), ``energy``, ``sep``, and ``depth`` where several blocks were measured.
    """
    drawn = {"ranks": draw_ranks(report), "energy": draw_energy(report), "sep": draw_sep(report)}
    blocks = [sum(layer.index < network.depth for layer in network.layers) for network in report.networks]
    if max(blocks) > 1:  # a remedy's map is none
        drawn["depth"] = draw_depth(report)
    return drawn


def draw_ranks(report: Report) -> Figure:
    """Draws, for each network, how SVD rank and PCA dimension at 95 % of the energy spread over the images."""
    figure, panels = _panels(report, 2.7)
    for network, (axes,) in zip(report.networks, panels, strict=True):
        layer = network.face
        for values, colour, name in (
            (layer.svd_rank(LEVEL), BLUE, "one image (SVD)"),
            (layer.pca_dimension(LEVEL), ORANGE, "shared axes (PCA)"),
        ):
            low, high = int(values.min()), int(values.max())
            step = max(1, -(-(high - low + 1) // 40))
            bins = np.arange(low - 0.5, high + step + 0.5, step)
            axes.hist(values, bins, color=colour, alpha=0.75)
            label = f"{name}: p99 {p99(values):.0f}"
            axes.axvline(p99(values), ymax=0.7, color=colour, linestyle="--", linewidth=1.2, label=label)
        if report.advice is not None and network is report.networks[0]:
            have = report.advice.have
            axes.axvline(have, ymax=0.7, color="black", linestyle=":", linewidth=1.5, label=f"student's width: {have}")
        axes.set(xlim=(0, 1.03 * layer.width), ylim=(0, 1.42 * axes.get_ylim()[1]))
        _label(axes, network, f"directions for 95 % of the energy, of {layer.width}")
        axes.legend(loc="upper right", fontsize=8, frameon=False, labelspacing=0.2)
        _left(axes, "images")
    return figure


def draw_energy(report: Report) -> Figure:
    """Draws, for each network, the energy in the leading directions: of each image alone, and shared; with bands."""
    figure, panels = _panels(report, 2.6)
    for network, (axes,) in zip(report.networks, panels, strict=True):
        layer = network.face
        for energy, colour, style, name in (
            (layer.svd_energy, BLUE, "-", "one image (SVD)"),
            (layer.pca_energy, ORANGE, "--", "shared axes (PCA)"),
        ):
            number = np.arange(1, energy.shape[1] + 1)
            for low, high, alpha in BANDS:
                bounds = 100 * np.percentile(energy, (low, high), axis=0)
                axes.fill_between(number, *bounds, color=colour, alpha=alpha, linewidth=0)
            axes.plot(number, 100 * np.median(energy, axis=0), style, color=colour, linewidth=1.3, label=name)
        axes.axhline(100 * LEVEL, color=GREY, linestyle=":", linewidth=1)
        axes.set(xlim=(1, layer.width), ylim=(0, 101))
        _label(axes, network, f"directions, of {layer.width}")
        axes.legend(loc="lower right", fontsize=8, frameon=False)
        _left(axes, "energy (%)")
    return figure


def draw_sep(report: Report) -> Figure:
    """Draws, for each network, SEP and its controls: the curves above, what they differ from the diagonal below."""
    figure, panels = _panels(report, 4.0, ratios=(3, 2))
    for network, (upper, lower) in zip(report.networks, panels, strict=True):
        _draw_sep(network.face, upper, lower)
        _label(upper, network)
        _label(lower, None, f"share of {network.face.width} frequencies")
        _left(upper, "share of energy")
        _left(lower, "minus diagonal")
    _legend(figure, panels[0][0], 2)
    return figure


def _draw_sep(layer: LayerReport, upper: Any, lower: Any) -> None:
    share = np.arange(1, layer.width + 1) / layer.width
    permuted = layer.sep(layer.permuted)
    curves = (
        (layer.sep(), BLUE, "-", 1.6, "tokens"),
        (permuted.mean(0), ORANGE, "--", 1.3, f"channels permuted ({len(permuted)}x)"),
        (layer.sep(layer.gaussian), GREEN, ":", 1.6, "Gaussian noise"),
    )
    for axes, minus in ((upper, np.zeros_like(share)), (lower, share)):
        bounds = (permuted.min(0) - minus, permuted.max(0) - minus)
        axes.fill_between(share, *bounds, color=ORANGE, alpha=0.25, linewidth=0)
        axes.plot(share, share - minus, color=GREY, linewidth=0.8, label="diagonal")
        for curve, colour, style, thickness, name in curves:
            axes.plot(share, curve - minus, style, color=colour, linewidth=thickness, label=name)
        axes.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    upper.tick_params(labelbottom=False)


def draw_depth(report: Report) -> Figure:
    """Draws SVD rank and PCA dimension at 95 % of the energy (99th percentiles) over the depth of all networks."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes: Any = figure.add_subplot()
    for i, network in enumerate(report.networks):
        look: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
        ends = [1.0 + 0.05 * (layer.index >= network.depth) for layer in network.layers]  # a remedy's map stands behind
        depth = [min((layer.index + 1) / network.depth, end) for layer, end in zip(network.layers, ends, strict=True)]
        for values, style, name in (
            ([p99(layer.pca_dimension(LEVEL)) for layer in network.layers], "--", "shared axes (PCA)"),
            ([p99(layer.svd_rank(LEVEL)) for layer in network.layers], "-", "one image (SVD)"),
        ):
            label = f"{network.name}: {name}"
            axes.plot(depth, values, style, **look, markersize=4, linewidth=1.3, label=label)
    axes.set(ylabel="directions for 95 %, p99", ylim=(0, None))
    _label(axes, None, "share of the depth")
    _legend(figure, axes, 2)
    axes.grid(alpha=0.3)
    return figure


def _panels(report: Report, height: float, ratios: tuple[int, ...] = (1,)) -> tuple[Figure, list[tuple[Any, ...]]]:
    """Returns a figure, and for each network a panel, or several in a column with these ratios of their heights."""
    count, stacked = len(report.networks), len(ratios)
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    grid: Any = figure.subplots(stacked * rows, columns, squeeze=False, height_ratios=ratios * rows)
    panels = [tuple(column) for row in np.split(grid, rows) for column in row.T]
    for axes in (axes for spare in panels[count:] for axes in spare):
        axes.set_axis_off()
    return figure, panels[:count]


def _label(axes: Any, network: NetworkReport | None, below: str = "") -> None:
    if network is not None:
        text = f"{network.name}, layer {network.face.layer}"
        axes.set_title("\n".join(textwrap.wrap(text, 38)), fontsize=9)
    axes.set_xlabel(below, fontsize=9)
    axes.yaxis.label.set_size(9)
    axes.tick_params(labelsize=8)


def _left(axes: Any, label: str) -> None:
    """Labels an axis where the panel stands at the left."""
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel(label, fontsize=9)


def _legend(figure: Figure, axes: Any, columns: int) -> None:
    """Puts the legend of one panel above all."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", fontsize=8, frameon=False, ncols=columns)
