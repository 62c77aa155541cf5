"""The Mamba block."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig
from tokendyn.backends.jax.layers._affine import DepthwiseConv, Linear
from tokendyn.backends.jax.layers._ordering import expect_tokens
from tokendyn.backends.jax.layers._s6 import S6
from tokendyn.errors import OptionError, ShapeError


class Mamba(S6):
    """Mamba block: a gated selective layer behind a short causal convolution.

    ::

        x, z = in_proj(h);  x = silu(conv1d(x));  y = S6(x) ∘ silu(z);  out_proj(y)

    Parameters have the names and shapes of :class:`tokendyn.torch.Mamba` and so of mamba-ssm.

    Args:
        d_model: channels of input and output.
        d_state, d_conv, expand: state size N, kernel of the convolution (None: no convolution), d_inner = expand ·
            d_model.
        dt_rank: rank of S_Δ; ``"auto"`` for ⌈d_model/16⌉, None for a dense one.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor, scalar_A, io_regime, io_form, dtype, param_dtype, rngs: see
            :class:`S6`.
        conv_bias, bias: biases of the convolution; of in_proj and out_proj.
        order: see :class:`tokendyn.torch.Mamba`; a block that orders its tokens is **not causal**.

    Shapes:
        (b, L, d_model) → (b, L, d_model).

    Raises:
        OptionError, RegimeError, ShapeError: an unknown option, a regime that the others exclude, an input that does
            not fit.

    Source:
        Gu and Dao (2023), Figure 3; paper 1, Section 5.2 for the order.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int | None = 4,
        expand: float = 2,
        dt_rank: int | str | None = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        scalar_A: bool = False,
        io_regime: str = "free",
        io_form: str = "paper",
        order: OrderConfig | str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check.expect_size("Mamba", "d_model", d_model)
        if d_conv is not None:
            check.expect_size("Mamba", "d_conv", d_conv)
        d_inner = int(expand * d_model)
        super().__init__(
            d_inner,
            d_state,
            dt_rank=math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            scalar_A=scalar_A,
            io_regime=io_regime,
            io_form=io_form,
            order=order,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.d_model = d_model
        self.d_conv = d_conv
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.in_proj = Linear(d_model, 2 * d_inner, bias=bias, **options)
        self.conv1d = None if d_conv is None else DepthwiseConv(d_inner, d_conv, bias=conv_bias, **options)
        self.out_proj = Linear(d_inner, d_model, bias=bias, **options)

    def __call__(self, hidden_states: jax.Array) -> jax.Array:  # type: ignore[override]
        """``hidden_states`` (b, L, d_model) → (b, L, d_model)."""
        expect_tokens("Mamba", hidden_states, self.d_model)
        x, z = jnp.split(self.in_proj(hidden_states), 2, axis=-1)
        x = self._convolve(jnp.pad(x, ((0, 0), ((self.d_conv or 1) - 1, 0), (0, 0))))
        return self.out_proj(self.mix(x, z))

    def mix(self, x: jax.Array, z: jax.Array) -> jax.Array:
        """Scan of the convolved tokens x (b, L, d_inner) in the layer's order, gated by z (b, L, d_inner)."""
        order = self.token_order(x)
        if order is None or self.order is None:
            return self.scan(x, z)
        x = order.apply(x)
        if self.order.config.restore:
            return order.restore(self.scan(x)) * jax.nn.silu(z)
        if self.order.config.reorder_gate:
            z = order.apply(z)
        return self.scan(x, z)

    def allocate_inference_cache(self, batch_size: int, dtype: Any = None) -> tuple[jax.Array, ...]:
        """Empty states for decoding: (b, d_inner, d_conv) of the convolution and (b, d_inner, N) of the scan.

        b is ``batch_size``. In ``dtype``, by default that of the computation; the scan's state in float32 at least.
        They do not grow.
        """
        dtype = dtype or self.dtype or self.in_proj.weight.dtype
        return (
            jnp.zeros((batch_size, self.d_inner, self.d_conv or 0), dtype),
            jnp.zeros((batch_size, self.d_inner, self.d_state), jnp.promote_types(dtype, jnp.float32)),
        )

    def prefill(
        self, hidden_states: jax.Array, conv_state: jax.Array, ssm_state: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens ``hidden_states`` (b, L, d_model) that follow those of ``conv_state`` and ``ssm_state``.

        Returns:
            (b, L, d_model), and the two states after them.
        """
        x, z, conv_state = self._advance(hidden_states, conv_state)
        y, state = self.scan(x, z, initial_state=ssm_state.astype(exact_dtype(x)), return_last_state=True)
        return self.out_proj(y), conv_state, state.astype(ssm_state.dtype)

    def step(
        self, hidden_states: jax.Array, conv_state: jax.Array, ssm_state: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One token: ``hidden_states`` (b, 1, d_model), ``conv_state`` and ``ssm_state`` → the same after it."""
        expect_one_token(hidden_states)
        x, z, conv_state = self._advance(hidden_states, conv_state)
        y, state = self.update(ssm_state.astype(exact_dtype(x)), x[:, 0], z[:, 0])
        return self.out_proj(y[:, None]), conv_state, state.astype(ssm_state.dtype)

    def _advance(self, hidden_states: jax.Array, conv_state: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Convolved tokens, gate, and the last d_conv tokens before the convolution."""
        self._expect_decodable()
        expect_tokens("Mamba", hidden_states, self.d_model)
        x, z = jnp.split(self.in_proj(hidden_states), 2, axis=-1)
        if self.d_conv is None:
            return self._convolve(x), z, conv_state
        seen = jnp.concatenate([conv_state.mT.astype(x.dtype), x], axis=1)
        return self._convolve(seen[:, 1:]), z, seen[:, -self.d_conv :].mT.astype(conv_state.dtype)

    def _convolve(self, x: jax.Array) -> jax.Array:
        """Tokens behind the d_conv - 1 before them → tokens, each mixed with those before it."""
        return jax.nn.silu(x if self.conv1d is None else self.conv1d(x))

    def _expect_decodable(self) -> None:
        if self.order is not None:
            raise OptionError(
                "Mamba: a block with order= was asked to continue from states; an order needs the whole sequence and "
                "cannot be decoded token by token, call the block on all of it"
            )


def expect_one_token(hidden_states: jax.Array) -> None:
    """``hidden_states`` is (b, 1, D)."""
    if hidden_states.shape[1] != 1:
        raise ShapeError(
            f"Mamba.step: hidden_states has shape {tuple(hidden_states.shape)}, expected one token (b, 1, D); "
            f"call prefill for several"
        )


def exact_dtype(x: jax.Array) -> Any:
    """The dtype of the scan's state beside activations x."""
    return jnp.promote_types(x.dtype, jnp.float32)
