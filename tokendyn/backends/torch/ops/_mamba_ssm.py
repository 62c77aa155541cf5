"""mamba-ssm's CUDA kernel as an engine, for those who have it installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

_INSTALLED = importlib.util.find_spec("mamba_ssm") is not None


def declines(call: Any) -> str | None:
    """Why mamba-ssm cannot take a call, or None. See :class:`_engines.ScanCall`."""
    if not _INSTALLED:
        return "the package 'mamba-ssm' is not installed"
    if call.device != "cuda":
        return f"the arrays are on {call.device}, it needs an NVIDIA GPU"
    if call.dtype == torch.float64:
        return "it has no float64"
    if call.state > 256:
        return f"the state has N = {call.state} entries, it takes at most 256"
    unknown = sorted(call.given & {"initial_state", "seq_idx", "lengths"})
    if unknown:
        return f"it knows no {' nor '.join(unknown)}"
    if call.return_last_state and call.needs_grad:
        return "its last state has no gradient"
    if call.transformed:
        return "its autograd function has no rule for torch.func transforms"
    return None


def run(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """See :func:`tokendyn.selective_scan`."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    A = A.reshape(A.shape[0], -1).float().expand(-1, B.shape[-2]).contiguous()
    D, delta_bias = (None if t is None else t.float() for t in (D, delta_bias))
    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
