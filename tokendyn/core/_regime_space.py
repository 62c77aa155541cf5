"""Regimes in R^D: what can be proved is proved, the rest is simulated and says so.

Proved (derived in the docs on the dynamics; S = (M + Mᵀ)/2):

- Token 1 obeys dx_{d1}/dt = (x_1ᵀ M x_1) Δ_d(x_1) x_{d1}: coordinates keep their signs, and all grow or all shrink with
  the sign of x_1ᵀ M x_1. If that is 0 it stays.
- With Δ and a shared by the channels its direction u is kept as well, so it is the line's token with μ = uᵀ M u and
  S_Δ u for S_Δ.
- Else if S is negative on the closed orthant of x_1 (negative definite, or negative entry by entry with the signs of
  x_1) token 1 goes to 0; if S is positive there, to infinity, how fast is not proved.
- If M is symmetric negative definite, and Δ and a are shared, every token goes to 0 like t^{-1/2}.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn.core._flow import channels, flow_rhs
from tokendyn.core._parametrize import io_spectrum
from tokendyn.core._regime import FATES, Regime
from tokendyn.core._regime_numba import (
    CONVERGENCE,
    DERIVED,
    ENDED,
    FAST,
    MIXED,
    SIMULATED,
    SLOW,
    STATIONARY,
    UNDECIDED,
)
from tokendyn.core._simulate import ensemble_size, member_parameters, simulate

#: How long the short simulation runs, in units of the fastest token's initial time scale, and where it looks.
_LOOKS = np.array([1e3, 1e6])
_RTOL, _STEPS = 1e-6, 2000


def classify_space(x0: np.ndarray, parameters: dict[str, Any], tolerance: float) -> Regime:
    """Regime of one sequence (L, D), or of an ensemble, in R^D."""
    size = ensemble_size(x0, parameters)
    if size is None:
        return _classify_one(x0, parameters, tolerance)
    found = [
        _classify_one(x0[i] if x0.ndim == 3 else x0, member_parameters(parameters, i, size), tolerance)
        for i in range(size)
    ]
    return Regime(
        np.array([regime.kind_code for regime in found], np.int8),
        np.stack([regime.fate_codes for regime in found]),
        np.stack([regime.certainty_codes for regime in found]),
        np.array([regime.margin for regime in found]),
        tolerance,
        {"x0": x0, **parameters},
        members=tuple(found),
    )


def _classify_one(x0: np.ndarray, parameters: dict[str, Any], tolerance: float) -> Regime:
    p = channels(x0.shape[-1], *(parameters[key] for key in ("M", "S_B", "S_C", "s_delta", "a", "bias")))
    shared = bool((p.S_delta == p.S_delta[0]).all() and (p.bias == p.bias[0]).all() and (p.a == p.a.flat[0]).all())
    low, high = _symmetric_range(p.S_B, p.S_C)
    fates = np.full(len(x0), UNDECIDED, np.int8)
    known = np.full(len(x0), SIMULATED, np.int8)
    fates[~x0.any(axis=1)], known[~x0.any(axis=1)] = STATIONARY, DERIVED
    notes, margin = [], 0.0

    if shared and high < 0 and _symmetric(p.S_B, p.S_C):
        fates[fates == UNDECIDED], known[:] = CONVERGENCE, DERIVED
        margin = -high
        notes.append(
            f"M is symmetric negative definite (largest eigenvalue {high:.4g}) and Δ and a are shared by the channels, "
            f"so every token goes to 0 like t^(-1/2) (derived)."
        )
        if high > -tolerance:
            notes.append(f"boundary: the largest eigenvalue of M, {high:.3g}, is within {tolerance:.3g} of 0")
    elif fates[0] == UNDECIDED:
        fate, note, (name, margin) = _first_token(x0[0], p, shared, low, high)
        if fate != UNDECIDED:
            fates[0], known[0] = fate, DERIVED
        notes.append(note)
        if margin <= tolerance:
            notes.append(f"boundary: |{name}| = {margin:.3g} is within {tolerance:.3g} of 0")
    trajectory = None
    if (fates == UNDECIDED).any():
        trajectory = _look(x0, parameters, fates)
        open_tokens = np.flatnonzero(known == SIMULATED)
        notes.append(
            f"Tokens {', '.join(map(str, open_tokens + 1))} are not covered by a proof: a simulation to t = "
            f"{trajectory.stopped_at:.3g} shows {', '.join(FATES[fates[l]] for l in open_tokens)}."
        )
        margin = 0.0
    return Regime(
        _kind(fates), fates, known, float(margin), tolerance, {"x0": x0, **parameters}, tuple(notes), trajectory
    )


def _symmetric_range(S_B: np.ndarray, S_C: np.ndarray) -> tuple[float, float]:
    """Smallest and largest eigenvalue of (M + Mᵀ)/2, those that are 0 by rank included."""
    N, D = S_B.shape
    if 2 * N >= D:
        M = S_C.T @ S_B
        values = np.linalg.eigvalsh((M + M.T) / 2)
    else:
        values = np.append(io_spectrum(S_B, S_C)[1], 0.0)
    return float(values.min()), float(values.max())


def _symmetric(S_B: np.ndarray, S_C: np.ndarray) -> bool:
    """Whether M equals its transpose, up to the rounding of the product."""
    M = S_C.T @ S_B
    return bool(np.abs(M - M.T).max() <= 8 * np.finfo(float).eps * np.abs(M).max())


def _first_token(x: np.ndarray, p: Any, shared: bool, low: float, high: float) -> tuple[int, str, tuple[str, float]]:
    """Fate of token 1, why, and the nearest boundary: ``x_1ᵀ M x_1 / |x_1|² = 0`` or, with one Δ, ``S_Δ x_1 = 0``."""
    form = float((p.S_C @ x) @ (p.S_B @ x)) / float(x @ x)
    boundary = "x_1ᵀ M x_1 / |x_1|²", abs(form)
    if form == 0:
        return STATIONARY, "Token 1 stays where it is, since x_1ᵀ M x_1 = 0.", boundary
    if shared:
        pull = float(p.S_delta[0] @ x)
        if form < 0:
            fate, speed = CONVERGENCE, "goes to 0 like t^(-1/2)"
        elif pull < 0:
            fate, speed = SLOW, "goes to infinity like ln t"
        else:
            fate, speed = FAST, "blows up in finite time"
        if form > abs(pull):
            boundary = "S_Δ x_1", abs(pull)
        return (
            fate,
            f"Token 1 keeps its direction, for Δ is shared by the channels, and {speed}: it is a token of the line "
            f"with μ = x_1ᵀ M x_1 / |x_1|² = {form:.4g} (derived).",
            boundary,
        )
    present = x != 0
    signs = np.sign(x[present])
    M = (p.S_C.T @ p.S_B)[np.ix_(present, present)]
    oriented = (M + M.T) * np.outer(signs, signs)
    if high < 0 or ((oriented <= 0).all() and (np.diag(oriented) < 0).all()):
        return (
            CONVERGENCE,
            "Token 1 goes to 0, for xᵀ M x < 0 in its whole orthant, which it does not leave (derived).",
            boundary,
        )
    if low > 0 or ((oriented >= 0).all() and (np.diag(oriented) > 0).all()):
        text = "Token 1 goes to infinity, for xᵀ M x > 0 in its whole orthant (derived); how fast is simulated."
        return UNDECIDED, text, boundary
    direction = "shrinks" if form < 0 else "grows"
    text = (
        f"Token 1 {direction} at first, x_1ᵀ M x_1 / |x_1|² = {form:.4g}; as Δ differs between channels its direction "
        f"turns and the sign may change, so this proves nothing about the end."
    )
    return UNDECIDED, text, boundary


def _look(x0: np.ndarray, parameters: dict[str, Any], fates: np.ndarray) -> Any:
    """Simulate, and enter what the undecided tokens are seen to do into ``fates``."""
    speed = np.linalg.norm(flow_rhs(x0, **parameters), axis=1)
    norms = np.linalg.norm(x0, axis=1)
    rate = np.max(speed[norms > 0] / norms[norms > 0])
    looks = _LOOKS / rate
    options = {"times": looks, "rtol": _RTOL, "points_per_step": 1, "max_steps": _STEPS}
    trajectory = simulate(x0, parameters, sphere=False, t_end=looks[-1], **options)
    for l in np.flatnonzero(fates == UNDECIDED):
        if trajectory.ended_by[l] == l:
            fates[l] = FAST
        elif trajectory.ended_by[l] >= 0:
            fates[l] = ENDED
        elif trajectory.reason == "reached t_end":
            early, late = np.linalg.norm(trajectory.tokens[:, l], axis=-1)
            if late < 0.1 * early:
                fates[l] = CONVERGENCE
            elif late > 1.02 * early:
                fates[l] = SLOW
    return trajectory


def _kind(fates: np.ndarray) -> int:
    """The kind of a sequence from the fates of its tokens."""
    moving = fates[fates != STATIONARY]
    if len(moving) == 0:
        return STATIONARY
    if (moving == UNDECIDED).any():
        return UNDECIDED
    converging = moving == CONVERGENCE
    if converging.all():
        return CONVERGENCE
    if converging.any():
        return MIXED
    return FAST if (moving != SLOW).any() else SLOW
