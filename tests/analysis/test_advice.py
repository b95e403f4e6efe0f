"""The rule, the costs, and the config to paste."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kdvit.analysis import Options, Outliers, advise, advised_model, measure
from kdvit.analysis.advised import distilled_layer
from kdvit.analysis.layer_report import LayerReport
from kdvit.analysis.rule import HOLDS, RULE
from kdvit.distillers import FeatureDistiller, LiftDistiller, WideLastDistiller
from kdvit.models import LiftViT, TimmNetwork, TimmStudent, WideLastViT
from kdvit.models.timm_model import create_timm_model
from kdvit.structures import Layer, OutputShapes, ViTOutput
from tests.tiny import student


def _layer(need: int, rank: int, width: int) -> LayerReport:
    """A teacher's layer with given ranks at 95 %."""
    report = measure(torch.randn(3, 4, 5), Options(permutations=1), robust=False)
    ranks = report.ranks._replace(
        svd_energy=_energy(rank, width), pca_energy=_energy(need, width), outliers=Outliers(0, 0, 0)
    )
    return report._replace(width=width, variants={"raw": ranks})


def _energy(rank: int, width: int) -> np.ndarray:
    curve = np.concatenate([np.linspace(0.1, 0.9, rank - 1), np.linspace(0.96, 1, width - rank + 1)])
    return np.stack([curve] * 3)


def test_the_published_pair_is_advised_as_the_paper_did_and_costs_what_it_says() -> None:
    advice = advise(_layer(302, 61, 384), TimmStudent("deit_tiny_patch16_224"))
    assert (advice.remedy, advice.width, advice.present, advice.unchanged) == ("WideLast", 384, "none", False)
    costs = {cost.student: cost.parameters for cost in advice.costs}
    assert costs == {"no remedy": 5_717_416, "Lift": 5_983_528, "Lift, folded": 5_735_560, "WideLast": 7_313_896}
    assert (advice.have, advice.need, advice.rank) == (192, 302, 61)
    assert advice.held == pytest.approx(_energy(302, 384)[0, 191])
    assert "192 channels cannot hold 302 axes, an encoding mismatch" in advice.why
    assert "1.28 times" in advice.why
    assert "all together take 5.0 times as many" in str(advice)


@pytest.mark.parametrize(
    ("need", "rank", "target", "verdict", "why"),
    [
        (10, 5, 24, "phi_s", r"projector: phi_s\. 16 channels can hold the 10 axes"),
        (12, 5, 16, "direct", "The student has the teacher's width: distil it directly"),
        (6, 5, 12, "linear", "The student is wider than the teacher: FeatureDistiller, projector: linear"),
        (20, 5, 24, "phi_s", r"projector: phi_s\. 16 channels cannot hold 20 axes.* would cost .* 16 axes hold 77% of"),
        (24, 5, 24, "Lift", "would cost .* times the student's"),
        (20, 18, 24, "WideLast", "nor the 18 directions of single images"),
    ],
)
def test_the_rule(need: int, rank: int, target: int, verdict: str, why: str) -> None:
    advice = advise(_layer(need, rank, target), student())
    assert (advice.verdict, advice.remedy) == (verdict, verdict if verdict in ("Lift", "WideLast") else "none")
    assert advice.to_json()["verdict"] == verdict
    assert advice.width == (target if verdict in ("Lift", "WideLast") else 16)
    assert re.search(why, advice.why)
    assert ("a fixed target of that many (phi_s) holds as much" in str(advice)) == (target > 16)


def test_the_page_of_the_analysis_says_the_rule() -> None:
    page = Path(__file__).parents[2] / "kdvit" / "analysis" / "README.md"
    assert RULE in " ".join(page.read_text().split())


def test_a_student_that_no_remedy_fits_is_told_so() -> None:
    advice = advise(_layer(890, 5, 900), TimmNetwork(create_timm_model("resnet18")))
    assert (advice.verdict, advice.remedy) == ("logits", "none")
    assert "a TimmStudent of timm's VisionTransformer or Eva, and this student is none" in advice.why
    assert [cost.student for cost in advice.costs] == ["no remedy"]
    bare = advise(_layer(24, 5, 24), TimmNetwork(student().model))
    assert "if it is one of these, build it as TimmStudent" in bare.why
    held = advise(_layer(20, 18, 24), TimmNetwork(student().model))
    assert held.verdict == "phi_s"
    assert "Lift and WideLast do not fit this student, and single images need 18 directions, more than any" in held.why


def test_a_remedy_is_judged_by_the_blocks_under_it() -> None:
    kept = advise(_layer(24, 5, 24), student("lift"))
    assert (kept.remedy, kept.present, kept.unchanged, kept.have) == ("Lift", "Lift", True, 16)
    assert kept.why.startswith("nothing to change: the student has Lift at width 24")
    narrow = advise(_layer(24, 5, 24), LiftViT(**{**student("lift").init_args, "width": 18}))
    assert (narrow.remedy, narrow.width, narrow.unchanged) == ("Lift", 24, False)
    assert "(Now it has Lift at width 18.)" in narrow.why
    wider = advise(_layer(20, 18, 24), student("lift"))
    assert (wider.remedy, wider.unchanged) == ("WideLast", False)
    assert "(Now it has Lift at width 24.)" in wider.why


def test_heads_are_found_for_a_width_that_the_head_dimension_does_not_divide() -> None:
    advice = advise(_layer(350, 250, 400), TimmStudent("deit_tiny_patch16_224"))
    wide = advice.costs[-1]
    assert (advice.remedy, wide.student, wide.num_heads) == ("WideLast", "WideLast", 8)
    model = {"student": {"class_path": "TimmStudent", "init_args": {"arch": "deit_tiny_patch16_224"}}}
    assert advised_model(advice, model)["student"]["init_args"]["num_heads"] == 8


def test_the_advised_model_keeps_what_is_not_advised_upon() -> None:
    spec = {"class_path": "my.FeatureDistiller", "init_args": {"weight": 3.0}}
    options = {
        "weight": 0.7,
        "loss": "spectral",
        "projector": "pool",
        "student_layers": [0, 2],
        "teacher_layers": [0, 5],
    }
    feature = {"class_path": "FeatureDistiller", "init_args": options}
    model = {
        "student": {
            "class_path": "TimmStudent",
            "init_args": {"arch": "deit_tiny_patch16_224", "pretrained": True, "published_init": True},
        },
        "teacher": {"class_path": "Mine"},
        "distillers": {"other": spec, "feature": feature},
        "task_weight": 0.5,
    }
    advised = advised_model(advise(_layer(24, 5, 24), student()), model)
    assert advised == {
        "student": {
            "class_path": "LiftViT",
            "init_args": {"arch": "deit_tiny_patch16_224", "pretrained": True, "width": 24},
        },
        "teacher": {"class_path": "Mine"},
        "distillers": {
            "other": spec,
            "lift": {
                "class_path": "LiftDistiller",
                "init_args": {"weight": 0.7, "loss": "spectral", "teacher_layer": 5},
            },
        },
        "task_weight": 0.5,
    }
    bare = advise(_layer(12, 5, 24), student("lift"))
    lift = {"class_path": "LiftDistiller", "init_args": {"teacher_layer": [0.2, 0.5], "teacher": "big"}}
    back = advised_model(bare, {**advised, "distillers": {"lift": lift}})["distillers"]["feature"]["init_args"]
    assert back == {"weight": 0.2, "teacher_layers": [0.5], "teacher": "big", "projector": "phi_s"}


def _of(distillers: dict) -> dict:
    return {"student": {"class_path": "TimmStudent", "init_args": {"arch": "resnet18"}}, "distillers": distillers}


def test_a_narrow_student_that_no_remedy_fits_distils_logits_or_the_fixed_target() -> None:
    advice = advise(_layer(890, 5, 900), TimmNetwork(create_timm_model("resnet18")))
    assert advice.held < HOLDS
    assert "Else distil logits (LogitDistiller), or a fixed target (FeatureDistiller, projector: phi_s)" in advice.why
    logit = {"class_path": "LogitDistiller", "init_args": {"weight": 0.9}}
    linear = {"class_path": "FeatureDistiller", "init_args": {"weight": 0.3, "projector": "linear"}}
    assert advised_model(advice, _of({"logit": logit, "map": linear}))["distillers"] == {"logit": logit}
    assert advised_model(advice, _of({"map": linear}))["distillers"] == {
        "feature": {"class_path": "FeatureDistiller", "init_args": {"weight": 0.3, "projector": "phi_s"}}
    }


@pytest.mark.parametrize(("need", "target", "projector"), [(10, 24, "phi_s"), (20, 24, "phi_s"), (10, 16, "pool")])
def test_pooled_channels_become_phi_s_where_the_advice_says_so(need: int, target: int, projector: str) -> None:
    pooled = {"weight": 0.3, "projector": "pool", "student_layers": [0, -1], "teacher_layers": [0, -1]}
    model = _of({"map": {"class_path": "FeatureDistiller", "init_args": pooled}})
    advice = advise(_layer(need, 5, target), student())
    assert advice.unchanged
    assert ("projector: phi_s" in advice.why) == (projector == "phi_s")
    expected = {"class_path": "FeatureDistiller", "init_args": {**pooled, "projector": projector}}
    assert advised_model(advice, model) == {**model, "distillers": {"map": expected}}


@pytest.mark.parametrize("width", [24, [20, 24]])
def test_a_student_that_is_as_advised_stays_as_it_is_and_gets_the_objective(width: int | list[int]) -> None:
    given = WideLastViT(**{**student("wide_last").init_args, "width": width, "num_heads": 4})
    advice = advise(_layer(20, 18, 24), given)
    assert advice.why.startswith("nothing to change: the student has WideLast at width 24")
    model = {"student": {"class_path": "WideLastViT", "init_args": given.init_args}, "distillers": {}}
    objective = {"class_path": "WideLastDistiller", "init_args": {"weight": 0.2}}
    assert advised_model(advice, model) == {**model, "distillers": {"wide_last": objective}}


@pytest.mark.parametrize(("need", "rank", "layer"), [(12, 5, -1), (20, 18, "wide_last")])
def test_objectives_of_a_map_that_the_student_loses_take_the_one_it_gets(need: int, rank: int, layer: Layer) -> None:
    relations = {"class_path": "TokenRelationDistiller", "init_args": {"student_layer": "lift", "weight": 2.0}}
    own = {"class_path": "my.Distiller", "init_args": {"student_layers": [0, "lift"], "teacher_layers": [0, "lift"]}}
    bare = {"class_path": "LogitDistiller"}
    model = {
        "student": {"class_path": "LiftViT", "init_args": student("lift").init_args},
        "distillers": {"relations": relations, "own": own, "logit": bare, "map": {"class_path": "LiftDistiller"}},
    }
    advised = advised_model(advise(_layer(need, rank, 24), student("lift")), model)["distillers"]
    assert advised["relations"]["init_args"] == {"student_layer": layer, "weight": 2.0}
    assert advised["own"]["init_args"] == {"student_layers": [0, layer], "teacher_layers": [0, "lift"]}
    assert advised["logit"] == bare
    assert "map" not in advised


@pytest.mark.parametrize(
    ("present", "need", "variant", "given", "normalize"),
    [
        (None, 20, "unit", {}, "layer_norm"),
        (None, 10, "unit", {}, "layer_norm"),
        ("lift", 20, "unit", {}, "layer_norm"),
        ("lift", 20, "unit", {"normalize": "unit_norm"}, "unit_norm"),
        (None, 20, "raw", {"normalize": "unit_norm"}, "unit_norm"),
        (None, 20, "raw", {}, None),
        (None, 20, "centred", {}, None),
        (None, 20, "standardised", {}, None),
        (None, 20, "unit_standardised", {}, "layer_norm"),
    ],
)
def test_sinks_that_the_figures_leave_out_are_normalised_in_the_loss(
    present: str | None, need: int, variant: str, given: dict, normalize: str | None
) -> None:
    layer, pair = _layer(need, 5, 24), student(present)
    ranks = layer.ranks._replace(variant=variant)
    advice = advise(layer._replace(variants={variant: ranks}), pair)
    assert ("every token counts alike" in advice.why) == ("unit" in variant)
    assert ("no option takes massive channels out" in advice.why) == ("standardised" in variant)
    kind = "FeatureDistiller" if present is None else "LiftDistiller"
    model = {
        "student": {"class_path": type(pair).__name__, "init_args": pair.init_args},
        "distillers": {"lift": {"class_path": kind, "init_args": given}},
    }
    (objective,) = advised_model(advice, model)["distillers"].values()
    assert objective["init_args"].get("normalize") == normalize
    built = {"FeatureDistiller": FeatureDistiller, "LiftDistiller": LiftDistiller}[objective["class_path"]]
    assert built(**objective["init_args"]).normalize == normalize


@pytest.mark.parametrize("kind", [LiftDistiller, WideLastDistiller])
def test_the_objectives_of_remedies_normalise_as_the_feature_objective_does(kind: type[FeatureDistiller]) -> None:
    shapes = OutputShapes(None, ((6, 4, 4),))
    ours, theirs = (ViTOutput(None, (torch.randn(2, 6, 4, 4),)) for _ in range(2))
    losses = []
    for objective in (kind(normalize="layer_norm"), FeatureDistiller(normalize="layer_norm"), kind()):
        objective.build(shapes, shapes)
        losses.append(objective(ours, theirs, torch.zeros(2)))
    assert losses[0] == losses[1] != losses[2]


def test_what_looks_at_one_token_an_image_is_no_map_objective_and_stays() -> None:
    pooled = {
        "class_path": "FeatureDistiller",
        "init_args": {"student_layers": ["pooled"], "teacher_layers": ["pooled"]},
    }
    for asked, expected in (([0, "pooled"], 0), (["pooled"], None)):
        both = {"class_path": "kdvit.distillers.FeatureDistiller", "init_args": {"teacher_layers": asked}}
        relations = {"class_path": "TokenRelationDistiller", "init_args": {"student_layer": "lift"}}
        model = {
            "student": {"class_path": "TimmStudent", "init_args": student().init_args},
            "distillers": {"wide_last": pooled, "both": both, "relations": relations},
        }
        assert distilled_layer(model) == expected
        advised = advised_model(advise(_layer(20, 18, 24), student()), model)["distillers"]
        assert advised.pop("wide_last") == pooled
        assert advised.pop("wide_last_map")["class_path"] == "WideLastDistiller"
        assert advised.pop("relations")["init_args"] == {"student_layer": "wide_last"}
        assert advised == ({} if expected == 0 else {"both": both})
