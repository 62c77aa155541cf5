"""Token reordering around any sequence mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig, expect_order_without_gate
from tokendyn.backends.jax.layers._ordering import expect_tokens, make_ordering


class TokenReorder(nnx.Module):
    """Any sequence mixer with its tokens reordered before and put back after: score ⟨K, x⟩, order, mixer, restore.

    For mixers without a step size, where the score (14) has no S_Δ. A causal mixer inside is causal no longer.

    Args:
        mixer: module mapping (b, L, D) to (b, L, D).
        d_model: the channels D.
        order: an :class:`~tokendyn.OrderConfig`, ``"published"`` or a method's name. ``reorder_gate`` has no meaning
            here and is refused.
        param_dtype: of ``order.K`` (D,).
        rngs: the stream ``params``; ``order`` for random orders.

    Raises:
        OptionError: an unknown order, none, or one with ``reorder_gate``.

    Source:
        Paper 1, Section 5.2 and Appendix D.1.
    """

    def __init__(
        self,
        mixer: Callable[..., Any],
        d_model: int,
        order: OrderConfig | str = "softsort",
        *,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check.expect_size("TokenReorder", "d_model", d_model)
        expect_order_without_gate("TokenReorder", order)
        ordering = make_ordering(order, d_model, param_dtype=param_dtype, rngs=rngs)
        assert ordering is not None
        self.d_model = d_model
        self.mixer = mixer
        self.order = ordering

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """``x`` (b, L, D) → (b, L, D); ``args`` and ``kwargs`` go to the mixer as they are.

        Raises:
            ShapeError: x has another number of axes or channels.
        """
        expect_tokens("TokenReorder", x, self.d_model)
        order = self.order(x)
        if order is None:
            return self.mixer(x, *args, **kwargs)
        y = self.mixer(order.apply(x), *args, **kwargs)
        return order.restore(y) if self.order.config.restore else y
