"""Orders of tokens: scores, SoftSort and its inverse by the engine that takes them, hard orders."""

from __future__ import annotations

import importlib.util

import torch

from tokendyn.backends.torch.ops._engines import Call, OrderCall, choose
from tokendyn.backends.torch.ops._function import transformed
from tokendyn.backends.torch.ops._laplace import laplace_kernel
from tokendyn.backends.torch.ops._permute import sorting
from tokendyn.backends.torch.ops._precision import compute_dtype, without_autocast
from tokendyn.backends.torch.ops._softsort_plain import in_order, is_dense, matrix, poison

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def importance_score(x: torch.Tensor, s_delta: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.importance_score`."""
    dtype = compute_dtype(x)
    with without_autocast(x):
        direction = k.to(dtype) if s_delta is None else k.to(dtype) @ s_delta.to(dtype)
        return exact_scores(x, direction).to(x.dtype)


def exact_scores(x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """x (b, L, d) times the direction (d,) of scores, in the direction's dtype: float32, or float64 if x is; on a GPU
    by a kernel of our own, where no copy of x in float32 is made."""
    usable = x.is_cuda and _HAS_TRITON and x.dtype != torch.float64 and direction.dtype == torch.float32
    if usable and not torch.compiler.is_compiling() and not transformed():
        from tokendyn.backends.torch.ops import _score_triton

        return _score_triton.scores(x, direction)
    return x.to(direction.dtype) @ direction


def hard_order(scores: torch.Tensor, *, ascending: bool = True) -> torch.Tensor:
    """See :func:`tokendyn.hard_order`."""
    return sorting(scores, ascending)


def take_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.take_tokens`."""
    return choose("take_tokens", "auto", _describe_move(x)).run(x, indices)


def put_tokens(y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.put_tokens`."""
    return choose("put_tokens", "auto", _describe_move(y)).run(y, indices)


def _describe_move(x: torch.Tensor) -> Call:
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    return Call(dtype=x.dtype, device=x.device.type, needs_grad=needs_grad, transformed=transformed())


def softsort(
    scores: torch.Tensor,
    x: torch.Tensor,
    *,
    tau: float = 1.0,
    power: float = 1,
    ascending: bool = True,
    engine: str = "auto",
) -> torch.Tensor:
    """See :func:`tokendyn.softsort`."""
    return choose("softsort", engine, _describe(scores, x, power)).run(scores, x, tau, power, ascending)


def softsort_restore(
    scores: torch.Tensor,
    y: torch.Tensor,
    *,
    tau: float = 1.0,
    power: float = 1,
    ascending: bool = True,
    engine: str = "auto",
) -> torch.Tensor:
    """See :func:`tokendyn.softsort_restore`."""
    return choose("softsort_restore", engine, _describe(scores, y, power)).run(scores, y, tau, power, ascending)


def _describe(scores: torch.Tensor, x: torch.Tensor, power: float) -> OrderCall:
    return OrderCall(
        dtype=torch.promote_types(scores.dtype, x.dtype),
        device=x.device.type,
        needs_grad=torch.is_grad_enabled() and (scores.requires_grad or x.requires_grad),
        transformed=transformed(),
        length=x.shape[1],
        power=power,
    )


def softsort_matrix(
    scores: torch.Tensor, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> torch.Tensor:
    """See :func:`tokendyn.softsort_matrix`."""
    return matrix(scores.to(compute_dtype(scores)), tau, power, ascending).to(scores.dtype)


def effective_tokens(
    scores: torch.Tensor, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> torch.Tensor:
    """See :func:`tokendyn.effective_tokens`."""
    wide = scores.detach().to(compute_dtype(scores))
    if is_dense(scores, power):
        return matrix(wide, tau, power, ascending).square().sum(-1).reciprocal().to(scores.dtype)
    _, placed, ones = in_order(wide, ascending)
    mass = laplace_kernel(placed, ones, tau) + poison(wide)
    return (mass.square() / laplace_kernel(placed, ones, tau / 2)).squeeze(-1).to(scores.dtype)
