"""Watching a model while it trains, for less than one per cent of the time."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokendyn.diagnose._adapters import find_sites
from tokendyn.diagnose._capture import Capture, watching
from tokendyn.diagnose._findings import COLLAPSED_COSINE
from tokendyn.diagnose._measure._quick import NAMES, measure_quickly
from tokendyn.diagnose._words import printable
from tokendyn.errors import OptionError

#: What may overflow.
_RISING = ("delta_max", "output_max")
#: Steps over which a trend is read.
_HISTORY = 8


class MonitorWarning(UserWarning):
    """A quantity is on its way to overflow or the tokens are on their way to one point."""


class Monitor:
    """Logs growth, step sizes, attention, token similarity and the room left before overflow during training.

    ::

        monitor = tokendyn.diagnose.Monitor(model, log="monitor.jsonl")
        for step, batch in enumerate(batches):
            with monitor.step(step):
                loss = train_step(batch)

    It watches one step, measures how long that took, and waits until its share of the whole time is under ``budget``
    again: if watching makes a step 5 % longer, the default of 1 % lets it watch one step in five. The first watched
    step is an advance, paid off before the next. Outputs, gradients and random numbers are what they would be without
    it. On a GPU the numbers of all layers are fetched together at the step's end, and waiting for it counts.

    Every record is ``{"step": ..., "layers": {name: {...}}}``, of each layer: the mean and the greatest Δ, the greatest
    output, the share of tokens with x_lᵀ M x_l > 0, the share of the movement that grows tokens and its mean rate, the
    attention on the first token and its entropy (of the first 64 tokens, in about 8 channels), the mean cosine of two
    tokens after the block, and ``limit``, where the dtype overflows. What cannot be had is None.

    Args:
        model: as of :func:`tokendyn.diagnose`.
        log: a path for JSON lines, or a function of one dictionary a watched step.
        budget: share of the time of training, 0.01 by default; 1 is no limit.
        every: watch no more often than every so many steps.
        warn: called with a sentence when a quantity will overflow or tokens collapse; by default a
            :class:`MonitorWarning`.

    Raises:
        OptionError: no selective layer, or an option out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        log: str | Path | Callable[[dict[str, Any]], Any] | None = None,
        *,
        budget: float = 0.01,
        every: int = 1,
        warn: Callable[[str], Any] | None = None,
    ) -> None:
        if not 0 < budget <= 1 or every < 1:
            raise OptionError(f"Monitor: budget is {budget}, every is {every}; expected 0 < budget <= 1 and every >= 1")
        self.sites = find_sites(model)
        if not self.sites:
            raise OptionError(f"Monitor: no selective (S6) layer found in {type(model).__name__}")
        self.budget, self.every = budget, every
        self.records: list[dict[str, Any]] = []
        self.spent = 0.0  # seconds of its own
        self.total = 0.0  # seconds of training seen, its own included
        self._log = log
        self._warn = warn or (lambda text: warnings.warn(text, MonitorWarning, stacklevel=4))
        self._warned: set[tuple[str, str]] = set()
        self._history: dict[str, list[tuple[int, float]]] = {}
        self._last = -every
        self._begun: float | None = None
        self._opened: Any = None
        self._number = 0
        self._cost = 0.0  # of the last watched step
        self._before = 0.0

    def step(self, number: int) -> Monitor:
        """The context of one training step (forward, backward, update)."""
        self._number = number
        return self

    def __enter__(self) -> Monitor:
        now = time.perf_counter()
        if self._begun is None:
            self._begun = now
        self.total = now - self._begun
        self._found: dict[str, tuple[Tensor, float]] = {}
        self._opened = None
        # As if this step cost a quarter more than the last one did, so that the budget is not overdrawn.
        within = self.budget >= 1 or self.spent + 1.25 * self._cost < self.budget * self.total
        affordable = not self.records or within
        if self._number - self._last >= self.every and affordable:
            self._opened = watching(self.sites, self._receive)
            self._opened.__enter__()
            self._last = self._number
            self._before = self.spent
            self.spent += time.perf_counter() - now
        return self

    def __exit__(self, *error: object) -> None:
        begun = time.perf_counter()
        if self._opened is not None:
            self._opened.__exit__(None, None, None)
            for site in self.sites:
                self.spent += site.seconds
                site.seconds = 0.0
            if self._found:
                record = {"step": self._number, "layers": self._numbers()}
                self.records.append(record)
                self._write(record)
                if error[0] is None:
                    self._judge(record["layers"])
            self.spent += time.perf_counter() - begun
            self._cost = self.spent - self._before
        if self._begun is not None:
            self.total = time.perf_counter() - self._begun

    @property
    def share(self) -> float:
        """The part of the time of training that the monitor itself took."""
        return self.spent / self.total if self.total > 0 else 0.0

    @torch.no_grad()
    def _receive(self, capture: Capture) -> None:
        begun = time.perf_counter()
        self._found[capture.title] = measure_quickly(capture), torch.finfo(capture.y.dtype).max
        self.spent += time.perf_counter() - begun

    def _numbers(self) -> dict[str, dict[str, Any]]:
        """What was found, fetched from the device at once."""
        values = torch.stack([numbers for numbers, _ in self._found.values()]).tolist()
        layers = {}
        for (name, (_, limit)), row in zip(self._found.items(), values, strict=True):
            found: dict[str, Any] = dict(zip(NAMES, row, strict=True))
            kept = {key: value for key, value in found.items() if key in _RISING or value == value}
            layers[name] = {**dict.fromkeys(NAMES), **kept, "limit": limit}
        self._found = {}
        return layers

    def _write(self, record: dict[str, Any]) -> None:
        if callable(self._log):
            self._log(record)
        elif self._log is not None:
            with Path(self._log).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _judge(self, layers: dict[str, dict[str, Any]]) -> None:
        for name, found in layers.items():
            for quantity in _RISING:
                self._overflow(name, quantity, found[quantity], found["limit"])
            cosine = found.get("cosine")
            if cosine is not None and cosine > COLLAPSED_COSINE:
                self._say(name, "collapse", f"{name}: tokens collapse, mean cosine {cosine:.3f} at step {self._number}")

    def _overflow(self, name: str, quantity: str, value: float, limit: float) -> None:
        key = f"{name}/{quantity}"
        if not value < float("inf"):
            self._say(name, quantity, f"{name}: {quantity} is not finite at step {self._number}")
            return
        logarithm = math.log10(max(value, 1e-300))
        history = self._history.setdefault(key, [])
        history.append((self._number, logarithm))
        del history[:-_HISTORY]
        left = math.log10(limit) - logarithm
        steps = history[-1][0] - history[0][0]
        slope = (logarithm - history[0][1]) / steps if steps > 0 else 0.0
        rising = len(history) >= 4 and logarithm - history[0][1] > 1.0
        if left < 1.0 or (rising and slope > 0 and left / slope < 20 * max(1, steps)):
            when = f", overflow in about {left / slope:,.0f} steps" if slope > 0 else ""
            self._say(name, quantity, f"{name}: {quantity} is {value:.3g} at step {self._number} and rising{when}")

    def _say(self, name: str, kind: str, text: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            self._warn(printable(text))


class LightningMonitor:
    """:class:`Monitor` as a callback of Lightning: ``Trainer(callbacks=[LightningMonitor(log=...)])``.

    It has the hooks by name and derives from Lightning's ``Callback`` where that is installed.
    """

    def __new__(cls, **options: Any) -> Any:
        import importlib
        import importlib.util

        base: Any = object
        for package in ("lightning.pytorch", "pytorch_lightning"):
            if importlib.util.find_spec(package.partition(".")[0]) is not None:
                base = importlib.import_module(package).Callback
                break

        class Adapter(base):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                self.monitor = Monitor(pl_module, **options)

            def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
                self.monitor.step(trainer.global_step).__enter__()

            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
                self.monitor.__exit__(None, None, None)

        return Adapter()


class HuggingFaceMonitor:
    """:class:`Monitor` as a callback of transformers' ``Trainer(callbacks=[HuggingFaceMonitor(log=...)])``."""

    def __new__(cls, **options: Any) -> Any:
        from transformers import TrainerCallback  # type: ignore[import-not-found]

        class Adapter(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                self.monitor = Monitor(model, **options)

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.monitor.step(state.global_step).__enter__()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.monitor.__exit__(None, None, None)

        return Adapter()
