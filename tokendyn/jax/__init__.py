"""tokendyn on JAX, without dispatch: every operation for JAX arrays and tracers."""

from __future__ import annotations

from tokendyn import _operations as _ops
from tokendyn._dispatch import bind as _bind
from tokendyn._dispatch import load_backend as _load_backend

_load_backend("jax")

attention_flow = _bind(_ops.attention_flow, "jax")
autoregressive_flow = _bind(_ops.autoregressive_flow, "jax")
effective_tokens = _bind(_ops.effective_tokens, "jax")
flow_rhs = _bind(_ops.flow_rhs, "jax")
hard_order = _bind(_ops.hard_order, "jax")
hidden_attention = _bind(_ops.hidden_attention, "jax")
importance_score = _bind(_ops.importance_score, "jax")
io_projections = _bind(_ops.io_projections, "jax")
io_spectrum = _bind(_ops.io_spectrum, "jax")
put_tokens = _bind(_ops.put_tokens, "jax")
selective_scan = _bind(_ops.selective_scan, "jax")
selective_state_update = _bind(_ops.selective_state_update, "jax")
softsort = _bind(_ops.softsort, "jax")
softsort_matrix = _bind(_ops.softsort_matrix, "jax")
softsort_restore = _bind(_ops.softsort_restore, "jax")
sphere_flow = _bind(_ops.sphere_flow, "jax")
take_tokens = _bind(_ops.take_tokens, "jax")
token_order = _bind(_ops.token_order, "jax")

__all__ = [
    "attention_flow",
    "autoregressive_flow",
    "effective_tokens",
    "flow_rhs",
    "hard_order",
    "hidden_attention",
    "importance_score",
    "io_projections",
    "io_spectrum",
    "put_tokens",
    "selective_scan",
    "selective_state_update",
    "softsort",
    "softsort_matrix",
    "softsort_restore",
    "sphere_flow",
    "take_tokens",
    "token_order",
]
