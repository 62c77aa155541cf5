"""What the trainer trains: the interface between an experiment and the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

KEEPSAKES = "keepsakes.safetensors"


@dataclass
class Batch:
    """Examples of one step on the CPU, and those that could not be read (name -> why)."""

    tensors: dict[str, Tensor]
    skipped: dict[str, str] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU reads while the host goes on; ``DataLoader`` asks for it."""
        return Batch({name: value.pin_memory() for name, value in self.tensors.items()}, self.skipped)


class Task(Protocol):
    """What is trained. Everything here must follow from the constructor's arguments and the step."""

    @property
    def steps_per_epoch(self) -> int: ...

    def build_model(self) -> nn.Module:
        """The model on the CPU, initialised from torch's generator."""
        ...

    def batch(self, step: int) -> Batch:
        """The batch of ``step``, a function of the step alone. May be called in another process."""
        ...

    def loss(self, model: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and further scalars to average into the log."""
        ...

    def evaluate(self, model: nn.Module, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
        """Held-out measures of the model (in evaluation mode, without gradients), ``loss`` among them, and
        the examples that could not be read (name -> why)."""
        ...


@runtime_checkable
class Scheduled(Protocol):
    """A task that changes its model as the training goes on."""

    def set_progress(self, model: nn.Module, progress: float) -> None:
        """Make ``model`` what it must be when a part ``progress`` (0 to 1) of all steps is made."""
        ...


@runtime_checkable
class Alike(Protocol):
    """A task whose steps can be made alike, so that a GPU can replay one that was recorded (``--cuda-graphs``)."""

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What ``loss`` is given, of a batch on the device: all that draws or decides on the host is done here, and the
        shapes are the same in every step."""
        ...

    def steps_differ(self) -> str | None:
        """Why ``loss`` is nevertheless another one from step to step, in words; None if it is not."""
        ...


@runtime_checkable
class Keeping(Protocol):
    """A task that leaves tensors for the report, so that it needs no checkpoints."""

    def keepsakes(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """What is written to ``keepsakes.safetensors`` at the end; called like ``evaluate``."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """A task whose batches several processes can share."""

    def batch_part(self, step: int, part: slice) -> Batch:
        """The examples ``part`` of the batch of ``step``, as they are in the whole batch."""
        ...
