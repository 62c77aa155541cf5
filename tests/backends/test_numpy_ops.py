"""The NumPy operations through the public functions: dtypes, engines, and results that are the spec's."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tokendyn
from tokendyn import core
from tokendyn.backends.numpy import ops
from tokendyn.errors import DTypeError, OptionError


def calls(dtype: Any) -> dict[str, dict[str, Any]]:
    """Arguments of every operation, arrays in ``dtype``."""
    rng = np.random.default_rng(1)

    def make(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    order = np.stack([rng.permutation(6) for _ in range(2)])
    scan = {"delta": make(2, 4, 6), "A": make(4, 3), "B": make(2, 3, 6), "C": make(2, 3, 6)}
    return {
        "selective_scan": {"u": make(2, 4, 6), **scan, "delta_softplus": True},
        "hidden_attention": {**scan, "delta_softplus": True},
        "importance_score": {"x": make(2, 6, 3), "s_delta": make(4, 3), "k": make(4)},
        "softsort": {"scores": make(2, 6), "x": make(2, 6, 3), "tau": 0.5},
        "softsort_restore": {"scores": make(2, 6), "y": make(2, 6, 3), "power": 2},
        "softsort_matrix": {"scores": make(2, 6), "ascending": False},
        "effective_tokens": {"scores": make(2, 6), "power": 2},
        "hard_order": {"scores": make(2, 6), "ascending": False},
        "take_tokens": {"x": make(2, 6, 3), "indices": order},
        "put_tokens": {"y": make(2, 6, 3), "indices": order},
        "io_projections": {"weight_B": make(3, 5), "diagonal": make(3), "regime": "mixed"},
        "io_spectrum": {"S_B": make(3, 5), "S_C": make(3, 5)},
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", calls("float64"))
def test_results_are_the_specs_in_the_dtype_given(name: str, dtype: str) -> None:
    arguments = calls(dtype)[name]
    got, want = getattr(tokendyn, name)(**arguments), getattr(core, name)(**arguments)
    together = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for mine, reference in together:
        assert isinstance(mine, np.ndarray)
        if name == "hard_order":
            assert np.issubdtype(mine.dtype, np.integer)
        else:
            kind = np.result_type(dtype, np.complex64) if np.iscomplexobj(reference) else dtype
            assert mine.dtype == kind
        np.testing.assert_allclose(mine, reference, rtol=0, atol=20 * np.finfo(dtype).eps * np.abs(reference).max())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", sorted(set(calls("float64")) - {"take_tokens", "put_tokens", "io_spectrum"}))
def test_half_precision_is_refused(name: str, dtype: Any) -> None:
    with pytest.raises(DTypeError, match="float32"):
        getattr(tokendyn, name)(**calls(dtype)[name])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_permutations_take_any_dtype(dtype: Any) -> None:
    arguments = calls(dtype)["take_tokens"]
    there = tokendyn.take_tokens(**arguments)
    assert there.dtype == dtype
    np.testing.assert_array_equal(tokendyn.put_tokens(there, arguments["indices"]), arguments["x"])


def test_engines() -> None:
    arguments = calls("float32")["selective_scan"]
    scan = tokendyn.selective_scan
    spec = scan(**arguments, engine="spec")
    assert spec.dtype == np.float32
    np.testing.assert_array_equal(spec, core.selective_scan(**arguments).astype(np.float32))
    np.testing.assert_array_equal(scan(**arguments, engine="auto"), scan(**arguments, engine="numba"))
    y, last = scan(**arguments, engine="spec", return_last_state=True)
    assert (y.dtype, last.dtype) == (np.float32, np.float32)
    for call in (scan, lambda **a: ops.selective_scan_vjp(spec, **a)):
        with pytest.raises(OptionError, match=r"'triton'.*'auto', 'numba', 'spec'"):
            call(**arguments, engine="triton")


@pytest.mark.parametrize("engine", ["auto", "numba", "spec"])
def test_gradients_of_the_scan(engine: str) -> None:
    arguments = calls("float64")["selective_scan"]
    dy = np.random.default_rng(2).standard_normal(arguments["u"].shape)
    got = ops.selective_scan_vjp(dy, **arguments, engine=engine)
    want = core.selective_scan_vjp(dy, **arguments)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        np.testing.assert_allclose(gradient, want[name], rtol=0, atol=1e-13 * np.abs(want[name]).max())


def test_helpers() -> None:
    indices = np.array([[2, 0, 1]])
    matrix = ops.permutation_matrix(indices, np.zeros((1, 3), np.float32))
    assert matrix.dtype == np.float32
    x = np.arange(6.0).reshape(1, 3, 2)
    np.testing.assert_array_equal(matrix @ x, ops.take_tokens(x, indices))
    assert ops.stop_gradient(x) is x
    assert ops.from_numpy([1, 2], "float32").dtype == np.float32
    assert ops.to_numpy(x) is x


def test_straight_through_order_is_the_permutation_exactly() -> None:
    arguments = calls("float32")["softsort"]
    order = tokendyn.token_order(arguments["scores"], "straight_through")
    np.testing.assert_array_equal(
        order.apply(arguments["x"]), np.take_along_axis(arguments["x"], order.indices[..., None], axis=1)
    )
