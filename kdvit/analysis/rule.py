"""The rule of the advice: from what a teacher's tokens take, and what a student has, to what to distil.

The measurements are the paper's (arXiv:2511.15572, sections on per-image SVD and dataset PCA); the rule is kdvit's:

- *need* is the number of shared axes that hold 95 % of the energy of 99 % of the teacher's images (dataset PCA), *rank*
  the number of directions that hold as much of one image alone (per-image SVD), *have* the width of the student's
  blocks, whether or not it has a remedy already, and *held* the share of the energy that the *have* leading shared axes
  hold of 99 % of the images. (Need and rank are some image's own and not interpolated, so that *have* axes hold 95 % of
  99 % of the images exactly where have >= need.)
- have >= the teacher's width: nothing is lost. The map itself, or by a linear projector where the student is wider.
- need <= have: the fixed target phi_s of *have* channels holds what matters of the teacher's map.
- have < need and have < rank: WideLast at the teacher's width. The lifted map of one image has at most the rank of the
  student's tokens, so that Lift could not hold even a single image.
- have < need otherwise: the encoding mismatch of the paper. WideLast at the teacher's width, which gained most there
  (78.23 against Lift's 77.53 % for DeiT-Tiny from CaiT-S24), if it costs at most a third more parameters and
  operations, as it does there, or Lift does not fit the student. Else what costs nothing at inference: phi_s again, if
  *held* is two thirds; Lift at the teacher's width, which folds once it is trained (`kdvit.models.fold`), if it is
  less.
- What does not fit the student is passed over: without WideLast, what costs nothing at inference is left; where neither
  fits, phi_s, if *held* is two thirds, and else logits.

Its record, and how far to trust it: README.md beside this file.
"""

from __future__ import annotations

from typing import Literal

from kdvit.analysis.costs import Cost, Remedy

Verdict = Literal["direct", "linear", "phi_s", "Lift", "WideLast", "logits"]
LABELS: dict[Verdict, str] = {
    "direct": "the map itself",
    "linear": "linear projector",
    "phi_s": "fixed target phi_s",
    "Lift": "Lift",
    "WideLast": "WideLast",
    "logits": "no remedy fits",
}
REMEDY: dict[Verdict, Remedy] = {"Lift": "Lift", "WideLast": "WideLast"}
"""Of a verdict that changes the student."""
AFFORDABLE = 4 / 3
"""Times the student's parameters or operations that WideLast may cost."""
HOLDS = 2 / 3
"""Share of the energy from which on a fixed target is taken before a lift; fitted to pairs of digits."""
PHI_S_AHEAD = "10 of 12 small pairs of digits and in 3 of 7 of Fashion-MNIST"
"""Where the channels held that share, but not the axes that matter, and phi_s gained more than Lift."""
RULE = (
    "Count the shared axes that hold 95 % of the energy for 99 % of the teacher's images. If the student is narrower "
    "than the teacher but has as many channels as that, distil a fixed target, phi_s. If it has fewer, take WideLast, "
    "if it adds at most a third to the cost, or if single images alone need more directions than the student has. Else "
    "take what costs nothing at inference: phi_s again, if the student's channels hold two thirds of that energy, and "
    "Lift, if they hold less."
)


def judge(have: int, need: int, rank: int, held: float, target: int, costs: list[Cost]) -> tuple[Verdict, str]:
    """Returns what to distil, and why; see on top of this file.

    Args:
        have: Width of the student's blocks.
        need: Shared axes that hold 95 % of the energy of 99 % of the images.
        rank: Directions that hold as much of one image.
        held: Share of the energy that `have` shared axes hold of 99 % of the images.
        target: Width of the teacher's map.
        costs: Of the student without a remedy, and with each that it can have.
    """
    by_remedy = {cost.remedy: cost for cost in costs if not cost.folded}
    fixed = "a fixed target: FeatureDistiller, projector: phi_s"
    if have == target:
        return "direct", "no remedy. The student has the teacher's width: distil it directly (FeatureDistiller)."
    if have > target:
        return "linear", "no remedy. The student is wider than the teacher: FeatureDistiller, projector: linear."
    if have >= need:
        return "phi_s", f"{fixed}. {have} channels can hold the {need} axes that matter."
    short = f"{have} channels cannot hold {need} axes"
    wide, narrow = by_remedy.get("WideLast"), by_remedy["none"]
    if len(by_remedy) == 1 and held < HOLDS:
        return "logits", (
            f"no remedy that kdvit has. {short}, an encoding mismatch; but Lift and WideLast are made anew from a "
            "TimmStudent of timm's VisionTransformer or Eva, and this student is none: if it is one of these, build it "
            "as TimmStudent. Else distil logits (LogitDistiller), or a fixed target (FeatureDistiller, projector: "
            "phi_s); or take such a student."
        )
    if wide is None:
        beside = f"{'WideLast does' if 'Lift' in by_remedy else 'Lift and WideLast do'} not fit this student"
        if have < rank:
            beside += f", and single images need {rank} directions, more than any narrow student gives"
    else:
        if have < rank:
            return "WideLast", (
                f"WideLast at width {target}. {short}, nor the {rank} directions of single images: the lifted map of "
                "an image has no more rank than the student's tokens, so that Lift would not do."
            )
        ratio = max(wide.parameters / narrow.parameters, wide.flops / narrow.flops)
        price = f"{ratio:.2f} times the student's parameters or operations"
        if ratio <= AFFORDABLE or "Lift" not in by_remedy:
            cheaper = (
                " Lift is the cheaper choice: once trained, it folds into a student that costs what this one costs."
            )
            return "WideLast", (
                f"WideLast at width {target}. {short}, an encoding mismatch, and WideLast, which gained most in the "
                f"paper, costs {price}.{cheaper if 'Lift' in by_remedy else ''}"
            )
        beside = f"WideLast, which gained most in the paper, would cost {price}"
    if held >= HOLDS:
        return "phi_s", (
            f"{fixed}. {short}, an encoding mismatch; {beside}. But {have} axes hold {held:.0%} of the energy of 99 % "
            f"of the images. Where they held two thirds or more, phi_s gained more than Lift in {PHI_S_AHEAD}, at the "
            "same cost."
        )
    return "Lift", (
        f"Lift at width {target}. {short}, an encoding mismatch; {beside}. Once trained, Lift folds into a student "
        "that costs what this one costs (kdvit export --fold)."
    )
