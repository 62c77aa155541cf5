"""The selective scan as plain JAX: a loop over chunks of tokens, inside it a loop over tokens.

Time goes first and channels last, so that a step works on contiguous (N, channels) tiles. ``exp(Δ A)`` is
made inside the step: nothing of size L x d x N ever exists. The reverse pass keeps the state before every
chunk and remakes the states within a chunk, so it holds L/CHUNK + CHUNK states instead of L.

Forward and reverse mode of any order, vmap, scan and remat pass, because nothing here has a derivative
rule of its own. Products that spread an array over another axis are written as ``einsum``: their
transposes are then contractions, which XLA runs several times faster on the CPU than sums inside a loop.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tokendyn.backends.jax.ops._arguments import EXACT, grouped, keep, sequence_starts, step_size, valid_tokens, widen

#: Tokens a chunk.
CHUNK = 32

_einsum = functools.partial(jnp.einsum, precision=EXACT)


@functools.partial(jax.jit, static_argnames="delta_softplus")
def run(
    u: jax.Array,
    delta: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    delta_bias: jax.Array | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: jax.Array | None = None,
    seq_idx: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output (b, d, L) in the dtype of u, and the last state (b, d, N) in the dtype of states."""
    valid = valid_tokens(lengths, u.shape[-1])
    step = step_size(delta, delta_bias, delta_softplus, valid)
    x = widen(keep(u, valid))
    B, C = grouped(B, valid), grouped(C, valid)
    batch, groups, state, _ = B.shape
    channels = u.shape[1] // groups
    if initial_state is None:
        h = jnp.zeros((batch, groups, state, channels), step.dtype)
    else:
        h = widen(initial_state).reshape(batch, groups, channels, state).mT
    starts = None if seq_idx is None else sequence_starts(seq_idx, valid)
    y, h = _recurrence(
        step.reshape(batch, groups, channels, -1),
        (step * x).reshape(batch, groups, channels, -1),
        widen(A).reshape(groups, channels, -1).mT,
        B,
        C,
        h,
        starts,
    )
    y = y.reshape(x.shape)
    if D is not None:
        y = y + widen(D)[:, None] * x
    if z is not None:
        y = y * jax.nn.silu(widen(keep(z, valid)))
    return keep(y, valid).astype(u.dtype), h.mT.reshape(batch, groups * channels, state)


def _recurrence(
    step: jax.Array, x: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, h: jax.Array, starts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """``h_l = exp(Δ_l A) h_{l-1} + B_l x_l``, ``y_l = ⟨C_l, h_l⟩``: Eq. (1) of paper 1.

    Args:
        step, x: (b, G, c, L), G groups of c channels; x holds Δ u.
        A: (G, N, c), or (G, 1, c) in the scalar form.
        B, C: (b, G, N, L).
        h: (b, G, N, c).
        starts: (b, L) booleans, reset the state before this token; or None.

    Returns:
        y (b, G, c, L) and the last state.
    """
    length = x.shape[-1]
    chunks = -(-length // CHUNK)
    size = -(-length // chunks)

    def by_chunk(v: jax.Array) -> jax.Array:
        """(b, ..., L) -> (chunks, size, b, ...); the tokens added at the end have Δ = x = 0, which keep the state."""
        v = jnp.moveaxis(v, -1, 0)
        v = jnp.pad(v, ((0, chunks * size - length), *((0, 0),) * (v.ndim - 1)))
        return v.reshape(chunks, size, *v.shape[1:])

    def token(h: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        step, x, B, start = inputs
        if start is not None:
            h = jnp.where(start[:, None, None, None], 0, h)
        if A.shape[1] == 1:  # the scalar form: one exponential a channel, made by chunk
            h = _einsum("bgc,bgnc->bgnc", step, h)
        else:
            h = jnp.exp(_einsum("bgc,gnc->bgnc", step, A)) * h
        h = h + _einsum("bgn,bgc->bgnc", B, x)
        return h, h

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(h: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        step, x, B, C, start = inputs
        if A.shape[1] == 1:
            step = jnp.exp(_einsum("lbgc,gc->lbgc", step, A[:, 0]))
        h, states = jax.lax.scan(token, h, (step, x, B, start))
        return h, _einsum("lbgn,lbgnc->lbgc", C, states)

    h, y = jax.lax.scan(chunk, h, jax.tree.map(by_chunk, (step, x, B, C, starts)))
    return jnp.moveaxis(y.reshape(chunks * size, *y.shape[2:])[:length], 0, -1), h
