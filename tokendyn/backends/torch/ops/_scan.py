"""Selective scan: describe the call, let an engine run it."""

from __future__ import annotations

from typing import Any

import torch

from tokendyn.backends.torch.ops._engines import ScanCall, choose
from tokendyn.backends.torch.ops._function import transformed


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: torch.Tensor | None = None,
    return_last_state: bool = False,
    seq_idx: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    engine: str = "auto",
) -> Any:
    """See :func:`tokendyn.selective_scan`."""
    optional = {
        "D": D,
        "z": z,
        "delta_bias": delta_bias,
        "initial_state": initial_state,
        "seq_idx": seq_idx,
        "lengths": lengths,
    }
    given = {name: array for name, array in optional.items() if array is not None}
    batch, channels, length = u.shape
    call = ScanCall(
        batch=batch,
        channels=channels,
        length=length,
        groups=B.shape[1] if B.ndim == 4 else 1,
        state=B.shape[-2],
        dtype=u.dtype,
        device=u.device.type,
        scalar_A=A.ndim == 1 or A.shape[1] == 1,
        given=frozenset(given),
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in (u, delta, A, B, C, *given.values())),
        transformed=transformed(),
    )
    return choose("selective_scan", engine, call).run(
        u, delta, A, B, C, delta_softplus=delta_softplus, return_last_state=return_last_state, **given
    )
