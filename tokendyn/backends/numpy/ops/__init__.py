"""Every operation of the table on NumPy arrays: Numba engines where a model would run them, else the spec."""

from __future__ import annotations

from tokendyn.backends.numpy.ops._arrays import from_numpy, permutation_matrix, stop_gradient, to_numpy
from tokendyn.backends.numpy.ops._attention import hidden_attention
from tokendyn.backends.numpy.ops._flow import attention_flow, autoregressive_flow, flow_rhs, sphere_flow
from tokendyn.backends.numpy.ops._order import (
    effective_tokens,
    hard_order,
    importance_score,
    put_tokens,
    softsort,
    softsort_matrix,
    softsort_restore,
    take_tokens,
)
from tokendyn.backends.numpy.ops._parametrize import io_projections, io_spectrum
from tokendyn.backends.numpy.ops._scan import selective_scan, selective_scan_vjp
from tokendyn.backends.numpy.ops._step import selective_state_update, selective_state_update_vjp

__all__ = [
    "attention_flow",
    "autoregressive_flow",
    "effective_tokens",
    "flow_rhs",
    "from_numpy",
    "hard_order",
    "hidden_attention",
    "importance_score",
    "io_projections",
    "io_spectrum",
    "permutation_matrix",
    "put_tokens",
    "selective_scan",
    "selective_scan_vjp",
    "selective_state_update",
    "selective_state_update_vjp",
    "softsort",
    "softsort_matrix",
    "softsort_restore",
    "sphere_flow",
    "stop_gradient",
    "take_tokens",
    "to_numpy",
]
