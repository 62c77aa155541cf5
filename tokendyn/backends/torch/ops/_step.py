"""One step of the selective scan: describe the call, let an engine run it."""

from __future__ import annotations

import torch

from tokendyn.backends.torch.ops._engines import StepCall, choose
from tokendyn.backends.torch.ops._function import transformed


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    *,
    engine: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`tokendyn.selective_state_update`."""
    arrays = (state, x, dt, A, B, C, D, z, dt_bias)
    call = StepCall(
        dtype=x.dtype,
        device=x.device.type,
        state=state.shape[2],
        needs_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arrays),
        transformed=transformed(),
    )
    return choose("selective_state_update", engine, call).run(*arrays, dt_softplus)
