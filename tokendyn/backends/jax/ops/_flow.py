"""Token dynamics on JAX arrays: each right-hand side is one selective scan, or attention by rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tokendyn.backends.jax.ops._scan import selective_scan

#: Rows of softmax attention that are held at once.
_ROWS = 128


def flow_rhs(
    x: jax.Array,
    *,
    s_delta: Any,
    a: Any,
    mu: Any = None,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
) -> jax.Array:
    """See :func:`tokendyn.flow_rhs`."""
    if mu is None:
        return _channels(x, x, M, S_B, S_C, s_delta, a, bias)
    rows = x.reshape(-1, x.shape[-1])  # the sequences of an ensemble are the scan's channels: each has its a
    mu, s_delta, a, bias = (_column(parameter) for parameter in (mu, s_delta, a, bias))
    ones = jnp.ones((1, 1, rows.shape[-1]), rows.dtype)
    decay = jnp.broadcast_to(-a * jnp.ones((1, 1), rows.dtype), (rows.shape[0], 1))[:, 0]
    w = selective_scan((rows**2)[None], (s_delta * rows + bias)[None], decay, ones, ones, delta_softplus=True)
    return (mu * rows * w[0]).reshape(x.shape)


def sphere_flow(
    x: jax.Array,
    *,
    s_delta: Any,
    a: Any,
    M: Any = None,
    S_B: Any = None,
    S_C: Any = None,
    bias: Any = None,
    W: Any = None,
) -> jax.Array:
    """See :func:`tokendyn.sphere_flow`."""
    value = x if W is None else x @ W.mT
    return _tangent(x, _channels(x, value, M, S_B, S_C, s_delta, a, bias))


def attention_flow(
    x: jax.Array,
    *,
    Q: jax.Array,
    K: jax.Array,
    V: jax.Array | None = None,
    kind: str = "softmax",
    causal: bool = True,
    sphere: bool = False,
) -> jax.Array:
    """See :func:`tokendyn.attention_flow`."""
    tokens = x if x.ndim == 3 else x[None]
    q, k = tokens @ Q.mT, tokens @ K.mT
    value = tokens if V is None else tokens @ V.mT
    if kind == "softmax":
        out = _softmax_attention(q, k, value, causal)
    elif causal:  # the scan with Δ = 1 that forgets nothing
        u = value.mT
        out = selective_scan(u, jnp.ones_like(u), jnp.zeros(u.shape[1], u.dtype), k.mT, q.mT).mT
    else:
        out = q @ (k.mT @ value)
    out = out.reshape(x.shape)
    return _tangent(x, out) if sphere else out


def autoregressive_flow(x: jax.Array, *, phi: jax.Array, sphere: bool = True) -> jax.Array:
    """See :func:`tokendyn.autoregressive_flow`."""
    out = jnp.zeros_like(x)
    for k in range(1, phi.shape[0] + 1):
        out = out.at[..., k:, :].add(phi[k - 1] * x[..., : max(x.shape[-2] - k, 0), :])
    return _tangent(x, out) if sphere else out


def _column(parameter: Any) -> Any:
    """A parameter of the line as something that multiplies (b, L); None is 0."""
    if parameter is None:
        return 0.0
    return parameter.reshape(-1, 1) if isinstance(parameter, jax.Array) else parameter


def _channels(
    x: jax.Array, value: jax.Array, M: Any, S_B: Any, S_C: Any, s_delta: jax.Array, a: Any, bias: Any
) -> jax.Array:
    """``Σ_{j≤l} (x_lᵀ M x_j) D_{lj} value_j``: one scan of ``value`` with the B, C and Δ of x."""
    D = x.shape[-1]
    tokens = x if x.ndim == 3 else x[None]
    delta = tokens @ (s_delta if s_delta.ndim == 2 else s_delta[None]).mT
    if bias is not None:
        delta = delta + bias
    B = tokens @ (M if S_B is None else S_B).mT
    C = tokens if S_C is None else tokens @ S_C.mT
    A = -a if isinstance(a, jax.Array) and a.ndim > 0 else -a * jnp.ones(D, x.dtype)
    u = value.reshape(tokens.shape).mT
    delta = jnp.broadcast_to(delta.mT, u.shape)
    return selective_scan(u, delta, A, B.mT, C.mT, delta_softplus=True).mT.reshape(x.shape)


def _softmax_attention(q: jax.Array, k: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    """Attention in blocks of rows; of each block only the keys it may see, its weights remade in reverse mode."""
    length = q.shape[1]
    place = jnp.arange(length)

    def block(q: jax.Array, k: jax.Array, value: jax.Array, start: int) -> jax.Array:
        scores = q @ k.mT
        if causal:
            visible = place[: k.shape[1]] <= place[start : start + q.shape[1], None]
            scores = jnp.where(visible, scores, -jnp.inf)
        return jax.nn.softmax(scores, axis=-1) @ value

    blocks = []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        seen = stop if causal else length
        remade = jax.checkpoint(lambda q, k, value, start=start: block(q, k, value, start))
        blocks.append(remade(q[:, start:stop], k[:, :seen], value[:, :seen]))
    return jnp.concatenate(blocks, axis=1)


def _tangent(x: jax.Array, v: jax.Array) -> jax.Array:
    """``(I - x_l x_lᵀ) v_l`` for every token."""
    return v - x * (x * v).sum(-1, keepdims=True)
