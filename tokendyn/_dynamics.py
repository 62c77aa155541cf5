"""Token dynamics: simulate and classify, on the line, in R^D and on spheres. Public functions, argument checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokendyn import _checks as check
from tokendyn._dispatch import describe, kind_of
from tokendyn._operations import ATTENTION_KINDS
from tokendyn.errors import DTypeError, NonFiniteError, OptionError, ShapeError

if TYPE_CHECKING:
    from tokendyn.core._regime import Regime
    from tokendyn.core._sphere import SphereRegime
    from tokendyn.core._trajectory import Trajectory

#: A token may miss the unit sphere by as much.
_OFF_SPHERE = 1e-6


def simulate(
    *,
    x0: Any,
    t_end: float,
    s_delta: Any = None,
    a: Any = None,
    mu: Any = None,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = 0.0,
    Q: Any = None,
    K: Any = None,
    V: Any = None,
    kind: str = "softmax",
    causal: bool = True,
    times: Any = None,
    rtol: float = 1e-9,
    points_per_step: int = 4,
    max_steps: int = 100_000,
) -> Trajectory:
    """Simulate the token dynamics in Euclidean space; the right-hand side is :func:`flow_rhs`.

    ::

        trajectory = tokendyn.simulate(mu=1.0, s_delta=0.7, a=1.0, x0=[0.3, -1.0, 1.2], t_end=10.0)
        print(trajectory)          # what happened, and when
        trajectory.plot()

    An adaptive Runge-Kutta method of order 8, compiled as a whole. Time runs on a logarithmic clock, so that
    ``t_end=1e32`` costs a few hundred steps; on the line the integrator holds ln|x_l|, so that tokens keep their
    signs and all their digits. A blow-up is not a failure: time is rescaled so that it lies at infinity, and its
    moment is found to about ``rtol``. The dynamics is triangular: when token l blows up, tokens l and later end with
    it, for their equations hold token l, and those before it go on (see :class:`tokendyn.Trajectory`). In words and
    formulas token 1 is the first, as in the papers; arrays are indexed from 0. Where a step size per channel makes
    the problem stiff, an implicit method (SciPy's Radau) takes over.

    PyTorch tensors and JAX arrays go through torchdiffeq and diffrax instead, and the tokens returned can be
    differentiated with respect to x0 and every parameter. There a blow-up before t_end is an error (under ``jax.jit``
    NaN), an ensemble shares its steps and, in R^D, its parameters.

    Args:
        x0: initial tokens, (L,) on the line, (L, D) in R^D; with an axis in front an ensemble of b trajectories, run
            on all cores, each with steps of its own. A NumPy array, a nested sequence, a tensor or a JAX array.
        t_end: end of the simulation, above 0.
        s_delta, a, mu, M, S_B, S_C, bias: as of :func:`flow_rhs`, with a > 0. In an ensemble they are shared, or each
            trajectory has its own: on the line as (b,), in R^D with b in front of M (or of S_B and S_C) and of every
            other array, a Δ shared by the channels as s_delta (b, 1, D).
        Q, K, V, kind, causal: self-attention in Euclidean space instead, as of :func:`attention_flow`: the control
            of paper 1, Remark 4.
        times: rising times in [0, t_end] at which to return tokens. By default a single trajectory is returned at
            0 and at ``points_per_step`` points inside each step, which lie closer where more happens; an ensemble at
            0 and t_end.
        rtol: error allowed in a step, relative to a token's magnitude; at least 1e-13.
        points_per_step: see ``times``.
        max_steps: steps after which to stop, for trajectories that oscillate ever faster.

    Returns:
        :class:`tokendyn.Trajectory`: times, tokens, blow-ups, why it stopped. Ctrl-C returns what is done.

    Raises:
        ShapeError, DTypeError, OptionError, NonFiniteError: an argument has the wrong shape, the wrong dtype, a value
            out of range, or is not finite.

    Cost:
        12 right-hand sides a step; 10 to 30 steps a decade of time at the default tolerance.

    Source:
        Paper 1, Eqs. (7)-(12).
    """
    name = "simulate"
    given = {"Q": Q, "K": K, "V": V, "kind": kind, "causal": causal}
    if Q is not None or K is not None:
        _expect_absent(name, "Q and K", s_delta=s_delta, a=a, mu=mu, M=M, S_B=S_B, S_C=S_C)
        parameters = given
    else:
        _expect_absent(name, "no Q and K", V=V)
        parameters = {"mu": mu, "M": M, "S_B": S_B, "S_C": S_C, "s_delta": s_delta, "a": a, "bias": bias}
    return _simulate(name, x0, parameters, False, t_end, times, rtol, points_per_step, max_steps)


def simulate_sphere(
    *,
    x0: Any,
    t_end: float,
    s_delta: Any = None,
    a: Any = None,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = 0.0,
    W: Any = None,
    Q: Any = None,
    K: Any = None,
    V: Any = None,
    kind: str = "softmax",
    causal: bool = True,
    phi: Any = None,
    times: Any = None,
    rtol: float = 1e-9,
    points_per_step: int = 4,
    max_steps: int = 100_000,
) -> Trajectory:
    """Simulate the token dynamics on the unit sphere: :func:`sphere_flow`, or another autoregressive model.

    The model is a selective SSM (``s_delta``, ``a`` and M), attention (``Q``, ``K``), or AR(p) (``phi``). Tokens are
    brought back to unit norm after every step.

    Args:
        x0: (L, D) tokens of unit norm, or (b, L, D), an ensemble.
        t_end, times, rtol, points_per_step, max_steps: as of :func:`simulate`.
        s_delta, a, M, S_B, S_C, bias, W: as of :func:`sphere_flow`.
        Q, K, V, kind, causal: as of :func:`attention_flow`.
        phi: as of :func:`autoregressive_flow`.

    Returns:
        :class:`tokendyn.Trajectory`.

    Raises:
        ShapeError, DTypeError, OptionError, NonFiniteError: an argument has the wrong shape, the wrong dtype, a value
            out of range, or is not finite.

    Cost:
        As :func:`simulate`.

    Source:
        Token Dynamics on Spheres in Mamba Models; arXiv 2609.17997, Eq. (5); arXiv 2411.04990.
    """
    name = "simulate_sphere"
    parameters = _sphere_parameters(name, s_delta, a, M, S_B, S_C, bias, W, Q, K, V, kind, causal, phi)
    return _simulate(name, x0, parameters, True, t_end, times, rtol, points_per_step, max_steps)


def _sphere_parameters(
    name: str,
    s_delta: Any,
    a: Any,
    M: Any,
    S_B: Any,
    S_C: Any,
    bias: Any,
    W: Any,
    Q: Any,
    K: Any,
    V: Any,
    kind: str,
    causal: bool,
    phi: Any,
) -> dict[str, Any]:
    """The parameters of the one model that is given."""
    selective = {"M": M, "S_B": S_B, "S_C": S_C, "s_delta": s_delta, "a": a, "W": W}
    if phi is not None:
        _expect_absent(name, "phi", **selective, Q=Q, K=K, V=V)
        return {"phi": phi}
    if Q is not None or K is not None:
        _expect_absent(name, "Q and K", **selective)
        return {"Q": Q, "K": K, "V": V, "kind": kind, "causal": causal}
    _expect_absent(name, "no Q and K", V=V)
    return {**selective, "bias": bias}


def _simulate(
    name: str,
    x0: Any,
    parameters: dict[str, Any],
    sphere: bool,
    t_end: float,
    times: Any,
    rtol: float,
    points_per_step: int,
    max_steps: int,
) -> Trajectory:
    from tokendyn.core._simulate import simulate as run

    check.expect_positive(name, "t_end", t_end)
    check.expect_positive(name, "rtol", rtol)
    if not 1e-13 <= rtol <= 0.1:
        raise OptionError(f"{name}: rtol is {rtol!r}, expected 1e-13 to 0.1")
    for key, value in (("points_per_step", points_per_step), ("max_steps", max_steps)):
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}: {key} is {value!r}, expected a whole number above 0")
    if times is not None:
        times = as_float64(name, "times", times)
        if times.ndim != 1 or len(times) == 0 or (np.diff(times) < 0).any() or times[0] < 0 or times[-1] > t_end:
            raise OptionError(f"{name}: times must be rising numbers in [0, t_end = {t_end}], got {times}")
    kind = kind_of(x0)
    if kind in ("torch", "jax"):
        return _simulate_on(kind, x0, parameters, sphere, t_end, times, rtol, max_steps)
    for key, value in parameters.items():
        if kind_of(value) in ("torch", "jax"):
            raise DTypeError(
                f"{name}: {key} is {describe(value)}, but x0 is {describe(x0)}; give x0 as such an array too, to "
                f"compute and differentiate there, or {key} as numbers"
            )
    tokens, arrays = problem_arrays(name, x0, parameters, sphere=sphere)
    return run(
        tokens,
        arrays,
        sphere=sphere,
        t_end=float(t_end),
        times=times,
        rtol=float(rtol),
        points_per_step=points_per_step,
        max_steps=max_steps,
    )


def _simulate_on(
    kind: str,
    x0: Any,
    parameters: dict[str, Any],
    sphere: bool,
    t_end: float,
    times: np.ndarray | None,
    rtol: float,
    max_steps: int,
) -> Trajectory:
    """Integrate framework arrays by the framework's own solver: differentiable, blow-ups are errors."""
    import importlib

    from tokendyn import _operations as ops
    from tokendyn.core._trajectory import Trajectory

    given = {key: value for key, value in parameters.items() if value is not None}
    options: dict[str, Any] = {}
    if "phi" in given:
        operation, options = ops.autoregressive_flow, {"sphere": sphere}
    elif "Q" in given:
        operation, options = ops.attention_flow, {"sphere": sphere}
    else:
        operation = ops.sphere_flow if sphere else ops.flow_rhs
    integrate = importlib.import_module(f"tokendyn.backends.{kind}._simulate").integrate
    asked = [0.0, float(t_end)] if times is None else [float(time) for time in times]
    grid = asked if asked[0] == 0 else [0.0, *asked]
    tokens = integrate(lambda x: operation(x, **given, **options), x0, grid, float(rtol), max_steps)
    tokens = tokens[len(grid) - len(asked) :]
    one = x0.ndim == (1 if "mu" in given else 2)
    shape = x0.shape[:1] if one else x0.shape[:2]
    return Trajectory(
        times=np.array(asked),
        tokens=tokens if one else tokens.swapaxes(0, 1),
        ended_at=np.full(shape, np.inf),
        ended_by=np.full(shape, -1),
        reason="reached t_end" if one else np.full(shape[:1], "reached t_end"),
        stopped_at=float(t_end),
        steps=None,
        rejected=None,
        evaluations=None,
        problem=parameters,
        start=x0,
        sphere=sphere,
    )


def _expect_absent(name: str, beside: str, **arguments: Any) -> None:
    given = [key for key, value in arguments.items() if value is not None]
    if given:
        raise OptionError(f"{name}: {', '.join(given)} given with {beside}, expected the parameters of one model")


def as_float64(name: str, key: str, value: Any) -> np.ndarray:
    """``value`` as a finite float64 NumPy array."""
    if type(value) in (int, float) and math.isfinite(value):  # the usual case, and no array to look into
        return np.array(value, np.float64)
    if kind_of(value) in ("torch", "jax"):
        raise DTypeError(f"{name}: {key} is {describe(value)}, expected a NumPy array, a sequence or a number")
    if not isinstance(value, (np.ndarray, np.generic, int, float, Sequence)) or isinstance(value, (str, bytes, bool)):
        raise DTypeError(f"{name}: {key} is {describe(value)}, expected a NumPy array, a sequence or a number")
    try:
        array = np.asarray(value)
    except ValueError as cause:
        raise ShapeError(f"{name}: {key} is ragged: {cause}") from cause
    if array.dtype.kind not in "fiu":
        raise DTypeError(f"{name}: {key} has dtype {array.dtype}, expected real numbers")
    array = np.array(array, np.float64)
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise NonFiniteError(f"{name}: {key}{list(where) if where else ''} is {array[where]}, expected finite numbers")
    return array


def _on_host(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The values of PyTorch's and JAX's arrays among ``arguments``: a regime is decided from values, in float64."""
    found = dict(arguments)
    for key, value in arguments.items():
        if kind_of(value) in ("torch", "jax"):
            found[key] = check.concrete(value, synchronize=True)
            if found[key] is None:
                raise DTypeError(
                    f"{name}: {key} has no values while it is traced; call {name} outside jit, vmap and torch.compile"
                )
    return found


def problem_arrays(
    name: str, x0: Any, parameters: dict[str, Any], *, sphere: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Tokens and parameters as float64 arrays, checked against each other; see :func:`simulate`."""
    tokens = as_float64(name, "x0", x0)
    arrays: dict[str, Any] = {
        key: value if value is None or isinstance(value, (str, bool)) else as_float64(name, key, value)
        for key, value in parameters.items()
    }
    shapes = check.Shapes(name)
    if arrays.get("mu") is not None:
        _check_line(name, shapes, tokens, arrays)
    else:
        _check_space(name, shapes, tokens, arrays)
    if "kind" in arrays:
        check.expect_choice(name, "kind", arrays["kind"], ATTENTION_KINDS)
    if arrays.get("a") is not None and (arrays["a"] <= 0).any():
        raise OptionError(f"{name}: a is {arrays['a'].min()}, expected a > 0 (A = -a, a stable layer)")
    if sphere:
        worst = np.abs(np.linalg.norm(tokens, axis=-1) - 1.0)
        if worst.max() > _OFF_SPHERE:
            where = np.unravel_index(worst.argmax(), worst.shape)
            raise OptionError(
                f"{name}: x0[{', '.join(str(int(i)) for i in where)}] has norm {np.linalg.norm(tokens[where]):.9g}, "
                f"expected 1; divide tokens by their norms"
            )
        tokens = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    return tokens, arrays


def _check_line(name: str, shapes: check.Shapes, tokens: np.ndarray, arrays: dict[str, Any]) -> None:
    _expect_absent(name, "mu", **{key: arrays.get(key) for key in ("M", "S_B", "S_C")})
    shapes.expect("x0", tokens, "L", "b L")
    for key in ("mu", "s_delta", "a", "bias"):
        if arrays[key] is None:
            raise OptionError(f"{name}: {key} is missing beside mu")
        shapes.expect(key, arrays[key], "", "b")


def _check_space(name: str, shapes: check.Shapes, tokens: np.ndarray, arrays: dict[str, Any]) -> None:
    shapes.expect("x0", tokens, "L D", "b L D")
    if "phi" in arrays:
        shapes.expect("phi", arrays["phi"], "p", "b p")
        return
    if "Q" in arrays:
        for key, pattern in (("Q", "N D"), ("K", "N D"), ("V", "D D")):
            if arrays[key] is not None:
                shapes.expect(key, arrays[key], pattern if np.ndim(arrays["Q"]) == 2 else f"b {pattern}")
            elif key != "V":
                raise OptionError(f"{name}: {key} is missing, expected both Q and K")
        return
    M, S_B, S_C = (arrays.get(key) for key in ("M", "S_B", "S_C"))
    if (M is None) == (S_B is None and S_C is None) or (S_B is None) != (S_C is None):
        raise OptionError(f"{name}: expected exactly one of mu, M, or S_B and S_C together")
    for key in ("s_delta", "a"):
        if arrays[key] is None:
            raise OptionError(f"{name}: {key} is missing")
    each = (S_B if M is None else M).ndim == 3  # type: ignore[union-attr]
    b = "b " if each else ""
    patterns = {
        "M": (f"{b}D D",),
        "S_B": (f"{b}N D",),
        "S_C": (f"{b}N D",),
        "W": (f"{b}D D",),
        "s_delta": ("b R D",) if each else ("D", "R D"),
        "a": ("", f"{b}D") if M is not None else ("", f"{b}D", f"{b}D N"),
        "bias": ("", f"{b}R") if each or arrays["s_delta"].ndim == 2 else ("",),
    }
    for key, allowed in patterns.items():
        if arrays.get(key) is not None:
            shapes.expect(key, arrays[key], *allowed)
    if shapes.sizes.get("R", 1) not in (1, shapes.sizes["D"]):
        raise ShapeError(
            f"{name}: s_delta has {shapes.sizes['R']} rows, expected 1 (one Δ for all channels) or D = "
            f"{shapes.sizes['D']}"
        )


def classify_sphere(
    *,
    x0: Any,
    s_delta: Any = None,
    a: Any = None,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = 0.0,
    W: Any = None,
    Q: Any = None,
    K: Any = None,
    V: Any = None,
    kind: str = "softmax",
    causal: bool = True,
    phi: Any = None,
) -> SphereRegime:
    """Where tokens on the unit sphere go: limit points and their stability, clusters, rates of approach.

    Args:
        x0: (L, D) tokens of unit norm.
        s_delta, a, M, S_B, S_C, bias, W, Q, K, V, kind, causal, phi: as of :func:`simulate_sphere`. PyTorch tensors
            and JAX arrays are read; what comes back is NumPy's.

    Returns:
        :class:`tokendyn.SphereRegime`.

    Raises:
        ShapeError, DTypeError, OptionError, NonFiniteError: an argument has the wrong shape, the wrong dtype, a value
            out of range, or is not finite.

    Cost:
        Formulas, and a simulation where they do not say at which of ± the limit a token arrives.

    Source:
        Token Dynamics on Spheres in Mamba Models; arXiv 2609.17997; arXiv 2411.04990, Theorem 4.1.
    """
    from tokendyn.core._sphere_regime import classify_sphere as run

    name = "classify_sphere"
    parameters = _sphere_parameters(name, s_delta, a, M, S_B, S_C, bias, W, Q, K, V, kind, causal, phi)
    given = _on_host(name, {"x0": x0, **parameters})
    tokens, arrays = problem_arrays(name, given.pop("x0"), given, sphere=True)
    if tokens.ndim == 3:
        raise ShapeError(f"{name}: x0 has shape {tokens.shape}, expected one sequence (L, D)")
    return run(tokens, arrays)


def classify(
    *,
    x0: Any,
    s_delta: Any,
    a: Any,
    mu: Any = None,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = 0.0,
    tolerance: float = 1e-9,
) -> Regime:
    """What becomes of every token: which regime, how it is known, how fast, and how close the next regime is.

    ::

        regime = tokendyn.classify(mu=1.0, s_delta=0.7, a=1.0, x0=[0.3, -1.0, 1.2])
        regime.kind            # "fast divergence"
        regime.fates           # ("blow-up", "blow-up", "blow-up")
        regime.blow_up_time    # of token 1, exactly
        print(regime.explain())

    On the line everything follows from the signs of μ and of S_Δ x_l, and the laws come with their constants. In R^D
    only what can be proved is said to be: token 1 from the sign of x_1ᵀ M x_1, all tokens if M is symmetric negative
    definite and Δ and a are shared by the channels; the rest is simulated, and says so. Paper 1's conjecture on the
    eigenvalues of the symmetric part of M is not used: both its halves are false.

    Args:
        x0, s_delta, a, mu, M, S_B, S_C, bias: as of :func:`simulate`. PyTorch tensors and JAX arrays are read; what
            comes back is NumPy's.
        tolerance: problems within this distance of a boundary have it named.

    Returns:
        :class:`tokendyn.Regime`.

    Raises:
        ShapeError, DTypeError, OptionError, NonFiniteError: an argument has the wrong shape, the wrong dtype, a value
            out of range, or is not finite.

    Cost:
        On the line about a microsecond a problem; constants and bounds when first asked for, about ten. In R^D a
        short simulation where nothing is proved.

    Source:
        Paper 1, Theorems 4.1, 4.3, 4.4 and Lemma 4.2.
    """
    from tokendyn.core._regime import classify_line

    name = "classify"
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < float("inf"):
        raise OptionError(f"{name}: tolerance is {tolerance!r}, expected a finite number, 0 or above")
    parameters = {"mu": mu, "M": M, "S_B": S_B, "S_C": S_C, "s_delta": s_delta, "a": a, "bias": bias}
    given = _on_host(name, {"x0": x0, **parameters})
    tokens, arrays = problem_arrays(name, given.pop("x0"), given, sphere=False)
    if mu is not None:
        return classify_line(tokens, arrays, float(tolerance))
    from tokendyn.core._regime_space import classify_space

    return classify_space(tokens, arrays, float(tolerance))
