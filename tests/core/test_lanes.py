"""The SIMD values of the kernels: elementary functions against long double, transposes, sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from tokendyn.core import _lanes_numba as lanes
from tokendyn.core._lanes_numba import WIDTH, row, set_row, total, transpose

DTYPES = ("float32", "float64")


def exact(name: str, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.longdouble)
    e = np.exp(-np.abs(x))
    if name == "exp":
        return np.exp(x)
    if name == "softplus":
        return np.maximum(x, 0) + np.log1p(e)
    return np.where(x >= 0, 1, e) / (1 + e)


def compiled(name: str) -> Any:
    function = getattr(lanes, name)

    @njit(fastmath={"contract"})
    def over_rows(x, y):
        for k in range(x.shape[0]):
            set_row(y, k, function(row(x, k)))

    return over_rows


@pytest.fixture(scope="module", params=["exp", "softplus", "sigmoid"])
def function(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, compiled(request.param)


def apply(over_rows: Any, x: np.ndarray) -> np.ndarray:
    padded = np.zeros((-(-x.size // WIDTH), WIDTH), x.dtype)
    padded.ravel()[: x.size] = x
    y = np.full_like(padded, np.nan)
    over_rows(padded, y)
    return y.ravel()[: x.size]


@pytest.mark.parametrize("dtype", DTYPES)
def test_last_digits(function: tuple[str, Any], dtype: str) -> None:
    """Over the whole range in which results are normal numbers, close to 0, and at the ends."""
    name, over_rows = function
    limits = np.finfo(dtype)
    lowest, highest = np.log(np.array([limits.smallest_normal, limits.max], np.longdouble))
    small = np.geomspace(1e-30, 1, 2000)
    x = np.concatenate([np.linspace(float(lowest), float(highest), 40001), small, -small])
    x = x.astype(dtype)
    x = x[(x > lowest) & (x < highest)]
    want = exact(name, x)
    error = np.max(np.abs(apply(over_rows, x) - want) / np.abs(want))
    assert error <= (1 if name == "exp" else 2) * limits.eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_range(function: tuple[str, Any], dtype: str) -> None:
    name, over_rows = function
    payload = np.array([0x7FC12345, 0xFFC00001], np.uint32).view(np.float32).astype(dtype)
    x = np.array([np.inf, -np.inf, 1e4, -1e4, 0.0, -0.0, np.nan, *payload], dtype)
    want = {
        "exp": [np.inf, 0.0, np.inf, 0.0, 1.0, 1.0],
        "softplus": [np.inf, 0.0, 1e4, 0.0, np.log(2.0), np.log(2.0)],
        "sigmoid": [1.0, 0.0, 1.0, 0.0, 0.5, 0.5],
    }[name]
    got = apply(over_rows, x)
    np.testing.assert_allclose(got[:6], np.array(want, dtype), rtol=2 * np.finfo(dtype).eps)
    assert np.isnan(got[6:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_around_its_ends_is_never_wild(dtype: str) -> None:
    """Next to overflow a finite right value or infinity, next to underflow a right value or 0."""
    limits = np.finfo(dtype)
    for end in (np.log(np.float64(limits.max)), np.log(np.float64(limits.smallest_normal))):
        around = np.array([end], dtype)
        x = np.concatenate([around] + [np.nextafter(around, np.array(side, dtype)) for side in (-1e9, 1e9)])
        for _ in range(50):
            x = np.unique(
                np.concatenate([x, np.nextafter(x, np.array(-1e9, dtype)), np.nextafter(x, np.array(1e9, dtype))])
            )
        got, want = apply(compiled("exp"), x), exact("exp", x)
        near = np.abs(got - want) <= 2 * limits.eps * want
        assert (
            near
            | (np.isinf(got) & (want > 0.999 * limits.max))
            | ((got == 0) & (want < 1.001 * limits.smallest_normal))
        ).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_transpose_and_total(dtype: str) -> None:
    @njit
    def run(source, target, sums):
        transpose(source, 3, source.shape[1], target, 5, target.shape[1])
        for k in range(WIDTH):
            sums[k] = total(row(target, 0)) if k == 0 else sums[k]

    source = np.arange(40.0 * 21).reshape(40, 21).astype(dtype)
    target, sums = np.full((WIDTH, 2 * WIDTH), -1, dtype), np.zeros(WIDTH, dtype)
    run(source, target, sums)
    want = np.full_like(target, -1)
    want[:, 5 : 5 + WIDTH] = source[:WIDTH, 3 : 3 + WIDTH].T
    np.testing.assert_array_equal(target, want)
    assert sums[0] == want.ravel()[:WIDTH].sum()
