"""An engine's SoftSort and inverse as something that autograd and torch.compile know.

Called eagerly they are autograd functions. While torch.compile traces they are registered operators, which it need not
look into; called eagerly those would cost several times as much time on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

#: (scores, x, tau, power, ascending) -> the output, and numbers (b, L) that the backward pass needs.
Forward = Callable[[torch.Tensor, torch.Tensor, float, int, bool], tuple[torch.Tensor, ...]]
#: (dout, scores, x, those numbers, tau, power, ascending, for_scores, for_x) -> dscores and dx, None if not asked for.
Backward = Callable[..., tuple[torch.Tensor | None, torch.Tensor | None]]


def register(
    name: str, engine: str, forward: Forward, backward: Backward, kept: Sequence[torch.dtype]
) -> Callable[..., torch.Tensor]:
    """Register ``tokendyn::NAME_ENGINE`` and ``..._backward``; return what an engine's ``run`` is.

    ``name`` is of the operation; ``kept`` are the dtypes of the numbers that ``forward`` leaves for ``backward``.
    """

    @torch.library.custom_op(f"tokendyn::{name}_{engine}", mutates_args=())
    def apply(scores: torch.Tensor, x: torch.Tensor, tau: float, power: int, ascending: bool) -> list[torch.Tensor]:
        return list(forward(scores, x, tau, power, ascending))

    @apply.register_fake  # type: ignore[attr-defined]
    def _(scores, x, tau, power, ascending):
        return [torch.empty_like(x), *(x.new_empty(x.shape[:2], dtype=dtype) for dtype in kept)]

    @torch.library.custom_op(f"tokendyn::{name}_{engine}_backward", mutates_args=())
    def apply_backward(
        dout: torch.Tensor,
        scores: torch.Tensor,
        x: torch.Tensor,
        saved: list[torch.Tensor],
        tau: float,
        power: int,
        ascending: bool,
        for_scores: bool,
        for_x: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dscores, dx = backward(dout, scores, x, saved, tau, power, ascending, for_scores, for_x)
        return x.new_empty((0,)) if dscores is None else dscores, x.new_empty((0,)) if dx is None else dx

    @apply_backward.register_fake  # type: ignore[attr-defined]
    def _(dout, scores, x, saved, tau, power, ascending, for_scores, for_x):
        return (
            scores.new_empty(scores.shape) if for_scores else x.new_empty((0,)),
            torch.empty_like(x) if for_x else x.new_empty((0,)),
        )

    def save(ctx: Any, inputs: tuple[Any, ...], saved: Sequence[torch.Tensor]) -> None:
        scores, x, *ctx.options = inputs
        ctx.save_for_backward(scores, x, *saved)

    def differentiate(ctx: Any, run_backward: Callable[..., Any], dout: torch.Tensor) -> tuple[Any, ...]:
        scores, x, *saved = ctx.saved_tensors
        for_scores, for_x = ctx.needs_input_grad[:2]
        dscores, dx = run_backward(dout, scores, x, saved, *ctx.options, for_scores, for_x)
        return dscores if for_scores else None, dx if for_x else None, None, None, None

    apply.register_autograd(  # type: ignore[attr-defined]
        lambda ctx, gradients: differentiate(ctx, apply_backward, gradients[0]),
        setup_context=lambda ctx, inputs, output: save(ctx, inputs, output[1:]),
    )

    class Order(torch.autograd.Function):
        """The same for eager calls."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
            out, *saved = forward(*inputs)
            save(ctx, inputs, saved)
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            if torch.is_grad_enabled():
                return Gradients.apply(ctx, gradients[0], *ctx.saved_tensors)
            return differentiate(ctx, backward, gradients[0])

    class Gradients(torch.autograd.Function):
        """The backward pass where its results might be differentiated again, which is refused then."""

        @staticmethod
        def forward(ctx: Any, of: Any, dout: torch.Tensor, *saved: torch.Tensor) -> Any:
            return differentiate(of, backward, dout)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError(
                f"the engine {engine!r} of {name} has no second derivatives; ask for them with engine='plain'"
            )

    def run(scores: torch.Tensor, x: torch.Tensor, tau: float, power: float, ascending: bool) -> torch.Tensor:
        inputs = (scores, x, float(tau), int(power), ascending)
        if torch.compiler.is_compiling():
            return apply(*inputs)[0]
        if torch.is_grad_enabled() and (scores.requires_grad or x.requires_grad):
            return Order.apply(*inputs)  # type: ignore[return-value]
        return forward(*inputs)[0]

    return run
