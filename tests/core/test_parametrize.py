"""The spec of the input-output maps: projections with a chosen spectrum, and the spectrum of any projections."""

from __future__ import annotations

import numpy as np
import pytest

from tokendyn import core

from .gradients import check_transpose, check_vjp

REGIMES = ("positive", "negative", "mixed")
FORMS = ("paper", "published_code", "scale_matched")
#: State size N and channels D: wide, just 2N, between N and 2N, square, tall, and single.
SIZES = [(3, 40), (3, 6), (4, 6), (5, 5), (7, 3), (1, 5), (4, 1), (1, 1)]


def projections(regime: str, form: str = "paper", N: int = 5, D: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([N, D, REGIMES.index(regime)])
    return core.io_projections(rng.standard_normal((N, D)), None, rng.standard_normal(N), regime=regime, form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes_have_their_signs(regime: str, form: str) -> None:
    S_B, S_C = projections(regime, form)
    M = S_C.T @ S_B
    np.testing.assert_allclose(M, M.T, rtol=1e-13, atol=1e-15)
    kept = np.linalg.eigvalsh(M)
    kept = kept[np.abs(kept) > 1e-10]
    assert len(kept) == 5
    assert (kept > 0).sum() == {"positive": 5, "negative": 0, "mixed": 3}[regime]


def test_the_forms_differ_as_the_table_says() -> None:
    """q at diagonal = 0, read off the first column: S_B[n, n] = q_n."""
    ln2 = np.log(2.0)
    size = {
        ("positive", "paper"): ln2,
        ("negative", "paper"): -ln2,
        ("mixed", "paper"): ln2,
        ("positive", "published_code"): ln2 + 0.7,
        ("negative", "published_code"): -ln2 - 0.7,
        ("mixed", "published_code"): ln2,
        ("positive", "scale_matched"): ln2 + 0.7,
        ("negative", "scale_matched"): -ln2 - 0.7,
        ("mixed", "scale_matched"): ln2 + 0.7,
    }
    weight = np.random.default_rng(1).standard_normal((3, 5))
    for (regime, form), q in size.items():
        S_B, S_C = core.io_projections(weight, None, np.zeros(3), regime=regime, form=form)
        signs = np.array([1.0, 1.0, -1.0]) if regime == "mixed" else np.ones(3)
        np.testing.assert_allclose(np.diag(S_B), q * signs, rtol=1e-15)
        np.testing.assert_array_equal(np.diag(S_C), np.ones(3))
        np.testing.assert_array_equal(np.triu(S_C, 1), np.triu(weight, 1))
        assert not np.tril(S_C, -1).any()


def test_free_projections_are_the_weights() -> None:
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((2, 7, 3))
    S_B, S_C = core.io_projections(*weights)
    np.testing.assert_array_equal([S_B, S_C], weights)
    check_transpose("io_projections", {"weight_B": weights[0], "weight_C": 0 * weights[1]}, "weight_B", rng)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("regime", REGIMES)
def test_gradients_of_projections(regime: str, form: str) -> None:
    rng = np.random.default_rng([REGIMES.index(regime), FORMS.index(form)])
    arguments = {"weight_B": rng.standard_normal((3, 5)), "diagonal": rng.standard_normal(3)}
    check_vjp("io_projections", arguments, "weight_B diagonal", rng, regime=regime, form=form)


def test_a_missing_member_of_dout_counts_as_zero() -> None:
    rng = np.random.default_rng(3)
    arguments = {"weight_B": rng.standard_normal((3, 5)), "diagonal": rng.standard_normal(3)}
    dS_B, dS_C = rng.standard_normal((2, 3, 5))
    both, first, second = (
        core.io_projections_vjp(d, **arguments, regime="mixed") for d in ((dS_B, dS_C), (dS_B, None), (None, dS_C))
    )
    for name in arguments:
        np.testing.assert_allclose(first[name] + second[name], both[name], rtol=1e-14)


@pytest.mark.parametrize(("N", "D"), SIZES)
def test_spectrum_is_that_of_the_large_matrix(N: int, D: int) -> None:
    rng = np.random.default_rng([N, D])
    S_B, S_C = rng.standard_normal((2, N, D))
    M = S_C.T @ S_B
    eigenvalues, symmetric = core.io_spectrum(S_B, S_C)
    assert eigenvalues.shape == (min(N, D),)
    assert symmetric.shape == (min(2 * N, D),)
    dense = np.linalg.eigvals(M)
    dense = dense[np.argsort(-np.abs(dense), kind="stable")][: min(N, D)]
    for value in dense:  # as sets: the order of the large matrix's values is not defined
        assert np.abs(eigenvalues - value).min() <= 1e-10 * np.abs(dense).max()
    dense = np.linalg.eigvalsh((M + M.T) / 2)
    np.testing.assert_allclose(padded(symmetric, D), dense[::-1], rtol=0, atol=1e-12 * np.abs(dense).max())


def padded(values: np.ndarray, size: int) -> np.ndarray:
    """Descending ``values`` with the zeros that rank alone accounts for."""
    return np.sort(np.concatenate([values, np.zeros(size - len(values))]))[::-1]


def test_eigenvalues_descend_and_conjugates_are_paired() -> None:
    rng = np.random.default_rng(4)
    pairs = 0
    for _ in range(20):
        eigenvalues = core.io_spectrum(*rng.standard_normal((2, 6, 9))).eigenvalues
        assert (np.diff(eigenvalues.real) <= 0).all()
        for i in np.flatnonzero(eigenvalues.imag > 0):
            assert eigenvalues[i + 1] == eigenvalues[i].conj()
            pairs += 1
    assert pairs > 10


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("N", "D"), [(5, 12), (16, 64), (5, 8), (5, 5)])
def test_spectrum_where_both_projections_have_one_row_space(regime: str, N: int, D: int) -> None:
    """LDLᵀ: [S_C; S_B] has rank N, not 2N, and the 2N x 2N matrix ½ J Q would be defective."""
    S_B, S_C = projections(regime, N=N, D=D)
    M = S_C.T @ S_B
    dense = np.linalg.eigvalsh((M + M.T) / 2)
    largest = np.abs(dense).max()
    spectrum = core.io_spectrum(S_B, S_C)
    np.testing.assert_allclose(padded(spectrum.symmetric, D), dense[::-1], rtol=0, atol=1e-10 * largest)
    np.testing.assert_allclose(spectrum.eigenvalues.imag, 0.0, atol=1e-10 * largest)
    np.testing.assert_allclose(padded(spectrum.eigenvalues.real, D), dense[::-1], rtol=0, atol=1e-10 * largest)


def test_free_projections_have_as_many_values_of_either_sign() -> None:
    """Sylvester's law of inertia."""
    rng = np.random.default_rng(5)
    for N in (1, 3, 8):
        symmetric = core.io_spectrum(*rng.standard_normal((2, N, 2 * N + 3))).symmetric
        assert ((symmetric > 0).sum(), (symmetric < 0).sum()) == (N, N)


@pytest.mark.parametrize(("N", "D"), SIZES)
def test_gradients_of_the_spectrum(N: int, D: int) -> None:
    """The loss of the differences is ``Re Σ conj(g) λ + Σ s σ``: the convention for complex eigenvalues."""
    rng = np.random.default_rng([N, D, 1])
    S_B, S_C = rng.standard_normal((2, N, D))
    check_vjp("io_spectrum", {"S_B": S_B, "S_C": S_C}, "S_B S_C", rng, step=1e-5, tolerance=1e-6)


def test_gradients_of_the_values_apart_from_a_degenerate_zero() -> None:
    """LDLᵀ has N zeros in the symmetric spectrum; the other values are distinct and have gradients."""
    S_B, S_C = projections("mixed")
    rng = np.random.default_rng(6)
    s = rng.standard_normal(10)
    s[np.abs(core.io_spectrum(S_B, S_C).symmetric) < 1e-9] = 0.0
    assert (s != 0).sum() == 5
    gradients = core.io_spectrum_vjp((None, s), S_B, S_C)
    direction, step = rng.standard_normal((2, *S_B.shape)), 1e-6
    up, down = (core.io_spectrum(S_B + h * direction[0], S_C + h * direction[1]).symmetric for h in (step, -step))
    found = np.sum(gradients["S_B"] * direction[0]) + np.sum(gradients["S_C"] * direction[1])
    np.testing.assert_allclose(found, s @ (up - down) / (2 * step), rtol=1e-7)
