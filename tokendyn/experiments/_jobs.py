"""Several runs at the same time, each in a process of its own.

On a CPU this beats several threads for small models: nothing waits for anything. On GPUs it fills what one small model
leaves idle. A process that lost its parent, however that died, ends at once, so that nobody keeps a run from being
continued.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any

from tokendyn.errors import NonFiniteError, TokendynError
from tokendyn.experiments._cli import Stopped
from tokendyn.experiments._progress import Listener
from tokendyn.experiments._signals import StopRequest, born_deaf, leave_signals_to_parent

_FREQUENCY = 0.1  # seconds between two looks at messages and signals


def run_jobs(
    run: Callable[..., bool],
    pairs: Sequence[tuple[str, int]],
    jobs: int,
    progress: Listener,
    signals: StopRequest,
    begin: Callable[[int], None],
) -> list[bool]:
    """``run(arm, seed, listener, stop_request)`` for all ``pairs``, ``jobs`` at a time; what each returned.

    If one fails, the others save and stop, and its error is raised; if a signal comes, all do. A loss that is not
    finite is the matter of its run alone: the others go on, and the error is raised when they are finished.

    Args:
        begin: called first in every process, with its number from 0.

    Raises:
        Stopped: a signal came.
        TokendynError: a process died, or what a run raises.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and CUDA's state
    messages: Any = context.Queue()
    stop = context.Value("i", 0)
    # `run` holds the data: it is sent once a process, not once a call. Not as an argument of the process, whose start
    # would wait until the one before has imported everything and read it.
    work: Any = context.Queue()
    work.cancel_join_thread()  # what a process that died did not fetch keeps nobody waiting
    packed = pickle.dumps((begin, run))
    for place in range(jobs):
        work.put((place, packed))
    with ProcessPoolExecutor(jobs, context, _begin, (work, messages, stop)) as pool:
        with born_deaf():
            futures = [pool.submit(_call, arm, seed) for arm, seed in pairs]
        pending = set(futures)
        failure: BaseException | None = None
        try:
            while pending:
                done, pending = wait(pending, timeout=_FREQUENCY, return_when=FIRST_COMPLETED)
                _forward(messages, progress)
                for future in done:
                    error = future.exception()
                    if error is not None and _gravity(error) > _gravity(failure):
                        failure = error
                if signals.received is not None or _gravity(failure) > 2:
                    stop.value = signals.received or signal.SIGTERM
        except BaseException:
            stop.value = signal.SIGTERM  # or leaving the block would wait for all runs
            raise
    _forward(messages, progress)
    if isinstance(failure, BrokenProcessPool):
        raise TokendynError(
            "a training process was killed (out of memory?); everything up to its last checkpoint is saved, continue "
            "with --resume auto, perhaps with fewer --jobs"
        ) from failure
    if failure is not None:
        raise failure
    return [future.result() for future in futures]


def _gravity(error: BaseException | None) -> int:
    """Of several errors the gravest is raised, of equal ones the first; above 2 the other runs stop."""
    if error is None:
        return 0
    return 1 if isinstance(error, Stopped) else 2 if isinstance(error, NonFiniteError) else 3


class _Messenger:
    """A :class:`Listener` in a child process: tells the parent's."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda *arguments: self._messages.put((method, arguments))


class _SharedStop:
    """The parent's wish to stop, seen in a child process."""

    def __init__(self, stop: Any) -> None:
        self._stop = stop

    @property
    def received(self) -> int | None:
        return self._stop.value or None


_child: tuple[Callable[..., bool], _Messenger, _SharedStop]


def _begin(work: Any, messages: Any, stop: Any) -> None:
    """First in every child process."""
    global _child
    leave_signals_to_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place, packed = work.get()
    begin, run = pickle.loads(packed)
    begin(place)
    _child = run, _Messenger(messages), _SharedStop(stop)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os._exit(1)


def _call(arm: str, seed: int) -> bool:
    run, messenger, stop = _child
    return run(arm, seed, messenger, stop)


def _forward(messages: Any, progress: Listener) -> None:
    while True:
        try:
            method, arguments = messages.get_nowait()
        except queue.Empty:
            return
        getattr(progress, method)(*arguments)
