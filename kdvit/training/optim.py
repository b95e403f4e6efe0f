"""The optimizer: timm's, with what the recipe fixes as plain options."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DistributedSampler, IterableDataset

from kdvit.errors import nearest
from kdvit.models import Network
from kdvit.runtime.length import RunEnd
from kdvit.training.schedule import RunLength, ScheduleOptions, limited, planned_length

FUSED = ("adam", "adamw")  # optimizers of torch's with one kernel for a whole step
FUSED_DEVICES = ("cpu", "cuda")
GROUPING = {
    "filter_bias_and_bn": "weight_decay_exclude_1d",
    "fallback_list": "fallback_list",
    "fallback_no_weight_decay": "fallback_no_weight_decay",
    "layer_decay": "layer_decay",
    "layer_decay_min_scale": "min_scale",
}
"""Options of timm's optimizers that say how parameters are grouped, with the names that its grouping takes them by."""
OF_LAYERS = ("layer_decay", "min_scale")


@dataclass
class OptimizerOptions:
    """The optimizer.

    Attributes:
        name: timm's name of the optimizer.
        lr: Learning rate at a global batch of `lr_base_batch` images.
        lr_base_batch: The learning rate is multiplied by (global batch / this); null leaves it as it is.
        weight_decay: Weight decay, not applied to biases, norms and the names that the student exempts.
        decay_embeddings: Decay what the student exempts by name, too: position embedding and class token. That is what
            the authors' Lift, WideLast and uniform-wide runs (arXiv:2511.15572) do, for their wrappers hide the names.
            The default is better founded: timm and DeiT exempt these parameters on purpose, as they do biases.
        args: More arguments of the optimizer, such as `betas`. `fused` and `foreach` choose torch's implementation; by
            default it is the fused one where there is one. ``layer_decay: 0.75`` gives each layer of a timm student the
            learning rate of the next times 0.75, down from the head (BEiT, arXiv:2106.08254), `layer_decay_min_scale`
            at least; ``filter_bias_and_bn: false`` decays biases and norms, too.

    Raises:
        ValueError: If timm has no such optimizer, or an argument is unknown or has no effect.
    """

    name: str = "adamw"
    lr: float = 5e-4
    lr_base_batch: int | None = 512
    weight_decay: float = 0.05
    decay_embeddings: bool = False
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in list_optimizers():
            hint = nearest(self.name, map(str, list_optimizers()))
            raise ValueError(f"optimizer.name: timm has no {self.name!r}.{hint} timm.optim.list_optimizers() has all.")
        if None in (self.lr, self.weight_decay):  # timm would take the optimizer's own
            raise ValueError(f"optimizer: lr and weight_decay must be numbers, got {self.lr} and {self.weight_decay}.")
        info = get_optimizer_info(self.name)
        taken = {"momentum": info.has_momentum, "eps": info.has_eps, "betas": info.has_betas}
        taken |= dict.fromkeys(("fallback_list", "fallback_no_weight_decay"), "muon" in self.name)
        taken |= dict.fromkeys(("param_group_fn", "layer_decay_no_opt_scale"), False)  # kdvit groups the parameters
        if idle := [name for name in self.args if not taken.get(name, True)]:  # timm would drop them without a word
            raise ValueError(f"optimizer.args: {self.name} has no {' and no '.join(idle)}.")
        if not 0 < (self.args.get("layer_decay", 1.0) or 0) <= 1:
            raise ValueError(f"optimizer.args: layer_decay must be above 0, and 1 or less; got {self.args}.")
        try:
            self.build([{"params": [nn.Parameter(torch.zeros(1))]}], global_batch=1)
        except TypeError as error:
            raise ValueError(f"optimizer.args: {self.name} does not take {self.args}: {error}") from error

    @property
    def grouping(self) -> dict[str, Any]:
        """What `args` say of the groups, for `parameter_groups`."""
        return {GROUPING[name]: value for name, value in self.args.items() if name in GROUPING}

    def scaled_lr(self, global_batch: int) -> float:
        """Returns the learning rate for a global batch: images a step over all processes and accumulated batches."""
        return self.lr if self.lr_base_batch is None else self.lr * global_batch / self.lr_base_batch

    def build(self, groups: list[dict[str, Any]], global_batch: int, fused: bool = False) -> torch.optim.Optimizer:
        """Builds the optimizer over the groups of `parameter_groups`.

        Args:
            groups: The groups.
            global_batch: Images behind a step, by which the learning rate is scaled.
            fused: Whether a fused kernel may be used, if `args` do not say.
        """
        parameters: Any = groups
        args = {name: value for name, value in self.args.items() if name not in GROUPING}
        lr = self.scaled_lr(global_batch)
        if fused and self.name in FUSED and not {"fused", "foreach"} & set(args):
            args = {**args, "fused": True}
        return create_optimizer_v2(parameters, opt=self.name, lr=lr, weight_decay=self.weight_decay, **args)


def optimizer_and_schedule(
    trainer: pl.Trainer, modules: Iterable[nn.Module], optimizer: OptimizerOptions, schedule: ScheduleOptions
) -> Any:
    """Builds what `LightningModule.configure_optimizers` returns, over the parameters of student and distillers."""
    images = 1 if optimizer.lr_base_batch is None else global_batch(trainer)
    groups = parameter_groups(modules, optimizer.weight_decay, optimizer.decay_embeddings, **optimizer.grouping)
    built = optimizer.build(groups, images, may_fuse(trainer))
    length = run_length(trainer, schedule.interval == "step")
    if (fault := schedule.fault(length)) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_info(f"Warning: {fault}")
    rate = schedule.build(built, length)
    return {"optimizer": built, "lr_scheduler": {"scheduler": rate, "interval": schedule.interval}}


def run_length(trainer: pl.Trainer, by_steps: bool) -> RunLength:
    """Returns how long a run is planned to be.

    Raises:
        ValueError: If nothing limits it, or its steps are to be counted and its loader has no length.
    """
    ends = [each.steps for each in trainer.callbacks if isinstance(each, RunEnd)]  # type: ignore[attr-defined]
    steps = next(filter(None, ends), trainer.max_steps)
    epochs = trainer.max_epochs or -1
    if epochs < 1 and steps < 1:
        raise ValueError(
            f"The schedule needs the length of the run: set trainer.max_epochs or trainer.max_steps (they are "
            f"{trainer.max_epochs} and {trainer.max_steps})."
        )
    if epochs > 0 and not by_steps:
        return RunLength(epochs)
    try:
        loader = training_loader(trainer)
        batches = len(loader)
    except TypeError as error:
        raise ValueError(
            "The training loader has no length, so the steps of an epoch are not known. Set trainer.max_epochs and "
            "schedule.interval: epoch."
        ) from error
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if not (is_stream or isinstance(loader.sampler, DistributedSampler)):  # Lightning is yet to deal the images out
        batches = math.ceil(batches / trainer.world_size)
    batches = limited(batches, trainer.limit_train_batches)
    an_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    return planned_length(epochs, steps, an_epoch)


def training_loader(trainer: pl.Trainer) -> Any:
    """Returns a training loader of its own: the Trainer's, if built before a resume, would not go on."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None:
        return data.train_dataloader()
    _ = trainer.estimated_stepping_batches  # builds the loader
    return trainer.train_dataloader


def global_batch(trainer: pl.Trainer) -> int:
    """Returns the number of images behind one optimizer step, over all processes and accumulated batches.

    Raises:
        ValueError: If the training loader does not say its batch size.
    """
    size = getattr(training_loader(trainer), "batch_size", None)
    if size is None:
        raise ValueError(
            "The training loader has no batch_size by which to scale the learning rate. Set optimizer.lr_base_batch: "
            "null and give the learning rate itself."
        )
    return int(size) * trainer.world_size * trainer.accumulate_grad_batches


def may_fuse(trainer: pl.Trainer) -> bool:
    """Tells whether one kernel may take a whole step of the optimizer.

    Not under a scaler, for it would unscale the gradients too late for their norm to be logged, nor where gradients are
    clipped in mixed precision, which Lightning then refuses.
    """
    clipped = isinstance(trainer.precision_plugin, MixedPrecision) and bool(trainer.gradient_clip_val)
    return trainer.strategy.root_device.type in FUSED_DEVICES and trainer.scaler is None and not clipped


def parameter_groups(
    modules: Iterable[nn.Module], weight_decay: float, decay_embeddings: bool = False, **grouping: Any
) -> list[dict[str, Any]]:
    """Splits trainable parameters into timm's groups, without and with weight decay.

    Biases and norms are not decayed, nor is what a module's own `no_weight_decay()` names. With `layer_decay` the
    student has two groups a layer, whose `lr_scale` timm's schedules apply.

    Args:
        modules: The student and the distillers.
        weight_decay: Weight decay of the second group.
        decay_embeddings: Whether what `no_weight_decay()` names is decayed after all.
        grouping: More arguments of timm's `param_groups_layer_decay`, or `param_groups_weight_decay` without layers.

    Raises:
        ValueError: If `layer_decay` is given, and the student's layers are not known.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    flat = {name: value for name, value in grouping.items() if name not in OF_LAYERS}
    for module in modules:
        exempt: Any = () if decay_embeddings else getattr(module, "no_weight_decay", set)()
        if isinstance(module, Network) and "layer_decay" in grouping:
            model, exempt = _layered(module), {name.removeprefix("model.") for name in exempt}
            found: Any = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, **grouping)
        else:
            found = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=exempt, **flat)
        for group in found:
            parameters = group.pop("params")
            groups.setdefault(tuple(sorted(group.items())), []).extend(parameters)
    return [{"params": parameters, **dict(options)} for options, parameters in groups.items()]


def _layered(student: Network) -> nn.Module:
    """Returns the timm model inside a student, whose layers timm knows."""
    model = getattr(student, "model", None)
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            f"optimizer.args: layer_decay has no effect on a {type(student).__name__}, whose layers timm does not "
            "know. Leave it out."
        )
    return model  # type: ignore[return-value]


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Returns the norm of all gradients; of a split module's, over all processes, which call it together."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def highest_rate(optimizer: torch.optim.Optimizer) -> float:
    """Returns the learning rate of the group that learns fastest: the run's, where layers have a share of it."""
    return max(float(group["lr"]) for group in optimizer.param_groups)
