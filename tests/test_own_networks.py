"""Networks that kdvit does not bring: the page about them runs, and what they cannot be is said before the training."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import kdvit.models
from kdvit import DistillationModule, load_student
from kdvit.cli import main
from kdvit.cli.lookup import find_network
from kdvit.models import Network
from kdvit.models.checkpoint import require_loadable, student_spec
from kdvit.structures import ViTOutput
from kdvit.testing import check_network
from tests.runs import SHORT
from tests.tiny import FORMAT, TinyData, trainer

PAGE = (Path(kdvit.models.__file__).parent / "README.md").read_text().partition("## Your own networks")[2]
PAIR, MOBILE = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
NETS, LOAD = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
OWN, FROZEN_AND_MERGED = ([shlex.split(line)[1:] for line in block.splitlines()] for block in BLOCKS)
SMALL = [*SHORT, "--trainer.max_epochs", "1", "--data.init_args.batch_size", "8"]


def run(*commands: list[str]) -> None:
    for command in commands:
        main([*command, *(SMALL if command[0] == "fit" else [])])


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*args])
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def my_nets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Writes the page's file into the current folder, and forgets it in the end."""
    monkeypatch.setattr("kdvit.models.own.IMPORTED", set())
    Path("my_nets.py").write_text(NETS)
    yield
    sys.modules.pop("my_nets", None)


@pytest.mark.slow
def test_a_class_of_ones_own_trains_leaves_home_and_teaches(my_nets: None, capsys) -> None:
    run(*OWN)
    names: dict = {}
    exec(LOAD, names)
    check_network(names["student"])
    assert names["student"].head.in_features == 24
    teacher = ["--model.teacher.class_path", "kdvit.load_student", "--model.teacher.init_args.path", "mine"]
    pair = [
        "--model.distillers",
        "{logit: {class_path: LogitDistiller}, map: {class_path: AttentionTransferDistiller}}",
    ]
    capsys.readouterr()
    main(["check", "--config", "demo/plain.yaml", *teacher, *pair])
    assert re.search(r"teacher +MyNet MyNet: 5,818 parameters", capsys.readouterr().out)
    del sys.modules["my_nets"]
    error = refused(capsys, "export", "--ckpt", "runs/mine/student", "--out", "again")
    assert (
        "is of the class 'my_nets.MyNet', and cannot be built: it needs my_nets.MyNet, which is not imported" in error
    )
    assert "add --import my_nets to the command" in error
    error = refused(capsys, "compare", "--import", "my_net", "runs/mine")
    assert "my_net raises ModuleNotFoundError: No module named 'my_net'" in error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*images are few:UserWarning")
def test_torchvisions_network_learns_from_hugging_faces(capsys) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.Dinov2Config(**sizes, image_size=28, patch_size=7, num_labels=7)
    transformers.Dinov2ForImageClassification(config).save_pretrained("dinov2")
    Path("resnet.yaml").write_text(PAIR)
    given = ["--config", "resnet.yaml"]
    main(["check", *given])
    shown = capsys.readouterr().out
    assert re.search(r"student +ModuleNetwork ResNet: 11,181,642 parameters", shown)
    assert "student layer4 [512, 1, 1] <- teacher layer 2 [24, 4, 4]" in shown, shown
    main(["cache", *given, "--out", "cache", "--data.init_args.batch_size", "64"])
    run(["fit", *given, "--data.init_args.cache", "cache"])
    assert load_student("runs/resnet/student").output_shapes(("layer3",)).features == ((256, 2, 2),)
    main(["analyze", *given, "--images", "20", "--permutations", "2", "--out", "report"])
    assert yaml.safe_load(Path("report/advised.yaml").read_text())["model"]["student"]["class_path"].endswith(
        ".ModuleNetwork"
    )
    main(["benchmark", "runs/resnet/student", "--batch_size", "1"])


def test_a_class_is_found_by_its_import_path() -> None:
    assert find_network("torchvision.models.squeezenet1_1", pretrained=False).output_shapes().classes == 1000
    assert isinstance(find_network("tests.models.test_checkpoint.MyNet", pretrained=False), Network)


BROKEN = """
from my_nets import MyNet
from torch import nn
import torch

class Lacks(MyNet):
    def __init__(self) -> None:
        super().__init__()
        self.backbone.eval()

class Key(MyNet):
    def __init__(self) -> None:
        super().__init__()
        {}["backbone"]

class Drawn(MyNet):
    def __init__(self) -> None:
        super().__init__()
        self.factor = float(torch.rand(()))

    def forward(self, image, layers=(), logits=True):
        return super().forward(image * self.factor, layers, logits)

class Function(MyNet):
    def __init__(self, norm: type = nn.BatchNorm2d, activation=len) -> None:
        super().__init__()

def make():
    class Local(MyNet):
        pass
    return Local()
"""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Lacks", "broken_nets.Lacks raises AttributeError: 'Lacks' object has no attribute 'backbone'"),
        ("Key", "broken_nets.Key raises KeyError: 'backbone'"),
    ],
)
def test_an_error_inside_ones_own_class_is_shown(name: str, error: str, my_nets: None, capsys) -> None:
    Path("broken_nets.py").write_text(BROKEN)
    student = ["--config", "demo/plain.yaml", "--model.student", f"broken_nets.{name}"]
    teacher = ["--config", "demo/plain.yaml", "--model.teacher", f"broken_nets.{name}"]
    Path("own.yaml").write_text(yaml.safe_dump({"model": {"student": {"class_path": f"broken_nets.{name}"}}}))
    for words in (["check", *student], ["fit", *teacher], ["benchmark", f"broken_nets.{name}"]):
        assert error in refused(capsys, *words), words
    sys.modules.pop("broken_nets")


def test_a_student_that_could_not_be_loaded_is_refused_before_the_first_step(my_nets: None, capsys) -> None:
    Path("broken_nets.py").write_text(BROKEN)
    drawn = ["--config", "demo/plain.yaml", "--model.student", "broken_nets.Drawn"]
    for command in ("check", "fit"):
        error = refused(capsys, command, *drawn)
        assert "The student broken_nets.Drawn could not be loaded after the training: a second one" in error
        assert error.endswith("--callbacks.student_export null.")
        assert not Path("runs/demo/plain/checkpoints").exists()
    run(["fit", *drawn, "--callbacks.student_export", "null"])
    import broken_nets

    for network, reason in (
        (broken_nets.Function(activation=max), "its constructor takes more than numbers, text, lists and mappings"),
        (broken_nets.make(), r"it needs broken_nets.make.<locals>.Local, which is not imported"),
    ):
        with pytest.raises(ValueError, match=reason):
            require_loadable(network, student_spec(network, FORMAT))
    plain = broken_nets.Function()
    require_loadable(plain, student_spec(plain, FORMAT))
    sys.modules.pop("broken_nets")


class Frozen(Network):
    """A stem with BatchNorm and dropout, a block and a head."""

    def __init__(self) -> None:
        super().__init__(depth=1, image_format=FORMAT)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.block, self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), nn.Linear(8, 5)

    def forward(self, image, layers=(), logits=True) -> ViTOutput:
        feature = self.block(self.stem(image))
        return ViTOutput(self.head(feature.mean((2, 3))) if logits else None, (feature,) * len(layers))


@pytest.mark.filterwarnings("ignore:Found 4 module.s. in eval mode:UserWarning")
def test_what_is_frozen_does_not_move() -> None:
    student = Frozen()
    module = DistillationModule(student, image_format=FORMAT, freeze=["stem", "*.bias"])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer(".", max_epochs=2).fit(module, datamodule=TinyData())
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {f"block.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == {"block.0.weight", "block.1.weight", "head.weight", *statistics}
    assert {name for name, each in student.train().named_modules() if not each.training} == {
        "stem",
        *(f"stem.{i}" for i in range(3)),
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["stam"], r"freeze: the student has no parameter or module 'stam'. Did you mean stem\?"),
        (["stem", "block", "head"], "freeze leaves no parameter of the student to train"),
    ],
)
def test_a_freeze_that_cannot_be_meant_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationModule(Frozen(), image_format=FORMAT, freeze=names)


@pytest.mark.slow
def test_frozen_parameters_stay_and_branches_are_merged(capsys) -> None:
    Path("mobileone.yaml").write_text(MOBILE)
    main(["check", *FROZEN_AND_MERGED[0][1:]])
    patches, positions, block = 16 * 12 + 16, (1 + 16) * 16, 3280
    assert re.search(rf"frozen +{patches + positions + 2 * block:,} parameters", capsys.readouterr().out)
    run(*FROZEN_AND_MERGED)
    assert re.search("4,278,522 parameters became 1,063,754", shown := capsys.readouterr().out), shown
    merged, trained = load_student("mobileone"), load_student("runs/mobileone/student")
    image = torch.randn(2, 3, 32, 32)
    ours, theirs = merged(image).logits, trained(image).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    main(["export", "--ckpt", "mobileone", "--out", "again"])
    assert torch.equal(load_student("again")(image, (-1,)).features[0], merged(image, (-1,)).features[0])
    plain = ["--ckpt", "runs/frozen/student", "--out", "x", "--reparameterize"]
    assert "nothing to reparameterize" in refused(capsys, "export", *plain)
