"""What several operations do with their arguments: dtypes, |·|, and padding, step size, groups of a scan.

Padded tokens may hold anything, NaN included. They are replaced by 0 before any arithmetic, so that neither
their values nor, in the reverse pass, a 0 multiplied by their derivatives can reach another token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokendyn._checks import dtype_name, state_dtype

#: Products of float32 are made of float32, also where a GPU would round the factors to fewer bits.
EXACT = jax.lax.Precision.HIGHEST


def widen(x: jax.Array) -> jax.Array:
    """``x`` in the dtype in which states are kept and sums are made: float32 for half precision."""
    return x.astype(state_dtype(dtype_name(x)))


def absolute(x: jax.Array) -> jax.Array:
    """|x| with derivative 0 at 0; that of ``jnp.abs`` is 1 there."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def valid_tokens(lengths: jax.Array | None, length: int) -> jax.Array | None:
    """(b, L) booleans: the token is not padding. None if nothing is padded."""
    return None if lengths is None else jnp.arange(length) < lengths[:, None]


def keep(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """``x`` (b, ..., L) with 0 where ``valid`` (b, L) is False."""
    if valid is None:
        return x
    return jnp.where(valid.reshape(len(x), *(1,) * (x.ndim - 2), -1), x, 0)


def sequence_starts(seq_idx: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """(b, L) booleans: another packed sequence begins at this token. Never at the first, nor in the padding."""
    starts = jnp.pad(seq_idx[:, 1:] != seq_idx[:, :-1], ((0, 0), (1, 0)))
    return starts if valid is None else starts & valid


def varying_like(x: jax.Array, *arrays: jax.Array) -> jax.Array:
    """``x``, which under ``jax.shard_map`` counts as different on every device if one of ``arrays`` does.

    The first value of a loop must be of the kind that its body returns. The arrays are named, not read: of a sum with
    what is never chosen nothing is left when compiled.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return x
    never = jnp.zeros((), bool)
    for array in arrays:
        x = x + jnp.where(never, array[(0,) * array.ndim], 0).astype(x.dtype)
    return x


def step_size(
    delta: jax.Array, delta_bias: jax.Array | None, delta_softplus: bool, valid: jax.Array | None
) -> jax.Array:
    """Δ (b, d, L), Eq. (3) of paper 1, in the dtype of states; 0 at padded tokens."""
    step = widen(keep(delta, valid))
    if delta_bias is not None:
        step = step + widen(delta_bias)[:, None]
    if delta_softplus:
        step = jax.nn.softplus(step)
    return keep(step, valid)


def grouped(B: jax.Array, valid: jax.Array | None) -> jax.Array:
    """B or C as (b, G, N, L) in the dtype of states, 0 at padded tokens."""
    return widen(keep(B if B.ndim == 4 else B[:, None], valid))
