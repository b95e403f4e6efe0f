"""What is measured of one layer, and what was found."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kdvit.analysis.controls import Interval
from kdvit.analysis.outliers import Outliers
from kdvit.analysis.spectral import bandwidth, sep_curve
from kdvit.analysis.subspaces import Routed
from kdvit.analysis.variants import LEVEL, Ranks

Array = NDArray[np.float64]
BANDWIDTH_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)


class Options(NamedTuple):
    """What to measure.

    Attributes:
        energies: Shares of the energy at which ranks and dimensions are given.
        centred: Subtract the mean token of all images before SVD and PCA; the paper does not.
        permutations: Random permutations of the channels beside SEP.
        seed: Of the controls and of the choice of images.
        subspaces: Up to how many bases images are routed to by their mean token; 0 for none.
    """

    energies: tuple[float, ...] = (0.8, 0.9, 0.95, 0.99)
    centred: bool = False
    permutations: int = 100
    seed: int = 0
    subspaces: int = 0

    @property
    def variant(self) -> str:
        """The variant of the tokens that is measured at every layer."""
        return "centred" if self.centred else "raw"

    def check(self) -> None:
        """Raises ValueError if a value is out of range."""
        if not self.energies or not all(0 < level < 1 for level in self.energies):
            raise ValueError(f"energies must be shares above 0 and below 1, got {list(self.energies)}.")
        if self.permutations < 1:
            raise ValueError(f"permutations must be 1 or more, for SEP means nothing without; got {self.permutations}.")
        if self.subspaces < 0:
            raise ValueError(f"subspaces must be 0 or more, got {self.subspaces}.")


class LayerReport(NamedTuple):
    """What was measured at one layer.

    Attributes:
        layer: The layer as it was asked for.
        index: Its index.
        tokens: Patch tokens N of an image.
        width: Channels D.
        outliers: What outliers the tokens have.
        variants: Ranks and shared axes by the name of the variant: first of the tokens as the options want them, then,
            where it was asked for, of those that outliers cannot fool.
        participation: Participation ratio of each image's tokens, ``[images]``.
        participation_shared: The same in the basis of the dataset PCA, ``[images]``.
        spectrum: Mean channel spectrum, ``[D // 2 + 1]``.
        permuted: The same under random permutations of the channels, ``[P, D // 2 + 1]``.
        gaussian: The same of Gaussian noise of the same shape, ``[D // 2 + 1]``.
        bandwidths: At 50, 60, 70, 80 and 90 %, where it was asked for, means over the images with their intervals: the
            bandwidth of an image, and what a permutation of the channels adds to it.
        subspaces: What images need that are routed to several bases, where it was asked for; with the name of the
            variant that they are measured in, the first that decides.
    """

    layer: str
    index: int  # type: ignore[assignment]  # tuple.index is of no use here
    tokens: int
    width: int
    outliers: Outliers
    variants: dict[str, Ranks]
    participation: Array
    participation_shared: Array
    spectrum: Array
    permuted: Array
    gaussian: Array
    bandwidths: list[tuple[Interval, Interval]]
    subspaces: tuple[str, list[Routed]] | None = None

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.participation)

    @property
    def ranks(self) -> Ranks:
        """The ranks of the tokens as the options want them: by default as they are."""
        return next(iter(self.variants.values()))

    @property
    def svd_energy(self) -> Array:
        """Share of each image's energy in its leading singular directions, ``[images, min(N, D)]``."""
        return self.ranks.svd_energy

    @property
    def pca_energy(self) -> Array:
        """Share of each image's energy in the leading axes of all images, ``[images, D]``."""
        return self.ranks.pca_energy

    @property
    def pca_spectrum(self) -> Array:
        """Eigenvalues of all tokens' second moment, descending, ``[D]``."""
        return self.ranks.pca_spectrum

    def svd_rank(self, level: float) -> Array:
        """Returns the per-image SVD rank at a level, ``[images]``."""
        return self.ranks.svd_rank(level)

    def pca_dimension(self, level: float) -> Array:
        """Returns the least number of shared axes that hold a level of each image's energy, ``[images]``."""
        return self.ranks.pca_dimension(level)

    def sep(self, spectrum: Array | None = None, folded: bool = False) -> Array:
        """Returns the SEP curve of `spectrum`, or of a control's spectra, ``[..., D]``."""
        chosen = torch.from_numpy(self.spectrum if spectrum is None else spectrum)
        curve: Array = sep_curve(chosen, self.width, folded).numpy()
        return curve

    @property
    def dc_share(self) -> float:
        """The share of the tokens' energy in their channel mean (frequency 0)."""
        return float(self.spectrum[0])

    def rotation(self, level: float = LEVEL) -> float:
        """Returns PCA dimension over SVD rank, 99th percentiles."""
        return self.ranks.rotation(level)


def bandwidths(layer: LayerReport, folded: bool = False) -> dict[str, dict[str, float]]:
    """Returns the bandwidths of a layer's tokens and of their controls, by level."""
    ours, permuted, gaussian = (
        torch.from_numpy(layer.sep(of, folded)) for of in (layer.spectrum, layer.permuted, layer.gaussian)
    )
    found = {}
    for level in BANDWIDTH_LEVELS:
        controls = bandwidth(permuted, level)
        found[f"{level:g}"] = {
            "tokens": float(bandwidth(ours, level)),
            "permuted_mean": float(controls.mean()),
            "permuted_min": float(controls.min()),
            "permuted_max": float(controls.max()),
            "gaussian": float(bandwidth(gaussian, level)),
        }
    return found
