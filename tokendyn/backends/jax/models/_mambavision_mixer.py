"""The selective mixer of MambaVision."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokendyn._layers import OrderConfig
from tokendyn._mambavision import expect_mixer
from tokendyn.backends.jax.layers import S6
from tokendyn.backends.jax.layers._affine import DepthwiseConv, Linear
from tokendyn.backends.jax.layers._ordering import expect_tokens


class MambaVisionMixer(S6):
    """MambaVision's mixer: half of the channels through a selective scan, half beside it, both behind a convolution.

    ::

        x, z = in_proj(h);  x = silu(conv_x(x));  z = silu(conv_z(z));  y = S6(x);  out_proj([y, z])

    Arguments, names and shapes as of :class:`tokendyn.torch.models.MambaVisionMixer`.

    Args:
        d_model: channels of input and output.
        d_state, d_conv, expand: state size N, odd kernel of the convolutions, d_inner = expand · d_model, even.
        dt_rank: rank of S_Δ; ``"auto"`` for ⌈d_model/16⌉.
        conv_bias, bias: biases of the convolutions; of in_proj and out_proj.
        io_regime, io_form, order, dtype, param_dtype, rngs: see :class:`~tokendyn.jax.S6`; the order's gate is z.
        parity: ``"clean"``, or ``"published"``: the bias of Δ counts twice, as in the public model.

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
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        d_both = expect_mixer(d_model, d_conv, expand, parity)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(
            d_both // 2,
            d_state,
            dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
            io_regime=io_regime,
            io_form=io_form,
            order=order,
            **options,
        )
        self.d_model = d_model
        self.d_conv = d_conv
        self.parity = parity
        self.in_proj = Linear(d_model, d_both, bias=bias, **options)
        self.out_proj = Linear(d_both, d_model, bias=bias, **options)
        self.conv1d_x = DepthwiseConv(self.d_inner, d_conv, bias=conv_bias, **options)
        self.conv1d_z = DepthwiseConv(self.d_inner, d_conv, bias=conv_bias, **options)

    def step_bias(self) -> jax.Array | None:
        bias = super().step_bias()
        return bias if bias is None or self.parity == "clean" else 2 * bias

    def __call__(self, hidden_states: jax.Array) -> jax.Array:  # type: ignore[override]
        """``hidden_states`` (b, L, d_model) → (b, L, d_model)."""
        expect_tokens("MambaVisionMixer", hidden_states, self.d_model)
        side = self.d_conv // 2
        padded = jnp.pad(self.in_proj(hidden_states), ((0, 0), (side, side), (0, 0)))
        x, z = jnp.split(padded, 2, axis=-1)
        x = jax.nn.silu(self.conv1d_x(x))
        z = jax.nn.silu(self.conv1d_z(z))
        order = self.token_order(x)
        if order is None or self.order is None:
            y = self.scan(x)
        else:
            y = self.scan(order.apply(x))
            if self.order.config.restore:
                y = order.restore(y)
            elif self.order.config.reorder_gate:
                z = order.apply(z)
        return self.out_proj(jnp.concatenate([y, z], axis=-1))
