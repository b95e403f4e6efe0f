"""What an analysis found: as a table, as files, and as a page to read."""

from __future__ import annotations

import csv
import json
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch

from kdvit.analysis.geometry import BANDWIDTH_LEVELS, Array, LayerReport, Options, bandwidths, p99
from kdvit.analysis.mismatch import Advice
from kdvit.analysis.page import page
from kdvit.analysis.plots import FIGURES, figures
from kdvit.structures import ImageFormat

BANDS = (1, 10, 50, 90, 99)


class NetworkReport(NamedTuple):
    """One network.

    Attributes:
        name: What the user calls it.
        kind: Its class and architecture.
        parameters: Number of parameters.
        flops: Operations of one image's logits; a multiply-add counts as 2.
        weights_sha256: Hash of all weights.
        image_format: Size and normalisation that it takes; None for features in a file.
        depth: Number of layers that can be asked for.
        layers: What was measured, in the order of the depth.
        data: Where the images came from.
        passes: How often they went through the network: twice where memory forbade to keep their tokens; 0 for features
            in a file.
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

    @property
    def face(self) -> LayerReport:
        """The last layer, or a remedy's map: what a feature-map objective compares."""
        return self.layers[-1]


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

    def table(self) -> str:
        """Returns the short table of the terminal."""
        levels = "/".join(f"{100 * level:g}" for level in self.options.energies)
        header = (
            "network",
            "layer",
            "N x D",
            f"SVD rank p99 at {levels} %",
            f"PCA dim p99 at {levels} %",
            "rotation",
            "SEP 90 %",
            "permuted",
            "noise",
            "DC",
            "spread",
        )
        rows = [header, *(self._row(network, layer) for network in self.networks for layer in network.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _row(self, network: NetworkReport, layer: LayerReport) -> tuple[str, ...]:
        ranks = [
            [f"{p99(of(level)):.0f}" for level in self.options.energies] for of in (layer.svd_rank, layer.pca_dimension)
        ]
        sep = bandwidths(layer)["0.9"]
        return (
            network.name,
            layer.layer,
            f"{layer.tokens} x {layer.width}",
            " / ".join(ranks[0]),
            " / ".join(ranks[1]),
            f"{layer.rotation():.1f}",
            f"{sep['tokens']:.2f}",
            f"{sep['permuted_mean']:.2f}",
            f"{sep['gaussian']:.2f}",
            f"{100 * layer.dc_share:.0f} %",
            f"{layer.participation.mean():.2f}",
        )

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
        for network in self.networks:
            for layer in network.layers:
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

    def save(self, folder: str | Path) -> list[Path]:
        """Writes report.html, report.json, tables.csv, curves.npz and the figures; returns the files.

        Args:
            folder: Made if it is not there.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")):
            old.unlink(missing_ok=True)
        pictures = figures(self)
        files = [folder / f"{name}.{kind}" for name in pictures for kind in ("png", "pdf")]
        for name, figure in pictures.items():
            figure.savefig(folder / f"{name}.png", dpi=160)
            figure.savefig(folder / f"{name}.pdf")
        (folder / "report.json").write_text(json.dumps(self.to_json(), indent=1) + "\n")
        np.savez_compressed(folder / "curves.npz", **self.curves())  # type: ignore[arg-type]
        with (folder / "tables.csv").open("w", newline="") as stream:
            rows = self.rows()
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        (folder / "report.html").write_text(page(self, {name: folder / f"{name}.png" for name in pictures}))
        return [folder / name for name in ("report.html", "report.json", "tables.csv", "curves.npz")] + files

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
                **{f"sep_{at}_{of}": value for at, found in bandwidths(layer).items() for of, value in found.items()},
                "dc_share": layer.dc_share,
                "participation": float(layer.participation.mean()),
                "participation_shared": float(layer.participation_shared.mean()),
            }
            for network in self.networks
            for layer in network.layers
        ]


def layer_json(layer: LayerReport, options: Options) -> dict[str, Any]:
    """Returns the numbers of one layer in plain types."""
    return {
        "layer": layer.layer,
        "index": layer.index,
        "tokens": layer.tokens,
        "width": layer.width,
        "svd_rank": {f"{level:g}": _statistics(layer.svd_rank(level)) for level in options.energies},
        "pca_dimension": {f"{level:g}": _statistics(layer.pca_dimension(level)) for level in options.energies},
        "rotation": {f"{level:g}": layer.rotation(level) for level in options.energies},
        "sep": {
            "dc_share": layer.dc_share,
            "full": bandwidths(layer, folded=False),
            "folded": bandwidths(layer, folded=True),
            "intervals": {
                f"{level:g}": {"bandwidth": ours._asdict(), "minus_permuted": difference._asdict()}
                for level, (ours, difference) in zip(BANDWIDTH_LEVELS, layer.bandwidths, strict=True)
            },
        },
        "participation": {
            "channels": _statistics(layer.participation),
            "shared_axes": _statistics(layer.participation_shared),
        },
    }


def _statistics(values: Array) -> dict[str, float]:
    return {
        "p99": p99(values),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "min": float(values.min()),
        "max": float(values.max()),
    }
