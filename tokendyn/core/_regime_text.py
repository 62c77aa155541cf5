"""Regimes in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tokendyn.core._activations import softplus
from tokendyn.core._regime import CONVERGENCE, FAST, SLOW, STATIONARY

if TYPE_CHECKING:
    from tokendyn.core._regime import Regime


def boundaries(regime: Regime) -> tuple[str, ...]:
    """See :attr:`Regime.boundaries`."""
    x0, near = regime.problem["x0"], regime.tolerance
    found = []
    if not regime.one_channel:
        found += [f"x_{l + 1} = 0" for l in np.flatnonzero(~x0.any(axis=-1))]
        return (*found, *(note.removeprefix("boundary: ") for note in regime.notes if note.startswith("boundary: ")))
    mu, s_delta = float(regime.problem["mu"]), float(regime.problem["s_delta"])
    if abs(mu) <= near:
        found.append("μ = 0" if mu == 0 else f"μ = {mu:.3g} is within {near:.3g} of 0")
    if s_delta == 0:
        found.append("S_Δ = 0")
    for l, x in enumerate(x0, start=1):
        if x == 0:
            found.append(f"x_{l} = 0")
        elif abs(s_delta * x) <= near and s_delta != 0:
            found.append(f"S_Δ x_{l} = {s_delta * x:.3g} is within {near:.3g} of 0")
    return tuple(found)


def explain(regime: Regime) -> str:
    """See :meth:`Regime.explain`."""
    if regime.one_channel:
        parts = _line(regime)
    else:
        fates = ", ".join(f"{l}: {fate}" for l, fate in enumerate(regime.fates, start=1))
        parts = [f"Regime: {regime.kind}. Tokens {fates}."]
        parts += [note for note in regime.notes if not note.startswith("boundary: ")]
    if regime.boundaries:
        parts.append(f"The problem lies on a boundary or close to one: {'; '.join(regime.boundaries)}.")
    parts.append(f"Certainty: {regime.certainty}. Margin: {regime.margin:.3g}.")
    return " ".join(parts)


def _line(regime: Regime) -> list[str]:
    p = regime.problem
    mu, s_delta, bias, x0 = float(p["mu"]), float(p["s_delta"]), float(p["bias"]), p["x0"]
    step = float(softplus(bias))
    if regime.kind_code == STATIONARY:
        reason = "μ = 0" if mu == 0 else "all tokens are 0"
        return [f"Regime: stationary. By (9), dx_l/dt = μ x_l w_l, nothing moves, since {reason}."]
    if regime.kind_code == CONVERGENCE:
        scales = regime.time_scales[x0 != 0]
        return [
            f"Regime: convergence (paper 1, Theorem 4.1), since μ = {mu:.4g} < 0: every token keeps its sign and "
            f"shrinks to 0 like t^(-1/2), and the hidden attention like 1/t.",
            f"Sharp: |x_l| √t tends to {_numbers(regime.constants)}, the first token's (2|μ|Δ₀)^(-1/2), every later "
            f"one's smaller by (1 - exp(-aΔ₀))^(1/2) whatever its start; Δ₀ = softplus(bias) = {step:.4g}.",
            f"These laws set in at about t = {scales[0]:.3g} for the first token and {scales.max():.3g} for the last.",
        ]
    if regime.kind_code == SLOW:
        return [
            f"Regime: slow divergence (Lemma 4.2, Theorem 4.3), since μ = {mu:.4g} > 0 and S_Δ x_l < 0 for all tokens: "
            f"|x_l| goes to infinity in infinite time, the hidden attention to 0.",
            f"Sharp: every token grows like ln t, the first as |S_Δ x| = ln t + 3 ln ln t + ln(μ e^bias / S_Δ²) + o(1) "
            f"with S_Δ = {s_delta:.4g}, each of the others in a ratio to it that tends to a constant (ratios() "
            f"measures it); the bound (ln t)^l of Theorem 4.3 is not attained.",
            f"The law of the first token sets in at about t = {regime.time_scales[np.flatnonzero(x0)[0]]:.3g}.",
        ]
    first = int(np.argmax(regime.fate_codes == FAST))
    bound = float(regime.blow_up_bounds[-1])
    law = f"(2 μ Δ₀ (T - t))^(-1/2), Δ₀ = {step:.4g}" if s_delta == 0 else "(3 μ |S_Δ| (T - t))^(-1/3)"
    cause = "S_Δ = 0" if s_delta == 0 else f"S_Δ x_{first + 1} = {s_delta * x0[first]:.4g} > 0"
    parts = [
        f"Regime: fast divergence (Theorem 4.4), since μ = {mu:.4g} > 0 and {cause}: tokens from {first + 1} on go to "
        f"infinity in finite time, the earliest of them before t = {bound:.6g}, like {law}."
    ]
    if first:
        parts.append(
            f"Tokens before {first + 1} do not feel it (the system is triangular) and diverge slowly, like ln t (Lemma "
            f"4.2)."
        )
    else:
        parts.append(f"Token 1 blows up at exactly T = {regime.blow_up_time:.9g}.")
    parts.append(
        "When a token blows up so does every later one that is not 0 (some so slowly that no simulation sees it), and "
        "of its row of the hidden attention only the diagonal diverges: P_lq → 0 for q < l, against the second half "
        "of Theorem 4.4. Tokens are counted from 1."
    )
    return parts


def _numbers(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.5g}" for value in values[:6])
    return shown if len(values) <= 6 else f"{shown}, … ({len(values)} tokens)"
