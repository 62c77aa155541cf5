"""SIGTERM and SIGINT as a wish to stop after the current step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Protocol


class StopRequest(Protocol):
    """Whether to stop: the signal that asked for it, or None."""

    @property
    def received(self) -> int | None: ...


TIME_IS_UP = 14  # SIGALRM's number where there is one


def name_of(number: int) -> str:
    """A reason to stop, in words."""
    return "--max-minutes" if number == TIME_IS_UP else signal.Signals(number).name


class StopSignals:
    """While the block runs, the first SIGTERM or SIGINT is only noted; a second one interrupts at once.

    Args:
        minutes: ask to stop after so many, as :data:`TIME_IS_UP`; None for never.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._noted: int | None = None
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._before: dict[int, signal._HANDLER] = {}

    @property
    def received(self) -> int | None:
        if self._noted is None and self._deadline is not None and time.monotonic() >= self._deadline:
            return TIME_IS_UP
        return self._noted

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            raise KeyboardInterrupt
        self._noted = number


@contextlib.contextmanager
def born_deaf() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C from their first moment: they inherit it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def leave_signals_to_parent(*_: object) -> None:
    """For child processes: Ctrl-C reaches them too, but their parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
