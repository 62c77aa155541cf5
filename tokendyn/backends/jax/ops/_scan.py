"""Selective scan on JAX arrays: chooses the engine that runs it."""

from __future__ import annotations

from typing import Any

import jax

from tokendyn.backends.jax.ops._engines import choose


def selective_scan(
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
    return_last_state: bool = False,
    seq_idx: jax.Array | None = None,
    lengths: jax.Array | None = None,
    engine: str = "auto",
) -> Any:
    """See :func:`tokendyn.selective_scan`."""
    arguments = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "delta_softplus": delta_softplus,
        "initial_state": initial_state,
        "seq_idx": seq_idx,
        "lengths": lengths,
    }
    y, last_state = choose(engine, arguments).run(**arguments)
    return (y, last_state) if return_last_state else y
