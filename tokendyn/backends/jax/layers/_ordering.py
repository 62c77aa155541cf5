"""How a mixer orders its tokens: one module a way, found by ``OrderConfig.method``; see the torch layers' twin.

A mixer asks ``self.order(x, *s_delta)`` for an :class:`~tokendyn.Order` (or None: leave the tokens as they are).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokendyn import _checks as check
from tokendyn import _operations as ops
from tokendyn._layers import OrderConfig
from tokendyn._order import Order


class TokenOrdering(nnx.Module):
    """Base of all ways to order tokens; ``__call__(x, *s_delta) -> Order | None``.

    What ``__call__`` takes:

    - x: (b, L, d) the tokens to be ordered.
    - s_delta: factors of S_Δ, left to right, the last one (·, d); none for mixers without a step size.

    Attributes:
        config: the :class:`~tokendyn.OrderConfig`; mixers read ``restore`` and ``reorder_gate`` from it.
    """

    def __init__(self, config: OrderConfig) -> None:
        self.config = config

    def __call__(self, x: jax.Array, *s_delta: jax.Array) -> Order | None:
        """The order of the tokens ``x``, by ``s_delta`` where scores are made of it; see the class."""
        raise NotImplementedError


class ScoreOrdering(TokenOrdering):
    """By the importance score ``s_l = (S_Δ x_l)ᵀ K``, computed as ``⟨(Kᵀ S_Δ)ᵀ, x_l⟩``, in float32 at least.

    Args:
        config: the order wanted.
        width: length of K, the number of rows of S_Δ.

    Attributes:
        K: (width,) the learnable direction, drawn from a normal of deviation 0.02 like the published one.
        tau: temperature, ``config.tau`` at first; a Python number, so a compiled step is compiled anew for each.

    Source:
        Paper 1, Eq. (14).
    """

    def __init__(self, config: OrderConfig, width: int, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        super().__init__(config)
        self.tau = config.tau
        self.K = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,), param_dtype))

    def __call__(self, x: jax.Array, *s_delta: jax.Array) -> Order:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        direction = self.K[...].astype(dtype)
        for factor in s_delta:
            direction = direction @ factor.astype(dtype)
        scores = ops.importance_score(x.astype(dtype), None, direction)
        if self.config.normalize:
            scores = unit_deviation(scores)
        return ops.token_order(
            scores, self.config.method, tau=self.tau, power=self.config.power, ascending=self.config.ascending
        )


class RandomOrdering(TokenOrdering):
    """A fresh uniform permutation of every sequence in every training step (stream ``order``); none in evaluation."""

    def __init__(self, config: OrderConfig, width: int, *, rngs: nnx.Rngs, **_: Any) -> None:
        super().__init__(config)
        self.deterministic = False
        self.rngs = rngs.order.fork()

    def __call__(self, x: jax.Array, *s_delta: jax.Array) -> Order | None:
        if self.deterministic:
            return None
        return ops.token_order(jax.random.uniform(self.rngs(), x.shape[:2]), "hard")


class ReversedOrdering(TokenOrdering):
    """Last token first."""

    def __init__(self, config: OrderConfig, width: int, **_: Any) -> None:
        super().__init__(config)

    def __call__(self, x: jax.Array, *s_delta: jax.Array) -> Order:
        places = jnp.arange(x.shape[1], dtype=jnp.float32)
        return ops.token_order(jnp.broadcast_to(places, x.shape[:2]), "hard", ascending=False)


class MeanOrdering(TokenOrdering):
    """Every place holds the mean of all tokens: SoftSort of equal scores, whose matrix is 1/L throughout."""

    def __init__(self, config: OrderConfig, width: int, **_: Any) -> None:
        super().__init__(config)

    def __call__(self, x: jax.Array, *s_delta: jax.Array) -> Order:
        return ops.token_order(jnp.zeros(x.shape[:2], jnp.promote_types(x.dtype, jnp.float32)), "softsort")


METHODS: dict[str, type[TokenOrdering]] = {
    "softsort": ScoreOrdering,
    "hard": ScoreOrdering,
    "straight_through": ScoreOrdering,
    "random": RandomOrdering,
    "reversed": ReversedOrdering,
    "mean": MeanOrdering,
}


def make_ordering(
    order: OrderConfig | str | None, width: int, *, param_dtype: Any, rngs: nnx.Rngs
) -> TokenOrdering | None:
    """The module for a layer's ``order=`` argument; None for None. ``width``: rows of S_Δ."""
    config = OrderConfig.of(order)
    if config is None:
        return None
    return METHODS[config.method](config, width, param_dtype=param_dtype, rngs=rngs)  # type: ignore[call-arg]


def unit_deviation(scores: jax.Array) -> jax.Array:
    """Scores (b, L) moved to mean 0 and standard deviation 1 in every sequence.

    Where a sequence's scores differ by no more than rounding, as on a uniform image, they are centred only: no noise is
    blown up into an order, and value and gradient stay finite.
    """
    centred = scores - scores.mean(1, keepdims=True)
    variance = jnp.square(centred).mean(1, keepdims=True)
    rounding = 8 * jnp.finfo(scores.dtype).eps * jnp.abs(scores).max(1, keepdims=True)
    spread = jax.lax.stop_gradient(variance > jnp.square(rounding))
    # The inner `where` keeps the square root's infinite derivative at 0 out of the gradient.
    return centred / jnp.sqrt(jnp.where(spread, variance, 1))


def expect_tokens(layer: str, x: jax.Array, width: int) -> None:
    """``x`` is (b, L, D) with D = ``width``."""
    shapes = check.Shapes(layer)
    shapes.sizes["D"] = width
    shapes.expect("x", x, "b L D")
