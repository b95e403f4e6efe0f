"""What a student costs without a remedy, and with each that its architecture allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from kdvit.models import LiftViT, Network, TimmStudent, WideLastViT
from kdvit.models.cost import forward_cost, parameter_count

Remedy = Literal["none", "Lift", "WideLast"]
REMEDIES: dict[Remedy, type[LiftViT] | type[WideLastViT]] = {"Lift": LiftViT, "WideLast": WideLastViT}
OF_A_REMEDY = ("width", "num_heads", "folded", "published_init")


class Cost(NamedTuple):
    """What a student costs.

    Attributes:
        remedy: The remedy that it has.
        width: Width of the map that is distilled.
        parameters: Number of parameters.
        flops: Operations of one image, see `kdvit.models.cost.ForwardCost`.
        num_heads: Heads of the wide block, where the head dimension does not divide the width.
        folded: Whether it is the cost of a lift that is folded after training.
    """

    remedy: Remedy
    width: int
    parameters: int
    flops: int
    num_heads: int | None = None
    folded: bool = False

    @property
    def student(self) -> str:
        """The student's name in tables."""
        return "no remedy" if self.remedy == "none" else f"{self.remedy}, folded" if self.folded else self.remedy


def without_remedy(student: Network) -> tuple[Remedy, Network]:
    """Returns the remedy that a student has, and the student without it."""
    for name, remedy in REMEDIES.items():
        if isinstance(student, remedy):
            return name, TimmStudent(**remedy_args(student))
    return "none", student


def remedy_costs(student: Network, width: int) -> list[Cost]:
    """Returns the costs of a student with each remedy that its architecture allows."""
    costs = []
    for name, remedy in REMEDIES.items():
        heads: list[int | None] = [None] if name == "Lift" else [None, _heads(student, width)]
        for num_heads in heads:
            args = {**remedy_args(student), "width": width, **({} if num_heads is None else {"num_heads": num_heads})}
            try:
                remedied = remedy(**args)
            except (ValueError, TypeError):  # heads that do not divide the width, another family, or no TimmStudent
                continue
            costs.append(Cost(name, width, parameter_count(remedied), forward_cost(remedied).flops, num_heads))
            if isinstance(remedied, LiftViT) and remedied.folds:
                folded = remedied.folded()
                costs.append(Cost(name, width, parameter_count(folded), forward_cost(folded).flops, folded=True))
            break
    return costs


def _heads(student: Network, width: int) -> int:
    """Returns the number of heads that divides a width and comes nearest to the student's head dimension."""
    blocks: Any = getattr(getattr(student, "model", None), "blocks", None)
    heads = getattr(getattr(blocks[-1], "attn", None), "num_heads", 1) if blocks is not None and len(blocks) else 1
    head_dim = student.output_shapes((-1,), logits=False).features[0][0] / heads
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(width / n - head_dim))


def remedy_args(student: Network) -> dict[str, Any]:
    """Returns the arguments of a student's narrow architecture, without those of a remedy that it may have."""
    given: Mapping[str, Any] = getattr(student, "init_args", None) or {}
    return {name: value for name, value in given.items() if name not in OF_A_REMEDY}
