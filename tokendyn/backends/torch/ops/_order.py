"""Orders of tokens: scores, SoftSort, hard orders and their inverses.

With power 1, K_ij = exp(-|s_i - s_j|/τ) of sorted scores is semiseparable. In sorted coordinates SoftSort is
``P x = (K x) / (K 1)`` and its inverse ``K(y / Z) / K(1 / Z)`` with ``Z = K 1``: products in linear time and memory.
Short sequences, where the matrix is small and its product faster, and other powers are dense.
"""

from __future__ import annotations

import torch

from tokendyn.backends.torch.ops._laplace import laplace_kernel
from tokendyn.backends.torch.ops._precision import compute_dtype, without_autocast

#: Up to these lengths the dense product takes less time than the linear one, forward and backward; both are exact.
_DENSE_UP_TO = {"cpu": 256, "cuda": 1024}


def importance_score(x: torch.Tensor, s_delta: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.importance_score`."""
    dtype = compute_dtype(x)
    with without_autocast(x):
        direction = k.to(dtype) if s_delta is None else k.to(dtype) @ s_delta.to(dtype)
        return (x.to(dtype) @ direction).to(x.dtype)


def hard_order(scores: torch.Tensor, *, ascending: bool = True) -> torch.Tensor:
    """See :func:`tokendyn.hard_order`."""
    return torch.sort(scores.detach(), dim=-1, stable=True, descending=not ascending).indices


def take_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.take_tokens`."""
    return x.flatten(0, 1).index_select(0, _rows(indices)).view_as(x)


def put_tokens(y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.put_tokens`."""
    rows = y.flatten(0, 1)
    return torch.empty_like(rows).index_copy(0, _rows(indices), rows).view_as(y)


def _rows(indices: torch.Tensor) -> torch.Tensor:
    """Places (b, L) in each sequence as places (b L,) in all of them end to end: whole rows move at once."""
    b, length = indices.shape
    starts = torch.arange(0, b * length, length, device=indices.device)
    return (indices + starts.unsqueeze(-1)).flatten()


def softsort(
    scores: torch.Tensor, x: torch.Tensor, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> torch.Tensor:
    """See :func:`tokendyn.softsort`."""
    dtype = compute_dtype(scores, x)
    scores, values = scores.to(dtype), x.to(dtype)
    if _is_dense(scores, power):
        with without_autocast(x):
            return (_matrix(scores, tau, power, ascending) @ values).to(x.dtype)
    order, placed, ones = _sorted(scores, ascending)
    summed = laplace_kernel(placed, torch.cat([take_tokens(values, order), ones], -1), tau)
    return (summed[..., :-1] / (summed[..., -1:] + _poison(scores))).to(x.dtype)


def softsort_restore(
    scores: torch.Tensor, y: torch.Tensor, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> torch.Tensor:
    """See :func:`tokendyn.softsort_restore`."""
    dtype = compute_dtype(scores, y)
    scores, values = scores.to(dtype), y.to(dtype)
    if _is_dense(scores, power):
        weights = _matrix(scores, tau, power, ascending).mT
        with without_autocast(y):
            return ((weights @ values) / weights.sum(-1, keepdim=True)).to(y.dtype)
    order, placed, ones = _sorted(scores, ascending)
    mass = laplace_kernel(placed, ones, tau) + _poison(scores)
    summed = laplace_kernel(placed, torch.cat([values, ones], -1) / mass, tau)
    return put_tokens(summed[..., :-1] / summed[..., -1:], order).to(y.dtype)


def softsort_matrix(
    scores: torch.Tensor, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> torch.Tensor:
    """See :func:`tokendyn.softsort_matrix`."""
    return _matrix(scores.to(compute_dtype(scores)), tau, power, ascending).to(scores.dtype)


def effective_tokens(
    scores: torch.Tensor, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> torch.Tensor:
    """See :func:`tokendyn.effective_tokens`."""
    wide = scores.detach().to(compute_dtype(scores))
    if _is_dense(scores, power):
        return _matrix(wide, tau, power, ascending).square().sum(-1).reciprocal().to(scores.dtype)
    _, placed, ones = _sorted(wide, ascending)
    mass = laplace_kernel(placed, ones, tau) + _poison(wide)
    return (mass.square() / laplace_kernel(placed, ones, tau / 2)).squeeze(-1).to(scores.dtype)


def _is_dense(scores: torch.Tensor, power: float) -> bool:
    return power != 1 or scores.shape[-1] <= _DENSE_UP_TO.get(scores.device.type, _DENSE_UP_TO["cuda"])


def _sorted(scores: torch.Tensor, ascending: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order, the scores in that order (b, L), and a column of ones (b, L, 1)."""
    order = hard_order(scores, ascending=ascending)
    return order, scores.gather(-1, order), torch.ones_like(scores).unsqueeze(-1)


def _poison(scores: torch.Tensor) -> torch.Tensor:
    """(b, 1, 1): 0, or NaN where a row has a score that is not finite."""
    return (scores.detach() * 0).sum(-1)[:, None, None]


def _matrix(scores: torch.Tensor, tau: float, power: float, ascending: bool) -> torch.Tensor:
    _, placed, _ = _sorted(scores, ascending)
    distance = placed.unsqueeze(-1) - scores.unsqueeze(-2)
    if power == 1:
        distance = distance.abs()
    elif power == 2:
        distance = distance.square()
    else:
        same = distance == 0  # pins the derivative at 0, which is infinite for power < 1
        distance = torch.where(same, 0.0, torch.where(same, 1.0, distance).abs() ** power)
    return torch.softmax(-distance / tau, -1) + _poison(scores)
