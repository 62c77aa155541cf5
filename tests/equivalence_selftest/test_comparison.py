"""The comparison itself: each of its checks, and that it cannot pass by comparing nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tokendyn._operations import ALL_BACKENDS

from ..equivalence.cases import CASES
from ..equivalence.check import Measured, compare_all, reference
from ..equivalence.compare import Bound, Errors, Mismatch, Outcome, compare, normwise, worst_token
from ..equivalence.frameworks import Implementation
from ..equivalence.record import Record
from ..equivalence.subjects import SUBJECTS

ROOT = Path(__file__).parents[2]
TIGHT = Bound(1e-6, 1e-5)


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape)


def caught(got: np.ndarray, want: np.ndarray, *, dtype: str = "float64", axes: str | None = None) -> str:
    with pytest.raises(Mismatch) as raised:
        compare("x", Outcome(got, dtype), want, "float64", TIGHT, axes)
    return raised.value.check


def test_equal_arrays_pass_with_no_error() -> None:
    want = values(2, 3, 5)
    assert compare("x", Outcome(want.copy(), "float64"), want, "float64", TIGHT, "kft") == Errors(0.0, 0.0)


def test_shape_even_where_it_would_broadcast() -> None:
    assert caught(values(1, 5), values(1, 5).repeat(3, 0)) == "shape"
    assert caught(values(5)[None], values(5)) == "shape"


def test_dtype() -> None:
    assert caught(values(5), values(5), dtype="float32") == "dtype"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_on_one_side(bad: float) -> None:
    spoilt = values(5)
    spoilt[2] = bad
    assert caught(spoilt, values(5)) == "non-finite"
    assert caught(values(5), spoilt) == "empty"


def test_non_finite_on_both_sides_is_no_agreement() -> None:
    """Zeroing NaN on both sides, or skipping it, would leave nothing compared there."""
    spoilt = values(5)
    spoilt[2] = np.nan
    assert caught(spoilt.copy(), spoilt) == "empty"
    assert caught(np.full(5, np.nan), np.full(5, np.nan)) == "empty"


def test_nothing_to_compare() -> None:
    assert caught(np.zeros((0, 3)), np.zeros((0, 3))) == "empty"


def test_where_the_reference_is_zero_only_zero_will_do() -> None:
    zero = np.zeros((1, 2, 4))
    assert compare("x", Outcome(zero, "float64"), zero, "float64", TIGHT, "kft") == Errors(0.0, 0.0)
    assert caught(zero + 1e-300, zero, axes="kft") == "normwise"
    padded = values(1, 2, 9)
    padded[..., 4:] = 0.0
    leaking = padded.copy()
    leaking[..., 8] = 1e-12
    assert normwise(leaking, padded) < 1e-11
    assert caught(leaking, padded, axes="kft") == "worst token"


def test_normwise() -> None:
    want = values(2, 3, 50)
    assert normwise(want * 1.004, want) == pytest.approx(0.004)
    assert caught(want * (1 + 2e-6), want) == "normwise"


def test_worst_token_sees_what_the_norm_cannot() -> None:
    """Where the state grows along the sequence, the norm is that of the last tokens."""
    want = values(1, 2, 60) * np.exp(np.arange(60) / 2)
    wrong = want.copy()
    wrong[..., 3] *= 1.01
    assert normwise(wrong, want) < 1e-10
    assert caught(wrong, want, axes="kft") == "worst token"


def test_worst_token_forgives_cancellation_in_one_token() -> None:
    """A token that cancels to nearly nothing has the absolute error of its neighbours."""
    want = np.ones((1, 1, 9))
    want[..., 4] = 1e-9
    assert worst_token(want + 1e-7, want, "kft") == pytest.approx(1e-6)


def test_worst_token_of_two_axes() -> None:
    want = np.ones((2, 9))
    wrong = want.copy()
    wrong[1, 4] += 0.3
    assert worst_token(wrong, want, "kt") == pytest.approx(0.3)


def test_integers_are_compared_exactly() -> None:
    want = np.arange(5)
    with pytest.raises(Mismatch, match=r"\[exact\]"):
        compare("x", Outcome(want[::-1], "int64"), want, "integer", TIGHT, None)
    with pytest.raises(Mismatch, match=r"\[dtype\]"):
        compare("x", Outcome(want, "float64"), want, "integer", TIGHT, None)
    compare("x", Outcome(want, "int32"), want, "integer", TIGHT, None)


def test_a_call_that_returns_nothing_is_caught() -> None:
    case = next(case for case in CASES if case.subject == "selective_scan")
    with pytest.raises(Mismatch, match=r"\[structure\]"):
        compare_all(
            case.id,
            SUBJECTS[case.subject],
            "numpy",
            "float64",
            Implementation(lambda **_: ()),
            reference(case, "float64"),
        )


def test_a_record_without_comparisons_misses_everything() -> None:
    record = Record()
    assert "anything at all" in record.missing(ALL_BACKENDS)
    for name, subject in SUBJECTS.items():
        for backend in subject.backends:
            record.add(name, backend, "float64", [Measured("y", False, Errors(0.0, 0.0))])
    # Values everywhere; gradients nowhere.
    assert all(line.startswith("gradients of ") for line in record.missing(ALL_BACKENDS))
    assert "gradients of selective_scan on torch" in record.missing(ALL_BACKENDS)
    for name, subject in SUBJECTS.items():
        for backend in subject.backends:
            record.add(name, backend, "float64", [Measured("gradient of u", True, Errors(0.0, 0.0))])
    assert not record.missing(ALL_BACKENDS)
    record.rows.pop(("softsort", "jax", "float64"))
    assert record.missing(ALL_BACKENDS) == ["softsort on jax"]


def test_a_session_that_compares_nothing_fails() -> None:
    """The whole module runs, every test passes, and not one array was looked at."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "tests.equivalence_selftest.compare_nothing", "tests/equivalence/test_equivalence.py"),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "failed" not in result.stdout.splitlines()[-1], result.stdout[-2000:]
    assert "nothing was compared for anything at all" in result.stdout
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
