"""Simulation of token dynamics with the compiled integrator: one trajectory, or an ensemble on all cores."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tokendyn.core import _integrate_numba as engine
from tokendyn.core._flow_numba import Compiled, compiled_channels, padded, transposed
from tokendyn.core._parallel import run_tiles
from tokendyn.core._problem_numba import Attention, Autoregression, Line, Space
from tokendyn.core._trajectory import Trajectory

_REASONS = {
    engine.REACHED_END: "reached t_end",
    engine.ALL_ENDED: "all tokens ended",
    engine.TOLERANCE: "tolerance unreachable",
    engine.OVERFLOW: "overflow",
    engine.STOPPED: "interrupted",
    engine.RUNNING: "max_steps reached",
}
#: The parameters that are matrices for one trajectory; in an ensemble one more axis is in front.
_MATRICES = ("M", "S_B", "S_C", "W", "Q", "K", "V")
Problem = Line | Space | Attention | Autoregression
#: Outputs made room for at first where a trajectory chooses its own times.
_ROWS = 256


class Asked(NamedTuple):
    """What is asked of a simulation; see :func:`simulate`."""

    clock: int
    t_end: float
    times: np.ndarray | None
    rtol: float
    points_per_step: int
    max_steps: int
    implicit: bool


def simulate(
    x0: np.ndarray,
    parameters: dict[str, Any],
    *,
    sphere: bool,
    t_end: float,
    times: np.ndarray | None,
    rtol: float,
    points_per_step: int,
    max_steps: int,
    implicit: bool = True,
) -> Trajectory:
    """Integrate from ``x0``; arguments as of :func:`tokendyn.simulate`, checked. ``parameters`` decides the model.

    Without ``implicit`` a trajectory that turns stiff is left there ("tolerance unreachable"): for large ensembles.

    Every array of an ensemble has the ensemble's axis in front, as :func:`ensemble_size` reads it.
    """
    size = ensemble_size(x0, parameters)
    one_channel = parameters.get("mu") is not None
    single = x0.ndim - (1 if one_channel else 2) == 0
    shape = x0.shape if single else x0.shape[1:]
    starts = np.empty((size or 1, *shape))
    starts[:] = x0
    problem, clock = _problem(starts, parameters, sphere)
    y = np.log(np.abs(starts), where=starts != 0, out=np.zeros_like(starts)) if one_channel else starts
    y = np.concatenate([np.zeros((len(y), 1)), y.reshape(len(y), -1)], axis=1)
    run = _one if size is None else _many
    asked = Asked(clock, t_end, times, rtol, points_per_step, max_steps, implicit)
    return run(starts, y, problem, asked, parameters)


def ensemble_size(x0: np.ndarray, parameters: dict[str, Any]) -> int | None:
    """The number of trajectories; None for a single one. Arrays of one more axis than one trajectory needs count.

    On the line every parameter is a number or (b,). In R^D the matrices tell: an ensemble has (b, N, D), and then
    every array parameter has b in front, a shared S_Δ as (b, 1, D).
    """
    if parameters.get("mu") is not None:
        if x0.ndim == 2:
            return len(x0)
        sizes = [len(p) for p in parameters.values() if np.ndim(p) == 1]
        return sizes[0] if sizes else None
    if x0.ndim == 3:
        return len(x0)
    return next((len(parameters[name]) for name in _MATRICES if _axes(parameters.get(name)) == 3), None)


def batched(parameters: dict[str, Any]) -> bool:
    """Whether the parameters in R^D differ from trajectory to trajectory."""
    return any(_axes(parameters.get(name)) == 3 for name in _MATRICES) or _axes(parameters.get("phi")) == 2


def _axes(parameter: Any) -> int:
    return 0 if parameter is None else np.ndim(parameter)


def member_parameters(parameters: dict[str, Any], i: int, size: int) -> dict[str, Any]:
    """The parameters of trajectory ``i``."""
    if parameters.get("mu") is None and not batched(parameters):
        return parameters
    return {
        name: value[i] if np.ndim(value) > 0 and len(value) == size else value for name, value in parameters.items()
    }


def _problem(starts: np.ndarray, parameters: dict[str, Any], sphere: bool) -> tuple[Problem, int]:
    """The problem of an ensemble (of one) and its clock."""
    count, D = len(starts), starts.shape[-1]
    if parameters.get("mu") is not None:
        line = np.zeros((count, 4))
        for column, key in enumerate(("mu", "s_delta", "a", "bias")):
            line[:, column] = parameters[key]
        sign = np.zeros((count, padded(D)))
        sign[:, :D] = np.sign(starts)
        return Line(1, False, line, sign), engine.BLOW_UP_CLOCK if line[:, 0].max() > 0 else engine.LOG_CLOCK
    members = [member_parameters(parameters, i, count) for i in range(count if batched(parameters) else 1)]
    if parameters.get("s_delta") is not None:
        arrays = [_channel_arrays(D, p) for p in members]
        stacks = {name: np.stack([getattr(one, name) for one in arrays]) for name in Compiled._fields}
        return Space(D, sphere, **stacks), engine.LINEAR_CLOCK if sphere else engine.BLOW_UP_CLOCK
    if parameters.get("phi") is not None:
        phi = np.stack([np.array(p["phi"], np.float64) for p in members])
        return Autoregression(D, sphere, phi), engine.LINEAR_CLOCK
    matrices = (np.stack([transposed(p.get(name)) for p in members]) for name in ("Q", "K", "V"))
    softmax, causal = parameters.get("kind", "softmax") == "softmax", bool(parameters.get("causal", True))
    return Attention(D, sphere, softmax, causal, *matrices), engine.LINEAR_CLOCK


def _one_of(problem: Any, i: int) -> Any:
    """The problem of trajectory ``i`` of an ensemble."""
    entries = (field[i if len(field) > 1 else 0] if isinstance(field, np.ndarray) else field for field in problem)
    return type(problem)(*entries)


def _channel_arrays(D: int, p: dict[str, Any]) -> Compiled:
    return compiled_channels(D, p["M"], p["S_B"], p["S_C"], p["s_delta"], p["a"], p["bias"], p.get("W"))


def _one(
    starts: np.ndarray,
    y: np.ndarray,
    problem: Problem,
    asked: Asked,
    parameters: dict[str, Any],
) -> Trajectory:
    """One trajectory, in slices, so that Ctrl-C is heard."""
    length, n = starts.shape[1], y.shape[1]
    state = engine.State(
        y[0], np.zeros((16, n)), np.zeros(2), _counts(1, length)[0], np.full(length, np.inf), np.full(length, -1)
    )
    points = asked.points_per_step if asked.times is None else 0
    times = np.empty(0) if asked.times is None else asked.times
    rows = _ROWS if asked.times is None else max(len(times), 1)
    output = _Output(times, points, np.empty(rows), np.zeros((rows, n - 1)))
    budget = min(asked.max_steps, max(10, 200_000 // (n + 100)))
    options = engine.Options(asked.clock, asked.rtol, asked.t_end, points, budget)
    try:
        reason = _drive(_one_of(problem, 0), options, state, output, asked)
    except KeyboardInterrupt:
        reason = engine.STOPPED
    made = int(state.counts[4])
    ended = state.ended_at[np.isfinite(state.ended_at)]
    if asked.times is None:
        out_times = np.concatenate([[0.0], output.times[:made]])
        tokens = np.concatenate([_flat_start(starts, parameters), output.rows[:made]])
        rising = np.append(True, np.diff(out_times) > 0)  # close to a blow-up, times agree in all their digits
        out_times, tokens = out_times[rising], tokens[rising]
    else:
        kept = len(times) if reason == engine.ALL_ENDED else made
        out_times, tokens = times[:kept], output.rows[:kept]
    return Trajectory(
        times=out_times,
        tokens=_tokens(tokens[None], out_times, starts, state.y[None], state.ended_at[None], parameters)[0],
        ended_at=state.ended_at,
        ended_by=state.ended_by,
        reason=_REASONS[reason],
        stopped_at=float(ended.max()) if reason == engine.ALL_ENDED else float(state.y[0]),
        steps=int(state.counts[1]),
        rejected=int(state.counts[2]),
        evaluations=int(state.counts[3]),
        problem=parameters,
        start=starts[0],
        sphere=problem.sphere,
    )


class _Output:
    """Where one trajectory is written: rows at the times asked for, or at times of its own, with room to grow."""

    def __init__(self, asked: np.ndarray, points: int, times: np.ndarray, rows: np.ndarray) -> None:
        self.asked, self.points, self.times, self.rows = asked, points, times, rows

    def grow(self) -> None:
        self.times = np.concatenate([self.times, np.empty_like(self.times)])
        self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])

    def write(self, counts: np.ndarray, at: Callable[[float], np.ndarray], now: float) -> None:
        """Outputs inside a step that ends at time ``now``, from its dense output ``at``."""
        from tokendyn.core._stiff import when

        shares = [(k + 1) / self.points for k in range(self.points)]
        while counts[4] + len(shares) < len(self.asked) and self.asked[counts[4] + len(shares)] <= now:
            shares.append(when(at, float(self.asked[counts[4] + len(shares)])))
        for share in shares:
            if counts[4] == len(self.times):
                self.grow()
            y = at(share)
            self.times[counts[4]] = y[0] if self.points else self.asked[counts[4]]
            self.rows[counts[4], : len(y) - 1] = y[1:]
            counts[4] += 1


def _drive(problem: Any, options: engine.Options, state: engine.State, output: _Output, asked: Asked) -> int:
    """Integrate one trajectory to its end: the explicit method, and where it turns stiff the implicit one."""
    stop = np.zeros(1, np.int64)
    while True:
        left = asked.max_steps - int(state.counts[1])
        if left <= 0:
            return engine.RUNNING
        slice_ = options._replace(budget=min(options.budget, left))
        reason = engine.integrate(problem, slice_, state, output.asked, output.times, output.rows, stop)
        if reason == engine.ROOM:
            output.grow()
        elif reason == engine.STIFF:
            if not asked.implicit:
                return engine.TOLERANCE
            from tokendyn.core._stiff import carry_on

            reason = carry_on(problem, options, state, functools.partial(output.write, state.counts), asked.max_steps)
            if reason != engine.RUNNING:
                return reason
        elif reason != engine.RUNNING:
            return reason


def _many(
    starts: np.ndarray,
    y: np.ndarray,
    problem: Problem,
    asked: Asked,
    parameters: dict[str, Any],
) -> Trajectory:
    """An ensemble on all cores. Ctrl-C keeps the trajectories that are done."""
    size, length = starts.shape[:2]
    times = np.array([0.0, asked.t_end]) if asked.times is None else asked.times
    n = y.shape[1]
    state = engine.State(
        y,
        np.empty((0, 0)),
        np.zeros((size, 2)),
        _counts(size, length),
        np.full((size, length), np.inf),
        np.full((size, length), -1),
    )
    out_times, out = np.empty((size, len(times))), np.zeros((size, len(times), n - 1))
    reasons = np.full(size, engine.STOPPED)
    stop = np.zeros(1, np.int64)
    options = engine.Options(asked.clock, asked.rtol, asked.t_end, 0, asked.max_steps)

    def compute(first: int, last: int) -> None:
        engine.integrate_many(first, last, problem, options, state, times, out_times, out, reasons, stop)

    try:
        run_tiles(compute, size, work=np.inf, stop=stop)
        for i in np.flatnonzero(reasons == engine.STIFF) if asked.implicit else ():
            one = engine.State(state.y[i], np.zeros((16, n)), *(field[i] for field in state[2:]))
            output = _Output(times, 0, out_times[i], out[i])
            reasons[i] = _drive(_one_of(problem, int(i)), options._replace(budget=1000), one, output, asked)
    except KeyboardInterrupt:
        reasons[reasons == engine.STIFF] = engine.STOPPED
        done = int((reasons != engine.STOPPED).sum())
        warnings.warn(f"simulate: interrupted; {done} of {size} trajectories are done", RuntimeWarning, stacklevel=4)
    reasons[reasons == engine.STIFF] = engine.TOLERANCE
    made = np.where(reasons == engine.ALL_ENDED, len(times), state.counts[:, 4])
    tokens = _tokens(out, times, starts, state.y, state.ended_at, parameters)
    tokens[np.arange(len(times)) >= made[:, None]] = np.nan
    ended = np.where(np.isfinite(state.ended_at), state.ended_at, -np.inf).max(axis=1)
    return Trajectory(
        times=times,
        tokens=tokens,
        ended_at=state.ended_at,
        ended_by=state.ended_by,
        reason=np.array([_REASONS[reason] for reason in reasons]),
        stopped_at=np.where(reasons == engine.ALL_ENDED, ended, state.y[:, 0]),
        steps=state.counts[:, 1],
        rejected=state.counts[:, 2],
        evaluations=state.counts[:, 3],
        problem=parameters,
        start=starts,
        sphere=problem.sphere,
    )


def _counts(size: int, length: int) -> np.ndarray:
    counts = np.zeros((size, 8), np.int64)
    counts[:, 0] = length
    return counts


def _flat_start(starts: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """The initial tokens as the integrator writes them."""
    flat = starts[:1].reshape(1, -1)
    if parameters.get("mu") is None:
        return flat
    return np.log(np.abs(flat), where=flat != 0, out=np.zeros_like(flat))


def _tokens(
    out: np.ndarray,
    times: np.ndarray,
    starts: np.ndarray,
    last: np.ndarray,
    ended_at: np.ndarray,
    parameters: dict[str, Any],
) -> np.ndarray:
    """The outputs (b, T, L D) as tokens, infinite where they have ended; what is exactly 0 stays 0."""
    tokens = out.reshape(*out.shape[:2], *starts.shape[1:])
    if parameters.get("mu") is not None:
        signs = np.sign(starts)
        tokens = signs[:, None] * np.exp(tokens)
    else:
        signs = np.sign(last[:, 1:].reshape(starts.shape))
    ended = times[:, None] >= ended_at[:, None, :]
    ended = ended.reshape(*ended.shape, *(1,) * (starts.ndim - 2))
    mark = np.where(signs == 0.0, 0.0, np.copysign(np.inf, signs))[:, None]
    return np.where(ended, mark, tokens)
