"""The teacher's forward: CaiT-S24 at 224, batch 16, against timm's own."""

from __future__ import annotations

import timm
import torch

from kdvit.models import FrozenTeacher, TimmTeacher
from tests.bench.device import timed
from tests.bench.rounds import Row, interleave, row, speed_up

ARCH, BATCH = "cait_s24_224", 16


def rows(rounds: int) -> list[Row]:
    """Measures logits and the last block's map, in float32 and under bfloat16 autocast."""
    torch.manual_seed(0)
    ours = FrozenTeacher(TimmTeacher(ARCH, pretrained=False))
    theirs = timm.create_model(ARCH).eval()
    theirs.load_state_dict(ours.network.model.state_dict())
    image = torch.randn(BATCH, 3, 224, 224)

    @torch.no_grad()
    def timms() -> None:
        end, _ = theirs.forward_intermediates(image, indices=[23])
        theirs.forward_head(end)

    found = []
    for name, half, goal in (("float32", False, ">= 1.2"), ("bfloat16", True, ">= 1.45")):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            pairs = interleave(timed(lambda: ours(image, [-1])), timed(timms), rounds)
        found.append(row(f"teacher forward, {name}: speed-up over timm", pairs, speed_up, "s", goal))
    return found
