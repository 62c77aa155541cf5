"""A task that trains in milliseconds and draws from every generator, and a study of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn.experiments import _graphs, _trainer
from tokendyn.experiments._config import ComputeConfig, TrainConfig
from tokendyn.experiments._task import Batch
from tokendyn.experiments._trainer import Trainer

COMPUTE = ComputeConfig(device="cpu", threads=1)
TRAIN = TrainConfig(steps=12, batch_size=4, log_every=3, evaluate_every=5, checkpoint_every=4, ema_decay=0.5)


@dataclass
class TinyTask:
    """A perceptron with dropout on points; its loss also draws from Python's and NumPy's generators."""

    seed: int = 0
    width: int = 6
    extra: bool = False  # one layer more, as an arm may have
    nan_at: int | None = None
    steps_per_epoch: int = 5

    def build_model(self) -> nn.Module:
        layers = [nn.Linear(3, self.width), nn.Tanh(), nn.Dropout(0.3)]
        if self.extra:
            layers.insert(0, nn.Linear(3, 3))
        return nn.ModuleDict({"body": nn.Sequential(*layers), "head": nn.Linear(self.width, 1)})

    def batch(self, step: int) -> Batch:
        points = torch.from_numpy(np.random.default_rng([self.seed, step]).standard_normal((4, 3), np.float32))
        points[0, 0] = float("nan") if step == self.nan_at else points[0, 0]
        return Batch({"points": points}, {"bad example": "bad example is bad"} if step == 6 else {})

    def batch_part(self, step: int, part: slice) -> Batch:
        whole = self.batch(step)
        return Batch({key: value[part] for key, value in whole.tensors.items()}, whole.skipped)

    def loss(self, model: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        noise = random.random() + np.random.rand()  # noqa: NPY002
        loss = F.mse_loss(predict(model, tensors["points"]) + 0.1 * noise, tensors["points"].sum(dim=1, keepdim=True))
        return loss, {"noise": torch.tensor(noise)}

    def evaluate(self, model: nn.Module, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
        points = torch.linspace(-1, 1, 12).reshape(4, 3)
        return {"loss": F.mse_loss(predict(model, points), points.sum(dim=1, keepdim=True)).item()}, {}


def predict(model: Any, points: Tensor) -> Tensor:
    return model["head"](model["body"](points))


@dataclass
class Recorder:
    """Listens to a run; may ask it to stop after a number of steps."""

    stop_after: int | None = None
    steps: int = 0
    said: list[str] = field(default_factory=list)
    started: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def received(self) -> int | None:
        return 15 if self.steps == self.stop_after else None

    def start(self, name: str, steps: int, done: int) -> None:
        self.started.append((name, steps, done))

    def advance(self) -> None:
        self.steps += 1

    def evaluated(self, name: str, step: int, steps: int, loss: float, accuracy: float | None) -> None:
        pass

    def say(self, message: str) -> None:
        self.said.append(message)


def recordings_are_calls(replace: Callable[[Any, str, Any], None]) -> None:
    """CUDA graphs without a GPU: what would be recorded is called. ``replace`` is ``setattr``, or pytest's."""
    replace(torch.cuda, "Stream", object)
    replace(_graphs, "beside", lambda stream, call: call())
    replace(_graphs, "record", lambda call: call)
    replace(_trainer, "expect_recordable", lambda *_: None)


def trainer(folder: Path, task: TinyTask | None = None, recorder: Recorder | None = None, **options: Any) -> Trainer:
    """A trainer of ``task`` into ``folder``, with :data:`TRAIN` unless told otherwise."""
    recorder = recorder or Recorder()
    settings = {"train": TRAIN, "compute": COMPUTE, "workers": 0, "seed": 3, "name": "tiny, seed 3"} | options
    return Trainer(task or TinyTask(), folder=folder, progress=recorder, signals=recorder, **settings)
