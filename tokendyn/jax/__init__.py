"""tokendyn on JAX, without dispatch: every operation for JAX arrays and tracers, and the trainable layers (Flax NNX).

The layers are loaded when first used, so that the operations need no Flax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokendyn import _operations as _ops
from tokendyn._dispatch import bind as _bind
from tokendyn._dispatch import load_backend as _load_backend

if TYPE_CHECKING:
    from tokendyn._causality import Causality, Leak
    from tokendyn._layers import OrderConfig
    from tokendyn.backends.jax._causality import causality, expect_causal
    from tokendyn.backends.jax._weights import load_state_dict, load_weights, save_weights, state_dict
    from tokendyn.backends.jax.layers import S6, Mamba, TokenOrdering, TokenReorder
    from tokendyn.backends.jax.models import MambaLM, MambaVision, mamba_lm_130m, mambavision_t
    from tokendyn.jax import models

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
    "S6",
    "Causality",
    "Leak",
    "Mamba",
    "MambaLM",
    "MambaVision",
    "OrderConfig",
    "TokenOrdering",
    "TokenReorder",
    "attention_flow",
    "autoregressive_flow",
    "causality",
    "effective_tokens",
    "expect_causal",
    "flow_rhs",
    "hard_order",
    "hidden_attention",
    "importance_score",
    "io_projections",
    "io_spectrum",
    "load_state_dict",
    "load_weights",
    "mamba_lm_130m",
    "mambavision_t",
    "models",
    "put_tokens",
    "save_weights",
    "selective_scan",
    "selective_state_update",
    "softsort",
    "softsort_matrix",
    "softsort_restore",
    "sphere_flow",
    "state_dict",
    "take_tokens",
    "token_order",
]

_LAZY = {
    **dict.fromkeys(("Causality", "Leak"), "tokendyn._causality"),
    **dict.fromkeys(("causality", "expect_causal"), "tokendyn.backends.jax._causality"),
    "OrderConfig": "tokendyn._layers",
    **dict.fromkeys(
        ("load_state_dict", "load_weights", "save_weights", "state_dict"), "tokendyn.backends.jax._weights"
    ),
    **dict.fromkeys(("S6", "Mamba", "TokenOrdering", "TokenReorder"), "tokendyn.backends.jax.layers"),
    **dict.fromkeys(("MambaLM", "MambaVision", "mamba_lm_130m", "mambavision_t"), "tokendyn.backends.jax.models"),
}


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("tokendyn.jax.models")
    if name not in _LAZY:
        raise AttributeError(f"module 'tokendyn.jax' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value
