"""Carrying a stiff trajectory on with an implicit method, where stability would hold the explicit one to tiny steps.

With a step size per channel a large token may make one of its channels forget at a rate 10^10 times that of
everything else. Radau IIA of order 5 (SciPy's) takes over there, over the same variable σ and with the same compiled
right-hand side, and hands back when a blow-up has removed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.integrate import Radau
from scipy.optimize import brentq

from tokendyn.core import _integrate_numba as engine

#: A component is held to rtol of itself, or of this share of its token's norm if that is more.
_FLOOR = 1e-3


def when(at: Callable[[float], np.ndarray], time: float) -> float:
    """The share of a step at which its dense output ``at``, whose first component is time, reaches ``time``."""
    if at(0.0)[0] >= time:
        return 0.0
    if at(1.0)[0] <= time:
        return 1.0
    return float(brentq(lambda share: at(share)[0] - time, 0.0, 1.0, xtol=1e-15))  # type: ignore[arg-type]


def carry_on(
    problem: Any,
    options: engine.Options,
    state: engine.State,
    write: Callable[[Callable[[float], np.ndarray], float], None],
    max_steps: int,
) -> int:
    """Integrate from ``state``, changed in place, until the end, a blow-up or a failure; returns a reason.

    ``RUNNING`` means that a blow-up has removed tokens and the explicit method may go on with those that are left,
    or that there have been ``max_steps`` steps in all.

    Args:
        write: called after every step with the dense output over shares of the step in [0, 1] and the time at its
            end (not past t_end).
    """
    counts = state.counts
    tokens, t_0 = int(counts[0]), state.numbers[1]
    n = 1 + tokens * problem.D

    def slope(_: float, y: np.ndarray) -> np.ndarray:
        counts[3] += 1
        out = np.empty(n)
        engine.slope_alone(problem, options, t_0, tokens, np.ascontiguousarray(y), out)
        return out

    def floors(y: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(y[1:].reshape(tokens, -1), axis=1)
        return options.rtol * _FLOOR * np.concatenate([[abs(y[0])], np.repeat(norms, problem.D)])

    y = state.y[:n].copy()
    solver: Any = Radau(
        slope,
        0.0,
        y,
        np.inf,
        rtol=max(options.rtol, 1e-12),
        atol=floors(y),  # type: ignore[arg-type]
        first_step=1e-3 * state.numbers[0],
    )
    while counts[1] < max_steps:
        with np.errstate(all="ignore"):
            solver.step()
        if solver.status == "failed" or not np.isfinite(solver.y).all():
            return engine.TOLERANCE
        counts[1] += 1
        solver.atol = floors(solver.y)
        dense = solver.dense_output()
        begin, width = solver.t_old, solver.t - solver.t_old

        def at(share: float, dense: Any = dense, begin: float = begin, width: float = width) -> np.ndarray:
            return dense(begin + share * width)

        now = float(solver.y[0])
        if now >= options.t_end:
            share = when(at, options.t_end)
            end = at(share)
            end[0] = options.t_end
            write(lambda part, at=at, share=share: at(part * share), options.t_end)
            state.y[:n] = end
            return engine.REACHED_END
        write(at, now)
        state.y[:n] = solver.y
        state.slopes[0, :n] = slope(0.0, solver.y)
        if engine.end_blown_up(problem, options, state):
            counts[6] = 0
            return engine.RUNNING
    return engine.RUNNING
