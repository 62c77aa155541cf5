"""The monitor: what it logs and warns of, what it costs, that training does not notice it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.diagnose.models import VOCABULARY, hugging_face, small  # noqa: E402
from tokendyn import errors  # noqa: E402
from tokendyn.diagnose import HuggingFaceMonitor, LightningMonitor, Monitor, MonitorWarning, capture  # noqa: E402


def _train(model: Any, steps: int, monitor: Monitor | None, before: Any = None) -> list[float]:
    torch.manual_seed(70)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        ids = torch.randint(VOCABULARY, (2, 40))
        if before is not None:
            before(step)
        if monitor is not None:
            with monitor.step(step):
                losses.append(_step(model, optimizer, ids))
        else:
            losses.append(_step(model, optimizer, ids))
    return losses


def _step(model: Any, optimizer: Any, ids: Any) -> float:
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


def test_training_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    model, _ = small(71)
    plain = _train(model, 6, None)
    model, _ = small(71)
    log = tmp_path / "monitor.jsonl"
    monitor = Monitor(model, log, budget=1.0)
    assert _train(model, 6, monitor) == plain
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(6))
    assert set(records[0]["layers"]) == {f"layers.{i}.mixer" for i in range(3)}
    assert records == monitor.records


def test_numbers_are_those_of_the_scan() -> None:
    model, ids = small(72, layers=1)
    monitor = Monitor(model, budget=1.0)
    with monitor.step(0):
        model(ids)
    with capture(model) as scans:
        model(ids)
    found, scan = monitor.records[0]["layers"]["layers.0.mixer"], scans[0]
    assert found["delta_max"] == pytest.approx(float(scan.delta[0].max()))
    assert found["delta_mean"] == pytest.approx(float(scan.delta[0].mean()))
    assert found["output_max"] == pytest.approx(float(scan.y[0].abs().max()))
    unit = torch.nn.functional.normalize(scan.tokens_out[0], dim=-1)
    cosine = (unit @ unit.mT).fill_diagonal_(0).sum() / (len(unit) * (len(unit) - 1))
    assert found["cosine"] == pytest.approx(float(cosine), abs=1e-5)


def test_it_waits_until_it_is_affordable() -> None:
    """The share of time is kept under the budget by watching fewer steps, whatever the machine."""
    model, _ = small(73)
    monitor = Monitor(model, budget=0.05)
    _train(model, 60, monitor)
    assert 1 <= len(monitor.records) < 60
    # It may overdraw by one watched step; that debt is paid before the next.
    longest = monitor.spent / len(monitor.records)
    assert monitor.spent <= 0.05 * monitor.total + 3 * longest
    rare = Monitor(model, budget=1.0, every=20)
    _train(model, 60, rare)
    assert [record["step"] for record in rare.records] == [0, 20, 40]


def test_it_warns_before_overflow() -> None:
    model, _ = small(74, layers=1)
    said: list[str] = []
    monitor = Monitor(model, budget=1.0, warn=said.append)

    def grow(step: int) -> None:
        with torch.no_grad():
            model.layers[0].mixer.D.mul_(8.0)

    with torch.no_grad():
        model.head.weight.zero_()  # so that the growth is ours alone
    for step in range(10):
        grow(step)
        with monitor.step(step):
            model(torch.arange(20)[None])
    assert len(said) == 1
    assert said[0].startswith("layers.0.mixer: output_max is")
    assert "overflow in about" in said[0]


def test_it_warns_of_collapse_and_of_what_is_not_finite() -> None:
    model, ids = small(75, layers=1)
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight[:1].expand_as(model.embedding.weight))
        model.layers[0].mixer.out_proj.weight.zero_()
    with pytest.warns(MonitorWarning, match="tokens collapse"), Monitor(model, budget=1.0).step(0):
        model(ids)
    said: list[str] = []
    monitor = Monitor(model, budget=1.0, warn=said.append)
    with torch.no_grad():
        model.layers[0].mixer.dt_proj.bias.fill_(float("inf"))
    with monitor.step(1):
        model(ids)
    assert any("delta_max is not finite at step 1" in text for text in said)


def test_an_error_inside_a_step_leaves_no_hooks() -> None:
    model, _ids = small(76)
    monitor = Monitor(model, budget=1.0)
    with pytest.raises(KeyError), monitor.step(0):
        raise KeyError
    assert all(not module._forward_hooks for module in model.modules())


def test_options() -> None:
    with pytest.raises(errors.OptionError, match="no selective"):
        Monitor(torch.nn.Linear(1, 1))
    with pytest.raises(errors.OptionError, match="budget"):
        Monitor(small(77)[0], budget=0.0)


def test_lightnings_hooks() -> None:
    """By name: Lightning itself is not installed here."""
    model, ids = small(78)
    records: list[Any] = []
    adapter = LightningMonitor(log=records.append, budget=1.0)
    adapter.on_train_start(None, model)
    for step in range(2):
        trainer = SimpleNamespace(global_step=step)
        adapter.on_train_batch_start(trainer, model, None, 0)
        model(ids)
        adapter.on_train_batch_end(trainer, model, None, None, 0)
    assert [record["step"] for record in records] == [0, 1]


def test_hugging_faces_callback() -> None:
    transformers = pytest.importorskip("transformers")
    model, ids = hugging_face("mamba", 8)
    records: list[Any] = []
    adapter = HuggingFaceMonitor(log=records.append, budget=1.0)
    assert isinstance(adapter, transformers.TrainerCallback)
    handler = SimpleNamespace(global_step=0)
    adapter.on_train_begin(None, handler, None, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MonitorWarning)
        for step in range(2):
            handler.global_step = step
            adapter.on_step_begin(None, handler, None)
            model(ids)
            adapter.on_step_end(None, handler, None)
    assert [record["step"] for record in records] == [0, 1]
