"""The triton engine: its launches as an operator."""

from __future__ import annotations

import torch

from tokendyn.backends.torch.ops import _scan_triton_launch as launch
from tokendyn.backends.torch.ops._scan_operator import register


def _forward(u, delta, A, B, C, D, z, bias, initial_state, seq_idx, lengths, softplus, return_last_state, keep_states):
    if seq_idx is not None:
        seq_idx = seq_idx.contiguous()
    arguments = (u, delta, A, B, C, D, z, bias, initial_state, seq_idx, lengths, softplus)
    if launch.uses_matrices(A, B):
        y, boundaries, states = launch.scalar_forward(*arguments, keep_states)
    else:
        y, boundaries, states = launch.general_forward(*arguments)
    return y, launch.slot(boundaries, -1) if return_last_state else None, states if keep_states else None


def _backward(
    dy, dlast, states, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus, initial_gradient
) -> tuple[torch.Tensor | None, ...]:
    if seq_idx is not None:
        seq_idx = seq_idx.contiguous()
    run_backward = launch.scalar_backward if launch.uses_matrices(A, B) else launch.general_backward
    du, ddelta, dA, dB, dC, dD, dz, dbias, costates = run_backward(
        dy, dlast, states, u, delta, A, B, C, D, z, bias, seq_idx, lengths, softplus
    )
    return (
        du, ddelta, dA.to(A.dtype).contiguous(), dB.to(B.dtype).contiguous(), dC.to(C.dtype).contiguous(),
        None if D is None else dD.to(D.dtype),
        None if z is None else dz,
        None if bias is None else dbias.to(bias.dtype),
        launch.slot(costates, 0) if initial_gradient else None,
    )  # fmt: skip


run = register("triton", _forward, _backward, launch.states_shape)
