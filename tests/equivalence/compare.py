"""What counts as equal: three checks on every array, and none of them can pass by comparing nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: A token is judged against the largest of its neighbours up to this many places away ...
NEIGHBOURS = 2
#: ... if it is smaller than this part of it. See :func:`worst_token`.
NEGLIGIBLE = 0.1
#: Smallest normal number; of float16, which no engine flushes to zero, the smallest of all.
SMALLEST = {
    "float64": 2.0**-1022,
    "complex128": 2.0**-1022,
    "float32": 2.0**-126,
    "complex64": 2.0**-126,
    "bfloat16": 2.0**-126,
    "float16": 2.0**-24,
}


class Mismatch(AssertionError):
    """Two arrays differ; ``check`` names the check that found it."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"[{check}] {message}")
        self.check = check


@dataclass(frozen=True)
class Outcome:
    """An array that came out of a backend: its values in float64 (complex128, int64) and its own dtype's name."""

    values: np.ndarray
    dtype: str


@dataclass(frozen=True)
class Bound:
    """Largest errors allowed: of the whole array and of its worst token."""

    normwise: float
    worst_token: float


@dataclass(frozen=True)
class Errors:
    """Errors found: of the whole array and of its worst token (0 where the array has no token axis)."""

    normwise: float
    worst_token: float


def compare(label: str, got: Outcome, want: np.ndarray, dtype: str, bound: Bound, axes: str | None) -> Errors:
    """Compare ``got`` with the reference.

    Args:
        label: what is compared, for messages.
        got: what the backend made.
        want: the reference, in float64 (complex128, int64).
        dtype: the dtype that ``got`` must have; ``"integer"`` accepts any integer dtype and demands equality.
        bound: the errors allowed.
        axes: one letter an axis, ``t`` the tokens, ``f`` the axes that make up one token, ``k`` others; None if
            the array has no tokens.

    Raises:
        Mismatch: with the name of the check that failed.
    """
    if got.values.shape != want.shape:
        raise Mismatch("shape", f"{label}: shape {got.values.shape}, expected {want.shape}")
    if want.size == 0:
        raise Mismatch("empty", f"{label}: nothing to compare, the reference has shape {want.shape}")
    if dtype == "integer":
        if not got.dtype.startswith(("int", "uint")):
            raise Mismatch("dtype", f"{label}: dtype {got.dtype}, expected an integer dtype")
        if not np.array_equal(got.values, want):
            where = tuple(int(i) for i in np.argwhere(got.values != want)[0])
            raise Mismatch("exact", f"{label}: {got.values[where]} at {where}, expected {want[where]}")
        return Errors(0.0, 0.0)
    if got.dtype != dtype:
        raise Mismatch("dtype", f"{label}: dtype {got.dtype}, expected {dtype}")
    if not np.isfinite(want).all():
        # No case is meant to overflow; a reference that is not finite would leave nothing to measure there.
        raise Mismatch("empty", f"{label}: the reference is not finite at {int((~np.isfinite(want)).sum())} places")
    finite = np.isfinite(got.values)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise Mismatch("non-finite", f"{label}: {got.values[where]} at {where}, expected {want[where]:.6g}")
    # What is smaller than the dtype's smallest number is 0 to some engines and a denormal to others.
    found = np.where(np.abs(got.values - want) < SMALLEST[dtype], want, got.values)
    errors = Errors(normwise(found, want), 0.0 if axes is None else worst_token(found, want, axes))
    for check, error, allowed in (
        ("normwise", errors.normwise, bound.normwise),
        ("worst token", errors.worst_token, bound.worst_token),
    ):
        if not error <= allowed:
            raise Mismatch(check, f"{label}: error {error:.3g}, allowed {allowed:.3g}")
    return errors


def normwise(got: np.ndarray, want: np.ndarray) -> float:
    """``|got - want| / |want|``; where the reference is 0 throughout, 0 for equality and else infinity."""
    every = tuple(range(want.ndim))
    return float(_ratio(_norms(got - want, every), _norms(want, every)).item())


def worst_token(got: np.ndarray, want: np.ndarray, axes: str) -> float:
    """``max_l |got_l - want_l| / max(|want_l|, floor_l)`` over tokens l.

    A token's value is a sum that may cancel: its error is then that of the terms, which are of the size of its
    neighbours' values, and relative to its own small norm it says nothing. So ``floor_l`` is a tenth of the
    largest norm among the tokens at most two places away. It is local on purpose: where the state grows or
    decays by many orders of magnitude along the sequence, a floor made from the whole array would hide every
    fault at the small end.
    """
    assert len(axes) == want.ndim
    token, features = axes.index("t"), tuple(i for i, letter in enumerate(axes) if letter == "f")

    errors, own = (np.moveaxis(_norms(values, features), token, -1) for values in (got - want, want))
    length = own.shape[-1]
    padded = np.pad(own, [(0, 0)] * (own.ndim - 1) + [(NEIGHBOURS, NEIGHBOURS)])
    neighbourhood = np.max([padded[..., i : i + length] for i in range(2 * NEIGHBOURS + 1)], axis=0)
    return float(np.max(_ratio(errors, np.maximum(own, NEGLIGIBLE * neighbourhood))))


def _norms(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Euclidean norms over ``axes``, scaled first: squares of very small numbers would vanish."""
    magnitudes = np.abs(values)
    largest = magnitudes.max(axis=axes, keepdims=True, initial=0.0)
    scale = np.where(largest == 0, 1.0, largest)
    return scale * np.sqrt(np.sum((magnitudes / scale) ** 2, axis=axes, keepdims=True))


def _ratio(error: np.ndarray, size: np.ndarray) -> np.ndarray:
    """``error / size``, with 0/0 = 0: where the reference is exactly 0, nothing but 0 will do."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, np.divide(error, size))
