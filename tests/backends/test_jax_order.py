"""Orders of tokens on JAX: ties, derivatives beyond the first, scores that are not finite, and Order as a pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokendyn
from tokendyn import core
from tokendyn.backends.jax.ops import _laplace, permutation_matrix

BATCH, LENGTH, CHANNELS = 2, 150, 2  # three blocks of the Laplace kernel


pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(*shape: int, seed: int) -> Any:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def tied_scores() -> np.ndarray:
    """Few values, so that groups of equal scores lie across the edges of blocks; and one row of nothing else."""
    return np.stack([np.round(2 * normal(LENGTH, seed=1)), np.full(LENGTH, 0.3)])


def sorted_in(ascending: bool, tau: float = 0.4) -> Any:
    return lambda scores, x: tokendyn.softsort(scores, x, tau=tau, ascending=ascending)


def restored_in(ascending: bool, tau: float = 0.4) -> Any:
    return lambda scores, y: tokendyn.softsort_restore(scores, y, tau=tau, ascending=ascending)


@pytest.mark.parametrize(
    ("operation", "spec", "ascending"),
    [(sorted_in, "softsort", True), (sorted_in, "softsort", False), (restored_in, "softsort_restore", True)],
)
def test_ties_across_blocks(operation: Any, spec: str, ascending: bool) -> None:
    """Values and gradients of both modes are the spec's, which is dense."""
    assert LENGTH > 2 * _laplace.BLOCK
    scores, x = tied_scores(), normal(BATCH, LENGTH, CHANNELS, seed=2)
    cotangent, tangent = normal(BATCH, LENGTH, CHANNELS, seed=3), normal(BATCH, LENGTH, seed=4)
    function = operation(ascending)

    @jax.jit
    def both_modes(scores: Any, x: Any) -> Any:
        y, pull = jax.vjp(function, scores, x)
        change = jax.jvp(lambda scores: function(scores, x), (scores,), (jnp.asarray(tangent),))[1]
        return y, pull(jnp.asarray(cotangent)), change

    y, (dscores, dx), change = both_modes(scores, x)
    options: dict[str, Any] = {"tau": 0.4, "ascending": ascending}
    np.testing.assert_allclose(y, getattr(core, spec)(scores, x, **options), rtol=1e-12, atol=1e-13)
    wanted = list(getattr(core, f"{spec}_vjp")(cotangent, scores, x, **options).values())
    np.testing.assert_allclose(dscores, wanted[0], rtol=0, atol=1e-12 * np.abs(wanted[0]).max())
    np.testing.assert_allclose(dx, wanted[1], rtol=0, atol=1e-12 * np.abs(wanted[1]).max())
    assert not np.asarray(dscores)[1].any()  # all scores equal
    np.testing.assert_allclose(np.vdot(cotangent, change), np.vdot(wanted[0], tangent), rtol=1e-11)


def test_second_derivatives() -> None:
    """Forward over reverse against differences of the gradient, where no scores are equal."""
    length = 70
    scores, x = jnp.asarray(normal(1, length, seed=5)), jnp.asarray(normal(1, length, CHANNELS, seed=6))
    direction = jnp.asarray(normal(1, length, seed=7))
    gradient = jax.jit(jax.grad(lambda s: (tokendyn.softsort(s, x, tau=0.5) ** 2).sum()))
    curvature = jax.jit(lambda s: jax.jvp(gradient, (s,), (direction,))[1])(scores)
    h = 1e-6
    quotient = (gradient(scores + h * direction) - gradient(scores - h * direction)) / (2 * h)
    np.testing.assert_allclose(curvature, quotient, rtol=0, atol=1e-7 * float(jnp.abs(quotient).max()))


@pytest.mark.parametrize("power", [1, 2, 0.5, 3])
def test_derivatives_of_every_power_vanish_at_ties(power: float) -> None:
    """Equal scores are pulled neither way: |·|^power has derivative 0 at 0, also where it has none (power < 1)."""
    scores = jnp.asarray([[0.5, 0.5, 0.5]])
    x = jnp.asarray(normal(1, 3, 2, seed=8))
    gradient = jax.grad(lambda s: (tokendyn.softsort(s, x, power=power) ** 3).sum())(scores)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("ascending", [True, False])
def test_hard_order_is_stable(ascending: bool) -> None:
    scores = np.where(tied_scores() == 0, -0.0, tied_scores())
    scores[:, ::3] = np.abs(scores[:, ::3])  # both zeros are one score
    np.testing.assert_array_equal(
        tokendyn.hard_order(jnp.asarray(scores), ascending=ascending), core.hard_order(scores, ascending=ascending)
    )


@pytest.mark.parametrize(("worst", "dtype"), [(np.nan, "float32"), (np.inf, "float32"), (-np.inf, "float64")])
@pytest.mark.parametrize("power", [1, 2])
def test_scores_that_are_not_finite_give_nan_under_jit(worst: float, dtype: str, power: float) -> None:
    """Nobody can look at a tracer's values, so no error; but never a wrong order."""
    scores, x = (jnp.asarray(v, dtype) for v in (normal(2, 5, seed=9), normal(2, 5, 3, seed=10)))
    scores = scores.at[1, 2].set(worst)

    @jax.jit
    def every(scores: Any, x: Any) -> Any:
        hard = tokendyn.token_order(scores, "hard")
        return (
            tokendyn.softsort(scores, x, power=power),
            tokendyn.softsort_restore(scores, x, power=power),
            tokendyn.softsort_matrix(scores, power=power),
            tokendyn.effective_tokens(scores, power=power),
            hard.apply(x),
            hard.restore(x),
            hard.matrix(),
        )

    for out in every(scores, x):
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()


@pytest.mark.parametrize("method", ["softsort", "hard", "straight_through"])
def test_an_order_crosses_the_boundaries_of_transformations(method: str) -> None:
    """Made within jit or vmap and returned; given to jit, vmap and grad; used within a scan."""
    scores, x = jnp.asarray(normal(3, 2, 7, seed=11)), jnp.asarray(normal(3, 2, 7, 4, seed=12))

    def made(scores: Any) -> Any:
        return tokendyn.token_order(scores, method, tau=0.2, ascending=False)

    def used(order: Any, x: Any) -> Any:
        return order.restore(order.apply(x) ** 2)

    wanted = used(made(scores[0]), x[0])

    order = jax.jit(made)(scores[0])
    assert isinstance(order, tokendyn.Order)
    assert (order.method, order.tau, order.power, order.ascending) == (method, 0.2, 1, False)
    np.testing.assert_allclose(jax.jit(used)(order, x[0]), wanted, rtol=1e-12)

    @jax.jit
    def mapped(scores: Any, x: Any) -> Any:
        orders = jax.vmap(made)(scores)
        return orders, jax.vmap(used)(orders, x), jax.lax.scan(lambda c, v: (c, used(*v)), None, (orders, x))[1]

    orders, by_map, by_scan = mapped(scores, x)
    assert orders.indices.shape == scores.shape
    np.testing.assert_allclose(by_map[0], wanted, rtol=1e-12)
    np.testing.assert_allclose(by_scan, by_map, rtol=1e-12)

    @jax.jit
    def gradients(order: Any, x: Any) -> Any:
        through = jax.grad(lambda order: used(order, x).sum(), allow_int=True)(order)
        return through.scores, jax.grad(lambda scores: used(made(scores), x).sum())(order.scores)

    given, direct = gradients(order, x[0])
    np.testing.assert_allclose(given, direct, rtol=1e-12, atol=1e-14)
    assert bool(direct.any()) == (method != "hard")


def test_permutations_undo_each_other() -> None:
    """Also of tokens that are integers (positions), and as a matrix."""
    indices = jnp.asarray(np.random.default_rng(13).permuted(np.tile(np.arange(7), (2, 1)), axis=1))
    for x in (jnp.asarray(normal(2, 7, 3, seed=14)), jnp.arange(42).reshape(2, 7, 3)):
        taken = tokendyn.take_tokens(x, indices)
        assert taken.dtype == x.dtype
        np.testing.assert_array_equal(taken[1, 2], x[1, indices[1, 2]])
        np.testing.assert_array_equal(tokendyn.put_tokens(taken, indices), x)
    x = jnp.asarray(normal(2, 7, 3, seed=14))
    np.testing.assert_array_equal(permutation_matrix(indices, x) @ x, tokendyn.take_tokens(x, indices))


@pytest.mark.parametrize("scores_dtype", ["float32", "float64", "bfloat16"])
def test_scores_and_tokens_of_different_dtypes(scores_dtype: str) -> None:
    """The result has the tokens' dtype and is as exact as the scores allow."""
    scores = jnp.asarray(normal(1, 9, seed=15)).astype(scores_dtype)
    x = normal(1, 9, 2, seed=16)
    for dtype in ("float64", "float32", "bfloat16"):
        tokens = jnp.asarray(x).astype(dtype)
        y = tokendyn.softsort(scores, tokens, tau=0.3)
        assert y.dtype == dtype
        wanted = core.softsort(np.asarray(scores, np.float64), np.asarray(tokens, np.float64), tau=0.3)
        exact = {"float64": 1e-14, "float32": 3e-7, "bfloat16": 5e-3}[dtype]
        np.testing.assert_allclose(np.asarray(y, np.float64), wanted, atol=exact * np.abs(wanted).max())
