"""Tokens shuffled among images: the ranks and axes that tokens show where no image has a subspace of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from kdvit.seeding import mixed_seed

IMAGES = 64


class ShuffledTokens(Metric):
    """Images made of the tokens of others, each at its place, over all batches and ranks.

    At each of the N places it holds the tokens of as many images, those with the smallest of random keys that follow
    from the seed, the image's number and the place. So the sample depends neither on the batches nor on the ranks, and
    the state is that of `IMAGES` images (64 of CaiT-S24's maps: 19 MB).

    Args:
        seed: Of the keys.
    """

    full_state_update = False
    keys: list[Tensor]
    tokens: list[Tensor]

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("tokens", [], dist_reduce_fx="cat")

    def update(self, tokens: Tensor, numbers: Tensor) -> None:
        """Adds images by their tokens ``[B, N, D]`` and their numbers in the data set, ``[B]``."""
        generators = [torch.Generator().manual_seed(mixed_seed(self.seed, int(number))) for number in numbers]
        drawn = [torch.rand(tokens.shape[1], generator=each, dtype=torch.float64) for each in generators]
        keys = torch.cat([*self.keys, torch.stack(drawn).to(tokens.device)])
        keys, tokens = _smallest(keys, torch.cat([*self.tokens, tokens]))
        self.keys, self.tokens = [keys], [tokens]

    def compute(self) -> Tensor:
        """Returns the shuffled images, ``[min(images, IMAGES), N, D]``."""
        return _smallest(dim_zero_cat(self.keys), dim_zero_cat(self.tokens))[1]


def _smallest(keys: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    order = keys.argsort(dim=0)[:IMAGES]
    return keys.gather(0, order), tokens.gather(0, order[..., None].expand(-1, -1, tokens.shape[2]))
