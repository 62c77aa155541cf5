"""Mamba that orders groups of channels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig, expect_order_without_gate
from tokendyn._order import Order
from tokendyn.backends.torch.layers._mamba import Mamba
from tokendyn.backends.torch.layers._ordering import make_ordering
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

    def __init__(self, d_model: int, *, groups: int, order: OrderConfig | str, **options: Any) -> None:
        check.expect_size("GroupOrderMamba", "groups", groups)
        expect_order_without_gate("GroupOrderMamba", order)
        super().__init__(d_model, **options)
        if groups < 2 or self.d_inner % groups:
            raise OptionError(
                f"GroupOrderMamba: groups is {groups}, expected a divisor of the {self.d_inner} channels of the scan, "
                f"at least 2"
            )
        self.groups = groups
        weight = self.in_proj.weight
        self.order = make_ordering(order, self.d_inner // groups, device=weight.device, dtype=weight.dtype)

    def mix(self, x: Tensor, z: Tensor, *, seq_idx: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        return self._gated(x, z, lambda ordered: self.scan(ordered, seq_idx=seq_idx, lengths=lengths))

    def prefill(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A whole prompt (b, L, d_model) → (b, L, d_model), from the beginning; the states are set and returned."""
        x, z = self._convolved_prompt(hidden_states, conv_state)

        def scan(ordered: Tensor) -> Tensor:
            y, state = self.scan(ordered, return_last_state=True)
            ssm_state.copy_(state)
            return y

        return self.out_proj(self._gated(x, z, scan)), conv_state, ssm_state

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token (b, 1, d_model) → (b, 1, d_model); the states are advanced in place and returned."""
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)

        def update(ordered: Tensor) -> Tensor:
            y, state = self.update(ssm_state, ordered[:, 0])
            ssm_state.copy_(state)
            return y.unsqueeze(1)

        return self.out_proj(self._gated(self.convolve_next(x, conv_state), z, update)), conv_state, ssm_state

    def _gated(self, x: Tensor, z: Tensor, scan: Any) -> Tensor:
        """``scan`` of x (b, L, d_inner) with each token's groups in their order, put back, times silu(z)."""
        rows = x.reshape(-1, self.groups, self.d_inner // self.groups)
        assert self.order is not None
        order: Order | None = self.order(rows)
        if order is None:
            return scan(x) * F.silu(z)
        y: Tensor = scan(order.apply(rows).reshape(x.shape))
        if self.order.config.restore:
            y = order.restore(y.reshape(rows.shape)).reshape(x.shape)
        return y * F.silu(z)

    def _expect_decodable(self) -> None:
        pass
