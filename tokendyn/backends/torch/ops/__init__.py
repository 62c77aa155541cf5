"""The operations of :mod:`tokendyn` on PyTorch tensors: ordinary framework code, on any device.

One function per operation of the table, called with arguments that the table has checked; and the few
conversions that the rest of the package asks of every backend.
"""

from __future__ import annotations

from typing import Any

import torch

from tokendyn.backends.torch.ops._attention import hidden_attention
from tokendyn.backends.torch.ops._flow import attention_flow, autoregressive_flow, flow_rhs, sphere_flow
from tokendyn.backends.torch.ops._order import (
    effective_tokens,
    hard_order,
    importance_score,
    put_tokens,
    softsort,
    softsort_matrix,
    softsort_restore,
    take_tokens,
)
from tokendyn.backends.torch.ops._parametrize import io_projections
from tokendyn.backends.torch.ops._scan import selective_scan
from tokendyn.backends.torch.ops._spectrum import io_spectrum
from tokendyn.backends.torch.ops._step import selective_state_update

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
    "selective_state_update",
    "softsort",
    "softsort_matrix",
    "softsort_restore",
    "sphere_flow",
    "stop_gradient",
    "take_tokens",
    "to_numpy",
]


def stop_gradient(x: torch.Tensor) -> torch.Tensor:
    """``x`` without its history."""
    return x.detach()


def permutation_matrix(indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(b, L, L) in the dtype of ``like``: row k is 1 at ``indices[k]``."""
    places = torch.arange(indices.shape[-1], device=indices.device, dtype=indices.dtype)
    return (indices.unsqueeze(-1) == places).to(like.dtype)


def from_numpy(array: Any, dtype_name: str | None = None) -> torch.Tensor:
    """A CPU tensor with a copy of ``array``'s values, in its own dtype or the one named."""
    return torch.tensor(array, dtype=None if dtype_name is None else getattr(torch, dtype_name))


def to_numpy(x: torch.Tensor) -> Any:
    """``x``'s values as a NumPy array; bfloat16, which NumPy lacks, becomes float32."""
    values = x.detach()
    return (values.float() if values.dtype is torch.bfloat16 else values).cpu().numpy()
