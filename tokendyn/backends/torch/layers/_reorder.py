"""Token reordering around any sequence mixer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig, expect_order_without_gate
from tokendyn.backends.torch.layers._ordering import expect_tokens, make_ordering
from tokendyn.errors import OptionError


class TokenReorder(nn.Module):
    """Any sequence mixer with its tokens reordered before and put back after: score ⟨K, x⟩, order, mixer, restore.

    For mixers without a step size, where the score (14) has no S_Δ (H3, attention). A causal mixer inside is causal no
    longer: earlier outputs depend on later tokens.

    Args:
        mixer: module mapping (b, L, D) to (b, L, D).
        d_model: the channels D.
        order: an :class:`~tokendyn.OrderConfig`, ``"published"`` or a method's name. ``reorder_gate`` has no meaning
            here and is refused.
        device, dtype: of ``order.K`` (D,).

    Raises:
        OptionError: an unknown order, none, or one with ``reorder_gate``.

    Source:
        Paper 1, Section 5.2 and Appendix D.1.
    """

    def __init__(
        self,
        mixer: nn.Module,
        d_model: int,
        order: OrderConfig | str = "softsort",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.expect_size("TokenReorder", "d_model", d_model)
        expect_order_without_gate("TokenReorder", order)
        ordering = make_ordering(order, d_model, device=device, dtype=dtype)
        assert ordering is not None
        self.d_model = d_model
        self.mixer = mixer
        self.order = ordering

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` (b, L, D) → (b, L, D); ``args`` and ``kwargs`` go to the mixer as they are.

        Raises:
            ShapeError: x has another number of axes or channels.
            OptionError: ``seq_idx``, packed sequences, which the order would mix.
        """
        expect_tokens("TokenReorder", x, self.d_model)
        if kwargs.get("seq_idx") is not None:
            raise OptionError("TokenReorder: seq_idx was given, but it would sort tokens across sequences; unpack them")
        order = self.order(x, lengths=kwargs.get("lengths"))
        if order is None:
            return self.mixer(x, *args, **kwargs)
        y = self.mixer(order.apply(x), *args, **kwargs)
        return order.restore(y) if self.order.config.restore else y
