"""Products with the Laplace kernel of sorted scores, block by block, and all their derivatives.

``K_ij = exp(-|s_i - s_j|/τ)``. Inside a block of tokens the product is a small dense one. What a block receives
from those before it passes through one score, the largest of them, since the exponential of a sum of distances
is a product: three sums a block stand for all earlier tokens.

Derivatives need no rule of their own. With s̄ the value of s, e = (s - s̄)/τ and σ_ij = sgn(s̄_i - s̄_j), σ = 0
between equal scores::

    K_ij = exp(-σ_ij e_i) · exp(-|s̄_i - s̄_j|/τ) · exp(σ_ij e_j)

holds for every s near s̄ that leaves equal scores equal. Between blocks only e, which is 0, carries the
derivatives of s, of every order, and that of |·| at 0 is 0. Differentiating the distances from token to sum and
from sum to token instead would share out a tie by position.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokendyn.backends.jax.ops._arguments import EXACT, absolute, varying_like

Carry = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

#: Tokens a block, at most.
BLOCK = 64

_einsum = functools.partial(jnp.einsum, precision=EXACT)


def laplace_kernel(s: jax.Array, x: jax.Array, tau: jax.Array | float, *, engine: str = "xla") -> jax.Array:
    """``K x`` for ascending scores s (b, L) and x (b, L, D). O(b L D) time, O(b L (D + BLOCK)) memory.

    ``engine``: who carries the sums over blocks, ``"xla"`` or ``"pallas"``.
    """
    batch, length, channels = x.shape
    blocks = -(-length // BLOCK)
    size = -(-length // blocks)
    added = (0, blocks * size - length)  # tokens like the last, but 0
    s = jnp.pad(s, ((0, 0), added), mode="edge").reshape(batch, blocks, size)
    x = jnp.pad(x, ((0, 0), added, (0, 0))).reshape(batch, blocks, size, channels)
    y = _einsum("bnij,bnjd->bnid", jnp.exp(-absolute(s[..., :, None] - s[..., None, :]) / tau), x)
    if blocks > 1:
        carry_of = carry if engine == "xla" else _kernel_carry()
        value = jax.lax.stop_gradient(s)
        e = (s - value) / tau
        y = (
            y
            + _from_other_blocks(value, e, x, tau, carry_of, reverse=False)
            + _from_other_blocks(-value, -e, x, tau, carry_of, reverse=True)
        )
    return y.reshape(batch, blocks * size, channels)[:, :length]


def _from_other_blocks(
    s: jax.Array, e: jax.Array, x: jax.Array, tau: jax.Array | float, carry_of: Carry, *, reverse: bool
) -> jax.Array:
    """(b, n, Q, D) ``Σ_j K_ij x_j`` over the tokens j of the blocks before that of i, or behind it in ``reverse``.

    Of the tokens passed, whose scores are at most ``top``, it carries ``Σ exp(e_j - (top - s_j)/τ) x_j`` over
    s_j < top, the same over s_j = top, and ``Σ x_j`` over s_j = top: a token whose score is top too is tied with
    the latter, and e must not come between them.

    Args:
        s: (b, n, Q) constant scores in n blocks, ascending from block to block in the direction taken.
        e: (b, n, Q); see above.
        x: (b, n, Q, D).
    """
    top = s.max(-1)
    if reverse:
        passed = jnp.concatenate([top[:, 1:], s[:, -1:].min(-1)], 1)
    else:
        passed = jnp.concatenate([s[:, :1].min(-1), top[:, :-1]], 1)

    at_top = s == top[..., None]
    weight = jnp.exp(e - (top[..., None] - s) / tau)
    weights = jnp.stack([jnp.where(at_top, 0, weight), jnp.where(at_top, weight, 0), at_top.astype(x.dtype)], -2)
    own = _einsum("bnkj,bnjd->bnkd", weights, x)

    decay, same = jnp.exp(-(top - passed) / tau), top == passed  # same: the block lies at the top of those before it
    steps = (own, decay, same)
    if reverse:
        steps = jax.tree.map(lambda v: jnp.flip(v, 1), steps)
    sums = carry_of(*steps)
    if reverse:
        sums = jnp.flip(sums, 1)

    tied = s == passed[..., None]
    weight = jnp.exp(-e - (s - passed[..., None]) / tau)
    weights = jnp.stack([weight, jnp.where(tied, 0, weight), tied.astype(x.dtype)], -1)
    return _einsum("bnik,bnkd->bnid", weights, sums)


def _kernel_carry() -> Carry:
    from tokendyn.backends.jax.ops import _laplace_pallas  # loads Pallas, which no other device needs

    return _laplace_pallas.carry


def carry(own: jax.Array, decay: jax.Array, same: jax.Array) -> jax.Array:
    """(b, n, 3, D) the sums over all earlier blocks, from those of each block.

    A block whose ``same`` (b, n) is True takes over the three sums that enter it; another one their part below the top
    and at it, times ``decay`` (b, n), as one sum below its own top.
    """

    def block(sums: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        own, decay, same = inputs
        below = decay * (sums[:, :1] + sums[:, 1:2])
        return own + jnp.where(same, sums, jnp.pad(below, ((0, 0), (0, 2), (0, 0)))), sums

    steps = (own, decay[..., None, None], same[..., None, None])
    steps = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), steps)
    return jnp.moveaxis(jax.lax.scan(block, varying_like(jnp.zeros_like(own[:, 0]), own, decay), steps)[1], 0, 1)
