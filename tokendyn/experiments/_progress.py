"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Progress of a study over all its runs.

    Args:
        total: steps of all runs together.
        terminal: draw a bar; None asks stderr.
    """

    def __init__(self, total: int, *, terminal: bool | None = None) -> None:
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty() if terminal is None else terminal:
            self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.05, file=sys.stderr)
        self._began = time.monotonic()
        self._name = ""
        self._steps = 0

    def start(self, name: str, steps: int, done: int) -> None:
        """A run begins, with ``done`` of its ``steps`` made earlier."""
        self._name, self._steps = name, steps
        if self._bar is not None:
            self._bar.set_description_str(name)
            self._bar.update(done)
            # Steps made earlier took no time today: they would spoil the rate and the time left.
            self._bar.initial += done
        elif done:
            self.say(f"{name}: continuing from step {done} of {steps}")

    def advance(self) -> None:
        """One step is made."""
        if self._bar is not None:
            self._bar.update()

    def evaluated(self, step: int, loss: float, accuracy: float | None) -> None:
        """Held-out data were evaluated."""
        shown = f"held-out loss {loss:.3f}" + ("" if accuracy is None else f", accuracy {100 * accuracy:.1f} %")
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        else:
            seconds = int(time.monotonic() - self._began)
            self.say(f"{seconds // 60:3d}:{seconds % 60:02d}  {self._name}  step {step}/{self._steps}  {shown}")

    def say(self, message: str) -> None:
        """One line for the user, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
