"""What the NumPy operations share: the dtypes they take, and conversions that other backends also offer."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn._checks import dtype_name
from tokendyn.errors import DTypeError


def expect_dtype(operation: str, array: np.ndarray) -> np.dtype:
    """The dtype of ``array``, float32 or float64: NumPy has no arithmetic of its own in half precision."""
    if array.dtype not in (np.float32, np.float64):
        raise DTypeError(
            f"{operation}: the NumPy backend computes in float32 and float64, got {dtype_name(array)}; "
            f"convert with .astype('float32'), or use PyTorch or JAX arrays for half precision"
        )
    return array.dtype


def stop_gradient(x: np.ndarray) -> np.ndarray:
    """``x``: NumPy keeps no gradients."""
    return x


def permutation_matrix(indices: np.ndarray, like: np.ndarray) -> np.ndarray:
    """(b, L, L) in the dtype of ``like`` with a 1 at [b, k, indices[b, k]]."""
    return np.eye(indices.shape[1], dtype=like.dtype)[indices]


def from_numpy(array: Any, dtype_name: str | None = None) -> np.ndarray:
    """``array`` as this backend's array, in the dtype named if one is."""
    return np.asarray(array, dtype_name)


def to_numpy(x: Any) -> np.ndarray:
    """``x`` as a NumPy array."""
    return np.asarray(x)
