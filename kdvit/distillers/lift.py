"""Distillation of the lifted map of a LiftViT (arXiv:2511.15572, Lift)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from kdvit.distillers.feature import FeatureDistiller, Loss, Normalize, same_width
from kdvit.distillers.weights import Weight
from kdvit.structures import Layer, OutputShapes, ViTOutput

Growth = Literal["linear", "exponential"]


def grown_widths(narrow: int, target: int, blocks: int, growth: Growth) -> list[int]:
    """Returns the widths of the lifted maps of the last blocks, as the authors' ``--expansion-type`` has them.

    Args:
        narrow: Width of the student.
        target: Width of the last lifted map.
        blocks: How many.
        growth: By equal steps, or by equal factors; rounded down.

    Examples:
        >>> grown_widths(192, 384, 3, "linear"), grown_widths(192, 384, 3, "exponential")
        ([256, 320, 384], [241, 304, 384])
    """
    shares = [(i + 1) / blocks for i in range(blocks - 1)]
    if growth == "linear":
        return [*(int(narrow + (target - narrow) * share) for share in shares), target]
    return [*(int(narrow * (target / narrow) ** share) for share in shares), target]


class LiftDistiller(FeatureDistiller):
    """Lift: the lifted map of a LiftViT, projector and norm included, against the teacher's block output.

    Checks the student's architecture and never makes it: the lifting projector is part of LiftViT and stays at
    inference.

    With `lifted_blocks`, earlier blocks are lifted too, each by a projector and norm of its own to a width between the
    student's and the teacher's, whose map is then averaged over neighbouring channels to that width. (The authors'
    ``--expansion-start-layer 9`` is ``lifted_blocks: 3`` of 12; 1 in the published runs. In their code these projectors
    are part of the student, where no logit depends on them. Here they leave with the training.)

    Args:
        weight: Factor of this term in the total loss; 0.2 in the paper's runs.
        loss: "mse", "smooth_l1", or "spectral" for SpectralKD; the paper's best Lift run takes "spectral".
        teacher_layer: Layer of the teacher, before its final norm; the last block in the paper. Of several lifted
            blocks a list, one for each; by default as many last blocks.
        teacher: Name of the teacher, where there are several.
        normalize: See FeatureDistiller; "layer_norm" for a teacher with sink tokens.
        lifted_blocks: How many last blocks are lifted.
        growth: How their widths rise to the teacher's, see `grown_widths`.

    Raises:
        ValueError: If an option is unknown, or there are not as many layers of the teacher as lifted blocks; at
            construction of the run, if the student has no lift or is not as wide as the teacher.
    """

    way_out = "Set the width of LiftViT to {width}."

    def __init__(
        self,
        weight: Weight = 1.0,
        loss: Loss = "mse",
        teacher_layer: Layer | list[Layer] = -1,
        teacher: str | None = None,
        normalize: Normalize | None = None,
        lifted_blocks: int = 1,
        growth: Growth = "linear",
    ) -> None:
        if lifted_blocks < 1 or growth not in get_args(Growth):
            raise ValueError(
                "LiftDistiller: lifted_blocks must be 1 or more, and growth linear or exponential, got "
                f"{lifted_blocks} and {growth!r}."
            )
        last = [-1 - i for i in range(lifted_blocks)][::-1]
        layers = last if teacher_layer == -1 else teacher_layer if isinstance(teacher_layer, list) else [teacher_layer]
        if len(layers) != lifted_blocks:
            raise ValueError(
                f"LiftDistiller: {lifted_blocks} lifted_blocks need as many layers of the teacher, got {layers}. Give "
                "teacher_layer as a list."
            )
        super().__init__(weight, (*last[:-1], "lift"), layers, loss, normalize=normalize, teacher=teacher)
        self.growth = growth

    def build(self, student: OutputShapes, teacher: OutputShapes) -> None:
        """Checks the width of the lifted map, and creates the projectors of earlier blocks."""
        narrow, target = student.features[0][0], student.features[-1][0]
        widths = grown_widths(narrow, target, len(self.student_layers), self.growth)
        self.widths = list(zip(widths, (width for width, *_ in teacher.features), strict=True))
        self.require_same_width(-1)
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(narrow, width, bias=False), nn.LayerNorm(width)) for width in widths[:-1]
        )

    def aligned(self, student: ViTOutput, teacher: ViTOutput) -> list[tuple[Tensor, Tensor]]:
        """Returns the pairs of maps as the loss compares them, student first, each ``[B, C, H, W]``."""
        *early, last = student.features
        lifted = [lift(each.movedim(1, -1)).movedim(-1, 1) for lift, each in zip(self.projectors, early, strict=True)]
        pairs = [same_width(*pair) for pair in zip([*lifted, last], teacher.features, strict=True)]
        ours, theirs = zip(*pairs, strict=True)
        return super().aligned(student._replace(features=ours), teacher._replace(features=theirs))
