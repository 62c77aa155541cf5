"""Input-output projections with a spectrum of chosen signs (LDLᵀ)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tokendyn.backends.jax.ops._arguments import widen

#: Added to softplus(diagonal) by the published code, and by its variant with equal scales.
_OFFSET = 0.7


@functools.partial(jax.jit, static_argnames=("regime", "form"))
def io_projections(
    weight_B: jax.Array,
    weight_C: jax.Array | None = None,
    diagonal: jax.Array | None = None,
    *,
    regime: str = "free",
    form: str = "paper",
) -> tuple[jax.Array, jax.Array]:
    """See :func:`tokendyn.io_projections`."""
    if weight_C is not None:
        return weight_B, weight_C
    assert diagonal is not None
    n = diagonal.shape[0]
    q = jax.nn.softplus(widen(diagonal))
    if form == "scale_matched" or (form == "published_code" and regime != "mixed"):
        q = q + _OFFSET
    if regime == "negative":
        q = -q
    elif regime == "mixed":
        q = jnp.where(jnp.arange(n) < (n + 1) // 2, q, -q)
    U = jnp.triu(widen(weight_B), 1) + jnp.eye(*weight_B.shape, dtype=q.dtype)
    return (q[:, None] * U).astype(weight_B.dtype), U.astype(weight_B.dtype)
