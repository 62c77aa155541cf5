"""What ``test_parallel.py`` starts by torchrun: the tiny task without dropout. Argument: the folder."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn

from tests.experiments.tiny import COMPUTE, TRAIN, Recorder, TinyTask, recordings_are_calls, trainer
from tokendyn.experiments._cli import Stopped
from tokendyn.experiments._distributed import current_group, joined
from tokendyn.experiments._trainer import Trainer
from tokendyn.experiments.imagenet.__main__ import main as imagenet

STUDY = "--seeds 0 --steps 2 --batch-size 8 --log-every 1 --evaluate-every 2 --jobs 1 --device cpu --threads 1"
SPREAD = "--arms baseline --parallel fsdp --channels-last"  # blocks inside stages, and weights that FSDP2 cannot take


class Task(TinyTask):
    """Its model sees each example by itself, and is a list of blocks, as FSDP2 divides it; its loss draws nothing."""

    def build_model(self) -> nn.Module:
        return Blocks(self.width)

    def loss(self, model, tensors):  # type: ignore[no-untyped-def]
        points = tensors["points"]
        loss = nn.functional.mse_loss(model(points), points.sum(dim=1, keepdim=True))
        return loss, {"double": 2 * loss.detach()}

    def evaluate(self, model: nn.Module, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
        points = torch.linspace(-1, 1, 12, device=device).reshape(4, 3)
        return {"loss": nn.functional.mse_loss(model(points), points.sum(dim=1, keepdim=True)).item()}, {}


class Blocks(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def make(folder: Path, parallel: str, stop_after: int | None = None) -> Trainer:
    """The trainer of this process."""
    train = dataclasses.replace(TRAIN, ema_decay=0.0 if parallel == "fsdp" else 0.5)
    graphs = {"cuda_graphs": True} if parallel == "graphs" else {"parallel": parallel}
    compute = dataclasses.replace(COMPUTE, **graphs)
    return trainer(folder, Task(), Recorder(stop_after=stop_after), train=train, compute=compute)


def main(folder: Path) -> None:
    """Train in all ways, each interrupted by a signal that the last process alone gets after step 6, and tells the
    others in step 7; then a study."""
    with joined(torch.device("cpu")):
        group = current_group()
        recordings_are_calls(setattr)
        for parallel in ("ddp", "fsdp", "graphs"):
            try:
                make(folder / parallel, parallel, 6 if group.rank == group.size - 1 else None).run()
            except Stopped as stopped:
                print(f"process {group.rank}: {stopped}")
            make(folder / parallel, parallel).run()
        for name, options in (("study", "--arms baseline published"), ("study-fsdp", SPREAD)):
            tree = ["--data-dir", str(folder / "tree"), "--out", str(folder / name)]
            if code := imagenet([*tree, *STUDY.split(), *options.split()]):
                sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
