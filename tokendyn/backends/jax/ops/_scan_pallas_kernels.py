"""Pallas kernels of the selective scan's recurrence, for the Triton backend of NVIDIA GPUs.

A program walks one chunk of tokens for a block of channels and keeps the state, a (channels, N) tile, in registers.
Chunks run in parallel: ``ends`` (or ``reverse_ends``) walks each from a state of 0, ``carry`` joins the ends over the
chunks, and ``outputs`` (or ``gradients``) walks again from the true state. Every array is padded to whole blocks
beforehand, so that nothing is masked; tiles have sizes of powers of two, as Triton wants it.

Arguments are references to blocks: step, x, y and their gradients (tokens, channels), A (channels, N or 1), B and C
(tokens, N), kept (tokens,) 0 where a sequence begins and the state is reset, else 1, or None.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def _decay(step: jax.Array, A: jax.Array, kept: Any, l: Any) -> jax.Array:
    """``exp(Δ_l A)`` for a row (channels,) of step sizes, the factor between the states before and after token l."""
    a = jnp.exp(step[:, None] * A)
    return a if kept is None else a * kept[l]


def _outer(x: jax.Array, B: jax.Array) -> jax.Array:
    return x[:, None] * B[None, :]


def _ahead(reference: Any, first: Any, size: int) -> list[jax.Array]:
    """Rows ``first`` to ``first + size`` of a block, asked for together, so that their ways from memory overlap."""
    return [reference[first + k, :] for k in range(size)]


def ends(step: Any, x: Any, A: Any, B: Any, kept: Any, end: Any, *, size: int) -> None:
    """The state after the chunk when that before it is 0; ``size`` tokens a turn, here and below."""
    rates = A[...]

    def tile(t: Any, h: jax.Array) -> jax.Array:
        steps, inputs, maps = (_ahead(v, t * size, size) for v in (step, x, B))
        for k in range(size):
            h = _decay(steps[k], rates, kept, t * size + k) * h + _outer(inputs[k], maps[k])
        return h

    end[...] = jax.lax.fori_loop(0, step.shape[0] // size, tile, jnp.zeros(end.shape, end.dtype))


def reverse_ends(step: Any, dy: Any, A: Any, C: Any, kept: Any, end: Any, *, size: int) -> None:
    """The gradient of the state before the chunk when that of the state after it is 0."""
    rates, tiles = A[...], step.shape[0] // size

    def tile(i: Any, e: jax.Array) -> jax.Array:
        first = (tiles - 1 - i) * size
        steps, changes, maps = (_ahead(v, first, size) for v in (step, dy, C))
        for k in reversed(range(size)):
            e = _decay(steps[k], rates, kept, first + k) * (e + _outer(changes[k], maps[k]))
        return e

    end[...] = jax.lax.fori_loop(0, tiles, tile, jnp.zeros(end.shape, end.dtype))


def carry(total: Any, A: Any, kept: Any, end: Any, first: Any, before: Any, last: Any, *, reverse: bool) -> None:
    """Join chunks: ``before`` each the state that enters it, ``last`` what leaves the last of them.

    Args:
        total: (chunks, channels) the sum of the step sizes of a chunk.
        A: (channels, N or 1).
        kept: (chunks,) 0 where a sequence begins inside the chunk, or None.
        end: (chunks, channels, N) of :func:`ends` or :func:`reverse_ends`.
        first: (channels, N) what enters the first chunk.
        before: (chunks, channels, N), written.
        last: (channels, N), written.
        reverse: from the last chunk to the first.
    """
    rates, chunks = A[...], end.shape[0]

    def chunk(i: Any, h: jax.Array) -> jax.Array:
        k = chunks - 1 - i if reverse else i
        before[k, :, :] = h
        return _decay(total[k, :], rates, kept, k) * h + end[k, :, :]

    last[...] = jax.lax.fori_loop(0, chunks, chunk, first[...])


def outputs(step: Any, x: Any, A: Any, B: Any, C: Any, kept: Any, before: Any, y: Any, *, size: int) -> None:
    """The outputs of a chunk from the state before it."""
    rates = A[...]

    def tile(t: Any, h: jax.Array) -> jax.Array:
        steps, inputs, maps, views = (_ahead(v, t * size, size) for v in (step, x, B, C))
        for k in range(size):
            h = _decay(steps[k], rates, kept, t * size + k) * h + _outer(inputs[k], maps[k])
            y[t * size + k, :] = jnp.sum(h * views[k][None, :], axis=1)
        return h

    jax.lax.fori_loop(0, step.shape[0] // size, tile, before[...])


def tile_states(step: Any, x: Any, A: Any, B: Any, kept: Any, before: Any, states: Any, *, size: int) -> None:
    """The states before every tile of a chunk, from the state before the chunk: (tiles, channels, N)."""
    rates = A[...]

    def tile(t: Any, h: jax.Array) -> jax.Array:
        states[t, :, :] = h
        steps, inputs, maps = (_ahead(v, t * size, size) for v in (step, x, B))
        for k in range(size):
            h = _decay(steps[k], rates, kept, t * size + k) * h + _outer(inputs[k], maps[k])
        return h

    jax.lax.fori_loop(0, states.shape[0], tile, before[...])


def gradients(
    step: Any, x: Any, A: Any, B: Any, C: Any, dy: Any, kept: Any, states: Any, after: Any,
    dstep: Any, dx: Any, dA: Any, dB: Any, dC: Any, *, size: int,
) -> None:  # fmt: skip
    """All gradients of a chunk, from the last token to the first; the states of a tile are remade in registers.

    With g the gradient of the state after a token and e of that before it::

        g_l = C_l dy_l + e_{l+1},  e_l = a_l g_l,  w_l = e_l h_{l-1}
        dx_l = Σ_n B_ln g_ln,  dΔ_l = Σ_n A_n w_ln,  dB_l = Σ_d x_l g_l,  dC_l = Σ_d dy_l h_l,  dA = Σ_l Δ_l w_l

    Args:
        states: (tiles, channels, N) of :func:`tile_states`.
        after: (channels, N) the gradient of the state after the chunk.
        dstep, dx: (tokens, channels), written.
        dA: (channels, N or 1), dB, dC: (tokens, N), of this chunk and these channels, written.
    """
    rates, tiles = A[...], states.shape[0]

    def tile(i: Any, carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        e, dA_sum = carried
        t = tiles - 1 - i
        path = [states[t, :, :]]
        steps, inputs, changes = (_ahead(v, t * size, size) for v in (step, x, dy))
        for k in range(size):
            l = t * size + k
            path.append(_decay(steps[k], rates, kept, l) * path[-1] + _outer(inputs[k], B[l, :]))
        for k in reversed(range(size)):
            l = t * size + k
            g = e + _outer(changes[k], C[l, :])
            dx[l, :] = jnp.sum(g * B[l, :][None, :], axis=1)
            dB[l, :] = jnp.sum(g * inputs[k][:, None], axis=0)
            dC[l, :] = jnp.sum(path[k + 1] * changes[k][:, None], axis=0)
            e = _decay(steps[k], rates, kept, l) * g
            w = e * path[k]
            dstep[l, :] = jnp.sum(w * rates, axis=1)
            dA_sum = dA_sum + w * steps[k][:, None]
        return e, dA_sum

    _, dA_sum = jax.lax.fori_loop(0, tiles, tile, (after[...], jnp.zeros(after.shape, after.dtype)))
    dA[...] = dA_sum if dA.shape[1] > 1 or dA_sum.shape[1] == 1 else jnp.sum(dA_sum, axis=1, keepdims=True)
