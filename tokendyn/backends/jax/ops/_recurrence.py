"""A selective scan around its recurrence: everything that engines share.

What surrounds the recurrence (step size, padding, groups, skip, gate) is elementwise, and XLA fuses and
differentiates it; an engine is a function for the recurrence alone.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp

from tokendyn.backends.jax.ops._arguments import (
    grouped,
    keep,
    sequence_starts,
    step_size,
    valid_tokens,
    varying_like,
    widen,
)


class Recurrence(Protocol):
    """``h_l = exp(Δ_l A) h_{l-1} + B_l Δ_l u_l``, ``y_l = ⟨C_l, h_l⟩``: Eq. (1) of paper 1."""

    def __call__(
        self,
        step: jax.Array,
        u: jax.Array,
        A: jax.Array,
        B: jax.Array,
        C: jax.Array,
        h: jax.Array,
        starts: jax.Array | None,
        /,
    ) -> tuple[jax.Array, jax.Array]:
        """y (b, G, c, L) and the last state, all in the dtype of states.

        Args:
            step, u: (b, G, c, L), G groups of c channels.
            A: (G, N, c), or (G, 1, c) in the scalar form.
            B, C: (b, G, N, L).
            h: (b, G, N, c).
            starts: (b, L) booleans, reset the state before this token; or None.
        """
        ...


def scan_by(
    recurrence: Recurrence,
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
    seq_idx: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output (b, d, L) in the dtype of u, and the last state (b, d, N) in the dtype of states."""
    valid = valid_tokens(lengths, u.shape[-1])
    step = step_size(delta, delta_bias, delta_softplus, valid)
    x = widen(keep(u, valid))
    B, C = grouped(B, valid), grouped(C, valid)
    batch, groups, state, _ = B.shape
    channels = u.shape[1] // groups
    if initial_state is None:
        h = jnp.zeros((batch, groups, state, channels), step.dtype)
    else:
        h = widen(initial_state).reshape(batch, groups, channels, state).mT
    y, h = recurrence(
        step.reshape(batch, groups, channels, -1),
        x.reshape(batch, groups, channels, -1),
        widen(A).reshape(groups, channels, -1).mT,
        B,
        C,
        varying_like(h, step, x, A, B),
        None if seq_idx is None else sequence_starts(seq_idx, valid),
    )
    y = y.reshape(x.shape)
    if D is not None:
        y = y + widen(D)[:, None] * x
    if z is not None:
        y = y * jax.nn.silu(widen(keep(z, valid)))
    return keep(y, valid).astype(u.dtype), h.mT.reshape(batch, groups * channels, state)
