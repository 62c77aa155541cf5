"""Input-output maps on NumPy arrays: small matrices, computed by the spec in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn._operations import IOSpectrum
from tokendyn.backends.numpy.ops._arrays import expect_dtype
from tokendyn.core import _parametrize as spec


def io_projections(
    weight_B: np.ndarray, weight_C: np.ndarray | None = None, diagonal: np.ndarray | None = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """See :func:`tokendyn.io_projections`."""
    dtype = expect_dtype("io_projections", weight_B)
    S_B, S_C = spec.io_projections(weight_B, weight_C, diagonal, **options)
    return S_B.astype(dtype), S_C.astype(dtype)


def io_spectrum(S_B: np.ndarray, S_C: np.ndarray) -> IOSpectrum:
    """See :func:`tokendyn.io_spectrum`."""
    eigenvalues, symmetric = spec.io_spectrum(S_B, S_C)
    return IOSpectrum(eigenvalues.astype(np.result_type(S_B, np.complex64)), symmetric.astype(S_B.dtype))
