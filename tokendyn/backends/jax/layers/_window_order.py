"""Mamba whose convolution sees the last tokens in the order of their scores; see the torch layers' twin."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tokendyn._layers import OrderConfig, expect_order_without_gate
from tokendyn.backends.jax.layers._affine import compute_dtype
from tokendyn.backends.jax.layers._mamba import Mamba
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

    def mix(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return self.scan(x, z)

    def _convolve(self, x: jax.Array) -> jax.Array:
        assert self.conv1d is not None
        weight = self.conv1d.weight[...]
        dtype = compute_dtype(self.dtype, x, weight)
        exact = jnp.promote_types(dtype, jnp.float32)
        (b, length, d), taps = x.shape, weight.shape[-1]
        length += 1 - taps
        windows = jnp.stack([x[:, k : k + length] for k in range(taps)], 2).astype(dtype).reshape(-1, taps, d)
        order = self.token_order(windows)
        ordered = windows if order is None else order.apply(windows)
        out = (ordered.astype(exact) * weight[:, 0].T.astype(exact)).sum(1)
        if self.conv1d.bias is not None:
            out = out + self.conv1d.bias[...].astype(exact)
        return jax.nn.silu(out.astype(dtype)).reshape(b, length, d)

    def _expect_decodable(self) -> None:
        pass
