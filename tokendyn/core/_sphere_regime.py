"""Which limit each token on the sphere takes: formulas where they decide, a simulation where they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tokendyn.core import _flow
from tokendyn.core._activations import softplus
from tokendyn.core._simulate import simulate
from tokendyn.core._sphere import (
    SphereRegime,
    autoregressive_rates,
    limit_points,
    pole_eigenvalues,
    shared_rates,
    softmax_rates,
    value_eigenvalues,
)

#: The simulation runs for so many of the slowest time constants, with at most so many steps.
_TIMES, _STEPS, _RTOL = 40.0, 5000, 1e-8
#: A token has arrived when it is this close to ± the limit.
_ARRIVED = 1e-2


def classify_sphere(x0: np.ndarray, parameters: dict[str, Any]) -> SphereRegime:
    """Limit, signs and rates for tokens x0 (L, D) of unit norm; see :func:`tokendyn.classify_sphere`."""
    case, points = limit_points(x0[0], parameters)
    length = len(x0)
    unknown = SphereRegime(
        case, "undecided", points, None, np.zeros(length), np.full(length, np.nan), "simulated", parameters
    )
    if case in ("softmax", "linear", "AR"):
        return _mixer(x0, parameters, unknown)
    if case == "A":
        return _shared(x0, parameters, unknown)
    return _drawn(x0, parameters, unknown)


def _mixer(x0: np.ndarray, parameters: dict[str, Any], unknown: SphereRegime) -> SphereRegime:
    """Attention and AR(p): token 1 rests, and with V = I the others come to ± it."""
    length = len(x0)
    if unknown.case == "AR":
        rates = autoregressive_rates(parameters["phi"], length)
        return _settle(x0, parameters, unknown, x0[0], lambda signs: rates) if (rates[1:] > 0).all() else unknown
    if not unknown.limit_points or not parameters.get("causal", True):
        return unknown
    if unknown.case == "softmax":
        signs = np.ones(length)
        return replace(
            unknown, kind="consensus", limit=x0[0], signs=signs, rates=softmax_rates(length), certainty="theorem"
        )
    form = float((parameters["Q"] @ x0[0]) @ (parameters["K"] @ x0[0]))
    rates = form * np.arange(length)
    if form <= 0:
        return replace(unknown, kind="repulsion" if form else "undecided", rates=rates, certainty="derived")
    return _settle(x0, parameters, unknown, x0[0], lambda signs: rates)


def _shared(x0: np.ndarray, parameters: dict[str, Any], unknown: SphereRegime) -> SphereRegime:
    """Case A: token 1 rests; with m = x_1ᵀ M x_1 > 0 the others come to ± it, with m < 0 they are driven away."""
    p = _channels(x0.shape[1], parameters)
    form = float((p.S_C @ x0[0]) @ (p.S_B @ x0[0]))

    def rates(signs: np.ndarray) -> np.ndarray:
        return shared_rates(form, softplus(signs * (p.S_delta[0] @ x0[0]) + p.bias[0]), float(p.a.flat[0]))

    signs = np.zeros(len(x0))
    signs[0] = 1.0
    if form <= 0:
        kind = "repulsion" if form else "undecided"
        return replace(unknown, kind=kind, signs=signs, rates=rates(np.ones(len(x0))), certainty="derived")
    if len(x0) == 1:
        return replace(unknown, kind="stationary", limit=x0[0], signs=signs, rates=rates(signs), certainty="derived")
    signs[1] = np.sign((p.S_C @ x0[1]) @ (p.S_B @ x0[0]))
    if len(x0) == 2 and signs[1]:
        return replace(unknown, kind="consensus", limit=x0[0], signs=signs, rates=rates(signs), certainty="derived")
    return _settle(x0, parameters, unknown, x0[0], rates)


def _drawn(x0: np.ndarray, parameters: dict[str, Any], unknown: SphereRegime) -> SphereRegime:
    """Cases B and C: token 1 moves to one of the stable limit points; which one, and with which signs, is simulated."""
    stable = [point for point in unknown.limit_points if point.stable]
    if not stable:
        return unknown
    p = _channels(x0.shape[1], parameters)
    slowest = min(-point.eigenvalues.max() for point in stable)
    trajectory = _run(x0, parameters, _TIMES / slowest)
    first = trajectory.tokens[-1, 0]
    limit = max(stable, key=lambda point: float(first @ point.point))
    if np.linalg.norm(first - limit.point) > _ARRIVED:
        return replace(unknown, trajectory=trajectory)
    form = float((p.S_C @ limit.point) @ (p.S_B @ limit.point))

    def rates(signs: np.ndarray) -> np.ndarray:
        steps = softplus(np.outer(signs, p.S_delta @ limit.point) + p.bias)
        if unknown.case == "B":
            nu = int(np.abs(limit.point).argmax())
            return -pole_eigenvalues(form, steps, float(p.a[nu, 0]), nu).max(axis=1)
        values, vectors = np.linalg.eigh(p.W)
        top = int(np.abs(limit.point @ vectors).argmax())
        return -value_eigenvalues(form, values, top, steps[:, 0], float(p.a.flat[0])).max(axis=1)

    return _arrive(trajectory, unknown, limit.point, rates)


def _settle(x0: np.ndarray, parameters: dict[str, Any], unknown: SphereRegime, limit: np.ndarray, rates: Any) -> Any:
    """Simulate long enough for the slowest token, and read off the signs."""
    guess = rates(np.ones(len(x0)))[1:]
    trajectory = _run(x0, parameters, _TIMES / guess.min())
    return _arrive(trajectory, unknown, limit, rates)


def _run(x0: np.ndarray, parameters: dict[str, Any], t_end: float) -> Any:
    options = {"times": np.array([t_end]), "rtol": _RTOL, "points_per_step": 1, "max_steps": _STEPS}
    trajectory = simulate(x0, parameters, sphere=True, t_end=t_end, **options)
    if len(trajectory.times) == 0:  # too many steps: look at where it got to
        options["times"] = np.array([trajectory.stopped_at])
        trajectory = simulate(x0, parameters, sphere=True, t_end=trajectory.stopped_at, **options)
    return trajectory


def _arrive(trajectory: Any, unknown: SphereRegime, limit: np.ndarray, rates: Any) -> SphereRegime:
    """Signs of the tokens that have arrived at ± the limit; consensus if all have."""
    end = trajectory.tokens[-1]
    along = end @ limit
    signs = np.where(np.abs(np.abs(along) - 1) < _ARRIVED**2, np.sign(along), 0.0)
    if (signs == 0).any():
        return replace(unknown, limit=limit, signs=signs, trajectory=trajectory)
    return replace(unknown, kind="consensus", limit=limit, signs=signs, rates=rates(signs), trajectory=trajectory)


def _channels(D: int, parameters: dict[str, Any]) -> _flow.Channels:
    keys = ("M", "S_B", "S_C", "s_delta", "a", "bias", "W")
    return _flow.channels(D, *(parameters.get(key) for key in keys))
