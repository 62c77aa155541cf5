"""A scan engine's launches as something that autograd and torch.compile know.

Called eagerly they are an autograd function. While torch.compile traces they are a pair of registered operators, which
it need not look into; called eagerly those would cost several times as much time on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register(
    engine: str,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]],
    backward: Callable[..., tuple[torch.Tensor | None, ...]],
    states_shape: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[int, ...]],
) -> Callable[..., Any]:
    """Register ``tokendyn::selective_scan_ENGINE`` and ``..._backward``; return what an engine's ``run`` is.

    ``forward(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, delta_softplus,
    return_last_state, keep_states)`` gives y, the last state, and states for the backward pass of ``states_shape(u, A,
    B)`` in float32; the latter two may be None where they were not asked for. ``backward(dy, dlast, states, u, delta,
    A, B, C, D, z, delta_bias, seq_idx, lengths, delta_softplus, initial_gradient)`` gives the gradients of u, delta,
    A, B, C, D, z, delta_bias, initial_state, None where there are none. A is (d, N) or (d, 1), B and C (b, G, N, L).
    """

    @torch.library.custom_op(f"tokendyn::selective_scan_{engine}", mutates_args=())
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

    @torch.library.custom_op(f"tokendyn::selective_scan_{engine}_backward", mutates_args=())
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

    def differentiate(ctx: Any, run_backward: Callable[..., Any], dy: Any, dlast: Any) -> tuple[Any, ...]:
        states, u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = run_backward(
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

    def save(ctx: Any, inputs: tuple[Any, ...], states: torch.Tensor | None) -> None:
        u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, lengths, ctx.delta_softplus, ctx.last, _ = inputs
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.save_for_backward(states, u, delta, A, B, C, D, z, delta_bias, seq_idx, lengths)

    scan.register_autograd(  # type: ignore[attr-defined]
        lambda ctx, dy, dlast, _: differentiate(ctx, scan_backward, dy, dlast),
        setup_context=lambda ctx, inputs, output: save(ctx, inputs, output[2]),
    )

    class Gradients(torch.autograd.Function):
        """The backward pass where its results might be differentiated again, which is refused then."""

        @staticmethod
        def forward(ctx: Any, of: Any, dy: torch.Tensor | None, dlast: torch.Tensor | None, *saved: Any) -> Any:
            return differentiate(of, backward, dy, dlast)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError(
                f"the engine {engine!r} of selective_scan has no second derivatives; ask for them with engine='plain'"
            )

    class Scan(torch.autograd.Function):
        """The same for eager calls."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            ctx.set_materialize_grads(False)
            y, last, states = forward(*inputs)
            save(ctx, inputs, states)
            return y, last

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
            dy, dlast = gradients
            if torch.is_grad_enabled():
                return Gradients.apply(ctx, dy, dlast, *ctx.saved_tensors)
            return differentiate(ctx, backward, dy, dlast)

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
        inputs = (
            u, delta, A.reshape(A.shape[0], -1), B, C, D, z, delta_bias, initial_state, seq_idx, lengths,
            delta_softplus, return_last_state, keep_states,
        )  # fmt: skip
        if torch.compiler.is_compiling():
            y, last_state, _ = scan(*inputs)
        elif keep_states:
            y, last_state = Scan.apply(*inputs)  # type: ignore[misc]
        else:
            y, last_state, _ = forward(*inputs)
        return (y, last_state) if return_last_state else y

    return run
