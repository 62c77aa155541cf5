"""Steps replayed from CUDA graphs: the trainer's part on a CPU, where a recording is the function itself; the rest on a
GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.experiments.test_trainer import contents
from tests.experiments.tiny import COMPUTE, TRAIN, Recorder, TinyTask, predict, recordings_are_calls, trainer
from tokendyn.errors import NonFiniteError, OptionError
from tokendyn.experiments._cli import Stopped
from tokendyn.experiments._distributed import Group
from tokendyn.experiments._graphs import EAGER_CALLS, Recorded, expect_recordable
from tokendyn.experiments._records import read_records
from tokendyn.experiments.imagenet._config import DataConfig, ImageNetConfig, ModelConfig
from tokendyn.experiments.imagenet._images import load_digits
from tokendyn.experiments.imagenet._task import ImageTasks

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
GRAPHS = dataclasses.replace(COMPUTE, device="cuda" if GPU else "cpu", cuda_graphs=True)
EAGER = dataclasses.replace(GRAPHS, cuda_graphs=False)


class AlikeTask(TinyTask):
    """Its noise is drawn in time, and it draws for every example on the device: dropout, and batch statistics."""

    differs: str | None = None

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model["body"].append(nn.BatchNorm1d(self.width))  # type: ignore[index,operator]
        return model

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        points = tensors["points"]
        noise = np.random.rand()  # noqa: NPY002
        return {"points": points, "noise": torch.full((), noise, device=points.device)}

    def steps_differ(self) -> str | None:
        return self.differs

    def loss(self, model: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        points, noise = tensors["points"], tensors["noise"]
        loss = F.mse_loss(predict(model, points) + 0.1 * noise, points.sum(dim=1, keepdim=True))
        return loss, {"noise": noise}

    def evaluate(self, model: nn.Module, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
        points = torch.linspace(-1, 1, 12, device=device).reshape(4, 3)
        return {"loss": F.mse_loss(predict(model, points), points.sum(dim=1, keepdim=True)).item()}, {}


@pytest.fixture(autouse=True)
def _recordings_are_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU."""
    if not GPU:
        recordings_are_calls(monkeypatch.setattr)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_records(folder / "metrics.jsonl")]


def test_replayed_steps_are_the_steps(tmp_path: Path) -> None:
    """The same losses, running statistics and weights as without; the same random numbers in the same places."""
    runs = []
    for name, how in (("eager", EAGER), ("graphs", GRAPHS)):
        runs.append(trainer(tmp_path / name, AlikeTask(), compute=how))
        runs[-1].run()
    np.testing.assert_allclose(losses(tmp_path / "graphs"), losses(tmp_path / "eager"), rtol=2e-5)
    eager, graphs = (run.model.state_dict() for run in runs)
    for name, value in eager.items():  # the learning rate is a float32 in a graph
        torch.testing.assert_close(graphs[name], value, rtol=2e-5, atol=1e-7, msg=name)
    # A loss that was only recorded once would stand still.
    assert len(set(losses(tmp_path / "graphs"))) == len(losses(tmp_path / "graphs"))


@pytest.mark.parametrize("stop", [2, EAGER_CALLS + 1, 8])
def test_a_stopped_run_continues_with_the_same_bits(tmp_path: Path, stop: int) -> None:
    trainer(tmp_path / "whole", AlikeTask(), compute=GRAPHS).run()
    with pytest.raises(Stopped):
        trainer(tmp_path / "stopped", AlikeTask(), Recorder(stop_after=stop), compute=GRAPHS).run()
    trainer(tmp_path / "stopped", AlikeTask(), compute=GRAPHS).run()
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_replayed_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    run = trainer(tmp_path, AlikeTask(nan_at=9), compute=GRAPHS)
    updated: list[Tensor] = []
    apply = run._apply

    def note(tensors: dict[str, Tensor]) -> None:
        apply(tensors)
        updated[:] = [parameter.detach().clone() for parameter in run.model.parameters()]

    run._apply = note
    with pytest.raises(NonFiniteError, match=r"step 10 of 12: the loss is nan \(first found in the input of body.0"):
        run.run()
    assert all(torch.equal(a, b) for a, b in zip(updated, run.model.parameters(), strict=True))


def test_how_often_a_function_is_made() -> None:
    """Each call once; what is recorded reads the memory of the first recording."""
    places: list[int] = []

    def double(tensors: dict[str, Tensor]) -> Tensor:
        places.append(tensors["x"].data_ptr())
        return 2 * tensors["x"]

    recorded = Recorded(double)
    device = "cuda" if GPU else "cpu"
    found = [recorded({"x": torch.full((2,), float(k), device=device)}).tolist() for k in range(8)]
    assert found == [[2.0 * k] * 2 for k in range(8)]
    assert len(places) == (EAGER_CALLS + 1 if GPU else 8)
    assert len(set(places[EAGER_CALLS:])) == 1
    with pytest.raises(OptionError, match=r"--cuda-graphs recorded x as \(2,\), torch.float32; this step has \(3,\)"):
        recorded({"x": torch.zeros(3, device=device)})


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        ("needs an NVIDIA GPU, and --device is cpu", {"device": "cpu"}),
        ("steps that are alike, and those of TinyTask are not known to be", {"task": TinyTask()}),
        ("steps that are alike, but a temperature moves", {"differs": "a temperature moves"}),
        ("cannot be had with --parallel fsdp; choose ddp", {"size": 2, "parallel": "fsdp"}),
        ("with --sync-batch-norm in several processes; say --no-sync-batch-norm", {"size": 2}),
        (None, {"size": 2, "sync_batch_norm": False}),
        (None, {}),
    ],
)
def test_what_cannot_be_recorded(expected: str | None, change: dict[str, Any]) -> None:
    change = dict(change)
    task = change.pop("task", AlikeTask())
    task.differs = change.pop("differs", None)
    device, group = torch.device(change.pop("device", "cuda")), Group(0, change.pop("size", 1))

    def ask() -> None:
        expect_recordable(task, device, group, dataclasses.replace(GRAPHS, **change))

    if expected is None:
        ask()
    else:
        with pytest.raises(OptionError, match=f"^--cuda-graphs .*{expected}$"):
            ask()


def test_arms_whose_temperature_moves_are_refused() -> None:
    config = ImageNetConfig(arms=("published", "annealed"))
    make: Callable[[str, int], Any] = ImageTasks(load_digits(16), config)
    assert make("published", 0).steps_differ() is None
    assert make("annealed", 0).steps_differ() == "the temperature of this arm moves"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("arm", ["baseline", "published"])
def test_mambavision_trains_alike_from_graphs(tmp_path: Path, arm: str) -> None:
    """Stochastic depth, autocast, channels last, an order, the scan's kernels: the losses of both ways."""
    config = ImageNetConfig(data=DataConfig(), model=ModelConfig(drop_path=0.2, label_smoothing=0.1))
    images = load_digits(16)
    train = dataclasses.replace(TRAIN, batch_size=64, log_every=1, steps=10, ema_decay=0.0)
    found = []
    for name, how in (("eager", EAGER), ("graphs", GRAPHS)):
        compute = dataclasses.replace(how, precision="bfloat16", channels_last=True, deterministic=False)
        trainer(tmp_path / name, ImageTasks(images, config)(arm, 0), train=train, compute=compute).run()
        found.append(losses(tmp_path / name))
    np.testing.assert_allclose(found[1], found[0], rtol=2e-2)  # bfloat16, sums in another order from run to run
