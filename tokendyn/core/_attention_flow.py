"""Token dynamics of autoregressive mixers other than the selective scan: attention and AR(p).

The controls beside :mod:`tokendyn.core._flow`: dx_l/dt = Σ_j w_{lj} V x_j, on the sphere projected on the
tangent space. Arguments and results are those of :func:`tokendyn.attention_flow` and
:func:`tokendyn.autoregressive_flow`; everything is computed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn.core._flow import tangent, tangent_vjp


def attention_flow(
    x: Any, *, Q: Any, K: Any, V: Any = None, kind: str = "softmax", causal: bool = True, sphere: bool = False
) -> np.ndarray:
    """Spec of :func:`tokendyn.attention_flow`: one row of attention after another."""
    x = np.asarray(x, np.float64)
    rows = x.reshape(-1, *x.shape[-2:])
    out = np.empty_like(rows)
    for b, tokens in enumerate(rows):
        q, k, v = _projections(tokens, Q, K, V)
        for l in range(len(tokens)):
            seen = slice(0, l + 1 if causal else None)
            out[b, l] = _weights(k[seen] @ q[l], kind) @ v[seen]
    return tangent(x, out.reshape(x.shape)) if sphere else out.reshape(x.shape)


def attention_flow_vjp(
    dout: Any,
    x: Any,
    *,
    Q: Any,
    K: Any,
    V: Any = None,
    kind: str = "softmax",
    causal: bool = True,
    sphere: bool = False,
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, attention_flow(...)⟩`` by argument name.

    With w the weights of row l and g_j = ⟨dout_l, v_j⟩, the scores receive ``w ∘ (g - ⟨w, g⟩)`` under softmax
    and g without it.
    """
    x, dout = np.asarray(x, np.float64), np.asarray(dout, np.float64)
    dx = np.zeros_like(x)
    if sphere:
        free = attention_flow(x, Q=Q, K=K, V=V, kind=kind, causal=causal)
        dout, dx = tangent_vjp(dout, x, free)
    rows, douts, dx_rows = (array.reshape(-1, *x.shape[-2:]) for array in (x, dout, dx))
    gradients = {"Q": np.zeros(np.shape(Q)), "K": np.zeros(np.shape(K)), "V": np.zeros((x.shape[-1], x.shape[-1]))}
    for tokens, dtokens, dx_row in zip(rows, douts, dx_rows, strict=True):
        q, k, v = _projections(tokens, Q, K, V)
        dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for l in range(len(tokens)):
            seen = slice(0, l + 1 if causal else None)
            w = _weights(k[seen] @ q[l], kind)
            g = v[seen] @ dtokens[l]
            dscore = w * (g - w @ g) if kind == "softmax" else g
            dv[seen] += np.outer(w, dtokens[l])
            dk[seen] += np.outer(dscore, q[l])
            dq[l] = dscore @ k[seen]
        for name, matrix, part in (("Q", Q, dq), ("K", K, dk), ("V", V, dv)):
            gradients[name] += part.T @ tokens
            dx_row += part if matrix is None else part @ np.asarray(matrix, np.float64)
    if V is None:
        del gradients["V"]
    return {"x": dx, **gradients}


def autoregressive_flow(x: Any, *, phi: Any, sphere: bool = True) -> np.ndarray:
    """Spec of :func:`tokendyn.autoregressive_flow`: ``Σ_{k=1..p} φ_k x_{l-k}``, token by token."""
    x, phi = np.asarray(x, np.float64), np.asarray(phi, np.float64)
    out = np.zeros_like(x)
    for l in range(x.shape[-2]):
        for k in range(1, min(len(phi), l) + 1):
            out[..., l, :] += phi[k - 1] * x[..., l - k, :]
    return tangent(x, out) if sphere else out


def autoregressive_flow_vjp(dout: Any, x: Any, *, phi: Any, sphere: bool = True) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, autoregressive_flow(...)⟩`` by argument name."""
    x, phi, dout = (np.asarray(array, np.float64) for array in (x, phi, dout))
    dx, dphi = np.zeros_like(x), np.zeros_like(phi)
    if sphere:
        dout, dx = tangent_vjp(dout, x, autoregressive_flow(x, phi=phi, sphere=False))
    for l in range(x.shape[-2]):
        for k in range(1, min(len(phi), l) + 1):
            dphi[k - 1] += (dout[..., l, :] * x[..., l - k, :]).sum()
            dx[..., l - k, :] += phi[k - 1] * dout[..., l, :]
    return {"x": dx, "phi": dphi}


def _projections(x: np.ndarray, Q: Any, K: Any, V: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries (L, N), keys (L, N) and values (L, D) of one sequence."""
    q, k = (x @ np.asarray(matrix, np.float64).T for matrix in (Q, K))
    return q, k, x if V is None else x @ np.asarray(V, np.float64).T


def _weights(scores: np.ndarray, kind: str) -> np.ndarray:
    """One row of attention from its scores."""
    if kind == "linear":
        return scores
    e = np.exp(scores - scores.max())
    return e / e.sum()
