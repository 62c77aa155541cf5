"""Token dynamics on the unit sphere: limit points, their stability, rates of approach, clusters.

Three cases of the selective model: A, Δ and a shared by the channels; B, a Δ per channel; C, a symmetric value matrix W
with shared Δ; and the autoregressive mixers dx_l/dt = Proj(Σ_{j≤l} w_{lj} x_j). Near a limit point the linearisation
is block triangular like the dynamics itself, so its eigenvalues are those of one token at a time; ``spectrum`` computes
them from the full Jacobian, and the tests hold each formula to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokendyn.core import _attention_flow, _flow
from tokendyn.core._activations import softplus
from tokendyn.errors import OptionError

CASES = {
    "A": "selective, Δ shared by all channels",
    "B": "selective, a Δ per channel",
    "C": "selective, Δ shared, with a value matrix",
    "softmax": "softmax attention",
    "linear": "linear attention",
    "AR": "AR(p)",
}


@dataclass(frozen=True, eq=False)
class LimitPoint:
    """A point at which token 1 may rest.

    Attributes:
        point: (D,) of unit norm.
        eigenvalues: (D - 1,) real parts of the linearisation of token 1's own flow there.
        name: what it is.
    """

    point: np.ndarray
    eigenvalues: np.ndarray
    name: str

    @property
    def stable(self) -> bool:
        """Whether token 1 is drawn to it at an exponential rate."""
        return bool((self.eigenvalues < 0).all())


@dataclass(frozen=True, eq=False)
class SphereRegime:
    """Where tokens on the sphere go; made by :func:`tokendyn.classify_sphere`.

    Attributes:
        case: a key of ``CASES``.
        kind: ``"consensus"``: all tokens go to ± one point; ``"repulsion"``: the first token drives the others away
            from ± itself; ``"stationary"``; or ``"undecided"``.
        limit_points: of token 1. In case A token 1 does not move, so it is its own; in case B the poles ±e_ν (others,
            at which the Δ_d of the support agree or xᵀMx = 0, are not listed); in case C eigenvectors of W.
        limit: (D,) the point that the tokens gather at, up to sign, or None.
        signs: (L,) ±1, at which of ±limit each token arrives; 0 where this is not known.
        rates: (L,) κ_l: the slowest eigenvalue of token l's own block is -κ_l; NaN where unknown, 0 for a token that
            does not move.
        certainty: ``"theorem"``, ``"derived"`` or ``"simulated"``: of limit and signs.
        problem: the parameters, by name.
        trajectory: the simulation that was needed, if there was one.
    """

    case: str
    kind: str
    limit_points: tuple[LimitPoint, ...]
    limit: np.ndarray | None
    signs: np.ndarray
    rates: np.ndarray
    certainty: str
    problem: dict[str, Any] = field(repr=False)
    trajectory: Any = field(default=None, repr=False)

    @property
    def decay(self) -> np.ndarray:
        """(L,) the rate at which each token approaches its limit: the least κ_j of the moving tokens j ≤ l.

        Of a token that rests 0. Where two of these rates nearly agree the blocks are not diagonalisable and
        distances carry powers of t beside the exponential.
        """
        moving = np.where(self.rates == 0, np.inf, self.rates)
        least = np.minimum.accumulate(moving)
        return np.where(self.rates == 0, 0.0, least)

    def explain(self) -> str:
        """The regime in words."""
        from tokendyn.core._sphere_text import explain

        return explain(self)

    def __str__(self) -> str:
        return f"case {self.case}: {self.kind} ({self.certainty})"


def earlier_weights(step: np.ndarray, a: float) -> np.ndarray:
    """(L,) ``Σ_{j<l} Δ_j exp(-a Σ_{k=j+1..l} Δ_k)``, what the hidden attention gives the tokens before l."""
    sums = np.zeros_like(step)
    for l in range(1, len(step)):
        sums[l] = np.exp(-a * step[l]) * (sums[l - 1] + step[l - 1])
    return sums


def shared_rates(form: float, step: np.ndarray, a: float) -> np.ndarray:
    """(L,) κ_l of case A at x_l = s_l x_1: ``m Σ_{j<l} Δ(s_j x_1) exp(-a Σ_{k=j+1..l} Δ(s_k x_1))``, m = x_1ᵀ M x_1.

    Every eigenvalue of token l's block is -κ_l. ``step`` holds Δ(s_l x_1).
    """
    return form * earlier_weights(step, a)


def pole_eigenvalues(form: float, steps: np.ndarray, a: float, nu: int) -> np.ndarray:
    """(L, D - 1) eigenvalues of case B at x_l = s_l e_ν; ``steps`` (L, D) holds Δ_d(s_l e_ν), ``form`` M_νν.

    ``-M_νν [Δ_ν(s_l e_ν) - Δ_d(s_l e_ν) + Σ_{j<l} λ^ν_{lj}]`` for d ≠ ν.
    """
    others = np.delete(steps, nu, axis=1)
    return -form * (steps[:, nu, None] - others + earlier_weights(steps[:, nu], a)[:, None])


def value_eigenvalues(form: float, values: np.ndarray, top: int, step: np.ndarray, a: float) -> np.ndarray:
    """(L, D - 1) eigenvalues of case C at x_l = s_l v, v the eigenvector ``top`` of W; ``values`` all of W's.

    ``-m [λ_v Σ_{j<l} D_{lj} + (λ_v - λ_i) Δ(s_l v)]`` for i ≠ v, with m = vᵀ M v.
    """
    others = np.delete(values, top)
    return -form * (values[top] * earlier_weights(step, a)[:, None] + (values[top] - others) * step[:, None])


def softmax_rates(length: int) -> np.ndarray:
    """(L,) κ_l = (l - 1)/l of causal softmax attention with V = I at consensus, whatever Q and K."""
    return np.arange(length) / np.arange(1, length + 1)


def autoregressive_rates(phi: np.ndarray, length: int) -> np.ndarray:
    """(L,) κ_l of AR(p) at consensus: partial sums of φ, up to l - 1 terms."""
    sums = np.concatenate([[0.0], np.cumsum(phi)])
    return sums[np.minimum(np.arange(length), len(phi))]


def spectrum(x: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    """Eigenvalues (L, D - 1) of the linearised sphere dynamics at tokens x (L, D), block by block, by real part.

    From the exact Jacobian (the reverse pass of the right-hand side), on the tangent spaces; of a block triangular
    matrix the eigenvalues are those of its diagonal blocks. Cost: O(L D) reverse passes.
    """
    length, D = x.shape
    options: dict[str, Any] = {"sphere": True}
    vjp: Callable[..., dict[str, np.ndarray]]
    if parameters.get("phi") is not None:
        vjp = _attention_flow.autoregressive_flow_vjp
    elif parameters.get("Q") is not None:
        vjp = _attention_flow.attention_flow_vjp
    else:
        vjp, options = _flow.sphere_flow_vjp, {}
    given = {key: value for key, value in parameters.items() if value is not None}
    found = np.empty((length, D - 1), complex)
    for l in range(length):
        rows = []
        for d in range(D):
            dout = np.zeros_like(x)
            dout[l, d] = 1.0
            rows.append(vjp(dout, x, **given, **options)["x"][l])
        basis = np.linalg.svd(x[l][None])[2][1:]  # orthonormal, orthogonal to x_l
        values = np.linalg.eigvals(basis @ np.array(rows) @ basis.T)
        found[l] = values[np.lexsort((values.imag, values.real))]
    return found


def clusters(x: np.ndarray, tolerance: float = 1e-3) -> np.ndarray:
    """(L,) a number a token: tokens of one number lie within ``tolerance`` of the first of them, by distance."""
    labels = np.full(len(x), -1)
    leaders: list[int] = []
    for l in range(len(x)):
        near = [k for k, leader in enumerate(leaders) if np.linalg.norm(x[l] - x[leader]) <= tolerance]
        if near:
            labels[l] = near[0]
        else:
            labels[l] = len(leaders)
            leaders.append(l)
    return labels


def limit_points(x: np.ndarray, parameters: dict[str, Any]) -> tuple[str, tuple[LimitPoint, ...]]:
    """The case of a problem, and the limit points of token 1 that are known in closed form."""
    D = len(x)
    if parameters.get("phi") is not None:
        return "AR", (LimitPoint(x, np.zeros(D - 1), "token 1 itself, which does not move"),)
    if parameters.get("Q") is not None:
        kind = parameters.get("kind", "softmax")
        return kind, () if parameters.get("V") is not None else (
            LimitPoint(x, np.zeros(D - 1), "token 1 itself, which does not move"),
        )
    p = _flow.channels(D, *(parameters.get(key) for key in ("M", "S_B", "S_C", "s_delta", "a", "bias", "W")))
    M = p.S_C.T @ p.S_B
    shared = len(p.S_delta) == 1 or bool((p.S_delta == p.S_delta[0]).all() and (p.bias == p.bias[0]).all())
    if parameters.get("W") is not None:
        if not (shared and (p.a == p.a.flat[0]).all() and np.allclose(p.W, p.W.T)):
            raise OptionError(
                "classify_sphere: with a value matrix limit points are known for a symmetric W and Δ and a shared by "
                "the channels; use simulate_sphere"
            )
        values, vectors = np.linalg.eigh(p.W)
        found = []
        for i in range(D):
            for sign in (1.0, -1.0):
                v = sign * vectors[:, i]
                step = softplus(p.S_delta[0] @ v + p.bias[0])
                eigenvalues = value_eigenvalues(float(v @ M @ v), values, i, np.array([step]), 1.0)[0]
                found.append(
                    LimitPoint(v, eigenvalues, f"{'+' if sign > 0 else '-'}eigenvector of W to {values[i]:.4g}")
                )
        return "C", tuple(found)
    if shared and (p.a == p.a.flat[0]).all():
        return "A", (LimitPoint(x, np.zeros(D - 1), "token 1 itself, which does not move"),)
    found = []
    for nu in range(D):
        for sign in (1.0, -1.0):
            pole = np.zeros(D)
            pole[nu] = sign
            steps = np.broadcast_to(softplus(p.S_delta @ pole + p.bias), (D,))
            eigenvalues = pole_eigenvalues(M[nu, nu], steps[None], 1.0, nu)[0]
            found.append(LimitPoint(pole, eigenvalues, f"pole {'+' if sign > 0 else '-'}e_{nu}"))
    return "B", tuple(found)
