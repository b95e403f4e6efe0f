"""Measurements: per-image rank, axes that all images share, spectra along channels, and what a pair suffers from.

On tokens that are at hand: `svd_energy`, `pca_energy`, `channel_spectrum`, `participation_ratio`, or all by `measure`.
On networks and images: `analyze`. Over batches and ranks: the torchmetrics in `svd_rank`, `pca`, `spectral` and
`participation`.
"""

from kdvit.analysis.advised import advised_model, distilled_layer
from kdvit.analysis.callback import GeometryMonitor
from kdvit.analysis.features import read_features
from kdvit.analysis.geometry import LayerGeometry, measure
from kdvit.analysis.layer_report import LayerReport, Options
from kdvit.analysis.mismatch import Advice, advise
from kdvit.analysis.outliers import Outliers, SinkShare
from kdvit.analysis.participation import ParticipationRatio, participation_ratio
from kdvit.analysis.pca import DatasetPCA, PCAEnergy, SharedBasis, moments, pca_energy, shared_basis
from kdvit.analysis.probes import ProbeOptions, ProbeScores
from kdvit.analysis.probing import probe
from kdvit.analysis.report import NetworkReport, Report
from kdvit.analysis.run import analyze
from kdvit.analysis.spectral import SpectralEnergyPattern, bandwidth, channel_spectrum, sep_curve
from kdvit.analysis.svd_rank import SVDRank, energy_rank, svd_energy
from kdvit.analysis.tokens import as_tokens
from kdvit.analysis.variants import Ranks, p99

__all__ = [
    "Advice",
    "DatasetPCA",
    "GeometryMonitor",
    "LayerGeometry",
    "LayerReport",
    "NetworkReport",
    "Options",
    "Outliers",
    "PCAEnergy",
    "ParticipationRatio",
    "ProbeOptions",
    "ProbeScores",
    "Ranks",
    "Report",
    "SVDRank",
    "SharedBasis",
    "SinkShare",
    "SpectralEnergyPattern",
    "advise",
    "advised_model",
    "analyze",
    "as_tokens",
    "bandwidth",
    "channel_spectrum",
    "distilled_layer",
    "energy_rank",
    "measure",
    "moments",
    "p99",
    "participation_ratio",
    "pca_energy",
    "probe",
    "read_features",
    "sep_curve",
    "shared_basis",
    "svd_energy",
]
