"""Metrics to TensorBoard, trackio or Weights & Biases, beside the run folder: a logger that fails or hangs is told once
and left behind, and the training goes on.

Each logger lives in a thread of its own, its construction included: it may wait for a network as long as it likes.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokendyn.errors import OptionError

WAITING = 1000  # records that a slow logger may lag behind; later ones are dropped
PATIENCE = 10.0  # seconds that the end of a run waits for loggers


class Logger(Protocol):
    """Where metrics go."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracked:
    """trackio has wandb's interface."""

    def __init__(self, module: str, folder: Path, name: str) -> None:
        tracker: Any = importlib.import_module(module)
        options = {"dir": str(folder), "reinit": "create_new"} if module == "wandb" else {}
        self._run = tracker.init(project="tokendyn", name=name, **options)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, str], Logger]] = {
    "tensorboard": _TensorBoard,
    "trackio": lambda folder, name: _Tracked("trackio", folder, name),
    "wandb": lambda folder, name: _Tracked("wandb", folder, name),
}


def expect_installed(names: Sequence[str]) -> None:
    """The packages of the named loggers are there.

    Raises:
        OptionError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise OptionError(f"--log-to {name}: {name} is not installed; run: pip install {name}")


class Loggers:
    """All loggers of one run.

    Args:
        names: keys of :data:`LOGGERS`.
        folder, name: of the run.
        say: told one sentence for each logger that fails.
    """

    def __init__(self, names: Sequence[str], folder: Path, name: str, say: Callable[[str], None]) -> None:
        self._workers = [_Worker(kind, folder, name, say) for kind in names]

    def log(self, step: int, record: dict[str, Any]) -> None:
        """Hand over the numbers of a record of ``metrics.jsonl``."""
        if self._workers:
            values = dict(_numbers(record, record["split"]))
            for worker in self._workers:
                worker.put((step, values))

    def close(self) -> None:
        """Give the loggers some seconds to finish."""
        for worker in self._workers:
            worker.put(None)
        for worker in self._workers:
            worker.join(PATIENCE)


class _Worker(threading.Thread):
    def __init__(self, kind: str, folder: Path, name: str, say: Callable[[str], None]) -> None:
        super().__init__(name=f"{kind} of {name}", daemon=True)
        self._kind, self._arguments, self._say = kind, (folder, name), say
        self._records: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING)
        self._failed = False
        self.start()

    def put(self, record: tuple[int, dict[str, float]] | None) -> None:
        if self._failed:
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._fail(f"lags {WAITING} records behind")

    def run(self) -> None:
        try:
            logger = LOGGERS[self._kind](*self._arguments)
            while (record := self._records.get()) is not None and not self._failed:
                logger.log(*record)
            logger.close()
        except BaseException as error:  # SystemExit too: a logger ends no training
            self._fail(f"failed ({type(error).__name__}: {' '.join(str(error).split())})")

    def _fail(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            self._say(f"the logger {self._kind} {why}; the training goes on without it, metrics.jsonl has everything")


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Numbers in nested dictionaries, by path: ``held_out/orders/levels.2.blocks.0.mixer.order/tokens``."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("step", "split"):
                yield from _numbers(inner, f"{path}/{key}")
    elif isinstance(value, (int, float)):
        yield path, value
