"""The plain engine of the single step: ordinary torch code, differentiable to any order."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tokendyn.backends.torch.ops._precision import compute_dtype
from tokendyn.backends.torch.ops._scan_plain import softplus


def run(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`tokendyn.selective_state_update`."""
    dtype = compute_dtype(x)
    batch, channels, size = state.shape
    groups = 1 if B.ndim == 2 else B.shape[1]
    u, step, B, C = (t.to(dtype) for t in (x, dt, B, C))
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = softplus(step)

    def by_group(v: torch.Tensor) -> torch.Tensor:
        return v.reshape(batch, groups, channels // groups, -1)

    B, C = (t.reshape(batch, groups, 1, size) for t in (B, C))
    decay = (by_group(step) * A.to(dtype).reshape(groups, channels // groups, -1)).exp()
    h = decay * by_group(state.to(dtype)) + by_group(step * u) * B
    y = (h * C).sum(-1).reshape(batch, channels)
    if D is not None:
        y = y + D.to(dtype) * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), h.reshape(state.shape).to(state.dtype)
