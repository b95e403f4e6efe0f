"""Students that are split over the processes of a run: `--trainer.strategy sharded`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kdvit.errors import UserError

PRECISIONS = ("32-true", "bf16-mixed")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")  # each element's step is its own


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2: each process holds the whole teacher, and a part of the weights, gradients and moments that are trained.

    A layer is gathered where it runs, and the whole student for a validation, a test or a prediction. Checkpoints
    are one file, the same as other strategies write: a run may go on with another strategy of as many processes, and be
    tested by any number.

    Raises:
        UserError: Before anything is trained, if the run has what does not go with it; see `require_shardable`.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Spreads one student over all processes."""
        assert self.lightning_module is not None
        require_shardable(self.lightning_module.trainer, self.lightning_module)
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Evaluation: a collective for each batch would hang where a rank has one batch more than another

    def on_validation_start(self) -> None:
        """Gathers the whole student."""
        self._keep_whole(True)

    def on_validation_end(self) -> None:
        """Splits the student again."""
        self._keep_whole(False)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _keep_whole(self, whole: bool) -> None:
        student: Any = getattr(self.lightning_module, "student", None)
        for module in student.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(not whole, recurse=False)
                module.unshard() if whole else module.reshard()

    # Checkpoints: gathered on the first rank, in the names and numbers of other strategies

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Has Lightning call `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the whole weights on the first rank; all ranks call it together."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Returns the whole state on the first rank; all ranks call it together."""
        return self._gathered(ParallelStrategy.optimizer_state(self, optimizer))

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        def gather(part: Any) -> Any:
            whole = part.detach().full_tensor()
            return whole.cpu() if self.is_global_zero else whole.new_empty(0)

        return dict(apply_to_collection(dict(state), DTensor, gather))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, on each rank."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads this rank's part of the weights."""
        assert self.lightning_module is not None
        ours = self.lightning_module.state_dict()
        state = {name: _part(value, ours.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this rank's part of the moments."""
        states = []
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = list(chain(*(group["params"] for group in optimizer.param_groups)))
            numbers = chain(*(group["params"] for group in whole["param_groups"]))
            like = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {name: _part(value, like[number]) for name, value in values.items()}
                for number, values in whole["state"].items()
            }
            states.append({**whole, "state": state})
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": states})


def _part(value: Any, like: Tensor | None) -> Any:
    """Returns the rank's part of a tensor that belongs to a split one, and anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def split(module: Any, mesh: DeviceMesh) -> None:
    """Splits student and distillers of a `DistillationModule` over the processes of a mesh, by FSDP2; once."""
    if isinstance(module.student, FSDPModule):
        return
    module.load_state_dict(module.trainer.strategy.broadcast(module.state_dict()))  # parts of one student, not several
    for block in getattr(getattr(module.student, "model", None), "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(module.student, mesh=mesh, reshard_after_forward=True)
    for distiller in module.distillers.values():
        if next(distiller.parameters(), None) is not None:  # its metrics are taken after its forward: whole till then
            fully_shard(distiller, mesh=mesh, reshard_after_forward=False)


def require_shardable(trainer: pl.Trainer, module: Any) -> None:
    """Raises UserError for what does not work, or is not tested, with a split student."""
    said = "trainer.strategy sharded"
    if str(trainer.precision) not in PRECISIONS:
        raise UserError(f"{said} goes with trainer.precision {' or '.join(PRECISIONS)}, got {trainer.precision}.")
    if any(getattr(each, "averages_student", False) for each in trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError(f"{said} has no averaged student: leave ema.decay out, or set --trainer.strategy ddp.")
    if module.compiled in ("student", "both"):
        raise UserError(f"{said} does not go with model.compile {module.compiled}: set it to none or teacher.")
    if module.optimizer_options.name not in OPTIMIZERS:
        known, ours = ", ".join(OPTIMIZERS), module.optimizer_options.name
        raise UserError(f"{said} goes with the optimizers {known}, got model.optimizer.name {ours!r}.")
    weights = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if buffers := sorted(set(module.state_dict()) - weights):
        raise UserError(
            f"{said} keeps no buffers alike over the processes, and {buffers[0]!r} is one (as of BatchNorm). Set "
            "--trainer.strategy ddp."
        )


StrategyRegistry.register(
    "sharded", ShardedStrategy, description="FSDP2 of student and distillers; the teacher is whole in each process"
)
