"""One step of the selective scan on JAX arrays."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tokendyn._checks import expect_choice
from tokendyn.backends.jax.ops._arguments import EXACT, widen

ENGINES = ("auto", "xla")


def selective_state_update(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = False,
    *,
    engine: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """See :func:`tokendyn.selective_state_update`."""
    expect_choice("selective_state_update on JAX", "engine", engine, ENGINES)
    return _run(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


@functools.partial(jax.jit, static_argnames="dt_softplus")
def _run(
    state: jax.Array,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    dt_softplus: bool,
) -> tuple[jax.Array, jax.Array]:
    batch, channels, size = state.shape
    groups = 1 if B.ndim == 2 else B.shape[1]
    u, step = widen(x), widen(dt)
    if dt_bias is not None:
        step = step + widen(dt_bias)
    if dt_softplus:
        step = jax.nn.softplus(step)

    def by_group(v: jax.Array, *last: int) -> jax.Array:
        return v.reshape(*v.shape[:-1], groups, channels // groups, *last)

    B, C = (widen(v).reshape(batch, groups, size) for v in (B, C))
    decay = jnp.exp(by_group(step, 1) * widen(A).reshape(groups, channels // groups, -1))
    h = decay * widen(state).reshape(batch, groups, -1, size) + by_group(step * u, 1) * B[:, :, None]
    y = jnp.einsum("bgcn,bgn->bgc", h, C, precision=EXACT).reshape(batch, channels)
    if D is not None:
        y = y + widen(D) * u
    if z is not None:
        y = y * jax.nn.silu(widen(z))
    return y.astype(x.dtype), h.reshape(state.shape).astype(state.dtype)
