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

from tokendyn.backends.jax.ops._arguments import EXACT
from tokendyn.backends.jax.ops._recurrence import scan_by

#: Tokens a chunk.
CHUNK = 32

_einsum = functools.partial(jnp.einsum, precision=EXACT)


def recurrence(
    step: jax.Array, u: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, h: jax.Array, starts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """See :class:`~tokendyn.backends.jax.ops._recurrence.Recurrence`."""
    x, length = step * u, u.shape[-1]
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


run = jax.jit(functools.partial(scan_by, recurrence), static_argnames="delta_softplus")
