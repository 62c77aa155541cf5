"""The selective mixer of MambaVision."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tokendyn._layers import OrderConfig
from tokendyn._mambavision import expect_mixer
from tokendyn.backends.torch.layers import S6
from tokendyn.backends.torch.layers._ordering import expect_tokens
from tokendyn.backends.torch.ops._convolution import convolve_silu


class MambaVisionMixer(S6):
    """MambaVision's mixer: half of the channels through a selective scan, half beside it, both behind a convolution.

    ::

        x, z = in_proj(h);  x = silu(conv_x(x));  z = silu(conv_z(z));  y = S6(x);  out_proj([y, z])

    The convolutions are centred, not causal, and each half has d_inner / 2 channels.

    Args:
        d_model: channels of input and output.
        d_state, d_conv, expand: state size N, odd kernel of the convolutions, d_inner = expand · d_model, even.
        dt_rank: rank of S_Δ; ``"auto"`` for ⌈d_model/16⌉.
        conv_bias, bias: biases of the convolutions; of in_proj and out_proj.
        io_regime, io_form, order: see :class:`~tokendyn.torch.S6`; the order's gate is z.
        parity: ``"clean"``, or ``"published"``: the bias of Δ counts twice, as in the public model, where the
            projection adds it and the scan adds it again. So a public state in a clean mixer gives the public outputs
            once ``dt_proj.bias`` is doubled.

    Shapes:
        (b, L, d_model) → (b, L, d_model).

    Raises:
        OptionError, RegimeError: an unknown option, or a regime that the others exclude.

    Source:
        Hatamizadeh and Kautz (2024), Section 3.3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 8,
        d_conv: int = 3,
        expand: float = 1,
        *,
        dt_rank: int | str = "auto",
        conv_bias: bool = False,
        bias: bool = False,
        io_regime: str = "free",
        io_form: str = "paper",
        order: OrderConfig | str | None = None,
        parity: str = "clean",
    ) -> None:
        d_both = expect_mixer(d_model, d_conv, expand, parity)
        super().__init__(
            d_both // 2,
            d_state,
            dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
            io_regime=io_regime,
            io_form=io_form,
            order=order,
        )
        self.d_model = d_model
        self.parity = parity
        self.in_proj = nn.Linear(d_model, d_both, bias=bias)
        self.out_proj = nn.Linear(d_both, d_model, bias=bias)
        self.conv1d_x = self._convolution(d_conv, conv_bias)
        self.conv1d_z = self._convolution(d_conv, conv_bias)

    def _convolution(self, kernel: int, bias: bool) -> nn.Conv1d:
        return nn.Conv1d(self.d_inner, self.d_inner, kernel, groups=self.d_inner, padding=kernel // 2, bias=bias)

    def step_bias(self) -> Tensor | None:
        bias = super().step_bias()
        return bias if bias is None or self.parity == "clean" else 2 * bias

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """``hidden_states`` (b, L, d_model) → (b, L, d_model)."""
        expect_tokens("MambaVisionMixer", hidden_states, self.d_model, self.dt_proj.weight)
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        centred = self.conv1d_x.kernel_size[0] // 2
        x = convolve_silu(x, self.conv1d_x.weight, self.conv1d_x.bias, centred)
        z = convolve_silu(z, self.conv1d_z.weight, self.conv1d_z.bias, centred)
        order = self.token_order(x)
        if order is None or self.order is None:
            y = self.scan(x)
        else:
            y = self.scan(order.apply(x))
            if self.order.config.restore:
                y = order.restore(y)
            elif self.order.config.reorder_gate:
                z = order.apply(z)
        return self.out_proj(torch.cat([y, z], dim=-1))
