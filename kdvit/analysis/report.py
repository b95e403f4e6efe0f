"""What an analysis found: every number by name, and the columns of its tables."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import timm
import torch

from kdvit.analysis.costs import REMEDIES
from kdvit.analysis.layer_report import BANDWIDTH_LEVELS, Array, LayerReport, Options, bandwidths
from kdvit.analysis.mismatch import Advice
from kdvit.analysis.published import LEVELS, Published, published
from kdvit.analysis.subspaces import Routed
from kdvit.analysis.variants import LEVEL, VARIANTS, Ranks, p99, shown, spread_json
from kdvit.structures import ImageFormat
from kdvit.tables import text_table

BANDS = (1, 10, 50, 90, 99)
Cells = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Head and rows of a table."""
FIRST = {"network": "{0[network]}", "layer": "{0[layer]}", "N x D": "{0[tokens]} x {0[width]}"}
"""The first columns of every table: formats of `Report.rows` by their heads."""


class NetworkReport(NamedTuple):
    """One network.

    Attributes:
        name: What the user calls it.
        kind: Its class and architecture.
        parameters: Number of parameters.
        flops: Operations of one image, see `kdvit.models.cost.ForwardCost`.
        weights_sha256: Hash of all weights.
        image_format: Size and normalisation that it takes; None for features in a file.
        depth: Number of layers that can be asked for.
        layers: What was measured, in the order of the depth.
        data: Where the images came from.
        passes: How often they went through the network: twice where memory forbade to keep their tokens; 0 for features
            in a file.
        compared: Place in `layers` of the one that a feature-map objective compares.
        precision: In which the network ran, by Lightning's name.
    """

    name: str
    kind: str
    parameters: int
    flops: int
    weights_sha256: str
    image_format: ImageFormat | None
    depth: int
    layers: list[LayerReport]
    data: str
    passes: int
    compared: int = -1
    precision: str = "32-true"

    @property
    def published(self) -> Published | None:
        """The paper's figures of its architecture; none where a remedy has changed that."""
        kind, _, arch = self.kind.partition(" ")
        return None if kind in [remedy.__name__ for remedy in REMEDIES.values()] else published(arch)

    @property
    def face(self) -> LayerReport:
        """What a feature-map objective compares: the last layer, or a remedy's map, unless another one was named."""
        return self.layers[self.compared]


class Report(NamedTuple):
    """All networks of an analysis.

    Attributes:
        networks: One each.
        options: What was measured.
        advice: On the pair, if there is one.
        notes: What a reader must know besides.
    """

    networks: list[NetworkReport]
    options: Options
    advice: Advice | None = None
    notes: tuple[str, ...] = ()

    def layers(self) -> Iterator[tuple[NetworkReport, LayerReport]]:
        """Yields every layer of every network."""
        return ((network, layer) for network in self.networks for layer in network.layers)

    def cells(self, columns: Mapping[str, str]) -> Cells:
        """Returns a table of all layers.

        Args:
            columns: Formats of one of `rows`, by the heads of the columns.
        """
        return list(columns), [[each.format(row) for each in columns.values()] for row in self.rows()]

    def outliers(self) -> list[str]:
        """Returns what outliers the layers have, a sentence each."""
        found = [
            f"Outliers in {network.name}, layer {layer.layer}: {', '.join(layer.outliers.found().values())}."
            for network, layer in self.layers()
            if layer.outliers.found()
        ]
        return found or ["No layer has outliers: no massive channels, no sink tokens and no constant offset."]

    def variant_cells(self) -> Cells:
        """Returns the table of ranks and axes beside those that outliers cannot fool, of each network's last layer."""
        head = ("network", "tokens", "SVD 95 %", "PCA 95 %", "rotation", "shuffled", "ratio", "outliers")
        rows = []
        for network in self.networks:
            for ranks in network.face.variants.values():
                spread = ranks.spread()
                figures = (shown(spread.rank), shown(spread.need), f"{spread.rotation.value:.2f}")
                shuffled = "" if spread.shuffled is None else f"{spread.shuffled.value:.2f}"
                turn = "" if spread.turn is None else shown(spread.turn, ".2f")
                left = ", ".join(ranks.outliers.found()) or "none"
                rows.append((network.name, ranks.label, *figures, shuffled, turn, left))
        return head, rows

    def subspace_cells(self) -> Cells:
        """Returns the table of what images need that are routed to several bases; no rows where nobody asked."""
        head = ("network", "tokens", "bases", "by mean token: p99", "median", "at random: p99", "median")
        rows = []
        for network in self.networks:
            variant, routed = network.face.subspaces or ("", [])
            for each in routed:
                found = [cell for of in each[1:] for cell in (shown(of.p99), f"{of.median:.0f}")]
                rows.append((network.name, VARIANTS[variant].label, str(each.bases), *found))
        return head, rows

    def level_columns(self) -> dict[str, str]:
        """Returns the columns of SVD ranks and PCA dimensions, all levels of the energy in one each."""
        energies = self.options.energies
        levels = "/".join(f"{100 * level:g}" for level in energies)
        measured = {"SVD rank": "svd_rank", "PCA dim": "pca_dimension"}
        return {
            f"{said} p99 at {levels} %": " / ".join(f"{{0[{name}_p99_{level:g}]:.0f}}" for level in energies)
            for said, name in measured.items()
        }

    def publishable(self, against: bool = False) -> Cells:
        """Returns the table for a paper: SVD ranks and PCA dimensions of all layers.

        Args:
            against: With the paper's own row behind each network that is one of its models.
        """
        head, rows = self.cells({**FIRST, **self.level_columns()})
        lines: list[Sequence[str]] = []
        for (network, layer), row in zip(self.layers(), rows, strict=True):
            lines.append(row)
            theirs = network.published if against and layer is network.face else None
            if theirs is not None:
                figures = (dict(zip(LEVELS, found, strict=True)) for found in (theirs.svd, theirs.pca))
                cells = (" / ".join(str(of.get(level, "")) for level in self.options.energies) for of in figures)
                lines.append((f"{theirs.name} (paper)", "last", f"N x {theirs.width}", *cells))
        return head, lines

    def table(self) -> str:
        """Returns what the terminal shows: outliers, the short table, and the last layers without outliers."""
        columns = {
            **FIRST,
            **self.level_columns(),
            "rotation at 95 %": "{0[rotation_0.95]:.1f}",
            "SEP 90 %": "{0[sep_0.9_tokens]:.2f}",
            "permuted": "{0[sep_0.9_permuted_mean]:.2f}",
            "noise": "{0[sep_0.9_gaussian]:.2f}",
            "DC": "{0[dc_share]:.0%}",
            "spread": "{0[participation]:.2f}",
        }
        tables = [text_table(*self.cells(columns), left=3), "", text_table(*self.variant_cells(), left=2)]
        if (routed := self.subspace_cells())[1]:
            said = "Shared axes for 95 % of an image's energy, where images are routed to several bases:"
            tables += ["", said, text_table(*routed, left=2)]
        return "\n".join([*self.outliers(), "", *tables])

    def to_json(self) -> dict[str, Any]:
        """Returns every number in plain types."""
        options = {**self.options._asdict(), "energies": list(self.options.energies)}
        return {
            "kdvit": version("kdvit"),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "machine": platform.machine(),
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "options": options,
            "notes": list(self.notes),
            "networks": [
                {
                    **{k: v for k, v in network._asdict().items() if k not in ("image_format", "layers")},
                    "images": network.face.images,
                    "image_format": None if network.image_format is None else network.image_format.to_json(),
                    "layers": [layer_json(layer, self.options) for layer in network.layers],
                }
                for network in self.networks
            ],
            "advice": None if self.advice is None else self.advice.to_json(),
        }

    def curves(self) -> dict[str, Array]:
        """Returns the arrays behind the figures, each under ``NETWORK/LAYER/NAME``."""
        arrays: dict[str, Array] = {"energies": np.array(self.options.energies), "bands": np.array(BANDS)}
        for network, layer in self.layers():
            named = {
                "svd_rank": np.stack([layer.svd_rank(level) for level in self.options.energies], axis=1),
                "pca_dimension": np.stack([layer.pca_dimension(level) for level in self.options.energies], axis=1),
                "svd_energy_bands": np.percentile(layer.svd_energy, BANDS, axis=0),
                "pca_energy_bands": np.percentile(layer.pca_energy, BANDS, axis=0),
                "pca_spectrum": layer.pca_spectrum,
                "sep": layer.sep(),
                "sep_permuted": layer.sep(layer.permuted),
                "sep_gaussian": layer.sep(layer.gaussian),
                "participation": layer.participation,
                "participation_shared": layer.participation_shared,
            }
            arrays |= {f"{network.name}/{layer.layer}/{name}": array for name, array in named.items()}
        return arrays

    def rows(self) -> list[dict[str, Any]]:
        """Returns one row of numbers for each layer of each network."""
        return [
            {
                "network": network.name,
                "layer": layer.layer,
                "index": layer.index,
                "tokens": layer.tokens,
                "width": layer.width,
                **{f"svd_rank_p99_{level:g}": p99(layer.svd_rank(level)) for level in self.options.energies},
                **{f"pca_dimension_p99_{level:g}": p99(layer.pca_dimension(level)) for level in self.options.energies},
                "rotation_0.95": layer.rotation(),
                **{f"outliers_{name}": share for name, share in layer.outliers._asdict().items()},
                **{f"sep_{at}_{of}": value for at, found in bandwidths(layer).items() for of, value in found.items()},
                "dc_share": layer.dc_share,
                "participation": float(layer.participation.mean()),
                "participation_shared": float(layer.participation_shared.mean()),
            }
            for network, layer in self.layers()
        ]


def layer_json(layer: LayerReport, options: Options) -> dict[str, Any]:
    """Returns the numbers of one layer in plain types."""
    return {
        "layer": layer.layer,
        "index": layer.index,
        "tokens": layer.tokens,
        "width": layer.width,
        "outliers": layer.outliers._asdict(),
        **_ranks_json(layer.ranks, options),
        "variants": {
            ranks.variant: {
                "outliers": ranks.outliers._asdict(),
                **_ranks_json(ranks, options),
                "spread": spread_json(ranks.spread()),
            }
            for ranks in layer.variants.values()
        },
        "sep": {
            "dc_share": layer.dc_share,
            "full": bandwidths(layer, folded=False),
            "folded": bandwidths(layer, folded=True),
            "intervals": {
                f"{level:g}": {"bandwidth": own._asdict(), "permuted_minus_own": added._asdict()}
                for level, (own, added) in zip(BANDWIDTH_LEVELS, layer.bandwidths, strict=False)
            },
        },
        "subspaces": None if layer.subspaces is None else _subspaces_json(*layer.subspaces),
        "participation": {
            "channels": _statistics(layer.participation),
            "shared_axes": _statistics(layer.participation_shared),
        },
    }


def _subspaces_json(variant: str, routed: list[Routed]) -> dict[str, Any]:
    found = [
        {
            "bases": each.bases,
            **{
                f"{name}": {"p99": of.p99._asdict(), "median": of.median}
                for name, of in list(each._asdict().items())[1:]
            },
        }
        for each in routed
    ]
    return {"variant": variant, "energy": LEVEL, "routed": found}


def _ranks_json(ranks: Ranks, options: Options) -> dict[str, Any]:
    return {
        "svd_rank": {f"{level:g}": _statistics(ranks.svd_rank(level)) for level in options.energies},
        "pca_dimension": {f"{level:g}": _statistics(ranks.pca_dimension(level)) for level in options.energies},
        "rotation": {f"{level:g}": ranks.rotation(level) for level in options.energies},
    }


def _statistics(values: Array) -> dict[str, float]:
    return {
        "p99": p99(values),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
    }
