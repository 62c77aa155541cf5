"""Numba twin of :mod:`tokendyn.core._step`: the scan's kernels over one token, in float32 or float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn.core import _scan_numba, _scan_vjp_numba
from tokendyn.core._step import as_scan, cotangents_of_scan, of_step


def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Twin of :func:`tokendyn.core.selective_state_update`."""
    y, new_state = _scan_numba.selective_scan(**as_scan(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus))
    return y[..., 0], new_state


def selective_state_update_vjp(
    dout: Any,
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
) -> dict[str, np.ndarray]:
    """Twin of :func:`tokendyn.core.selective_state_update_vjp`."""
    one_token = as_scan(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    return of_step(_scan_vjp_numba.selective_scan_vjp(cotangents_of_scan(dout), **one_token))
