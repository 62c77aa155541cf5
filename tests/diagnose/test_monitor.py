"""The monitor: what it logs and warns of, what it costs, that training does not notice it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
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
    assert found["delta_max"] == pytest.approx(float(scan.delta.max()))
    assert found["delta_mean"] == pytest.approx(float(scan.delta.mean()))
    assert found["output_max"] == pytest.approx(float(scan.y.abs().max()))
    assert found["limit"] == torch.finfo(torch.float32).max
    product = (scan.C[0] * scan.B[0]).sum(0)[:64]
    assert found["self_product_positive"] == pytest.approx(float((product > 0).float().mean()))
    channels = list(range(0, 32, 4))
    P = torch.stack([scan.attention(c)[:64, :64] for c in channels])
    x = scan.u[0, channels, :64].double()
    moved = x * torch.einsum("clj,cj->cl", P, x)
    assert found["growing"] == pytest.approx(float(moved.clamp_min(0).sum() / moved.abs().sum()), abs=1e-5)
    assert found["rate"] == pytest.approx(float((moved.sum(0) / x.square().sum(0)).mean()), rel=1e-4)
    alpha = P.abs().mean(0) / P.abs().mean(0).sum(-1, keepdim=True)
    assert found["first_token_sink"] == pytest.approx(float(alpha[1:, 0].mean()), rel=1e-4)
    entropy = [-(row[: l + 1] * row[: l + 1].log()).sum() / np.log(l + 1) for l, row in enumerate(alpha) if l]
    assert found["entropy"] == pytest.approx(float(torch.stack(entropy).mean()), rel=1e-4)
    assert scan.tokens_out is not None
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


def test_one_token_leaves_nothing_to_compare() -> None:
    model, ids = small(79, layers=1)
    monitor = Monitor(model, budget=1.0)
    with monitor.step(0):
        model(ids[:1, :1])
    found = monitor.records[0]["layers"]["layers.0.mixer"]
    assert found["first_token_sink"] is found["entropy"] is found["cosine"] is None
    assert found["rate"] is not None
    json.dumps(monitor.records, allow_nan=False)


def test_lightnings_hooks_by_their_names() -> None:
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_in_lightnings_trainer(tmp_path: Path) -> None:
    """The real Trainer, with and without: the same losses, a record a step, hooks gone."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, _ = small(78, layers=2)
            self.losses: list[float] = []

        def training_step(self, batch: Any, _index: int) -> Any:
            logits = self.model(batch)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(callbacks: list[Any]) -> Any:
        data = torch.randint(VOCABULARY, (4, 2, 30), generator=torch.Generator().manual_seed(1))
        trainer = lightning.Trainer(
            max_steps=4,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
        return module

    records: list[Any] = []
    monitor = LightningMonitor(log=records.append, budget=1.0)
    assert isinstance(monitor, lightning.Callback)
    watched, plain = train([monitor]), train([])
    assert watched.losses == plain.losses
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert set(records[0]["layers"]) == {"model.layers.0.mixer", "model.layers.1.mixer"}
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in watched.model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_in_hugging_faces_trainer(tmp_path: Path) -> None:
    """The real Trainer, accumulating gradients over two batches, with and without: the same losses and weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def train(callbacks: list[Any]) -> Any:
        model, _ = hugging_face("mamba", 8)
        data = torch.randint(VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(2))
        trainer = transformers.Trainer(
            model=model.float(),
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path / "run"),
                max_steps=3,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                seed=5,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in data],
            callbacks=callbacks,
        )
        loss = trainer.train().training_loss
        return loss, trainer.model

    records: list[Any] = []
    loss, watched = train([HuggingFaceMonitor(log=records.append, budget=1.0)])
    again, plain = train([])
    assert loss == again
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))
    assert [record["step"] for record in records] == [0, 1, 2]
    mixers = [name for name, module in watched.named_modules() if hasattr(module, "A_log")]
    assert list(records[0]["layers"]) == mixers
    assert all(not module._forward_hooks for module in watched.modules() if hasattr(module, "A_log"))
