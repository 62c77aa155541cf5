"""Training steps replayed from CUDA graphs.

The host starts every kernel of a step by itself, and where models are small it takes longer over that than the GPU
takes over the kernels. A CUDA graph holds all launches of a function, with the addresses of all tensors in them, and is
started by one call. So what is recorded must be alike in every step: the same shapes, the same kernels, nothing drawn
or decided on the host. torch's generator of the GPU is no exception: a replay draws what the launches would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokendyn.errors import OptionError
from tokendyn.experiments._config import ComputeConfig
from tokendyn.experiments._distributed import Group
from tokendyn.experiments._task import Alike, Task

T = TypeVar("T")

EAGER_CALLS = 3  # kernels are chosen and compiled, and the optimiser makes its state, before anything is recorded


def expect_recordable(task: Task, device: torch.device, group: Group, compute: ComputeConfig) -> None:
    """Training ``task`` so can be recorded.

    Raises:
        OptionError: it cannot; the reason.
    """
    reason = None
    if device.type != "cuda":
        reason = f"needs an NVIDIA GPU, and --device is {device}"
    elif not isinstance(task, Alike):
        reason = f"needs steps that are alike, and those of {type(task).__name__} are not known to be"
    elif differs := task.steps_differ():
        reason = f"needs steps that are alike, but {differs}"
    elif group.size > 1 and compute.parallel != "ddp":
        reason = f"cannot be had with --parallel {compute.parallel}; choose ddp"
    elif group.size > 1 and compute.sync_batch_norm:
        reason = "cannot be had with --sync-batch-norm in several processes; say --no-sync-batch-norm"
    if reason is not None:
        raise OptionError(f"--cuda-graphs {reason}")


class Recorded(Generic[T]):
    """A function of tensors on one GPU: made as it is :data:`EAGER_CALLS` times, then recorded, then replayed.

    Every call is made once, however it is made: nothing has to be undone after a rehearsal.

    Args:
        function: takes a dictionary of tensors. What it returns, and whatever else it makes and keeps, is overwritten
            by the next call.
    """

    def __init__(self, function: Callable[[dict[str, Tensor]], T]) -> None:
        self._function = function
        self._stream: torch.cuda.Stream | None = None
        self._calls = 0
        self._inputs: dict[str, Tensor] = {}
        self._replay: Callable[[], T] | None = None

    def __call__(self, tensors: dict[str, Tensor]) -> T:
        self._calls += 1
        if self._calls <= EAGER_CALLS:
            self._stream = self._stream or torch.cuda.Stream()
            return beside(self._stream, lambda: self._function(tensors))
        if self._replay is None:
            self._inputs = {name: value.clone() for name, value in tensors.items()}
            self._replay = record(lambda: self._function(self._inputs))
        else:
            self._take(tensors)
        return self._replay()

    def _take(self, tensors: dict[str, Tensor]) -> None:
        for name, place in self._inputs.items():
            value = tensors[name]
            if (value.shape, value.dtype) != (place.shape, place.dtype):
                raise OptionError(
                    f"--cuda-graphs recorded {name} as {tuple(place.shape)}, {place.dtype}; this step has "
                    f"{tuple(value.shape)}, {value.dtype}; leave --cuda-graphs out"
                )
            place.copy_(value)


def beside(stream: torch.cuda.Stream, call: Callable[[], T]) -> T:
    """What ``call`` returns, its kernels on ``stream``: autograd and libraries then keep nothing of the stream on which
    everything else runs, which a recording may not wait for."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = call()
    torch.cuda.current_stream().wait_stream(stream)
    return made


def record(call: Callable[[], T]) -> Callable[[], T]:
    """``call`` as the replay of a CUDA graph, which returns the same tensors every time."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may do what a recording must not: batches are pinned, processes watched.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        made = call()

    def replay() -> T:
        graph.replay()
        return made

    return replay


class GradientExchange:
    """Makes gradients the mean over all processes, in one exchange and in the memory in which they are.

    Called always with the same gradients: those of a recorded step.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._whole = torch.empty(0)
        self._parts: list[Tensor] = []

    def __call__(self, gradients: list[Tensor]) -> None:
        if self._group.size == 1 or not gradients:
            return
        if not self._parts:
            self._whole = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients))
            parts = self._whole.split([gradient.numel() for gradient in gradients])
            # Laid out in memory as the gradients are, so that few kernels move them all.
            self._parts = [
                part.as_strided(gradient.shape, torch.empty_like(gradient).stride())
                for part, gradient in zip(parts, gradients, strict=True)
            ]
        torch._foreach_copy_(self._parts, gradients)  # type: ignore[attr-defined]
        dist.all_reduce(self._whole)
        self._whole /= self._group.size
        torch._foreach_copy_(gradients, self._parts)  # type: ignore[attr-defined]
