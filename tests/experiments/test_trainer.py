"""The trainer: exact resume, stops, and what it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.experiments.tiny import COMPUTE, TRAIN, Recorder, TinyTask, trainer
from tokendyn.errors import CheckpointError, DataError, NonFiniteError, OptionError
from tokendyn.experiments import _random
from tokendyn.experiments._checkpoint import read_tensors
from tokendyn.experiments._cli import Stopped
from tokendyn.experiments._config import TrainConfig
from tokendyn.experiments._devices import numerics, resolve_device
from tokendyn.experiments._loggers import LOGGERS
from tokendyn.experiments._optim import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from tokendyn.experiments._records import Records, read_records
from tokendyn.experiments._task import Batch
from tokendyn.experiments._trainer import load_trained


def contents(folder: Path) -> dict[str, bytes]:
    """What two equal runs must have equal: metrics, result, and the last checkpoint's tensors."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    files = [folder / "metrics.jsonl", folder / "result.json", *sorted(last.glob("*.safetensors"))]
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer(folder).run()
    return contents(folder)


@pytest.mark.parametrize("stops", [[1], [4], [5], [6], [11], [2, 3, 7]])
def test_a_run_stopped_and_continued_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: dict[str, bytes], stops: list[int]
) -> None:
    for stop in stops:
        recorder = Recorder(steps=0, stop_after=stop - (0 if stop == stops[0] else stops[stops.index(stop) - 1]))
        with pytest.raises(Stopped, match=f"stopped after step {stop} of 12"):
            trainer(tmp_path, recorder=recorder).run()
        torch.rand(7), np.random.rand(7)  # noqa: NPY002 - what happens between must not matter
    recorder = Recorder()
    trainer(tmp_path, recorder=recorder).run()
    assert recorder.started == [("tiny, seed 3", 12, stops[-1])]
    assert contents(tmp_path) == uninterrupted


def test_an_optimiser_continues_where_convolutions_have_their_channels_last() -> None:
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.from_numpy(np.random.default_rng(7).standard_normal((2, 3, 8, 8), np.float32))
    optimizer = make_optimizer(model, TRAIN)

    def update(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    before = update(optimizer)
    # As a file gives them: contiguous, whatever they were.
    kept = {name: value.contiguous().clone() for name, value in optimizer_tensors(model, optimizer).items()}
    want = update(optimizer)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    continued = make_optimizer(model, TRAIN)
    load_optimizer_tensors(model, continued, kept)
    assert continued.state[model.weight]["exp_avg"].stride() == model.weight.stride()
    assert all(map(torch.equal, update(continued), want))


def test_a_run_that_lost_its_newest_checkpoint_ends_with_the_same_bits(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    with pytest.raises(Stopped):
        trainer(tmp_path, recorder=Recorder(stop_after=9)).run()
    newest = tmp_path / "checkpoints" / "step-00000009" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-2])
    recorder = Recorder()
    trainer(tmp_path, recorder=recorder).run()
    assert "step-00000009 is damaged" in recorder.said[0]
    assert recorder.started == [("tiny, seed 3", 12, 8)]
    assert contents(tmp_path) == uninterrupted


def test_a_killed_run_without_a_checkpoint_begins_anew(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "split": "held_out", "loss": 1.0}\n{"ste')
    trainer(tmp_path).run()
    assert contents(tmp_path) == uninterrupted


def test_a_run_killed_before_its_result_was_written_writes_it(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    trainer(tmp_path).run()
    (tmp_path / "result.json").unlink()
    trainer(tmp_path).run()
    assert contents(tmp_path) == uninterrupted


def test_batches_made_in_other_processes_change_no_bit(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    trainer(tmp_path, workers=2).run()
    assert contents(tmp_path) == uninterrupted


def test_another_seed_is_another_run(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    trainer(tmp_path, seed=4).run()
    assert contents(tmp_path)["metrics.jsonl"] != uninterrupted["metrics.jsonl"]


def test_what_is_written(tmp_path: Path) -> None:
    recorder = Recorder()
    result = trainer(tmp_path, recorder=recorder).run()
    metrics = read_records(tmp_path / "metrics.jsonl")
    held_out = [line for line in metrics if line["split"] == "held_out"]
    training = [line for line in metrics if line["split"] == "train"]
    assert [line["step"] for line in held_out] == [0, 5, 10, 12]
    assert [line["step"] for line in training] == [3, 6, 9, 12]
    assert training[0].keys() == {"step", "split", "loss", "gradient_norm", "noise", "learning_rate"}
    assert [line["steps"] for line in read_records(tmp_path / "timings.jsonl")] == [3, 3, 3, 3]
    assert sorted(place.name for place in (tmp_path / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert result == json.loads((tmp_path / "result.json").read_bytes())
    assert result["held_out"] == {"loss": held_out[-1]["loss"]}
    assert result["skipped"] == {"bad example": "bad example is bad"}
    assert recorder.said == ["skipped: bad example is bad"]
    assert result["parameters"] == 3 * 6 + 6 + 6 + 1
    assert recorder.steps == 12


def test_the_average_of_the_weights_is_evaluated_and_loaded(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.run()
    loaded = load_trained(TinyTask(), tmp_path)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, run.evaluated_model.state_dict()[name])
        assert not torch.equal(value, run.model.state_dict()[name])
    with torch.no_grad():
        assert TinyTask().evaluate(loaded, torch.device("cpu"))[0] == run.run()["held_out"]


def test_no_checkpoint_to_load_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_trained(TinyTask(), tmp_path)


def test_arms_start_equal_in_what_they_share(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a").model.state_dict()
    wider = trainer(tmp_path / "b", TinyTask(extra=True), initialise_like=TinyTask()).model.state_dict()
    # The extra layer moves the names of the body; only the head has its name and shape in both.
    assert torch.equal(wider["head.weight"], plain["head.weight"])
    alone = trainer(tmp_path / "c", TinyTask(extra=True)).model.state_dict()
    assert not torch.equal(alone["head.weight"], plain["head.weight"])


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    run = trainer(tmp_path, TinyTask(nan_at=7))
    message = (
        r"tiny, seed 3, step 8 of 12: the loss is nan \(first found in the input of body\.0 \(Linear\)\); the update "
        r"was not made\. The batch is kept in (\S+)\. "
    )
    with pytest.raises(NonFiniteError, match=message) as raised:
        run.run()
    found = re.search(message, str(raised.value))
    assert found is not None
    (points,) = read_tensors(Path(found[1])).values()
    torch.testing.assert_close(points, TinyTask(nan_at=7).batch(7).tensors["points"], rtol=0, atol=0, equal_nan=True)
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    good = trainer(tmp_path / "good", recorder=Recorder(stop_after=7))
    with pytest.raises(Stopped):
        good.run()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, good.model.state_dict()[name])


def test_the_layer_that_overflows_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.model["body"][1].register_forward_hook(lambda _, __, out: out / 0)
    with pytest.raises(NonFiniteError, match=r"first found in the output of body\.1 \(Tanh\)"):
        run.run()
    with torch.no_grad():
        run.model["head"].weight[0, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"first found in the parameter head\.weight"):
        run.run()


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_gradient_that_is_not_finite_names_the_parameter(tmp_path: Path, value: str) -> None:
    run = trainer(tmp_path)
    run.model["body"][0].bias.register_hook(lambda gradient: gradient * float(value))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    message = rf"step 1 of 12: the norm of the gradient is {value} \(first found in body\.0\.bias\.grad, in 1 param"
    with pytest.raises(NonFiniteError, match=message):
        run.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def test_a_batch_that_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, TinyTask(nan_at=0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tokendyn.experiments._trainer.write_with", full)
    with pytest.raises(NonFiniteError, match=r"The batch could not be kept \(.*No space left"):
        run.run()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """While the block runs no file can grow beyond ``size`` bytes: the system itself says no."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"checkpoint of step 4 cannot be written .*whole checkpoints there: steps none"
    with largest_file(600), pytest.raises(CheckpointError, match=message):
        trainer(tmp_path).run()
    run = trainer(tmp_path)
    append, size = Records.append, len(uninterrupted["metrics.jsonl"]) - 5
    with monkeypatch.context() as patch:  # checkpoints are larger than metrics, so the limit is for these alone

        def limited(records: Records, record: dict[str, Any]) -> None:
            with largest_file(size):
                append(records, record)

        patch.setattr(Records, "append", limited)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be written .*make room"):
            run.run()
    assert run.step == 12
    recorder = Recorder()
    trainer(tmp_path, recorder=recorder).run()
    assert recorder.started == [("tiny, seed 3", 12, 8)]
    assert contents(tmp_path) == uninterrupted


class FailingLogger:
    """Fails at its third record; its construction fails where the folder's name says so."""

    def __init__(self, folder: Path, name: str) -> None:
        if "unmade" in folder.name:
            raise ConnectionError("no route\nto host")
        self.count = 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self.count += 1
        if self.count == 3:
            raise SystemExit("the logger wants to end the process")

    def close(self) -> None:
        raise AssertionError("closed after a failure")


class GoodLogger:
    seen: ClassVar[list[tuple[int, dict[str, float]]]] = []
    closed = False

    def __init__(self, folder: Path, name: str) -> None:
        pass

    def log(self, step: int, values: dict[str, float]) -> None:
        self.seen.append((step, values))

    def close(self) -> None:
        GoodLogger.closed = True


def test_loggers_that_fail_stop_nothing(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGERS, "trackio", FailingLogger)
    monkeypatch.setitem(LOGGERS, "tensorboard", GoodLogger)
    GoodLogger.seen.clear()
    for folder in (tmp_path / "made", tmp_path / "unmade"):
        recorder = Recorder()
        trainer(folder, recorder=recorder, log_to=("trackio", "tensorboard")).run()
        assert contents(folder) == uninterrupted
        said = [line for line in recorder.said if "logger" in line]
        why = "ConnectionError: no route to host" if folder.name == "unmade" else "SystemExit: the logger wants"
        assert len(said) == 1
        assert said[0].startswith(f"the logger trackio failed ({why}")
        assert "the training goes on without it" in said[0]
    lines = read_records(folder / "metrics.jsonl")
    assert [step for step, _ in GoodLogger.seen] == [line["step"] for line in lines] * 2
    assert GoodLogger.seen[0][1] == {"held_out/loss": lines[0]["loss"]}
    assert GoodLogger.closed


def test_a_logger_that_hangs_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Hanging(GoodLogger):
        def __init__(self, folder: Path, name: str) -> None:
            release.wait()

    monkeypatch.setitem(LOGGERS, "trackio", Hanging)
    monkeypatch.setattr("tokendyn.experiments._loggers.PATIENCE", 0.01)
    monkeypatch.setattr("tokendyn.experiments._loggers.WAITING", 3)
    recorder = Recorder()
    trainer(tmp_path, recorder=recorder, log_to=("trackio",)).run()
    release.set()
    assert "the logger trackio lags 3 records behind" in " ".join(recorder.said)


def test_generators_are_captured_whole() -> None:
    import random

    _random.seed_everything(5)
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)  # noqa: NPY002 - each leaves a half-used pair
    state = _random.capture(torch.device("cpu"))

    def draw() -> tuple[object, ...]:
        return random.gauss(0, 1), np.random.standard_normal(), torch.randn(3).tolist(), random.random()  # noqa: NPY002

    first = draw()
    _random.seed_everything(6)
    _random.restore(state[0], json.loads(json.dumps(state[1])), torch.device("cpu"))
    assert draw() == first


def test_schedule() -> None:
    config = TrainConfig(learning_rate=1.0, final_learning_rate=0.1, warmup=0.2)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-12)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    np.testing.assert_allclose(rates[-1], 0.1, rtol=1e-12)
    np.testing.assert_allclose(rates[4 + 15 // 2] + rates[4 + 15 - 15 // 2], 1.1, rtol=1e-12)  # a cosine's symmetry
    assert learning_rate(0, 1, dataclasses.replace(config, warmup=0.0)) == 1.0


def test_weight_decay_acts_on_matrices_only() -> None:
    model = TinyTask().build_model()
    model["head"].weight._no_weight_decay = True
    groups = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.3, 1), (0.0, 3)]
    assert groups[0]["params"][0] is model["body"][0].weight


def test_torch_settings_are_put_back() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with numerics(dataclasses.replace(COMPUTE, threads=3)):
        assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.mark.parametrize("device", ["gpu", "cuda:", "meta", "cuda:99"])
def test_devices_that_cannot_be_used(device: str) -> None:
    with pytest.raises(OptionError, match="--device"):
        resolve_device(device)


def test_compiled_and_half_precision_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def without_compiler(model: torch.nn.Module) -> torch.nn.Module:
        asked.append(model)
        return model

    monkeypatch.setattr(torch, "compile", without_compiler)
    compute = dataclasses.replace(COMPUTE, compile=True, precision="bfloat16")
    run = trainer(tmp_path, compute=compute, train=dataclasses.replace(TRAIN, ema_decay=0.0))
    run.run()
    assert asked == [run.model]
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    whole = trainer(tmp_path / "whole", train=dataclasses.replace(TRAIN, ema_decay=0.0))
    whole.run()
    assert (
        read_records(tmp_path / "metrics.jsonl")[1]["loss"] != read_records(tmp_path / "whole/metrics.jsonl")[1]["loss"]
    )


class UnreadableTask(TinyTask):
    def batch(self, step: int) -> Batch:
        raise DataError("no example can be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_arrives_as_it_is(tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError) as raised:
        trainer(tmp_path, UnreadableTask(), workers=workers).run()
    assert str(raised.value) == "no example can be read"


class DivergingTask(TinyTask):
    def evaluate(self, model: torch.nn.Module, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
        return {"loss": float("inf")}, {}


def test_a_held_out_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="tiny, seed 3, after 0 of 12 steps: the held-out loss is inf"):
        trainer(tmp_path, DivergingTask()).run()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_trained(TinyTask(width=7), tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        trainer(tmp_path, TinyTask(width=7)).run()
