"""The executable spec: every operation in float64 plain loops that read like the equations.

``core.<op>(...)`` takes the arguments of ``tokendyn.<op>(...)``, unchecked. ``core.<op>_vjp(dout, ...)`` gives
the gradients of ``⟨dout, output⟩`` by argument name, for the differentiable arguments that were given; where
the output is a tuple so is ``dout``, and its members may be None. All backends answer to these functions. They
are slow on purpose: to run a model use ``tokendyn.<op>``.
"""

from __future__ import annotations

from tokendyn.core._attention import hidden_attention, hidden_attention_vjp
from tokendyn.core._attention_flow import (
    attention_flow,
    attention_flow_vjp,
    autoregressive_flow,
    autoregressive_flow_vjp,
)
from tokendyn.core._flow import flow_rhs, flow_rhs_vjp, sphere_flow, sphere_flow_vjp
from tokendyn.core._order import (
    effective_tokens,
    hard_order,
    importance_score,
    importance_score_vjp,
    put_tokens,
    put_tokens_vjp,
    softsort,
    softsort_matrix,
    softsort_matrix_vjp,
    softsort_restore,
    softsort_restore_vjp,
    softsort_vjp,
    take_tokens,
    take_tokens_vjp,
)
from tokendyn.core._parametrize import io_projections, io_projections_vjp, io_spectrum, io_spectrum_vjp
from tokendyn.core._scan import selective_scan, selective_scan_vjp
from tokendyn.core._step import selective_state_update, selective_state_update_vjp

__all__ = [
    "attention_flow",
    "attention_flow_vjp",
    "autoregressive_flow",
    "autoregressive_flow_vjp",
    "effective_tokens",
    "flow_rhs",
    "flow_rhs_vjp",
    "hard_order",
    "hidden_attention",
    "hidden_attention_vjp",
    "importance_score",
    "importance_score_vjp",
    "io_projections",
    "io_projections_vjp",
    "io_spectrum",
    "io_spectrum_vjp",
    "put_tokens",
    "put_tokens_vjp",
    "selective_scan",
    "selective_scan_vjp",
    "selective_state_update",
    "selective_state_update_vjp",
    "softsort",
    "softsort_matrix",
    "softsort_matrix_vjp",
    "softsort_restore",
    "softsort_restore_vjp",
    "softsort_vjp",
    "sphere_flow",
    "sphere_flow_vjp",
    "take_tokens",
    "take_tokens_vjp",
]
