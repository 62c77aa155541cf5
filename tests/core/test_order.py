"""The spec of the orders of tokens: scores, soft and hard orders, their inverses and their reverse passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tokendyn import core

from .gradients import check_transpose, check_vjp


def tied_scores(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Scores of which about half occur more than once, zeros of both signs among them."""
    scores = np.round(rng.standard_normal((batch, length)), 1)
    scores[:, ::3] = 0.0
    scores[:, ::6] = -0.0
    return scores


def matrix_by_sorting(scores: np.ndarray, tau: float, power: float, ascending: bool) -> np.ndarray:
    """SoftSort as its authors write it: a softmax of distances to the sorted scores."""
    ordered = np.sort(scores, axis=1) if ascending else -np.sort(-scores, axis=1)
    logits = -(np.abs(ordered[:, :, None] - scores[:, None, :]) ** power) / tau
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    return weights / weights.sum(axis=2, keepdims=True)


@pytest.mark.parametrize("length", [1, 2, 63])
@pytest.mark.parametrize("power", [1, 2, 0.5])
@pytest.mark.parametrize("ascending", [True, False])
def test_softsort(length: int, power: float, ascending: bool) -> None:
    rng = np.random.default_rng([length, ascending])
    scores, x = tied_scores(rng, 2, length), rng.standard_normal((2, length, 3))
    options: dict[str, Any] = {"tau": 0.3, "power": power, "ascending": ascending}
    P = matrix_by_sorting(scores, **options)
    np.testing.assert_allclose(core.softsort_matrix(scores, **options), P, rtol=1e-13)
    np.testing.assert_allclose(core.softsort(scores, x, **options), P @ x, rtol=1e-12, atol=1e-14)
    restored = np.swapaxes(P, 1, 2) @ x / P.sum(axis=1)[..., None]
    np.testing.assert_allclose(core.softsort_restore(scores, x, **options), restored, rtol=1e-12, atol=1e-14)
    counts = core.effective_tokens(scores, **options)
    np.testing.assert_allclose(counts, 1.0 / (P**2).sum(axis=2), rtol=1e-13)
    assert ((counts >= 1 - 1e-12) & (counts <= length * (1 + 1e-12))).all()


@pytest.mark.parametrize("ascending", [True, False])
def test_hard_order_keeps_equal_scores_in_place(ascending: bool) -> None:
    scores = tied_scores(np.random.default_rng(3), 3, 63)
    order = core.hard_order(scores, ascending=ascending)
    ordered = np.take_along_axis(scores, order, axis=1)
    steps, places = np.diff(ordered, axis=1), np.diff(order, axis=1)
    assert (steps >= 0).all() if ascending else (steps <= 0).all()
    assert (places[steps == 0] > 0).all()
    assert (steps == 0).sum() > 20


def test_a_cold_softsort_is_the_hard_order() -> None:
    rng = np.random.default_rng(4)
    scores, x = rng.permutation(20.0 * np.arange(12))[None] / 10, rng.standard_normal((1, 12, 3))
    order = core.hard_order(scores, ascending=False)
    sorted_x = core.softsort(scores, x, tau=1e-3, ascending=False)
    np.testing.assert_allclose(sorted_x, core.take_tokens(x, order), rtol=1e-14)
    np.testing.assert_allclose(core.softsort_restore(scores, sorted_x, tau=1e-3, ascending=False), x, rtol=1e-14)


def test_permuting_and_restoring_is_the_identity() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 9, 3))
    order = np.stack([rng.permutation(9) for _ in range(2)])
    np.testing.assert_array_equal(core.put_tokens(core.take_tokens(x, order), order), x)
    np.testing.assert_array_equal(core.take_tokens(x, order)[1, 4], x[1, order[1, 4]])


def test_permutations_gradients_are_transposes() -> None:
    rng = np.random.default_rng(6)
    order = np.stack([rng.permutation(9) for _ in range(2)])
    check_transpose("take_tokens", {"x": rng.standard_normal((2, 9, 3)), "indices": order}, "x", rng)
    check_transpose("put_tokens", {"y": rng.standard_normal((2, 9, 3)), "indices": order}, "y", rng)


@pytest.mark.parametrize("power", [1, 2, 1.5])
@pytest.mark.parametrize("ascending", [True, False])
def test_softsort_gradients(power: float, ascending: bool) -> None:
    rng = np.random.default_rng([6, ascending])
    scores, x = rng.standard_normal((2, 9)), rng.standard_normal((2, 9, 3))
    options: dict[str, Any] = {"tau": 0.7, "power": power, "ascending": ascending, "step": 1e-4}
    check_vjp("softsort", {"scores": scores, "x": x}, "scores x", rng, **options)
    check_vjp("softsort_restore", {"scores": scores, "y": x}, "scores y", rng, **options)
    check_vjp("softsort_matrix", {"scores": scores}, "scores", rng, **options)
    del options["step"]
    check_transpose("softsort", {"scores": scores, "x": x}, "x", rng, **options)
    check_transpose("softsort_restore", {"scores": scores, "y": x}, "y", rng, **options)


@pytest.mark.parametrize("power", [1, 2])
def test_tied_scores_get_the_mean_of_one_sided_gradients(power: float) -> None:
    """The derivative of |·| at 0 taken as 0 is what central differences see when one of two tied scores moves."""
    rng = np.random.default_rng(7)
    x, dout = rng.standard_normal((1, 4, 2)), rng.standard_normal((1, 4, 2))
    scores = np.array([[0.5, -0.2, 0.5, 1.0]])
    gradient = core.softsort_vjp(dout, scores, x, tau=0.6, power=power)["scores"]
    # Both tied scores together: then no order changes, and the function is smooth along this direction.
    direction, step = np.array([[1.0, 0.0, 1.0, 0.0]]), 1e-5
    difference = sum(
        sign * np.sum(dout * core.softsort(scores + sign * step * direction, x, tau=0.6, power=power))
        for sign in (1, -1)
    ) / (2 * step)
    np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-8)


def test_all_scores_equal_means_the_mean_and_no_gradient() -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((1, 7, 3))
    scores = np.full((1, 7), 0.3)
    mean = np.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
    np.testing.assert_allclose(core.softsort(scores, x), mean, rtol=1e-13, atol=1e-15)
    assert not core.softsort_vjp(rng.standard_normal(x.shape), scores, x)["scores"].any()
    np.testing.assert_allclose(core.effective_tokens(scores), 7.0, rtol=1e-14)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_far_scores_neither_overflow_nor_turn_into_nan(power: float) -> None:
    scores = np.array([[1e200, -1e200, 0.0, 1e-200]])
    x = np.random.default_rng(9).standard_normal((1, 4, 2))
    assert np.isfinite(core.softsort(scores, x, tau=1e-3, power=power)).all()
    np.testing.assert_allclose(core.softsort_matrix(scores, tau=1e-3, power=power).sum(axis=2), 1.0, rtol=1e-15)


@pytest.mark.parametrize("low_rank", [True, False])
def test_importance_score(low_rank: bool) -> None:
    rng = np.random.default_rng([10, low_rank])
    x, s_delta, k = rng.standard_normal((2, 9, 2)), rng.standard_normal((5, 2)), rng.standard_normal(5)
    if not low_rank:
        s_delta, k = None, k[:2]
    want = np.einsum("dq,blq,d->bl", np.eye(2) if s_delta is None else s_delta, x, k)
    np.testing.assert_allclose(core.importance_score(x, s_delta, k), want, rtol=1e-13)
    wrt = "x k" if s_delta is None else "x s_delta k"
    check_vjp("importance_score", {"x": x, "s_delta": s_delta, "k": k}, wrt, rng)
    for name in wrt.split():
        check_transpose("importance_score", {"x": x, "s_delta": s_delta, "k": k}, name, rng)
