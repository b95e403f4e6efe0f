"""The analyses against their definitions written out: SVDs with vectors, full transforms, features on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import timm
import torch

from kdvit.analysis import Options, analyze, channel_spectrum, moments, pca_energy, shared_basis, svd_energy
from kdvit.analysis.run import analysis_trainer
from kdvit.models import TimmTeacher
from tests.bench.device import timed
from tests.bench.rounds import Row, interleave, row, speed_up

LEVELS = (0.8, 0.9, 0.95, 0.99)
ARCH, BATCH, MAPS, IMAGES = "cait_s24_224", 16, 128, 48


def plain_ranks(features: np.ndarray) -> np.ndarray:
    """Energy ranks ``[images, levels]`` of ``[images, N, D]``, by one SVD an image."""
    ranks = []
    for image in features:
        _, values, _ = np.linalg.svd(image, full_matrices=False)
        share = (values**2).cumsum() / (values**2).sum()
        ranks.append([int((share < level).sum()) + 1 for level in LEVELS])
    return np.array(ranks)


def plain_dimensions(file: Path) -> np.ndarray:
    """Dimensions in the shared axes ``[images, levels]``, in two passes over saved features."""
    features = np.load(file, mmap_mode="r")
    moment = sum(image.astype(np.float64).T @ image.astype(np.float64) for image in features)
    axes = np.linalg.eigh(moment / (len(features) * features.shape[1]))[1][:, ::-1]
    dimensions = []
    for image in features:
        energy = ((image.astype(np.float64) @ axes) ** 2).sum(0).cumsum()
        dimensions.append([int((energy / energy[-1] < level).sum()) + 1 for level in LEVELS])
    return np.array(dimensions)


def plain_sep(file: Path) -> np.ndarray:
    """Mean cumulative spectrum ``[D]`` over all tokens of saved features."""
    total, tokens = 0.0, 0
    for image in np.load(file, mmap_mode="r"):
        power = np.abs(np.fft.fft(image.astype(np.float64), axis=1)) ** 2
        total = total + (power.cumsum(1) / power.sum(1, keepdims=True)).sum(0)
        tokens += len(image)
    return np.asarray(total / tokens)


def three(features: torch.Tensor) -> None:
    """SVD rank, dataset PCA and SEP by kdvit's functions."""
    svd_energy(features)
    channel_spectrum(features)
    second, first = moments(features)
    pca_energy(features, shared_basis(second, first, features.shape[0] * features.shape[1]))


def rows(rounds: int) -> list[Row]:
    """Measures the ranks, the three analyses on features at hand, and the whole command with the network."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(MAPS, 196, 40, generator=generator) @ torch.randn(MAPS, 40, 384, generator=generator)
    features = 3 * low + torch.randn(MAPS, 196, 384, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "features.npy"
        np.save(file, features.numpy())
        ranks = interleave(timed(lambda: svd_energy(features)), timed(lambda: plain_ranks(features.numpy())), rounds)
        all_three = interleave(
            timed(lambda: three(features)),
            timed(lambda: (plain_ranks(features.numpy()), plain_dimensions(file), plain_sep(file))),
            rounds,
        )
    shape = f"{MAPS} maps of 196 x 384"
    return [
        row(f"per-image ranks, {shape}: speed-up over SVDs", ranks, speed_up, "s", ">= 9"),
        row(f"three analyses, {shape}: speed-up over a plain transcription", all_three, speed_up, "s", ">= 5"),
        *(whole(precision, rounds) for precision in ("32-true", "bf16-mixed")),
    ]


def whole(precision: str, rounds: int) -> Row:
    """CaiT-S24 and all analyses of its last layer, with controls, against dumping every layer and reading it back."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, 224, 224)
    ours = TimmTeacher(ARCH, pretrained=False)
    theirs = timm.create_model(ARCH).eval()
    theirs.load_state_dict(ours.model.state_dict())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=BATCH)

    def kdvit() -> None:
        trainer = analysis_trainer(callbacks=[], enable_progress_bar=False, precision=precision)
        report = analyze(ours, loader, options=Options(), trainer=trainer)
        report.to_json()

    @torch.no_grad()
    def plain() -> None:
        with tempfile.TemporaryDirectory() as folder:
            files = [np.lib.format.open_memmap(f"{folder}/{i}.npy", "w+", "<f4", (IMAGES, 196, 384)) for i in range(24)]
            for first, batch in zip(range(0, IMAGES, BATCH), images.split(BATCH), strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                    maps = theirs.forward_intermediates(batch, output_fmt="NLC", intermediates_only=True)
                for file, tokens in zip(files, maps, strict=True):
                    file[first : first + BATCH] = tokens.float().numpy()
            for file in files:
                file.flush()
            last = Path(folder) / "23.npy"
            plain_ranks(np.load(last))
            plain_dimensions(last)
            plain_sep(last)

    pairs = interleave(timed(kdvit), timed(plain), rounds)
    what = f"analysis of CaiT-S24 on {IMAGES} images, network included, {precision}: speed-up over dumping all layers"
    return row(what, pairs, speed_up, "s", ">= 1.6")
