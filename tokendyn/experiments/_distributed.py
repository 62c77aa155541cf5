"""Several processes that train one model: torchrun's, by DDP or, for models that do not fit one GPU, FSDP2.

    torchrun --nproc-per-node 2 -m tokendyn.experiments.imagenet ...

Each process takes an equal part of every batch, and gradients are averaged, so the result is that of one process with
the whole batch, up to rounding. Batch normalisation sees the whole batch too where it is synchronised (on GPUs); else
each process normalises its own part, and evaluation uses the same statistics in all. Process 0 alone writes and speaks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokendyn.errors import OptionError
from tokendyn.experiments._config import ComputeConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes that train together: how many, and which of them this is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def told(self, value: T) -> T:
        """What process 0 passed."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """What all passed, in the order of their ranks."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box


def current_group() -> Group:
    """The group of this process; one process alone if none was joined."""
    return Group(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Group()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, while the block runs; the device of this process.

    Raises:
        OptionError: a device other than a process's own was named.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():  # alone, or joined already
        yield device
        return
    if device.type == "cuda":
        if device.index is not None:
            raise OptionError(f"--device {device}: with torchrun each process has a GPU of its own; say --device cuda")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def part_of(count: int, group: Group) -> slice:
    """The examples of a batch that are this process's.

    Raises:
        OptionError: the processes do not divide the batch.
    """
    if count % group.size:
        raise OptionError(
            f"--batch-size is {count}, which {group.size} processes do not divide; choose a multiple of {group.size}"
        )
    each = count // group.size
    return slice(group.rank * each, (group.rank + 1) * each)


def spread_model(
    model: nn.Module, device: torch.device, group: Group, compute: ComputeConfig
) -> tuple[nn.Module, nn.Module]:
    """The model to keep (its parameters, its states) and the module to call, compiled if that is asked.

    With CUDA graphs the module called exchanges no gradients: the trainer does, between two recordings.
    """

    def called(model: nn.Module) -> Any:
        return torch.compile(model) if compute.compile else model

    if group.size == 1 or compute.cuda_graphs:
        return model, called(model)
    if device.type == "cuda" and compute.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if compute.parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other
        mesh = init_device_mesh(device.type, (group.size,))
        exempt = [name for name, value in model.named_parameters() if getattr(value, "_no_weight_decay", False)]
        for module in reversed([*model.modules()]):  # the innermost lists first, as FSDP2 wants it
            if isinstance(module, nn.ModuleList):
                for block in module:
                    fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name, value in model.named_parameters():  # the parameters are others now
            if name in exempt:
                setattr(value, "_no_weight_decay", True)  # noqa: B010
        return model, called(model)
    # Compiled inside DDP it is the one graph that a single process compiles too.
    spread = nn.parallel.DistributedDataParallel(
        called(model),
        [device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    spread.broadcast_buffers = False  # in every step: statistics are averaged when they are used, by average_buffers
    return model, spread


def average_buffers(model: nn.Module, group: Group) -> None:
    """Give all processes the same statistics, the mean of theirs: each has those of its own parts of the batches."""
    for buffer in model.buffers():
        if group.size > 1 and buffer.is_floating_point():
            group.sum(buffer).div_(group.size)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which FSDP2 keeps a part in each process, whole; others as they are. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, _dtensor()) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """``value`` spread over the processes as ``tensor`` is."""
    if not isinstance(tensor, _dtensor()):
        return value.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]


def _dtensor() -> type:
    """FSDP2's tensors, or where it is not in use a type that has no instances."""
    if not dist.is_initialized():
        return type(None)
    from torch.distributed.tensor import DTensor

    return DTensor
