"""Products with the Laplace kernel of sorted scores, by decayed scans, and all their derivatives.

``K_ij = exp(-|s_i - s_j|/τ)``. With s̄ the value of s, e = (s - s̄)/τ and σ_ij = sgn(s̄_i - s̄_j), σ = 0
between equal scores::

    K_ij = exp(-σ_ij e_i) · exp(-|s̄_i - s̄_j|/τ) · exp(σ_ij e_j)

holds for every s that keeps the order of s̄. So K x is a sum of three products with *constant* kernels, over
strictly smaller, equal and strictly larger scores, with factors before and behind. e is 0, but its derivatives
are those of s: written so, JAX's own rules give K's derivatives of every order, forward and reverse, and that
of |·| at 0 is 0. Differentiating the decays between neighbours instead would share out a tie by position.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def laplace_kernel(s: jax.Array, x: jax.Array, tau: jax.Array | float) -> jax.Array:
    """``K x`` for ascending scores s (b, L) and x (b, L, D). O(b L D) time and memory.

    A score that is NaN or infinite makes its whole row of the batch NaN.
    """
    value = jax.lax.stop_gradient(s)
    moved = ((s - value) / tau)[..., None]
    up, down = jnp.exp(moved), jnp.exp(-moved)
    gaps = jnp.diff(value)
    decay = jnp.exp(-gaps / tau)
    equal = gaps == 0

    smaller = _decayed(decay, up * x)
    tied = _decayed(equal.astype(x.dtype), x)
    larger = jnp.flip(_decayed(jnp.flip(decay, 1), jnp.flip(down * x, 1)), 1)

    # A group of equal scores ends the sums of all its members at the place before its first, after its last.
    place = jnp.arange(s.shape[1])
    first = jax.lax.cummax(jnp.where(_pad(equal, 1, 0), 0, place), axis=1)
    last = jax.lax.cummin(jnp.where(_pad(equal, 0, 1), s.shape[1] - 1, place), axis=1, reverse=True)
    smaller = _pad(decay[..., None] * smaller[:, :-1], 1, 0)
    larger = _pad(decay[..., None] * larger[:, 1:], 0, 1)
    return down * _at(smaller, first) + _at(tied, last) + up * _at(larger, last)


def _decayed(decay: jax.Array, x: jax.Array) -> jax.Array:
    """``f_i = decay_{i-1} f_{i-1} + x_i`` along axis 1; decay (b, L-1), x (b, L, D)."""

    def combine(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(combine, (_pad(decay, 1, 0)[..., None], x), axis=1)[1]


def _pad(x: jax.Array, before: int, after: int) -> jax.Array:
    """``x`` with zeros before and after along axis 1."""
    return jnp.pad(x, ((0, 0), (before, after), *((0, 0),) * (x.ndim - 2)))


def _at(x: jax.Array, places: jax.Array) -> jax.Array:
    """``out[b, i] = x[b, places[b, i]]``."""
    return jnp.take_along_axis(x, places[..., None], axis=1)
