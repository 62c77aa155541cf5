"""The adaptive integrator: one trajectory from its start to its end, the whole loop compiled.

Time itself is the first component of the state; the variable that is stepped, σ, runs at the rate ::

    dt/dσ = 1                                linear clock: models on the sphere, which move at bounded rates
    dt/dσ = 1 / (1 / (t + t_0) + ρ(x))       logarithmic clock; ρ = 0 where no token can blow up

so growth to t = 1e32 takes a few hundred steps, and a blow-up, where ρ ~ 1/(p (T - t)), lies at σ = ∞ and is walked
towards at an even pace until the time left is below the resolution of t.

The system is triangular: token l moves by tokens 1 to l only. When token l blows up at T, the equations of tokens l
and later end there, since they hold token l; the tokens before it go on alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokendyn.core._dop853 import ERRORS, STAGES, combine, dense_coefficients, interpolate
from tokendyn.core._flow_numba import dot
from tokendyn.core._parallel import kernel
from tokendyn.core._problem_numba import logarithmic, member, right_hand_side, work_space

LINEAR_CLOCK, LOG_CLOCK, BLOW_UP_CLOCK = range(3)

#: Why :func:`integrate` returned.
RUNNING, REACHED_END, ALL_ENDED, TOLERANCE, OVERFLOW, ROOM, STOPPED, STIFF = range(8)

#: A blow-up is over when the e-folding time of its token is below this share of the time passed.
_RESOLUTION = 4e-16
#: Relative rates within this factor of the largest belong to tokens that blow up at the same time.
_SAME_TIME = 1e-3
_SAFETY, _SHRINK, _GROW = 0.9, 0.3, 6.0
_REJECTIONS = 60
#: Beyond this product of step and estimated eigenvalue stability, not accuracy, sets the step; so many steps in a
#: row make a problem stiff, and so many without it clear it (Hairer and Wanner, section IV.2).
_STIFF_PRODUCT, _STIFF_STEPS, _CALM_STEPS = 6.1, 15, 6


class State(NamedTuple):
    """Everything that a trajectory is between two calls of :func:`integrate`.

    Attributes:
        y: (1 + L D,) t, then the tokens as the problem holds them.
        slopes: (16, 1 + L D).
        numbers: (2,) step of σ, t_0.
        counts: (8,) tokens alive, steps, rejected steps, evaluations, next output, whether slopes[0] is there, steps
            that look stiff, steps in a row that do not.
        ended_at: (L,) time at which a token's equation ended, infinity while it has not.
        ended_by: (L,) the token whose blow-up ended it, -1 while none has.
    """

    y: np.ndarray
    slopes: np.ndarray
    numbers: np.ndarray
    counts: np.ndarray
    ended_at: np.ndarray
    ended_by: np.ndarray


class Options(NamedTuple):
    """What is asked of the integrator.

    Attributes:
        clock: ``LINEAR_CLOCK`` and so on.
        rtol: error allowed a step, relative to a token's norm (on the line: to the token).
        t_end: where to stop.
        points: outputs a step if none are asked for by time, else 0.
        budget: steps before control goes back to the caller.
    """

    clock: int
    rtol: float
    t_end: float
    points: int
    budget: int


@kernel()
def slope(p, work, options, t_0, tokens, y, dy):
    """d(t, tokens)/dσ at y = (t, tokens)."""
    rate = right_hand_side(p, work, tokens, y[1:], dy[1:])
    if options.clock == LINEAR_CLOCK:
        dy[0] = 1.0
        return
    pace = 1.0 / (y[0] + t_0)
    if options.clock == BLOW_UP_CLOCK:
        pace += rate
    pace = 1.0 / pace
    dy[0] = pace
    for i in range(1, 1 + tokens * p.D):
        dy[i] *= pace


@kernel()
def slope_alone(p, options, t_0, tokens, y, dy):
    """:func:`slope` for callers without work space."""
    slope(p, work_space(p, tokens), options, t_0, tokens, y, dy)


@kernel()
def _largest(v, first, last):
    """max |v_i| for first ≤ i < last; four at a time, so that no comparison waits for the one before."""
    a = b = c = d = 0.0
    i = first
    while i + 3 < last:
        a = max(a, abs(v[i]))
        b = max(b, abs(v[i + 1]))
        c = max(c, abs(v[i + 2]))
        d = max(d, abs(v[i + 3]))
        i += 4
    while i < last:
        a = max(a, abs(v[i]))
        i += 1
    return max(max(a, b), max(c, d))


@kernel()
def _error(p, options, tokens, y, end, slopes, step, zeros, scratch):
    """The largest error of a step in units of what is allowed; infinity if anything is not finite."""
    n = 1 + tokens * p.D
    third = fifth = 0.0
    for which in range(2):
        combine(n, zeros, slopes, ERRORS, which, 1.0, scratch)
        if not _finite(scratch, zeros, n):
            return np.inf
        worst = abs(scratch[0]) / slopes[0, 0]  # an error of t moves the tokens by as much of σ
        if logarithmic(p):
            worst = max(worst, _largest(scratch, 1, n))
        else:
            for l in range(tokens):
                norm = square = 0.0
                for i in range(1 + l * p.D, 1 + (l + 1) * p.D):
                    norm += max(y[i] * y[i], end[i] * end[i])
                    square += scratch[i] * scratch[i]
                if norm > 0.0:
                    worst = max(worst, np.sqrt(square / norm))
        third, fifth = fifth, worst
    if fifth == 0.0:
        return 0.0
    return step * fifth * fifth / np.sqrt(fifth * fifth + 0.01 * third * third) / options.rtol


@kernel()
def _when(y, coefficients, time):
    """The share of the step at which the dense output of t, a rising function, equals ``time``."""
    low, high = 0.0, 1.0
    at = np.empty(1)
    theta = (time - y[0]) / coefficients[0, 0]
    for _ in range(60):
        theta = min(max(theta, low), high)
        interpolate(1, y, coefficients, theta, at)
        late = at[0] - time
        if late > 0.0:
            high = theta
        else:
            low = theta
        before = theta
        interpolate(1, y, coefficients, theta + 1e-6, at)  # a difference serves as slope: the bracket keeps it safe
        rise = (at[0] - time - late) * 1e6
        theta = theta - late / rise if rise > 0.0 else 0.5 * (low + high)
        if not low <= theta <= high:
            theta = 0.5 * (low + high)
        if abs(theta - before) <= 1e-15 or low == high:
            break
    return theta


@kernel()
def _growth(p, y, slopes, l):
    """d ln|x_l| / dσ at the beginning of the slopes."""
    if logarithmic(p):
        return slopes[0, 1 + l]
    first = 1 + l * p.D
    along = norm = 0.0
    for i in range(first, first + p.D):
        along += y[i] * slopes[0, i]
        norm += y[i] * y[i]
    return along / norm if norm > 0.0 else 0.0


@kernel()
def _blown_up(p, tokens, y, slopes):
    """The first token that blows up here and now, or -1. ``slopes[0]`` belongs to y."""
    largest = 0.0
    for l in range(tokens):
        largest = max(largest, _growth(p, y, slopes, l))
    # dt/dσ over the growth a σ is the e-folding time
    if largest <= 0.0 or slopes[0, 0] / largest > _RESOLUTION * y[0]:
        return -1
    for l in range(tokens):
        if _growth(p, y, slopes, l) >= _SAME_TIME * largest:
            return l
    return -1


@kernel()
def _watch_stiffness(p, n, step, stage, end, slopes, counts):
    """Count steps held back by stability: the two slopes at the end of the step give the largest eigenvalue."""
    if logarithmic(p):
        return
    force = value = 0.0
    for i in range(n):
        force += (slopes[12, i] - slopes[11, i]) ** 2
        value += (end[i] - stage[i]) ** 2
    if value > 0.0 and step * np.sqrt(force / value) > _STIFF_PRODUCT:
        counts[6] += 1
        counts[7] = 0
    else:
        counts[7] += 1
        if counts[7] == _CALM_STEPS:
            counts[6] = 0


@kernel()
def _finite(v, zeros, n):
    """Whether the first ``n`` of ``v`` are all finite: 0 · ∞ and 0 · NaN are NaN."""
    return dot(v[:n], zeros[:n]) == 0.0


@kernel()
def _write(y, n, out):
    """The tokens of y = (t, tokens) to ``out``."""
    for i in range(1, n):
        out[i - 1] = y[i]


@kernel()
def end_blown_up(p, options, state):
    """End the equations of a token that blows up here and now and of those after it; whether there is one."""
    if options.clock != BLOW_UP_CLOCK:
        return False
    tokens = state.counts[0]
    l = _blown_up(p, tokens, state.y, state.slopes)
    if l < 0:
        return False
    for ended in range(l, tokens):
        state.ended_at[ended] = state.y[0]
        state.ended_by[ended] = l
    state.counts[0] = l
    state.counts[5] = 0
    return True


@kernel()
def _to_sphere(p, tokens, y):
    """Tokens back to unit norm, from which the error of a step has carried them."""
    for l in range(tokens):
        x = y[1 + l * p.D : 1 + (l + 1) * p.D]
        norm = np.sqrt(dot(x, x))
        for d in range(p.D):
            x[d] /= norm


@kernel()
def _fastest(p, tokens, y, slope):
    """The largest relative rate of change of a token."""
    fastest = 0.0
    for l in range(tokens):
        square = norm = 0.0
        for i in range(1 + l * p.D, 1 + (l + 1) * p.D):
            square += slope[i] * slope[i]
            norm += 1.0 if logarithmic(p) else y[i] * y[i]
        if norm > 0.0:
            fastest = max(fastest, np.sqrt(square / norm))
    return fastest


@kernel()
def _start(p, work, options, state):
    """The scale t_0 of the clock, the first slope and a first step; False if the slope is not finite."""
    tokens = state.counts[0]
    n = 1 + tokens * p.D
    y, slopes, numbers = state.y, state.slopes, state.numbers
    if numbers[1] == 0.0:
        numbers[1] = 1.0  # any scale: the slopes over dt/dσ do not depend on it
        slope(p, work, options, numbers[1], tokens, y, slopes[0])
        fastest = _fastest(p, tokens, y, slopes[0]) / slopes[0, 0]
        numbers[1] = 1.0 / fastest if fastest > 0.0 else options.t_end
    slope(p, work, options, numbers[1], tokens, y, slopes[0])
    state.counts[3] += 1
    fastest = max(1.0 / options.t_end if options.clock == LINEAR_CLOCK else 1.0, _fastest(p, tokens, y, slopes[0]))
    numbers[0] = 0.1 / fastest
    return _finite(slopes[0], np.zeros(n), n)


@kernel()
def integrate(p, options, state, times, out_times, out, stop):
    """Carry one trajectory on, and say why it was left.

    Args:
        p: :class:`Problem` of one trajectory.
        options: :class:`Options`.
        state: :class:`State`, changed in place.
        times: rising output times, or none: then ``options.points`` outputs a step are made.
        out_times, out: (n,) and (n, L D) outputs. Tokens that have ended keep what stands there.
        stop: (1,) set to non-zero by another thread to have the integration left.
    """
    counts = state.counts
    length = state.ended_at.shape[0]
    work = work_space(p, length)
    size = state.y.shape[0]
    stage, end, scratch, zeros = np.empty(size), np.empty(size), np.empty(size), np.zeros(size)
    dense = np.empty((7, size))
    used = 0
    while True:
        tokens = counts[0]
        n = 1 + tokens * p.D
        y, slopes = state.y, state.slopes
        if tokens == 0:
            return ALL_ENDED
        if counts[6] >= _STIFF_STEPS:
            return STIFF
        if y[0] >= options.t_end:
            return REACHED_END
        if used >= options.budget:
            return RUNNING
        if stop[0] != 0:
            return STOPPED
        if options.points > 0 and counts[4] + options.points > out_times.shape[0]:
            return ROOM
        if counts[5] == 0:
            if not _start(p, work, options, state):
                return OVERFLOW
            counts[5] = 1
        step, t_0 = state.numbers[0], state.numbers[1]
        if options.clock == LINEAR_CLOCK:
            step = min(step, options.t_end - y[0])

        # one step, made smaller until its error is allowed
        last_rejected = False
        accepted = False
        error = np.inf
        for _ in range(_REJECTIONS):
            for s in range(1, 12):
                combine(n, y, slopes, STAGES, s, step, stage)
                slope(p, work, options, t_0, tokens, stage, slopes[s])
            combine(n, y, slopes, STAGES, 12, step, end)
            counts[3] += 11
            error = _error(p, options, tokens, y, end, slopes, step, zeros, scratch)
            if error <= 1.0:
                accepted = True
                break
            counts[2] += 1
            last_rejected = True
            step *= max(_SHRINK, _SAFETY * error**-0.125) if np.isfinite(error) else 0.1
        if not accepted:
            state.numbers[0] = step
            return OVERFLOW if not np.isfinite(error) else TOLERANCE
        if p.sphere:
            _to_sphere(p, tokens, end)
        slope(p, work, options, t_0, tokens, end, slopes[12])
        counts[1] += 1
        counts[3] += 1
        used += 1
        _watch_stiffness(p, n, step, stage, end, slopes, counts)
        if not _finite(slopes[12], zeros, n):
            return OVERFLOW

        # outputs inside the step
        reached = end[0] >= options.t_end * (1.0 - 4e-16)
        if reached:
            end[0] = max(end[0], options.t_end)
        asked = counts[4] < times.shape[0] and times[counts[4]] <= min(end[0], options.t_end)
        if options.points > 0 or asked or end[0] > options.t_end:
            for s in range(13, 16):
                combine(n, y, slopes, STAGES, s, step, stage)
                slope(p, work, options, t_0, tokens, stage, slopes[s])
            counts[3] += 3
            dense_coefficients(n, y, end, slopes, step, dense)
            share = _when(y, dense, options.t_end) if end[0] > options.t_end else 1.0
            for point in range(options.points):
                interpolate(n, y, dense, share * (point + 1) / options.points, stage)
                last = reached and point == options.points - 1
                out_times[counts[4]] = options.t_end if last else stage[0]
                _write(stage, n, out[counts[4]])
                counts[4] += 1
            while counts[4] < times.shape[0] and times[counts[4]] <= min(end[0], options.t_end):
                interpolate(n, y, dense, _when(y, dense, times[counts[4]]), stage)
                out_times[counts[4]] = times[counts[4]]
                _write(stage, n, out[counts[4]])
                counts[4] += 1
            if end[0] > options.t_end:
                interpolate(n, y, dense, share, end)
                end[0] = options.t_end
        for i in range(n):
            y[i] = end[i]
        for i in range(n):
            slopes[0, i] = slopes[12, i]
        grow = _GROW if error == 0.0 else min(_GROW, max(_SHRINK, _SAFETY * error**-0.125))
        state.numbers[0] = step * (min(grow, 1.0) if last_rejected else grow)

        if not reached:
            end_blown_up(p, options, state)


@kernel()
def integrate_many(first, last, ensemble, options, state, times, out_times, out, reasons, stop):
    """:func:`integrate` for trajectories ``first`` to ``last`` of an ensemble, each with steps of its own.

    ``ensemble``, ``state`` (but for its slopes, which are made here), ``out_times``, ``out`` and ``reasons`` have one
    more axis in front. A trajectory that ``stop`` left unfinished has the reason ``STOPPED``.
    """
    length, n = state.ended_at.shape[1], state.y.shape[1]
    one = State(
        np.empty(n), np.empty((16, n)), np.empty(2), np.empty(8, np.int64), np.empty(length), np.empty(length, np.int64)
    )
    for i in range(first, last):
        # Copies: threads that count references to the same arrays wait for each other.
        one.y[:], one.numbers[:], one.counts[:] = state.y[i], state.numbers[i], state.counts[i]
        one.ended_at[:], one.ended_by[:] = state.ended_at[i], state.ended_by[i]
        reasons[i] = integrate(member(ensemble, i), options, one, times, out_times[i], out[i], stop)
        state.y[i], state.numbers[i], state.counts[i] = one.y, one.numbers, one.counts
        state.ended_at[i], state.ended_by[i] = one.ended_at, one.ended_by
