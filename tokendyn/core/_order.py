"""Orders of tokens: importance score (14), SoftSort, hard order; each with its reverse pass.

Arguments and results are those of the operations of the same names in :mod:`tokendyn`; everything is
computed in float64, SoftSort by its dense definition for every power.

Conventions: equal scores keep their order, also when descending; the derivative of |·| at 0 is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def importance_score(x: Any, s_delta: Any, k: Any) -> np.ndarray:
    """Spec of :func:`tokendyn.importance_score`: ``s_l = (S_Δ x_l)ᵀ K``. Paper 1, (14)."""
    x, k = np.asarray(x, np.float64), np.asarray(k, np.float64)
    scores = np.empty(x.shape[:2])
    for b, l in np.ndindex(scores.shape):
        scores[b, l] = k @ (x[b, l] if s_delta is None else np.asarray(s_delta, np.float64) @ x[b, l])
    return scores


def importance_score_vjp(dout: Any, x: Any, s_delta: Any, k: Any) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, importance_score(x, s_delta, k)⟩`` by argument name.

    ``ds_l``: ``dx_l = ds_l S_Δᵀ K``, ``dS_Δ = Σ_l ds_l K x_lᵀ``, ``dK = Σ_l ds_l S_Δ x_l``.
    """
    x, k, dout = (np.asarray(v, np.float64) for v in (x, k, dout))
    direction = k if s_delta is None else np.asarray(s_delta, np.float64).T @ k
    dx = np.empty_like(x)
    weighted = np.zeros(x.shape[2])  # Σ_l ds_l x_l
    for b, l in np.ndindex(dout.shape):
        dx[b, l] = dout[b, l] * direction
        weighted += dout[b, l] * x[b, l]
    if s_delta is None:
        return {"x": dx, "k": weighted}
    return {"x": dx, "s_delta": np.outer(k, weighted), "k": np.asarray(s_delta, np.float64) @ weighted}


def hard_order(scores: Any, *, ascending: bool = True) -> np.ndarray:
    """Spec of :func:`tokendyn.hard_order`. Python's sort is stable, in reverse too."""
    scores = np.asarray(scores, np.float64)
    return np.array(
        [sorted(range(len(row)), key=row.__getitem__, reverse=not ascending) for row in scores.tolist()], np.int64
    ).reshape(scores.shape)


def take_tokens(x: Any, indices: Any) -> np.ndarray:
    """Spec of :func:`tokendyn.take_tokens`: ``out[b, k] = x[b, indices[b, k]]``."""
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    for b, k in np.ndindex(x.shape[:2]):
        out[b, k] = x[b, indices[b, k]]
    return out


def take_tokens_vjp(dout: Any, x: Any, indices: Any) -> dict[str, np.ndarray]:
    """Gradient of :func:`take_tokens`: a permutation's transpose is its inverse."""
    return {"x": put_tokens(dout, indices)}


def put_tokens(y: Any, indices: Any) -> np.ndarray:
    """Spec of :func:`tokendyn.put_tokens`: ``out[b, indices[b, k]] = y[b, k]``."""
    y = np.asarray(y, np.float64)
    out = np.empty_like(y)
    for b, k in np.ndindex(y.shape[:2]):
        out[b, indices[b, k]] = y[b, k]
    return out


def put_tokens_vjp(dout: Any, y: Any, indices: Any) -> dict[str, np.ndarray]:
    """Gradient of :func:`put_tokens`: a permutation's transpose is its inverse."""
    return {"y": take_tokens(dout, indices)}


@np.errstate(over="ignore")  # of |·|^power: the weight is then 0
def softsort_matrix(scores: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> np.ndarray:
    """Spec of :func:`tokendyn.softsort_matrix`: ``P_{kl} = softmax_l(-|s_l - s_[k]|^power / tau)``.

    The largest exponent of a row is 0, that of its own token, so the softmax needs no shift.
    """
    scores = np.asarray(scores, np.float64)
    order = hard_order(scores, ascending=ascending)
    batch, length = scores.shape
    P = np.empty((batch, length, length))
    for b, k in np.ndindex(batch, length):
        weights = np.exp(-(np.abs(scores[b] - scores[b, order[b, k]]) ** power) / tau)
        P[b, k] = weights / weights.sum()
    return P


def softsort_matrix_vjp(
    dout: Any, scores: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> dict[str, np.ndarray]:
    """Gradient of ``⟨dout, softsort_matrix(scores, ...)⟩``.

    With the exponent e_{kl} = -|r|^power / tau, r = s_l - s_[k]: ``de_{kl} = P_{kl} (dP_{kl} - Σ_m P_{km} dP_{km})``
    and ``dr = -de power |r|^{power-1} sgn(r) / tau``, 0 at r = 0; r gives to s_l and takes from s_[k].
    """
    scores, dout = np.asarray(scores, np.float64), np.asarray(dout, np.float64)
    order = hard_order(scores, ascending=ascending)
    P = softsort_matrix(scores, tau=tau, power=power, ascending=ascending)
    dscores = np.zeros_like(scores)
    for b, k in np.ndindex(order.shape):
        dexponent = P[b, k] * (dout[b, k] - P[b, k] @ dout[b, k])
        r = scores[b] - scores[b, order[b, k]]
        slope = np.zeros_like(r)
        apart = r != 0
        slope[apart] = power * np.abs(r[apart]) ** (power - 1) * np.sign(r[apart]) / tau
        dscores[b] -= dexponent * slope
        dscores[b, order[b, k]] += dexponent @ slope
    return {"scores": dscores}


def softsort(scores: Any, x: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> np.ndarray:
    """Spec of :func:`tokendyn.softsort`: ``P x``."""
    P = softsort_matrix(scores, tau=tau, power=power, ascending=ascending)
    x = np.asarray(x, np.float64)
    y = np.empty_like(x)
    for b, k in np.ndindex(x.shape[:2]):
        y[b, k] = P[b, k] @ x[b]
    return y


def softsort_vjp(
    dout: Any, scores: Any, x: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, softsort(scores, x, ...)⟩``: ``dx = Pᵀ dy``, ``dP_{kl} = ⟨dy_k, x_l⟩``."""
    options: dict[str, Any] = {"tau": tau, "power": power, "ascending": ascending}
    P = softsort_matrix(scores, **options)
    x, dout = np.asarray(x, np.float64), np.asarray(dout, np.float64)
    dx, dP = np.empty_like(x), np.empty_like(P)
    for b, l in np.ndindex(x.shape[:2]):
        dx[b, l] = P[b, :, l] @ dout[b]
        dP[b, :, l] = dout[b] @ x[b, l]
    return {**softsort_matrix_vjp(dP, scores, **options), "x": dx}


def softsort_restore(scores: Any, y: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> np.ndarray:
    """Spec of :func:`tokendyn.softsort_restore`: ``x_l = Σ_k P_{kl} y_k / Σ_k P_{kl}``."""
    P = softsort_matrix(scores, tau=tau, power=power, ascending=ascending)
    y = np.asarray(y, np.float64)
    x = np.empty_like(y)
    for b, l in np.ndindex(y.shape[:2]):
        x[b, l] = P[b, :, l] @ y[b] / P[b, :, l].sum()
    return x


def softsort_restore_vjp(
    dout: Any, scores: Any, y: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, softsort_restore(scores, y, ...)⟩``.

    With c_l = Σ_k P_{kl}: ``dy_k = Σ_l P_{kl} dx_l / c_l`` and ``dP_{kl} = ⟨dx_l, y_k - x_l⟩ / c_l``.
    """
    options: dict[str, Any] = {"tau": tau, "power": power, "ascending": ascending}
    P = softsort_matrix(scores, **options)
    x = softsort_restore(scores, y, **options)
    y, dout = np.asarray(y, np.float64), np.asarray(dout, np.float64)
    dy, dP = np.zeros_like(y), np.empty_like(P)
    for b, l in np.ndindex(y.shape[:2]):
        total = P[b, :, l].sum()
        dy[b] += np.outer(P[b, :, l], dout[b, l] / total)
        dP[b, :, l] = (y[b] - x[b, l]) @ dout[b, l] / total
    return {**softsort_matrix_vjp(dP, scores, **options), "y": dy}


def effective_tokens(scores: Any, *, tau: float = 1.0, power: float = 1, ascending: bool = True) -> np.ndarray:
    """Spec of :func:`tokendyn.effective_tokens`: ``1 / Σ_l P_{kl}²``."""
    P = softsort_matrix(scores, tau=tau, power=power, ascending=ascending)
    counts = np.empty(P.shape[:2])
    for b, k in np.ndindex(counts.shape):
        counts[b, k] = 1.0 / (P[b, k] @ P[b, k])
    return counts
