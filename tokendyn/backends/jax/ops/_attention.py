"""Hidden attention: the matrices that the selective scan applies, one channel after another."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tokendyn.backends.jax.ops._arguments import (
    EXACT,
    absolute,
    grouped,
    sequence_starts,
    step_size,
    valid_tokens,
    widen,
)


def hidden_attention(*, rows: Sequence[int] | None = None, **arguments: Any) -> jax.Array:
    """See :func:`tokendyn.hidden_attention`."""
    # jit knows a constant by its hash, which a list has not.
    return _hidden_attention(rows=None if rows is None else tuple(rows), **arguments)


@functools.partial(jax.jit, static_argnames=("delta_softplus", "channel", "aggregate", "rows"))
def _hidden_attention(
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    *,
    seq_idx: jax.Array | None = None,
    lengths: jax.Array | None = None,
    channel: int | None = None,
    aggregate: str | None = None,
    rows: tuple[int, int] | None = None,
) -> jax.Array:
    batch, d, length = delta.shape
    start, stop = (0, length) if rows is None else rows
    valid = valid_tokens(lengths, length)
    step = step_size(delta, delta_bias, delta_softplus, valid)[..., :stop]  # no row sees a token at or past stop
    B, C = grouped(B, valid)[..., :stop], grouped(C, valid)[..., start:stop]
    groups = B.shape[1]
    A = widen(A).reshape(d, -1)

    l, j = jnp.arange(start, stop)[:, None], jnp.arange(stop)
    visible = jnp.broadcast_to(j <= l, (batch, stop - start, stop))
    if seq_idx is not None:
        packed = jnp.cumsum(sequence_starts(seq_idx), axis=1)
        visible &= packed[:, start:stop, None] == packed[:, None, :stop]
    if valid is not None:
        visible &= valid[:, start:stop, None]

    # Nothing of a channel is kept for the reverse pass, so (b, d, L, L) does not exist there either.
    @jax.checkpoint
    def attention(step: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
        """P, or |P|, (b, R, stop) of one channel: step (b, stop), A (N,) or (1,), B (b, N, stop), C (b, N, R)."""
        # Masked before the exponential: where it would overflow, so would its derivative.
        elapsed = jnp.where(visible, _elapsed(step, start), 0)
        P = jnp.where(visible, _kernel(elapsed, A, B, C) * step[:, None, :], 0)
        return absolute(P) if aggregate == "mean_abs" else P

    def by_group(v: jax.Array, axis: int) -> jax.Array:
        """Axis of d channels -> leading axes (G, d/G)."""
        v = jnp.moveaxis(v, axis, 0)
        return v.reshape(groups, d // groups, *v.shape[1:])

    if channel is not None:
        group = channel // (d // groups)
        P = attention(step[:, channel], A[channel], B[:, group], C[:, group])
    else:

        def one_group(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
            step, A, B, C = inputs

            def one_channel(total: jax.Array, own: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
                P = attention(*own, B, C)
                return (total, P) if aggregate is None else (total + P / d, None)

            return jax.lax.scan(one_channel, total, (step, A))

        zero = jnp.zeros((batch, stop - start, stop) if aggregate else (), step.dtype)
        inputs = (by_group(step, 1), by_group(A, 0), jnp.moveaxis(B, 1, 0), jnp.moveaxis(C, 1, 0))
        total, every = jax.lax.scan(one_group, zero, inputs)
        P = total if aggregate else jnp.moveaxis(every.reshape(d, batch, stop - start, stop), 0, 1)
    return jnp.pad(P, (*((0, 0),) * (P.ndim - 1), (0, length - stop))).astype(delta.dtype)


def _elapsed(step: jax.Array, start: int) -> jax.Array:
    """(b, R, stop) ``Σ_{k=j+1..l} Δ_k`` for l from ``start`` on, 0 for j ≥ l.

    Sums of the terms themselves, down the rows: a difference of two cumulative sums would lose digits.
    """
    stop = step.shape[-1]
    l, j = jnp.arange(start, stop)[:, None], jnp.arange(stop)
    terms = jnp.where(j < l, step[:, start:, None], 0)
    before = jax.lax.cumsum(step[:, 1 : start + 1], axis=1, reverse=True)
    first = jnp.pad(before, ((0, 0), (0, stop - start)))[:, None]
    return jax.lax.cumsum(jnp.concatenate([first, terms[:, 1:]], axis=1), axis=1)


def _kernel(elapsed: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array) -> jax.Array:
    """(b, R, stop) ``Σ_n C_{ln} exp(A_n elapsed_{lj}) B_{jn}``, one n after another; scalar A by one product."""
    if A.shape[0] == 1:
        return jnp.exp(A * elapsed) * jnp.einsum("bnl,bnj->blj", C, B, precision=EXACT)

    @jax.checkpoint
    def add(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        A, B, C = inputs
        return total + jnp.exp(A * elapsed) * jnp.einsum("bl,bj->blj", C, B, precision=EXACT), None

    return jax.lax.scan(add, jnp.zeros_like(elapsed), (A, jnp.moveaxis(B, 1, 0), jnp.moveaxis(C, 1, 0)))[0]
