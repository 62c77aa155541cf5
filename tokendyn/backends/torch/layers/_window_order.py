"""Mamba whose convolution sees the last tokens in the order of their scores."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tokendyn._layers import OrderConfig, expect_order_without_gate
from tokendyn.backends.torch.layers._mamba import Mamba
from tokendyn.backends.torch.layers._packing import by_sequence
from tokendyn.errors import OptionError


class WindowOrderMamba(Mamba):
    """Mamba whose convolution takes each token and the d_conv - 1 before it in the order of their scores; causal.

    ::

        x_l ← silu(Σ_i w_i (P_l [x_{l-d_conv+1}, ..., x_l])_i + bias)

    P_l is an order of these tokens alone, so of the prefix. Before the first token there are zeros, of score 0.

    Args:
        d_model, options: of :class:`Mamba`; ``d_conv`` of at least 2.
        order: how a window is ordered, by the score (14) of the tokens before the convolution; without
            ``reorder_gate``. ``restore`` has no meaning here: a window is summed up.

    Shapes:
        (b, L, d_model) → (b, L, d_model).

    Cost:
        d_conv times the memory of the convolution's input.
    """

    def __init__(self, d_model: int, *, order: OrderConfig | str, **options: Any) -> None:
        expect_order_without_gate("WindowOrderMamba", order)
        super().__init__(d_model, order=order, **options)
        if self.d_conv is None or self.d_conv < 2:
            raise OptionError(f"WindowOrderMamba: d_conv is {self.d_conv}, expected a convolution of 2 tokens or more")

    def mix(self, x: Tensor, z: Tensor, *, seq_idx: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        return self.scan(x, z, seq_idx=seq_idx, lengths=lengths)

    def convolve(self, x: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        if seq_idx is not None:
            return by_sequence(self.convolve, x, seq_idx)
        width = self.conv1d.weight.shape[-1]  # type: ignore[union-attr]
        windows = F.pad(x, (0, 0, width - 1, 0)).unfold(1, width, 1)  # (b, L, d_inner, d_conv)
        return self._sum_windows(windows.flatten(0, 1).mT).unflatten(0, x.shape[:2])

    def convolve_next(self, x: Tensor, conv_state: Tensor) -> Tensor:
        conv_state.copy_(F.pad(conv_state[..., 1:], (0, 1)))
        conv_state[..., -1] = x[:, 0]
        return self._sum_windows(conv_state.to(x.dtype).mT).unsqueeze(1)

    def _sum_windows(self, windows: Tensor) -> Tensor:
        """(n, d_conv, d_inner) → (n, d_inner)."""
        assert self.conv1d is not None
        order = self.token_order(windows)
        ordered = windows if order is None else order.apply(windows)
        out = (ordered * self.conv1d.weight.squeeze(1).mT.to(windows.dtype)).sum(1)
        return F.silu(out if self.conv1d.bias is None else out + self.conv1d.bias.to(windows.dtype))

    def _expect_decodable(self) -> None:
        pass
