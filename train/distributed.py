"""Distributed runs: joining the process group, errors that all processes raise together, and FSDP.

Processes synchronize at fixed points only. If one process fails, all raise the error at the next sync point, so that
none waits for a process that is gone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, get_int_from_env
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..configs.schema import ConfigError, TrainConfig
from ..errors import RunError
from .data import DataError

WORLD_SIZES = (
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "WORLD_SIZE",
)  # by launcher
READ_ERRORS = (DataError, OSError, RuntimeError)  # of loaders; RuntimeError: a worker that died
LISTS = (nn.ModuleList, nn.Sequential)
FULL = StateDictOptions(full_state_dict=True)


class OtherProcessError(RunError):
    """Another process failed; the message gives its rank and its error."""


def join_processes(**options: Any) -> Accelerator:
    """Creates this process's accelerator in a group of all processes that the launcher started; without a GPU, on CPUs.

    Args:
        options: of `Accelerator`.

    Raises:
        ConfigError: fewer processes joined the group than the launcher was asked for.
    """
    world, environ = get_int_from_env(WORLD_SIZES, 1), os.environ
    hint = "start N with `torchrun --nproc_per_node N -m foveal ...`"
    # accelerate launch --cpu sets the address of a group and starts a single process
    if world == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environ.keys() and "WORLD_SIZE" not in environ:
        raise ConfigError(f"accelerate launch started one process on the CPU, not --num_processes; {hint}")
    accelerator = Accelerator(cpu=world > 1 and not torch.accelerator.is_available(), **options)
    if accelerator.num_processes != world:
        raise ConfigError(
            f"the launcher started {world} processes, but {accelerator.num_processes} joined this run on "
            f"{accelerator.device.type}; {hint}, and ACCELERATE_USE_CPU=true for CPUs"
        )
    return accelerator


def raise_together(accelerator: Accelerator, error: Exception | None) -> None:
    """Raises ``error``, or `OtherProcessError` if only other processes have one. Every process must call this."""
    mine = [] if error is None else [f"process {accelerator.process_index}: {type(error).__name__}: {error}"]
    found = gather_object(mine)
    if error is not None:
        raise error
    if found:
        raise OtherProcessError("; ".join(found))


@contextmanager
def raised_by_all(accelerator: Accelerator) -> Iterator[None]:
    """An error inside the block on any process is raised by all of them at the end of the block."""
    try:
        yield
    except Exception as error:
        raise_together(accelerator, error)
        raise
    raise_together(accelerator, None)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is set on any process. Every process must call this."""
    flags: Any = accelerator.gather(torch.tensor([float(flag)], device=accelerator.device))
    return bool(flags.max())


class EvaluationLoader:
    """A loader that raises its errors on all processes together, after every process has read its share."""

    def __init__(self, loader: Any, accelerator: Accelerator):
        self._loader, self._accelerator = loader, accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        failure = None
        try:
            yield from self._loader.epoch(epoch, start)
        except READ_ERRORS as error:
            failure = error
        raise_together(self._accelerator, failure)


class TrainingBatches:
    """Iterates over an epoch's batches. After an error on one of several processes, it keeps the error in ``failure``
    until the next sync point and repeats the last batch; the first batch is a sync point."""

    def __init__(self, batches: Iterator[Any], accelerator: Accelerator):
        self._batches, self._accelerator = batches, accelerator
        self._batch: Any = None
        self.failure: Exception | None = None

    def __next__(self) -> Any:
        if self._batch is None:
            with raised_by_all(self._accelerator):
                self._read()
        elif self.failure is None:
            try:
                self._read()
            except READ_ERRORS as error:
                if self._accelerator.num_processes == 1:
                    raise
                self.failure = error
        return self._batch

    def _read(self) -> None:
        self._batch = next(self._batches, None)
        assert self._batch is not None, "the loader ended before its last batch"


# ---- FSDP


def check_sharding(config: TrainConfig) -> None:
    """Raises:
    ConfigError: an option that FSDP does not support.
    """
    if config.amp == "fp16":
        raise ConfigError("train.parallel=fsdp with train.amp=fp16: the gradient scaler needs full gradients; use bf16")
    if config.channels_last:
        raise ConfigError("train.parallel=fsdp with train.channels_last: FSDP shards contiguous weights only")


def _is_block(module: nn.Module) -> bool:
    """Whether ``module`` has children and is only ever called as a whole. Lists are not; nor are stages, which hold a
    list of blocks that dense tasks call one by one."""
    parts = list(module.children())
    lists = [part for part in parts if isinstance(part, LISTS)]
    stage = any(True for each in lists for element in each for _ in element.children())
    return bool(parts) and not isinstance(module, LISTS) and not stage


def shard(model: nn.Module, min_num_params: int) -> None:
    """Shards the parameters of ``model`` in place over the processes (PyTorch's FSDP2). Each block of
    ``min_num_params`` or more in a list is a unit, innermost first; the remaining parameters are one unit."""
    taken: set[nn.Parameter] = set()
    for module in reversed(list(model.modules())):  # children before their parents
        if isinstance(module, LISTS):
            for element in module:
                own = [p for p in element.parameters() if p not in taken]
                if _is_block(element) and sum(p.numel() for p in own) >= min_num_params:
                    fully_shard(element)
                    taken.update(element.parameters())
    fully_shard(model)


def gradient_sync(accelerator: Accelerator, model: Any, sync: bool) -> Any:
    """A context in which the backward pass reduces gradients over the processes only if ``sync``."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP, compiled or not
        model.set_requires_gradient_sync(sync)
        return nullcontext()
    return nullcontext() if sync else accelerator.no_sync(model)


def full(tensor: Any) -> Any:
    """Gathers a sharded tensor on every process; returns anything else unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's shard of a full tensor, sharded as ``own``; the full tensor if ``own`` is not sharded."""
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """A model's state dict with full tensors, sharded or not; every process must call this."""
    return get_model_state_dict(model, options=FULL)


def load_full_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads full tensors into a model, sharded or not."""
    set_model_state_dict(model, dict(state), options=FULL)


def full_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """An optimizer's state dict with full tensors on the CPU (empty unless ``keep``); every process must call this."""
    saved, state = optimizer.state_dict(), {}
    for number, values in saved["state"].items():
        tensors = {name: full(value) for name, value in values.items()}
        if keep:
            state[number] = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in tensors.items()}
    return saved | {"state": state}


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads the result of `full_optimizer_state`, whether the parameters are sharded now or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in saved["state"].items():
        own = parameters[number]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == own.shape:
                values[name] = local_shard(value, own)
    optimizer.load_state_dict(saved)
