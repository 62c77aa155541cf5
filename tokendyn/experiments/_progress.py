"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from tqdm import tqdm


class Listener(Protocol):
    """What a run tells about itself."""

    def start(self, name: str, steps: int, done: int) -> None:
        """Run ``name`` of ``steps`` begins, with ``done`` of them made earlier."""
        ...

    def advance(self) -> None:
        """A step is made."""
        ...

    def evaluated(self, name: str, step: int, steps: int, loss: float, accuracy: float | None) -> None:
        """Run ``name`` was evaluated on held-out data."""
        ...

    def say(self, message: str) -> None:
        """A line for the user."""
        ...


class Quiet:
    """A :class:`Listener` that tells nobody."""

    def start(self, name: str, steps: int, done: int) -> None:
        pass

    def advance(self) -> None:
        pass

    def evaluated(self, name: str, step: int, steps: int, loss: float, accuracy: float | None) -> None:
        pass

    def say(self, message: str) -> None:
        pass


class Progress:
    """Progress of a study over all its runs (a :class:`Listener`).

    Args:
        total: steps of all runs together.
        terminal: draw a bar; None asks stderr.
    """

    def __init__(self, total: int, *, terminal: bool | None = None) -> None:
        self._bar: tqdm[Any] | None = None
        if total and (sys.stderr.isatty() if terminal is None else terminal):
            self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.05, file=sys.stderr)
        self._began = time.monotonic()

    def start(self, name: str, steps: int, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done)
            # Steps made earlier took no time today: they would spoil the rate and the time left.
            self._bar.initial += done
        elif 0 < done < steps:
            self.say(f"{name}: continuing from step {done} of {steps}")

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def evaluated(self, name: str, step: int, steps: int, loss: float, accuracy: float | None) -> None:
        shown = f"held-out loss {loss:.3f}" + ("" if accuracy is None else f", accuracy {100 * accuracy:.1f} %")
        if self._bar is not None:
            self._bar.set_postfix_str(f"{name}: {shown}")
        else:
            seconds = int(time.monotonic() - self._began)
            self.say(f"{seconds // 60:3d}:{seconds % 60:02d}  {name}  step {step}/{steps}  {shown}")

    def say(self, message: str) -> None:
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
