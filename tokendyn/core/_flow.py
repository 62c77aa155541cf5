"""Token dynamics: the right-hand side of (7) and (9) of paper 1, on the line, in R^D and on the sphere.

One token after another: the hidden attention (6) acts through the state of a selective scan, so no L x L
matrix is made. Arguments and results are those of :func:`tokendyn.flow_rhs` and :func:`tokendyn.sphere_flow`;
everything is computed in float64. (12) and the sphere flow are numbered as in the docs on the dynamics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tokendyn.core._activations import sigmoid, softplus


class Channels(NamedTuple):
    """The parameters of D channels, written out.

    Attributes:
        S_B, S_C: (N, D) with M = S_Cᵀ S_B.
        S_delta: (D, D), or (1, D) where one Δ serves all channels.
        a: (D, N) decay rates.
        bias: (D,) or (1,), as ``S_delta`` has rows.
        W: (D, D) value matrix.
    """

    S_B: np.ndarray
    S_C: np.ndarray
    S_delta: np.ndarray
    a: np.ndarray
    bias: np.ndarray
    W: np.ndarray


def channels(D: int, M: Any, S_B: Any, S_C: Any, s_delta: Any, a: Any, bias: Any, W: Any = None) -> Channels:
    """Fill in the defaults of D channels; see :class:`Channels`. A given M is read as S_B = M, S_C = I."""
    S_B = np.asarray(M if S_B is None else S_B, np.float64)
    S_C = np.eye(D) if S_C is None else np.asarray(S_C, np.float64)
    S_delta = np.asarray(s_delta, np.float64)
    S_delta = S_delta if S_delta.ndim == 2 else S_delta[None]
    a = np.asarray(a, np.float64)
    bias = np.zeros(()) if bias is None else np.asarray(bias, np.float64)
    return Channels(
        S_B=S_B,
        S_C=S_C,
        S_delta=S_delta,
        a=np.broadcast_to(a[:, None] if a.ndim == 1 else a, (D, S_B.shape[0])),
        bias=np.broadcast_to(bias, (S_delta.shape[0],)),
        W=np.eye(D) if W is None else np.asarray(W, np.float64),
    )


def flow_rhs(
    x: Any,
    *,
    s_delta: Any,
    a: Any,
    mu: Any = None,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
) -> np.ndarray:
    """Spec of :func:`tokendyn.flow_rhs`. Paper 1, (7)-(12)."""
    x = np.asarray(x, np.float64)
    if mu is not None:
        rows = x.reshape(-1, x.shape[-1])
        mu, s_delta, a, bias = _per_row(len(rows), mu, s_delta, a, bias)
        out = [_line(*row) for row in zip(rows, mu, s_delta, a, bias, strict=True)]
    else:
        rows = x.reshape(-1, *x.shape[-2:])
        p = channels(x.shape[-1], M, S_B, S_C, s_delta, a, bias)
        out = [_space(row, p) for row in rows]
    return np.stack(out).reshape(x.shape)


def flow_rhs_vjp(
    dout: Any,
    x: Any,
    *,
    s_delta: Any,
    a: Any,
    mu: Any = None,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, flow_rhs(...)⟩`` by argument name; parameters given as Python numbers have none."""
    x, dout = np.asarray(x, np.float64), np.asarray(dout, np.float64)
    if mu is None:
        return _channels_vjp(dout, x, M, S_B, S_C, s_delta, a, bias, None)
    rows = x.reshape(-1, x.shape[-1])
    spread = _per_row(len(rows), mu, s_delta, a, bias)
    parts = [_line_vjp(*row) for row in zip(dout.reshape(rows.shape), rows, *spread, strict=True)]
    dx, dmu, ds, da, db = (np.stack(part) for part in zip(*parts, strict=True))
    gradients = {"x": dx.reshape(x.shape)}
    for name, given, gradient in (("mu", mu, dmu), ("s_delta", s_delta, ds), ("a", a, da), ("bias", bias, db)):
        if not isinstance(given, (int, float, type(None))):
            gradients[name] = gradient if np.ndim(given) == 1 else gradient.sum()
    return gradients


def sphere_flow(
    x: Any,
    *,
    s_delta: Any,
    a: Any,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
    W: Any = None,
) -> np.ndarray:
    """Spec of :func:`tokendyn.sphere_flow`: the flow projected on the tangent space, token by token."""
    x = np.asarray(x, np.float64)
    p = channels(x.shape[-1], M, S_B, S_C, s_delta, a, bias, W)
    rows = x.reshape(-1, *x.shape[-2:])
    return np.stack([tangent(row, _space(row, p)) for row in rows]).reshape(x.shape)


def sphere_flow_vjp(
    dout: Any,
    x: Any,
    *,
    s_delta: Any,
    a: Any,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
    W: Any = None,
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, sphere_flow(...)⟩`` by argument name; Python numbers have none."""
    x, dout = np.asarray(x, np.float64), np.asarray(dout, np.float64)
    p = channels(x.shape[-1], M, S_B, S_C, s_delta, a, bias, W)
    flow = np.stack([_space(row, p) for row in x.reshape(-1, *x.shape[-2:])]).reshape(x.shape)
    dflow, dx = tangent_vjp(dout, x, flow)
    gradients = _channels_vjp(dflow, x, M, S_B, S_C, s_delta, a, bias, W)
    gradients["x"] += dx
    return gradients


def tangent(x: Any, v: Any) -> Any:
    """``(I - x_l x_lᵀ) v_l`` for every token: v on the tangent space of the unit sphere at x."""
    return v - x * (x * v).sum(axis=-1, keepdims=True)


def tangent_vjp(dout: Any, x: Any, v: Any) -> tuple[Any, Any]:
    """Gradients of ``⟨dout, tangent(x, v)⟩`` with respect to v and to x."""
    inner, along = (dout * x).sum(axis=-1, keepdims=True), (x * v).sum(axis=-1, keepdims=True)
    return dout - x * inner, -(v * inner + dout * along)


def _per_row(rows: int, *parameters: Any) -> list[np.ndarray]:
    """One value a row of each parameter of the line; None is 0."""
    return [np.broadcast_to(np.asarray(0.0 if p is None else p, np.float64), (rows,)) for p in parameters]


def _line(x: np.ndarray, mu: float, s_delta: float, a: float, bias: float) -> np.ndarray:
    """One channel, one sequence (L,): (9)-(12)."""
    out = np.empty_like(x)
    w = 0.0
    for l in range(len(x)):
        step = softplus(s_delta * x[l] + bias)  # (3)
        w = np.exp(-a * step) * w + x[l] ** 2 * step  # (12)
        out[l] = mu * x[l] * w  # (12)
    return out


def _line_vjp(dout: np.ndarray, x: np.ndarray, mu: float, s_delta: float, a: float, bias: float) -> tuple[Any, ...]:
    """Gradients with respect to x, mu, s_delta, a, bias of one sequence, last token first.

    With W_l the gradient that reaches w_l and q_l = exp(-a Δ_l)::

        W_l = dout_l μ x_l + q_{l+1} W_{l+1}
        dΔ_l = W_l (x_l² - a q_l w_{l-1})
        dx_l = dout_l μ w_l + 2 W_l x_l Δ_l + S_Δ σ(v_l) dΔ_l,    v_l = S_Δ x_l + bias
    """
    v = s_delta * x + bias
    step = softplus(v)
    decay = np.exp(-a * step)
    w = np.zeros(len(x) + 1)  # w[l + 1] belongs to token l
    for l in range(len(x)):
        w[l + 1] = decay[l] * w[l] + x[l] ** 2 * step[l]
    dx = np.empty_like(x)
    dmu = ds = da = db = W = 0.0
    for l in reversed(range(len(x))):
        W += dout[l] * mu * x[l]
        dv = W * (x[l] ** 2 - a * decay[l] * w[l]) * sigmoid(v[l])
        dx[l] = dout[l] * mu * w[l + 1] + 2 * W * x[l] * step[l] + s_delta * dv
        dmu += dout[l] * x[l] * w[l + 1]
        ds += dv * x[l]
        db += dv
        da -= W * step[l] * decay[l] * w[l]
        W *= decay[l]
    return dx, dmu, ds, da, db


def _space(x: np.ndarray, p: Channels) -> np.ndarray:
    """D channels, one sequence (L, D): (7) through the scan (1)-(3), its values multiplied by W."""
    out = np.empty_like(x)
    h = np.zeros_like(p.a)
    for l in range(len(x)):
        step = softplus(p.S_delta @ x[l] + p.bias)[:, None]  # (3)
        B, C = p.S_B @ x[l], p.S_C @ x[l]  # (2)
        h = np.exp(-step * p.a) * h + step * np.outer(p.W @ x[l], B)  # (1)
        out[l] = h @ C  # (1), (7)
    return out


def _channels_vjp(
    dout: np.ndarray, x: np.ndarray, M: Any, S_B: Any, S_C: Any, s_delta: Any, a: Any, bias: Any, W: Any
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, Σ_j (x_lᵀ M x_j) D_{lj} W x_j⟩`` by argument name, last token first.

    With G_l (D, N) the gradient that reaches the state h_l and ā_l = exp(-Δ_l a)::

        G_l = dout_l C_lᵀ + ā_{l+1} ∘ G_{l+1}
        dC_l = h_lᵀ dout_l      dB_l = G_lᵀ (Δ_l ∘ W x_l)      d(W x_l) = Δ_l ∘ (G_l B_l)
        dΔ_l = rows of G_l ∘ (W x_l B_lᵀ - a ∘ ā_l ∘ h_{l-1}), summed
    """
    length, D = x.shape[-2:]
    p = channels(D, M, S_B, S_C, s_delta, a, bias, W)
    dx = np.zeros_like(x).reshape(-1, length, D)
    dS_B, dS_C, dS_delta, da, dbias, dW = (np.zeros(field.shape) for field in p)
    for row, (tokens, gradient) in enumerate(zip(x.reshape(dx.shape), dout.reshape(dx.shape), strict=True)):
        v = tokens @ p.S_delta.T + p.bias
        step = softplus(v)
        value, B, C = tokens @ p.W.T, tokens @ p.S_B.T, tokens @ p.S_C.T
        h = np.zeros((length + 1, *p.a.shape))  # h[l + 1] belongs to token l
        decay = np.exp(-step[:, :, None] * p.a)
        for l in range(length):
            h[l + 1] = decay[l] * h[l] + step[l][:, None] * np.outer(value[l], B[l])
        G = np.zeros_like(p.a)
        for l in reversed(range(length)):
            G += np.outer(gradient[l], C[l])
            dC, dB = h[l + 1].T @ gradient[l], G.T @ (step[l] * value[l])
            dvalue = step[l] * (G @ B[l])
            dstep = (G * (np.outer(value[l], B[l]) - p.a * decay[l] * h[l])).sum(axis=1)
            if len(p.S_delta) == 1:
                dstep = dstep.sum(keepdims=True)
            dv = dstep * sigmoid(v[l])
            dx[row, l] = p.S_delta.T @ dv + p.S_B.T @ dB + p.S_C.T @ dC + p.W.T @ dvalue
            dS_delta += np.outer(dv, tokens[l])
            dS_B += np.outer(dB, tokens[l])
            dS_C += np.outer(dC, tokens[l])
            dW += np.outer(dvalue, tokens[l])
            dbias += dv
            da -= step[l][:, None] * decay[l] * h[l] * G
            G *= decay[l]
    gradients = {"x": dx.reshape(x.shape), "s_delta": dS_delta.reshape(np.shape(s_delta))}
    if not isinstance(a, (int, float)):
        gradients["a"] = da if np.ndim(a) == 2 else da.sum(axis=1) if np.ndim(a) == 1 else da.sum()
    if M is not None:
        gradients["M"] = dS_B
    else:
        gradients.update(S_B=dS_B, S_C=dS_C)
    if not isinstance(bias, (int, float, type(None))):
        gradients["bias"] = dbias if np.ndim(bias) == 1 else dbias.sum()
    if W is not None:
        gradients["W"] = dW
    return gradients
