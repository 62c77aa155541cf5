"""Pallas kernels of the selective scan's recurrence, for the Triton backend of NVIDIA GPUs.

A program walks one chunk of tokens for a block of channels and keeps the state, a (channels, N) tile, in registers.
Chunks run in parallel: ``ends`` (or ``reverse_ends``) walks each from a state of 0, ``carry`` joins the ends over the
chunks, and ``outputs`` (or ``gradients``) walks again from the true state. Every array is padded to whole blocks
beforehand, so that nothing is masked; tiles have sizes of powers of two, as Triton wants it.

Arguments are references to blocks: step, u, y and their gradients (tokens, channels), A (channels, N or 1), B and C
(tokens, N), kept (tokens,) 0 where a sequence begins and the state is reset, else 1, or None. Sums are made in the
dtype of step; u may be narrower.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def _passed(h: jax.Array, step: Any, A: jax.Array, kept: Any, l: Any) -> jax.Array:
    """What token l takes over of the state before it, ``exp(Δ_l A) h``, or gives back of a gradient: (channels, N).

    Nothing where a sequence begins, not even what is no number, which a factor of 0 would pass on.
    """
    a = jnp.exp(step[l, :][:, None] * A) * h
    return a if kept is None else jnp.where(kept[l] == 0, jnp.zeros_like(a), a)


def _outer(x: jax.Array, B: jax.Array) -> jax.Array:
    return x[:, None] * B[None, :]


def _inflow(step: Any, u: Any, l: Any) -> jax.Array:
    """``Δ_l u_l`` (channels,)."""
    return step[l, :] * u[l, :].astype(step.dtype)


def ends(step: Any, u: Any, A: Any, B: Any, kept: Any, end: Any) -> None:
    """The state after the chunk when that before it is 0."""
    rates = A[...]

    def token(l: Any, h: jax.Array) -> jax.Array:
        return _passed(h, step, rates, kept, l) + _outer(_inflow(step, u, l), B[l, :])

    end[...] = jax.lax.fori_loop(0, step.shape[0], token, jnp.zeros(end.shape, end.dtype))


def reverse_ends(step: Any, dy: Any, A: Any, C: Any, kept: Any, end: Any) -> None:
    """The gradient of the state before the chunk when that of the state after it is 0."""
    rates, size = A[...], step.shape[0]

    def token(i: Any, e: jax.Array) -> jax.Array:
        l = size - 1 - i
        return _passed(e + _outer(dy[l, :], C[l, :]), step, rates, kept, l)

    end[...] = jax.lax.fori_loop(0, size, token, jnp.zeros(end.shape, end.dtype))


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
        return _passed(h, total, rates, kept, k) + end[k, :, :]

    last[...] = jax.lax.fori_loop(0, chunks, chunk, first[...])


def outputs(step: Any, u: Any, A: Any, B: Any, C: Any, kept: Any, before: Any, y: Any) -> None:
    """The outputs of a chunk from the state before it."""
    rates = A[...]

    def token(l: Any, h: jax.Array) -> jax.Array:
        h = _passed(h, step, rates, kept, l) + _outer(_inflow(step, u, l), B[l, :])
        y[l, :] = jnp.sum(h * C[l, :][None, :], axis=1)
        return h

    jax.lax.fori_loop(0, step.shape[0], token, before[...])


def tile_states(step: Any, u: Any, A: Any, B: Any, kept: Any, before: Any, states: Any) -> None:
    """The states before every tile of a chunk, from the state before the chunk: (tiles, channels, N)."""
    rates, tiles = A[...], states.shape[0]
    size = step.shape[0] // tiles

    def tile(t: Any, h: jax.Array) -> jax.Array:
        states[t, :, :] = h

        def token(k: Any, h: jax.Array) -> jax.Array:
            l = t * size + k
            return _passed(h, step, rates, kept, l) + _outer(_inflow(step, u, l), B[l, :])

        return jax.lax.fori_loop(0, size, token, h)

    jax.lax.fori_loop(0, tiles, tile, before[...])


def gradients(
    step: Any, u: Any, A: Any, B: Any, C: Any, dy: Any, kept: Any, states: Any, after: Any,
    dstep: Any, du: Any, dA: Any, dB: Any, dC: Any,
) -> None:  # fmt: skip
    """All gradients of a chunk, from the last token to the first; the states of a tile are remade in registers.

    With g the gradient of the state after a token and e of that before it::

        g_l = C_l dy_l + e_{l+1},  e_l = a_l g_l,  w_l = e_l h_{l-1},  v_l = Σ_n B_ln g_ln
        du_l = Δ_l v_l,  dΔ_l = u_l v_l + Σ_n A_n w_ln,  dB_l = Σ_d Δ_l u_l g_l,  dC_l = Σ_d dy_l h_l,  dA = Σ_l Δ_l w_l

    Args:
        states: (tiles, channels, N) of :func:`tile_states`.
        after: (channels, N) the gradient of the state after the chunk.
        dstep, du: (tokens, channels), written.
        dA: (channels, N or 1), dB, dC: (tokens, N), of this chunk and these channels, written.
    """
    rates, tiles = A[...], states.shape[0]
    size = step.shape[0] // tiles

    def tile(i: Any, carried: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        e, dA_sum = carried
        t = tiles - 1 - i
        path = [states[t, :, :]]
        for k in range(size):
            l = t * size + k
            path.append(_passed(path[-1], step, rates, kept, l) + _outer(_inflow(step, u, l), B[l, :]))
        for k in reversed(range(size)):
            l = t * size + k
            g = e + _outer(dy[l, :], C[l, :])
            v = jnp.sum(g * B[l, :][None, :], axis=1)
            du[l, :] = step[l, :] * v
            dB[l, :] = jnp.sum(g * _inflow(step, u, l)[:, None], axis=0)
            dC[l, :] = jnp.sum(path[k + 1] * dy[l, :][:, None], axis=0)
            e = _passed(g, step, rates, kept, l)
            w = e * path[k] if kept is None else jnp.where(kept[l] == 0, jnp.zeros_like(e), e * path[k])
            dstep[l, :] = u[l, :].astype(step.dtype) * v + jnp.sum(w * rates, axis=1)
            dA_sum = dA_sum + w * step[l, :][:, None]
        return e, dA_sum

    _, dA_sum = jax.lax.fori_loop(0, tiles, tile, (after[...], jnp.zeros(after.shape, after.dtype)))
    dA[...] = dA_sum if dA.shape[1] > 1 or dA_sum.shape[1] == 1 else jnp.sum(dA_sum, axis=1, keepdims=True)
