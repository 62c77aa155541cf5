"""The triton engine of SoftSort and its inverse: operators that torch.compile and autograd know."""

from __future__ import annotations

from typing import Any

import torch

from tokendyn.backends.torch.ops import _softsort_triton_tiles as tiles


def _given(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty((0,)) if gradient is None else gradient


def _per_token(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return x.new_empty(x.shape[:2], dtype=dtype)


@torch.library.custom_op("tokendyn::softsort", mutates_args=())
def apply(
    scores: torch.Tensor, x: torch.Tensor, tau: float, power: int, ascending: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P x, the mass Z and the rank of every token."""
    return tiles.softsort(scores, x, tau, power, ascending)


@apply.register_fake  # type: ignore[attr-defined]
def _(scores, x, tau, power, ascending):
    return torch.empty_like(x), _per_token(x), _per_token(x, torch.int32)


@torch.library.custom_op("tokendyn::softsort_backward", mutates_args=())
def apply_backward(
    dy: torch.Tensor,
    scores: torch.Tensor,
    x: torch.Tensor,
    mass: torch.Tensor,
    rank: torch.Tensor,
    tau: float,
    power: int,
    for_scores: bool,
    for_x: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dscores and dx; empty where they are not asked for."""
    dscores, dx = tiles.softsort_backward(dy, scores, x, mass, rank, tau, power, for_scores, for_x)
    return _given(dscores, scores), _given(dx, x)


@apply_backward.register_fake  # type: ignore[attr-defined]
def _(dy, scores, x, mass, rank, tau, power, for_scores, for_x):
    return _given(scores.new_empty(scores.shape) if for_scores else None, scores), _given(
        torch.empty_like(x) if for_x else None, x
    )


def _save_apply(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    scores, x, ctx.tau, ctx.power, _ = inputs
    ctx.save_for_backward(scores, x, *output[1:])


def _differentiate_apply(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    for_scores, for_x = ctx.needs_input_grad[:2]
    dscores, dx = torch.ops.tokendyn.softsort_backward(
        dy, *ctx.saved_tensors, ctx.tau, ctx.power, for_scores, for_x
    )  # fmt: skip
    return dscores if for_scores else None, dx if for_x else None, None, None, None


apply.register_autograd(_differentiate_apply, setup_context=_save_apply)  # type: ignore[attr-defined]


@torch.library.custom_op("tokendyn::softsort_restore", mutates_args=())
def restore(
    scores: torch.Tensor, y: torch.Tensor, tau: float, power: int, ascending: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse's x, its divisor M, the mass Z and the rank of every token."""
    return tiles.restore(scores, y, tau, power, ascending)


@restore.register_fake  # type: ignore[attr-defined]
def _(scores, y, tau, power, ascending):
    return torch.empty_like(y), _per_token(y), _per_token(y), _per_token(y, torch.int32)


@torch.library.custom_op("tokendyn::softsort_restore_backward", mutates_args=())
def restore_backward(
    dx: torch.Tensor,
    scores: torch.Tensor,
    y: torch.Tensor,
    total: torch.Tensor,
    mass: torch.Tensor,
    rank: torch.Tensor,
    tau: float,
    power: int,
    for_scores: bool,
    for_y: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dscores and dy; empty where they are not asked for."""
    dscores, dy = tiles.restore_backward(dx, scores, y, total, mass, rank, tau, power, for_scores, for_y)
    return _given(dscores, scores), _given(dy, y)


@restore_backward.register_fake  # type: ignore[attr-defined]
def _(dx, scores, y, total, mass, rank, tau, power, for_scores, for_y):
    return _given(scores.new_empty(scores.shape) if for_scores else None, scores), _given(
        torch.empty_like(y) if for_y else None, y
    )


def _save_restore(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    scores, y, ctx.tau, ctx.power, _ = inputs
    ctx.save_for_backward(scores, y, *output[1:])


def _differentiate_restore(ctx: Any, dx: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    for_scores, for_y = ctx.needs_input_grad[:2]
    dscores, dy = torch.ops.tokendyn.softsort_restore_backward(
        dx, *ctx.saved_tensors, ctx.tau, ctx.power, for_scores, for_y
    )  # fmt: skip
    return dscores if for_scores else None, dy if for_y else None, None, None, None


restore.register_autograd(_differentiate_restore, setup_context=_save_restore)  # type: ignore[attr-defined]


def softsort(scores: torch.Tensor, x: torch.Tensor, tau: float, power: float, ascending: bool) -> torch.Tensor:
    """See :func:`tokendyn.softsort`."""
    return torch.ops.tokendyn.softsort(scores, x, float(tau), int(power), ascending)[0]


def softsort_restore(scores: torch.Tensor, y: torch.Tensor, tau: float, power: float, ascending: bool) -> torch.Tensor:
    """See :func:`tokendyn.softsort_restore`."""
    return torch.ops.tokendyn.softsort_restore(scores, y, float(tau), int(power), ascending)[0]
