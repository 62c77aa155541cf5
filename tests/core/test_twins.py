"""The Numba twins against the spec, within the tolerance table."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest

from tokendyn import core
from tokendyn._tolerances import tolerance
from tokendyn.core import _attention_numba, _order_numba, _parallel, _scan_numba, _scan_vjp_numba

from ..equivalence.compare import Bound, Outcome, compare
from .scans import scan_arguments

DTYPES = ("float32", "float64")
#: Sizes around the edges of tiles (16 channels), chunks (32 and 64 tokens), blocks of rows (32) and groups.
SIZES: dict[str, dict[str, Any]] = {
    "one of everything": {"batch": 1, "channels": 1, "length": 1, "state": 1},
    "two tokens": {"channels": 5, "length": 2},
    "a tile": {"batch": 1, "channels": 16, "length": 64, "state": 4},
    "odd": {"batch": 1, "channels": 17, "length": 63, "state": 5},
    "long": {"batch": 1, "channels": 3, "length": 197, "state": 16},
    "groups": {"channels": 40, "length": 33, "groups": 2},
    "a group a channel": {"channels": 3, "length": 20, "groups": 3},
    "three tiles": {"batch": 1, "channels": 40, "length": 40, "state": 2},
}


def cut(options: str, batch: int, length: int) -> dict[str, Any]:
    """seq_idx and lengths that fall inside and on the edges of chunks."""
    if options == "whole":
        return {}
    return {
        "seq_idx": np.tile(np.arange(length) // 21, (batch, 1)).astype(np.int32),
        "lengths": np.array([length, (2 * length) // 3])[:batch],
    }


def assert_within(got: np.ndarray, want: np.ndarray, dtype: str, allowed: float, tokens: str | None = None) -> None:
    bound = Bound(allowed, tolerance("selective_scan", dtype).worst_token)
    compare("twin", Outcome(got, str(got.dtype)), want, dtype, bound, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("options", ["whole", "packed and padded"])
@pytest.mark.parametrize("sizes", SIZES)
def test_scan_and_its_gradients(sizes: str, options: str, scalar: bool, dtype: str) -> None:
    rng = np.random.default_rng([len(sizes), len(options), scalar])
    arguments = scan_arguments(rng, **SIZES[sizes], scalar=scalar, dtype=dtype)
    batch, _, length = arguments["u"].shape
    more = {"delta_softplus": True, "return_last_state": True, **cut(options, batch, length)}
    allowed = tolerance("selective_scan", dtype)

    y, last = _scan_numba.selective_scan(**arguments, **more)
    want_y, want_last = core.selective_scan(**arguments, **more)
    assert_within(y, want_y, dtype, allowed.values, "kft")
    assert_within(last, want_last, dtype, allowed.values)

    dout = tuple(rng.standard_normal(part.shape).astype(dtype) for part in (y, last))
    gradients = _scan_vjp_numba.selective_scan_vjp(dout, **arguments, **more)
    want = core.selective_scan_vjp(dout, **arguments, **more)
    assert gradients.keys() == want.keys()
    for name, gradient in gradients.items():
        assert_within(gradient, want[name], dtype, allowed.gradients)


def test_several_tiles_share_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """dB and dC where a piece of work holds more than one tile, and not all pieces the same number."""
    rng = np.random.default_rng(8)
    arguments = scan_arguments(rng, batch=1, channels=2 * 75, groups=2, length=10, state=2, dtype="float64")
    dy = rng.standard_normal(arguments["u"].shape)
    want = core.selective_scan_vjp(dy, **arguments, delta_softplus=True)
    for pieces in (1, 2, 3, 4, 1000):
        monkeypatch.setattr(_scan_vjp_numba, "PIECES", pieces)
        gradients = _scan_vjp_numba.selective_scan_vjp(dy, **arguments, delta_softplus=True)
        for name, gradient in gradients.items():
            assert_within(gradient, want[name], "float64", tolerance("selective_scan", "float64").gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_out", ["D z delta_bias initial_state", "z", "D"])
def test_scan_without_some_arguments(left_out: str, dtype: str) -> None:
    rng = np.random.default_rng(len(left_out))
    arguments = scan_arguments(rng, channels=5, dtype=dtype)
    for name in left_out.split():
        del arguments[name]
    arguments["u"][0, 0, 3] = np.inf  # where D is not given it must not make 0 · inf
    got, want = _scan_numba.selective_scan(**arguments), core.selective_scan(**arguments)
    np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    arguments["u"][0, 0, 3] = 1.0
    dy = rng.standard_normal(want.shape).astype(dtype)
    gradients = _scan_vjp_numba.selective_scan_vjp(dy, **arguments)
    expected = core.selective_scan_vjp(dy, **arguments)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_within(gradient, expected[name], dtype, tolerance("selective_scan", dtype).gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", ["huge steps", "tiny steps", "huge decay", "growth", "long memory", "very negative raw steps"]
)
def test_scan_at_extremes(case: str, dtype: str) -> None:
    rng = np.random.default_rng(len(case))
    arguments = scan_arguments(rng, channels=5, length=197, dtype=dtype)
    softplus = case == "very negative raw steps"
    arguments["delta_bias"] *= 0
    step = {"huge steps": 1e3, "tiny steps": 1e-6, "growth": 0.1, "long memory": 1e-3, "huge decay": 0.5}
    arguments["delta"] = np.full_like(arguments["delta"], -60.0 if softplus else step[case])
    scale = {"huge decay": 1e6, "long memory": 1e-2}.get(case, 1.0)
    arguments["A"] = (scale if case != "growth" else -1.0) * arguments["A"]
    arguments["A"] = np.clip(arguments["A"], None, 3.0).astype(dtype)
    allowed = tolerance("selective_scan", dtype)
    got, want = (
        scan(**arguments, delta_softplus=softplus) for scan in (_scan_numba.selective_scan, core.selective_scan)
    )
    assert_within(got, want, dtype, allowed.values, "kft")
    dy = rng.standard_normal(want.shape).astype(dtype)
    gradients = _scan_vjp_numba.selective_scan_vjp(dy, **arguments, delta_softplus=softplus)
    expected = core.selective_scan_vjp(dy, **arguments, delta_softplus=softplus)
    for name, gradient in gradients.items():
        assert_within(gradient, expected[name], dtype, allowed.gradients)


def test_overflow_and_nan_stay_in_their_channel() -> None:
    arguments = scan_arguments(np.random.default_rng(1), channels=20, length=70, dtype="float32")
    clean = _scan_numba.selective_scan(**arguments)
    arguments["u"][0, 3, 10] = np.nan
    arguments["A"][7] = 1e4
    arguments["delta"][:, 7] = 1.0
    got = _scan_numba.selective_scan(**arguments)
    others = np.delete(np.arange(20), [3, 7])
    np.testing.assert_array_equal(got[:, others], clean[:, others])
    assert np.isnan(got[0, 3, 10:]).all()
    np.testing.assert_array_equal(got[1, 3], clean[1, 3])
    assert not np.isfinite(got[:, 7, -1]).any()


def arrangements(array: np.ndarray) -> dict[str, np.ndarray]:
    """The same values in other places of memory."""
    channels_last = np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2)
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    wide[..., ::2] = array
    read_only = array.copy()
    read_only.flags.writeable = False
    return {
        "channels last": channels_last,
        "Fortran": np.asfortranarray(array),
        "strided": wide[..., ::2],
        "read-only": read_only,
    }


@pytest.mark.parametrize("arrangement", ["channels last", "Fortran", "strided", "read-only"])
def test_memory_layout_changes_no_bit(arrangement: str) -> None:
    rng = np.random.default_rng(2)
    plain = scan_arguments(rng, channels=37, length=70, dtype="float32")
    moved = {name: arrangements(array)[arrangement] if array.ndim == 3 else array for name, array in plain.items()}
    dy = rng.standard_normal(plain["u"].shape).astype(np.float32)
    np.testing.assert_array_equal(*(_scan_numba.selective_scan(**a, delta_softplus=True) for a in (moved, plain)))
    want = _scan_vjp_numba.selective_scan_vjp(dy, **plain, delta_softplus=True)
    for name, gradient in _scan_vjp_numba.selective_scan_vjp(dy, **moved, delta_softplus=True).items():
        np.testing.assert_array_equal(gradient, want[name])
    compiled = _scan_numba._forward.signatures  # type: ignore[attr-defined]
    assert len(compiled) == len(
        {signature[2].dtype for signature in compiled}
    )  # one for each dtype, not for each layout


def test_channels_last_comes_back_channels_last() -> None:
    arguments = scan_arguments(np.random.default_rng(3), channels=37, length=70)
    arguments["u"] = arrangements(arguments["u"])["channels last"]
    y = _scan_numba.selective_scan(**arguments)
    assert y.swapaxes(1, 2).flags.c_contiguous


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_the_number_of_threads_changes_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    arguments = scan_arguments(rng, channels=100, length=70, dtype="float32")
    attention = {name: arguments[name] for name in ("delta", "A", "B", "C")}
    scores, x = rng.standard_normal((2, 70)), rng.standard_normal((2, 70, 40)).astype(np.float32)
    dy = rng.standard_normal(arguments["u"].shape).astype(np.float32)

    def everything() -> list[np.ndarray]:
        return [
            _scan_numba.selective_scan(**arguments, delta_softplus=True),
            *_scan_vjp_numba.selective_scan_vjp(dy, **arguments, delta_softplus=True).values(),
            _attention_numba.hidden_attention(**attention, delta_softplus=True, aggregate="mean"),
            *_order_numba.softsort_vjp(x, scores, x).values(),
        ]

    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 1)
    alone = everything()
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", threads)
    monkeypatch.setattr(_parallel, "SERIAL_WORK", 0.0)
    _parallel._pool.cache_clear()
    try:
        for _ in range(3):
            for one, many in zip(alone, everything(), strict=True):
                np.testing.assert_array_equal(one, many)
    finally:
        _parallel._pool().shutdown()
        _parallel._pool.cache_clear()


def test_errors_in_threads_reach_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 2)

    def fail(first: int, last: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _parallel.run_tiles(fail, 8, work=1e9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_process_can_compute_too() -> None:
    """A pool of threads does not survive a fork; the child must make its own."""
    script = """
import os, numpy as np
from numba import config
config.NUMBA_NUM_THREADS = 2
from tokendyn.core import _parallel
from tokendyn.core._scan_numba import selective_scan
_parallel.SERIAL_WORK = 0.0
ones = np.ones((2, 40, 9), np.float32)
run = lambda: selective_scan(ones, ones, -np.ones((40, 3), np.float32), ones[:, :3], ones[:, :3])
want = run()
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(run(), want) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit_without_a_place(*, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(_parallel, "njit", njit_without_a_place)

    @_parallel.kernel()
    def twice(x):
        return x + x

    assert twice(2.0) == 4.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channel": 3},
        {"aggregate": "mean"},
        {"aggregate": "mean_abs", "rows": (20, 60)},
        {"rows": (31, 33)},
        cut("packed and padded", 2, 70),
        {**cut("packed and padded", 2, 70), "rows": (15, 65), "aggregate": "mean"},
    ],
    ids=lambda options: ", ".join(options) or "whole",
)
def test_attention(options: dict[str, Any], scalar: bool, dtype: str) -> None:
    rng = np.random.default_rng([len(options), scalar])
    arguments = scan_arguments(rng, length=70, state=5, groups=2, scalar=scalar, dtype=dtype)
    attention = {name: arguments[name] for name in ("delta", "A", "B", "C", "delta_bias")}
    got = _attention_numba.hidden_attention(**attention, delta_softplus=True, **options)
    want = core.hidden_attention(**attention, delta_softplus=True, **options)
    assert_within(got, want, dtype, tolerance("hidden_attention", dtype).values)
    assert not got[want == 0].any()  # above the diagonal, across sequences, past lengths


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_at_long_range(dtype: str) -> None:
    rng = np.random.default_rng(5)
    arguments = scan_arguments(rng, batch=1, channels=2, length=1000, state=2, dtype=dtype)
    attention = {name: arguments[name] for name in ("A", "B", "C")}
    attention["delta"] = np.full((1, 2, 1000), 3e-3, dtype)
    got, want = (f(**attention, rows=(998, 1000)) for f in (_attention_numba.hidden_attention, core.hidden_attention))
    assert_within(got, want, dtype, tolerance("hidden_attention", dtype).values)


def tied_scores(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    scores = np.round(rng.standard_normal((batch, length)), 1)
    scores[:, ::3] = 0.0
    scores[:, ::6] = -0.0
    return scores


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("tau", [3.0, 0.1, 1e-3])
@pytest.mark.parametrize(("length", "columns"), [(1, 3), (2, 1), (63, 20), (197, 16)])
def test_softsort_by_two_scans_is_the_dense_definition(length: int, columns: int, tau: float, ascending: bool) -> None:
    """Half the scores are tied. To 1e-14 of the largest value, gradients to 1e-12 (they are divided by tau)."""
    rng = np.random.default_rng([length, ascending])
    scores, x = tied_scores(rng, 2, length), rng.standard_normal((2, length, columns))
    dout = rng.standard_normal(x.shape)
    options: dict[str, Any] = {"tau": tau, "ascending": ascending}

    def close(got: np.ndarray, want: np.ndarray, error: float = 1e-14) -> None:
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=0, atol=error * max(np.abs(want).max(), 1.0))

    close(_order_numba.softsort(scores, x, **options), core.softsort(scores, x, **options))
    close(_order_numba.softsort_restore(scores, x, **options), core.softsort_restore(scores, x, **options))
    close(_order_numba.effective_tokens(scores, **options) / length, core.effective_tokens(scores, **options) / length)
    for name in ("softsort", "softsort_restore"):
        got = getattr(_order_numba, f"{name}_vjp")(dout, scores, x, **options)
        want = getattr(core, f"{name}_vjp")(dout, scores, x, **options)
        assert got.keys() == want.keys()
        for key in got:
            close(got[key], want[key], 1e-12)


@pytest.mark.parametrize("ascending", [True, False])
def test_softsort_in_float32(ascending: bool) -> None:
    rng = np.random.default_rng(6)
    scores, x = tied_scores(rng, 2, 197).astype(np.float32), rng.standard_normal((2, 197, 20)).astype(np.float32)
    dout = rng.standard_normal(x.shape).astype(np.float32)
    for name in ("softsort", "softsort_restore"):
        got, want = (getattr(m, name)(scores, x, ascending=ascending) for m in (_order_numba, core))
        assert_within(got, want, "float32", tolerance(name, "float32").values, "ktf")
        got, want = (getattr(m, f"{name}_vjp")(dout, scores, x, ascending=ascending) for m in (_order_numba, core))
        for key in want:
            assert_within(got[key], want[key], "float32", tolerance(name, "float32").gradients)


def test_softsort_of_scores_and_tokens_in_two_dtypes() -> None:
    rng = np.random.default_rng(7)
    scores, x = rng.standard_normal((1, 9)), rng.standard_normal((1, 9, 2)).astype(np.float32)
    assert _order_numba.softsort(scores, x).dtype == np.float32
    gradients = _order_numba.softsort_restore_vjp(x, scores, x)
    assert (gradients["scores"].dtype, gradients["y"].dtype) == (np.float64, np.float32)
