"""Regimes on the sphere in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tokendyn.core._sphere import CASES

if TYPE_CHECKING:
    from tokendyn.core._sphere import SphereRegime

_MOTIONS = {
    "A": "Token 1 does not move; with m = x_1ᵀ M x_1 > 0 the others come to ± it, with m < 0 it drives them away.",
    "B": "Token 1 follows a replicator equation in its squared coordinates; its stable limits here are the poles ±e_ν "
    "with M_νν > 0 and the largest Δ there, or M_νν < 0 and the smallest.",
    "C": "Token 1 goes to the top eigenvector of W while xᵀ M x > 0, to the bottom one while it is < 0.",
    "softmax": "Token 1 does not move, and with V = I all tokens come to it from almost every start, for any Q and K "
    "(arXiv 2411.04990, Theorem 4.1).",
    "linear": "Token 1 does not move; with x_1ᵀ Qᵀ K x_1 > 0 the others come to ± it.",
    "AR": "Token 1 does not move; where the partial sums of φ are positive the others can come to it.",
}


def explain(regime: SphereRegime) -> str:
    """See :meth:`SphereRegime.explain`."""
    parts = [f"Case {regime.case} ({CASES[regime.case]}): {regime.kind}.", _MOTIONS[regime.case]]
    stable = [point.name for point in regime.limit_points if point.stable]
    if regime.case in ("B", "C"):
        parts.append(f"Stable limits of token 1: {', '.join(stable) if stable else 'none'}.")
    if regime.kind == "consensus":
        minus = np.flatnonzero(regime.signs < 0) + 1
        where = "all at the same point" if len(minus) == 0 else f"tokens {', '.join(map(str, minus))} at its antipode"
        parts.append(f"The tokens gather, {where}.")
        rates = regime.rates[np.isfinite(regime.rates) & (regime.rates != 0)]
        if len(rates):
            parts.append(f"Rates of the tokens that move run from {rates.min():.4g} to {rates.max():.4g}.")
    elif regime.kind == "repulsion":
        parts.append("Its limit set is not known in closed form; token 2 goes to the hyperplane xᵀ M x_1 = 0.")
    parts.append(f"Certainty: {regime.certainty}.")
    return " ".join(parts)
