"""tokendyn on PyTorch, without dispatch: every operation for tensors, and the trainable layers."""

from __future__ import annotations

from tokendyn import _operations as _ops
from tokendyn._dispatch import bind as _bind
from tokendyn._dispatch import load_backend as _load_backend

_load_backend("torch")

# After the check that torch can be imported, which has the clearer message.
from tokendyn._causality import Causality, Leak  # noqa: E402
from tokendyn._layers import OrderConfig  # noqa: E402
from tokendyn.backends.torch._causality import causality, expect_causal  # noqa: E402
from tokendyn.backends.torch.layers import (  # noqa: E402
    H3,
    S6,
    CausalAttention,
    Mamba,
    OrderRecord,
    TokenOrdering,
    TokenReorder,
    record_orders,
)
from tokendyn.torch import models  # noqa: E402
from tokendyn.torch.models import H3LM, MambaLM, MambaVision, TransformerLM, mamba_lm_130m, mambavision_t  # noqa: E402

attention_flow = _bind(_ops.attention_flow, "torch")
autoregressive_flow = _bind(_ops.autoregressive_flow, "torch")
effective_tokens = _bind(_ops.effective_tokens, "torch")
flow_rhs = _bind(_ops.flow_rhs, "torch")
hard_order = _bind(_ops.hard_order, "torch")
hidden_attention = _bind(_ops.hidden_attention, "torch")
importance_score = _bind(_ops.importance_score, "torch")
io_projections = _bind(_ops.io_projections, "torch")
io_spectrum = _bind(_ops.io_spectrum, "torch")
put_tokens = _bind(_ops.put_tokens, "torch")
selective_scan = _bind(_ops.selective_scan, "torch")
selective_state_update = _bind(_ops.selective_state_update, "torch")
softsort = _bind(_ops.softsort, "torch")
softsort_matrix = _bind(_ops.softsort_matrix, "torch")
softsort_restore = _bind(_ops.softsort_restore, "torch")
sphere_flow = _bind(_ops.sphere_flow, "torch")
take_tokens = _bind(_ops.take_tokens, "torch")
token_order = _bind(_ops.token_order, "torch")

__all__ = [
    "H3",
    "H3LM",
    "S6",
    "CausalAttention",
    "Causality",
    "Leak",
    "Mamba",
    "MambaLM",
    "MambaVision",
    "OrderConfig",
    "OrderRecord",
    "TokenOrdering",
    "TokenReorder",
    "TransformerLM",
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
    "mamba_lm_130m",
    "mambavision_t",
    "models",
    "put_tokens",
    "record_orders",
    "selective_scan",
    "selective_state_update",
    "softsort",
    "softsort_matrix",
    "softsort_restore",
    "sphere_flow",
    "take_tokens",
    "token_order",
]
