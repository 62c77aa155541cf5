"""The sums that the Laplace kernel carries from block to block, in one GPU kernel instead of one a block.

What is carried solves a linear system, so it is given to JAX as one: forward and reverse mode of any order then come
from the same two kernels, the recursion and its transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

#: Channels of a program.
CHANNELS = 128


def carry(own: jax.Array, decay: jax.Array, same: jax.Array, *, interpret: bool = False) -> jax.Array:
    """See :func:`tokendyn.backends.jax.ops._laplace.carry`."""
    decay, kept = decay[..., None, None], same[..., None, None]

    def entering(after: jax.Array) -> jax.Array:
        """What enters each block: what left the one before it."""
        return jnp.pad(after[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))

    def system(after: jax.Array) -> jax.Array:
        sums = entering(after)
        below = decay * (sums[:, :, :1] + sums[:, :, 1:2])
        return after - jnp.where(kept, sums, jnp.pad(below, ((0, 0), (0, 0), (0, 2), (0, 0))))

    def solve_by(kernel: Callable[..., None]) -> Callable[[Any, jax.Array], jax.Array]:
        return lambda _, right: _launch(kernel, right, decay[..., 0, 0], same, interpret)

    after = jax.lax.custom_linear_solve(system, own, solve_by(_solve), solve_by(_solve_transposed))
    return entering(after)


def _solve(right: Any, decay: Any, kept: Any, out: Any) -> None:
    """``out_k = right_k + M_k out_{k-1}``; all (blocks, 3, channels), decay and kept (blocks,)."""

    def block(k: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        below, at, count = sums
        keep = kept[k] != 0
        sums = (
            right[k, 0, :] + jnp.where(keep, below, decay[k] * (below + at)),
            right[k, 1, :] + jnp.where(keep, at, 0.0),
            right[k, 2, :] + jnp.where(keep, count, 0.0),
        )
        for row, value in enumerate(sums):
            out[k, row, :] = value
        return sums

    jax.lax.fori_loop(0, right.shape[0], block, (jnp.zeros(right.shape[2], right.dtype),) * 3)


def _solve_transposed(right: Any, decay: Any, kept: Any, out: Any) -> None:
    """``out_k = right_k + M_{k+1}ᵀ out_{k+1}``."""
    blocks = right.shape[0]

    def block(i: Any, passed: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        k = blocks - 1 - i
        sums = tuple(right[k, row, :] + passed[row] for row in range(3))
        for row, value in enumerate(sums):
            out[k, row, :] = value
        keep, decayed = kept[k] != 0, decay[k] * sums[0]
        return (
            jnp.where(keep, sums[0], decayed),
            jnp.where(keep, sums[1], decayed),
            jnp.where(keep, sums[2], 0.0),
        )

    jax.lax.fori_loop(0, blocks, block, (jnp.zeros(right.shape[2], right.dtype),) * 3)


@functools.partial(jax.jit, static_argnames=("kernel", "interpret"))
def _launch(
    kernel: Callable[..., None], right: jax.Array, decay: jax.Array, same: jax.Array, interpret: bool
) -> jax.Array:
    batch, blocks, rows, channels = right.shape
    width = min(CHANNELS, pl.next_power_of_2(channels))
    added = -channels % width
    right = jnp.pad(right, ((0, 0), (0, 0), (0, 0), (0, added)))
    whole = pl.BlockSpec((None, blocks, rows, width), lambda b, d: (b, 0, 0, d))
    a_block = pl.BlockSpec((None, blocks), lambda b, d: (b, 0))
    out = pl.pallas_call(
        kernel,
        grid=(batch, (channels + added) // width),
        in_specs=[whole, a_block, a_block],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(right.shape, right.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=max(1, width // 32), num_stages=1),
        interpret=interpret,
        name=f"tokendyn_laplace{kernel.__name__}",
    )(right, decay.astype(right.dtype), same.astype(right.dtype))
    return out[..., :channels]
