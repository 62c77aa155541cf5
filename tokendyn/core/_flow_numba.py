"""Numba twins of :mod:`tokendyn.core._flow` and :mod:`tokendyn.core._attention_flow`.

Kernels for one sequence, without allocation, so that the integrator can call them millions of times; below
them the same functions as in the specs, for NumPy arrays. Matrices come transposed, (D, N), so that inner loops
run along memory; a matrix of no elements stands for the identity.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tokendyn.core import _lanes_numba as lanes
from tokendyn.core._elementary_numba import exp, softplus
from tokendyn.core._flow import channels
from tokendyn.core._lanes_numba import WIDTH, row, set_row
from tokendyn.core._parallel import kernel

#: Tokens of the line taken at once, so that work space stays in the nearest cache; a multiple of WIDTH.
_BLOCK = 512


@kernel()
def padded(tokens):
    """``tokens`` rounded up to whole lanes: the length of the arrays of :func:`line_states`."""
    return (tokens + WIDTH - 1) // WIDTH * WIDTH


@kernel()
def line_states(tokens, x, s_delta, a, bias, decay, w, state):
    """(12): ``w_l = exp(-a Δ(x_l)) w_{l-1} + x_l² Δ(x_l)`` with w_0 = ``state``; the last w_l.

    Arrays have padded lengths; decay is work space.
    """
    for k in range(padded(tokens) // WIDTH):
        token = row(x, k)
        step = lanes.softplus(s_delta * token + bias)
        set_row(w, k, token * token * step)
        set_row(decay, k, lanes.exp(step * -a))
    for l in range(tokens):
        state = decay[l] * state + w[l]
        w[l] = state
    return state


@kernel()
def _lines(x, mu, s_delta, a, bias, out):
    token, decay, w = np.zeros(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    for b in range(x.shape[0]):
        state = 0.0
        for start in range(0, x.shape[1], _BLOCK):
            tokens = min(_BLOCK, x.shape[1] - start)
            token[:tokens] = x[b, start : start + tokens]
            state = line_states(tokens, token, s_delta[b], a[b], bias[b], decay, w, state)
            for l in range(tokens):
                out[b, start + l] = mu[b] * token[l] * w[l]


@kernel("reassoc")
def dot(u, v):
    """⟨u, v⟩ of two vectors, summed in the order that is fastest."""
    total = 0.0
    for i in range(u.shape[0]):
        total += u[i] * v[i]
    return total


@kernel()
def project(matrix_T, x, out):
    """``out = matrix x`` for matrix_T (D, N) transposed; the identity if it has no elements."""
    if matrix_T.size == 0:
        for d in range(x.shape[0]):
            out[d] = x[d]
        return
    for n in range(out.shape[0]):
        out[n] = 0.0
    for d in range(x.shape[0]):
        for n in range(out.shape[0]):
            out[n] += x[d] * matrix_T[d, n]


@kernel()
def tangent(x, out):
    """Project every row of ``out`` on the tangent space at the same row of ``x``: ``out -= x ⟨x, out⟩``."""
    for l in range(x.shape[0]):
        along = dot(x[l], out[l])
        for d in range(x.shape[1]):
            out[l, d] -= along * x[l, d]


@kernel()
def space(x, S_B_T, S_C_T, S_delta, a, bias, W_T, out, h, B, C, value):
    """(7) for one sequence x (L, D) in D channels. ``a`` (D, N) or (D, 1); h, B, C, value are work space."""
    length, D = x.shape
    N = B.shape[0]
    h[:] = 0.0
    step = 0.0
    for l in range(length):
        project(S_B_T, x[l], B)
        project(S_C_T, x[l], C)
        project(W_T, x[l], value)
        for d in range(D):
            if d < S_delta.shape[0]:  # one row: Δ is shared by all channels
                step = softplus(dot(S_delta[d], x[l]) + bias[d])
            inflow = step * value[d]
            if a.shape[1] == 1:
                decay = exp(-step * a[d, 0])
                for n in range(N):
                    h[d, n] = decay * h[d, n] + inflow * B[n]
            else:
                for n in range(N):
                    h[d, n] = exp(-step * a[d, n]) * h[d, n] + inflow * B[n]
            out[l, d] = dot(C, h[d])


@kernel()
def _spaces(x, S_B_T, S_C_T, S_delta, a, bias, W_T, on_sphere, out):
    D, N = S_B_T.shape
    h, B, C, value = np.empty((D, N)), np.empty(N), np.empty(N), np.empty(D)
    for b in range(x.shape[0]):
        space(x[b], S_B_T, S_C_T, S_delta, a, bias, W_T, out[b], h, B, C, value)
        if on_sphere:
            tangent(x[b], out[b])


@kernel()
def softmax_attention(x, Q_T, K_T, V_T, causal, out, q, keys, values, weights):
    """Softmax attention of one sequence, row by row; keys (N, L), values (D, L), weights (L,) are work space."""
    length, D = x.shape
    for l in range(length):
        project(K_T, x[l], keys[:, l])
        project(V_T, x[l], values[:, l])
    for l in range(length):
        seen = l + 1 if causal else length
        project(Q_T, x[l], q)
        for j in range(seen):
            weights[j] = 0.0
        for n in range(q.shape[0]):
            for j in range(seen):
                weights[j] += q[n] * keys[n, j]
        largest = weights[0]
        for j in range(1, seen):
            largest = max(largest, weights[j])
        for j in range(seen):
            weights[j] = exp(weights[j] - largest)
        total = 0.0
        for j in range(seen):
            total += weights[j]
        for d in range(D):
            out[l, d] = dot(weights[:seen], values[d, :seen]) / total


@kernel()
def linear_attention(x, Q_T, K_T, V_T, causal, out, q, key, value, state):
    """Linear attention of one sequence by its state (D, N) = Σ_j V x_j (K x_j)ᵀ; q, key, value are work space."""
    length, D = x.shape
    state[:] = 0.0
    for sweep in range(1 if causal else 2):  # without causality: gather the whole state, then read it
        for l in range(length):
            if sweep == 0:
                project(K_T, x[l], key)
                project(V_T, x[l], value)
                for d in range(D):
                    for n in range(key.shape[0]):
                        state[d, n] += value[d] * key[n]
            if causal or sweep == 1:
                project(Q_T, x[l], q)
                for d in range(D):
                    out[l, d] = dot(state[d], q)


@kernel()
def _attentions(x, Q_T, K_T, V_T, softmax, causal, on_sphere, out):
    length, D = x.shape[1:]
    N = Q_T.shape[1]
    q, key, value, state = np.empty(N), np.empty(N), np.empty(D), np.empty((D, N))
    if softmax:
        keys, values, weights = np.empty((N, length)), np.empty((D, length)), np.empty(length)
    else:
        keys, values, weights = np.empty((0, 0)), np.empty((0, 0)), np.empty(0)
    for b in range(x.shape[0]):
        if softmax:
            softmax_attention(x[b], Q_T, K_T, V_T, causal, out[b], q, keys, values, weights)
        else:
            linear_attention(x[b], Q_T, K_T, V_T, causal, out[b], q, key, value, state)
        if on_sphere:
            tangent(x[b], out[b])


@kernel()
def autoregression(x, phi, out):
    """``Σ_{k=1..p} φ_k x_{l-k}`` of one sequence."""
    for l in range(x.shape[0]):
        for d in range(x.shape[1]):
            out[l, d] = 0.0
        for k in range(1, min(phi.shape[0], l) + 1):
            for d in range(x.shape[1]):
                out[l, d] += phi[k - 1] * x[l - k, d]


@kernel()
def _autoregressions(x, phi, on_sphere, out):
    for b in range(x.shape[0]):
        autoregression(x[b], phi, out[b])
        if on_sphere:
            tangent(x[b], out[b])


class Compiled(NamedTuple):
    """The parameters of D channels as the kernels take them: contiguous, transposed, empty for an identity."""

    S_B_T: np.ndarray
    S_C_T: np.ndarray
    S_delta: np.ndarray
    a: np.ndarray
    bias: np.ndarray
    W_T: np.ndarray


def compiled_channels(D: int, M: Any, S_B: Any, S_C: Any, s_delta: Any, a: Any, bias: Any, W: Any = None) -> Compiled:
    """See :class:`Compiled`; arguments as of :func:`tokendyn.sphere_flow`."""
    p = channels(D, M, S_B, S_C, s_delta, a, bias, W)
    return Compiled(
        S_B_T=transposed(p.S_B),
        S_C_T=np.empty((0, 0)) if S_C is None else transposed(p.S_C),
        S_delta=np.array(p.S_delta, order="C"),
        a=np.array(p.a if np.ndim(a) == 2 else p.a[:, :1], order="C"),
        bias=np.array(p.bias),
        W_T=np.empty((0, 0)) if W is None else transposed(p.W),
    )


def transposed(matrix: Any) -> np.ndarray:
    """``matrix`` (N, D) as a contiguous (D, N); of no elements if it is None."""
    return np.empty((0, 0)) if matrix is None else np.array(np.asarray(matrix, np.float64).T, order="C")


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
    """Twin of :func:`tokendyn.core.flow_rhs`."""
    if mu is None:
        rows = _rows(x, 2)
        out = np.empty_like(rows)
        _spaces(rows, *compiled_channels(rows.shape[-1], M, S_B, S_C, s_delta, a, bias), False, out)
    else:
        rows = _rows(x, 1)
        out = np.empty_like(rows)
        parameters = [
            np.full(len(rows), 0.0 if p is None else p, np.float64) if np.ndim(p) == 0 else np.array(p, np.float64)
            for p in (mu, s_delta, a, bias)
        ]
        _lines(rows, *parameters, out)
    return out.reshape(np.shape(x))


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
    """Twin of :func:`tokendyn.core.sphere_flow`."""
    rows = _rows(x, 2)
    out = np.empty_like(rows)
    _spaces(rows, *compiled_channels(rows.shape[-1], M, S_B, S_C, s_delta, a, bias, W), True, out)
    return out.reshape(np.shape(x))


def attention_flow(
    x: Any, *, Q: Any, K: Any, V: Any = None, kind: str = "softmax", causal: bool = True, sphere: bool = False
) -> np.ndarray:
    """Twin of :func:`tokendyn.core.attention_flow`."""
    rows = _rows(x, 2)
    out = np.empty_like(rows)
    _attentions(rows, transposed(Q), transposed(K), transposed(V), kind == "softmax", causal, sphere, out)
    return out.reshape(np.shape(x))


def autoregressive_flow(x: Any, *, phi: Any, sphere: bool = True) -> np.ndarray:
    """Twin of :func:`tokendyn.core.autoregressive_flow`."""
    rows = _rows(x, 2)
    out = np.empty_like(rows)
    _autoregressions(rows, np.array(phi, np.float64), sphere, out)
    return out.reshape(np.shape(x))


def _rows(x: Any, rank: int) -> np.ndarray:
    """``x`` in float64 with one leading axis before the last ``rank``."""
    x = np.array(x, np.float64, order="C")  # a copy, so that read-only arrays do not compile a second kernel
    return x.reshape(-1, *x.shape[x.ndim - rank :])
