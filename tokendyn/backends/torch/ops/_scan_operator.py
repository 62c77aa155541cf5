"""A scan engine's launches as a pair of operators that torch.compile and autograd know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register(
    name: str,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]],
    backward: Callable[..., tuple[torch.Tensor | None, ...]],
    states_shape: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[int, ...]],
) -> Callable[..., Any]:
    """Register ``tokendyn::NAME`` and ``tokendyn::NAME_backward``; return what an engine's ``run`` is.

    ``forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, delta_softplus,
    return_last_state, keep_states)`` gives y, the last state, and states for the backward pass of ``states_shape(u, A,
    B)`` in float32; the latter two may be None where they were not asked for. ``backward(dy, dlast, states, u, delta,
    A, B, C, D, z, delta_bias, seq_idx, lengths, delta_softplus, initial_gradient)`` gives the gradients of u, delta,
    A, B, C, D, z, delta_bias, initial_state, None where there are none. A is (d, N) or (d, 1), B and C (b, G, N, L).
    """

    @torch.library.custom_op(f"tokendyn::{name}", mutates_args=())
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
        y, last, states = forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths,
                                  delta_softplus, return_last_state, keep_states)  # fmt: skip
        return (
            y,
            u.new_empty((0,), dtype=torch.float32) if last is None else last,
            u.new_empty((0,), dtype=torch.float32) if states is None else states,
        )

    @scan.register_fake  # type: ignore[attr-defined]
    def _(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, delta_softplus, return_last_state,
          keep_states):  # fmt: skip
        last = (u.shape[0], u.shape[1], B.shape[2]) if return_last_state else (0,)
        states = states_shape(u, A, B) if keep_states else (0,)
        floats = {"dtype": torch.float32}
        return torch.empty_like(u), u.new_empty(last, **floats), u.new_empty(states, **floats)

    @torch.library.custom_op(f"tokendyn::{name}_backward", mutates_args=())
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
        found = backward(dy, dlast, states, u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths, delta_softplus,
                         initial_gradient)  # fmt: skip
        return [u.new_empty((0,), dtype=torch.float32) if gradient is None else gradient for gradient in found]

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

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, ctx.delta_softplus, ctx.last, _ = inputs
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.save_for_backward(output[2], u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths)

    def differentiate(ctx: Any, dy: torch.Tensor | None, dlast: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        states, u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = scan_backward(
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

    scan.register_autograd(differentiate, setup_context=save)  # type: ignore[attr-defined]

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
        differentiable = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        keep_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
        y, last_state, _ = scan(
            u, delta, A.reshape(A.shape[0], -1), B, C, D, z, delta_bias, initial_state, seq_idx, lengths,
            delta_softplus, return_last_state, keep_states,
        )  # fmt: skip
        return (y, last_state) if return_last_state else y

    return run
