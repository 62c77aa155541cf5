"""Mamba that orders groups of channels; see the torch layers' twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig, expect_order_without_gate
from tokendyn.backends.jax.layers._mamba import Mamba, exact_dtype, expect_one_token
from tokendyn.backends.jax.layers._ordering import make_ordering
from tokendyn.errors import OptionError


class GroupOrderMamba(Mamba):
    """Mamba that gives the channels of each token to its scan in an order of that token's own; causal.

    The d_inner channels are ``groups`` of equal width, a token's groups are ordered by the score ⟨K, x_group⟩ before
    the scan, and its output is put back in the same way. So the decay rates A_d and what S_B, S_C, S_Δ make of a
    channel belong to a rank, no longer to a channel.

    Args:
        d_model, options: of :class:`Mamba`.
        groups: number of groups; a divisor of d_inner, at least 2.
        order: how the groups of a token are ordered; without ``reorder_gate``.

    Shapes:
        (b, L, d_model) → (b, L, d_model); ``order.K`` is (d_inner / groups,).
    """

    def __init__(
        self,
        d_model: int,
        *,
        groups: int,
        order: OrderConfig | str,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        check.expect_size("GroupOrderMamba", "groups", groups)
        expect_order_without_gate("GroupOrderMamba", order)
        super().__init__(d_model, param_dtype=param_dtype, rngs=rngs, **options)
        if groups < 2 or self.d_inner % groups:
            raise OptionError(
                f"GroupOrderMamba: groups is {groups}, expected a divisor of the {self.d_inner} channels of the scan, "
                f"at least 2"
            )
        self.groups = groups
        ordering = make_ordering(order, self.d_inner // groups, param_dtype=param_dtype, rngs=rngs)
        self.order = nnx.data(ordering)  # it was None, which NNX takes for no module ever

    def mix(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return self._gated(x, z, lambda ordered: (self.scan(ordered), None))[0]

    def prefill(
        self, hidden_states: jax.Array, conv_state: jax.Array, ssm_state: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, z, conv_state = self._advance(hidden_states, conv_state)

        def scan(ordered: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.scan(ordered, initial_state=ssm_state.astype(exact_dtype(x)), return_last_state=True)

        y, state = self._gated(x, z, scan)
        return self.out_proj(y), conv_state, state.astype(ssm_state.dtype)

    def step(
        self, hidden_states: jax.Array, conv_state: jax.Array, ssm_state: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        expect_one_token(hidden_states)
        x, z, conv_state = self._advance(hidden_states, conv_state)

        def update(ordered: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, state = self.update(ssm_state.astype(exact_dtype(x)), ordered[:, 0])
            return y[:, None], state

        y, state = self._gated(x, z, update)
        return self.out_proj(y), conv_state, state.astype(ssm_state.dtype)

    def _gated(
        self, x: jax.Array, z: jax.Array, scan: Callable[[jax.Array], tuple[jax.Array, Any]]
    ) -> tuple[jax.Array, Any]:
        """``scan`` of x (b, L, d_inner) with each token's groups in their order, put back, times silu(z); its state."""
        rows = x.reshape(-1, self.groups, self.d_inner // self.groups)
        assert self.order is not None
        order = self.order(rows)
        if order is None:
            y, state = scan(x)
        else:
            y, state = scan(order.apply(rows).reshape(x.shape))
            if self.order.config.restore:
                y = order.restore(y.reshape(rows.shape)).reshape(x.shape)
        return y * jax.nn.silu(z), state

    def _expect_decodable(self) -> None:
        pass
