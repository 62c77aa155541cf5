"""The triton engine: its scan as an operator that torch.compile and autograd know."""

from __future__ import annotations

from typing import Any

import torch

from tokendyn.backends.torch.ops import _scan_triton_launch as launch


@torch.library.custom_op("tokendyn::selective_scan", mutates_args=())
def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    lengths: torch.Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the last state, and states for the backward pass; the latter two are empty unless asked for."""
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, delta_softplus)
    if launch.uses_matrices(A, B):
        y, boundaries, states = launch.scalar_forward(*arguments, keep_states)
    else:
        y, boundaries, states = launch.general_forward(*arguments)
    nothing = u.new_empty((0,), dtype=torch.float32)
    last = launch.slot(boundaries, -1) if return_last_state else nothing
    return y, last, nothing.clone() if states is None or not keep_states else states


@scan.register_fake  # type: ignore[attr-defined]
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, delta_softplus, return_last_state,
      keep_states):  # fmt: skip
    last = (u.shape[0], u.shape[1], B.shape[2]) if return_last_state else (0,)
    states = launch.states_shape(u, A, B) if keep_states else (0,)
    floats = {"dtype": torch.float32}
    return torch.empty_like(u), u.new_empty(last, **floats), u.new_empty(states, **floats)


@torch.library.custom_op("tokendyn::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: torch.Tensor,
    dlast: torch.Tensor | None,
    states: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    lengths: torch.Tensor | None,
    delta_softplus: bool,
    initial_gradient: bool,
) -> list[torch.Tensor]:
    """du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state; empty where the argument was not given."""
    backward = launch.scalar_backward if launch.uses_matrices(A, B) else launch.general_backward
    du, ddelta, dA, dB, dC, dD, dz, dbias, costates = backward(
        dy, dlast, states, u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths, delta_softplus
    )
    nothing = u.new_empty((0,), dtype=torch.float32)
    return [
        du,
        ddelta,
        dA.to(A.dtype).contiguous(),
        dB.to(B.dtype).contiguous(),
        dC.to(C.dtype).contiguous(),
        nothing if D is None else dD.to(D.dtype),
        dz,
        nothing.clone() if delta_bias is None else dbias.to(delta_bias.dtype),
        launch.slot(costates, 0) if initial_gradient else nothing.clone(),
    ]


@scan_backward.register_fake  # type: ignore[attr-defined]
def _(dy, dlast, states, u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths, delta_softplus, initial_gradient):
    def like(t: torch.Tensor | None) -> torch.Tensor:
        return u.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty(t.shape)

    initial = (u.shape[0], u.shape[1], B.shape[2]) if initial_gradient else (0,)
    return [
        torch.empty_like(u),
        torch.empty_like(delta),
        *(like(t) for t in (A, B, C, D)),
        like(None) if z is None else torch.empty_like(z),
        like(delta_bias),
        u.new_empty(initial, dtype=torch.float32),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, ctx.delta_softplus, ctx.last, _ = inputs
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(output[2], u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths)


def _backward(ctx: Any, dy: torch.Tensor | None, dlast: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    states, u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths = ctx.saved_tensors
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = torch.ops.tokendyn.selective_scan_backward(
        torch.zeros_like(u) if dy is None else dy, dlast if ctx.last else None, states,
        u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths, ctx.delta_softplus, ctx.initial_dtype is not None,
    )  # fmt: skip
    return (
        du, ddelta, dA, dB, dC,
        None if D is None else dD,
        None if z is None else dz,
        None if delta_bias is None else dbias,
        None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype),
        *[None] * 5,
    )  # fmt: skip


scan.register_autograd(_backward, setup_context=_save)  # type: ignore[attr-defined]


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
    initial_state: torch.Tensor | None = None,
    return_last_state: bool = False,
    seq_idx: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> Any:
    """See :func:`tokendyn.selective_scan`."""
    if B.ndim == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    if seq_idx is not None:
        seq_idx = seq_idx.contiguous()
    differentiable = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    y, last_state, _ = torch.ops.tokendyn.selective_scan(
        u, delta, A.reshape(A.shape[0], -1), B, C, D, z, delta_bias, initial_state, seq_idx, lengths, delta_softplus,
        return_last_state, keep_states,
    )  # fmt: skip
    return (y, last_state) if return_last_state else y
