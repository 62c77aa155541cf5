"""Orders of tokens: scores, SoftSort, hard orders and their inverses.

With power 1, K_ij = exp(-|s_i - s_j|/τ) of sorted scores is semiseparable. In sorted coordinates
SoftSort is ``P x = (K x) / (K 1)`` and its inverse ``K(y / Z) / K(1 / Z)`` with ``Z = K 1``, so both are
a few decayed scans. Other powers are dense.
"""

from __future__ import annotations

import torch

from tokendyn.backends.torch.ops._laplace import laplace_kernel
from tokendyn.backends.torch.ops._scan_plain import compute_dtype


def importance_score(x: torch.Tensor, s_delta: torch.Tensor | None, k: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.importance_score`."""
    return x @ (k if s_delta is None else k @ s_delta)


def hard_order(scores: torch.Tensor, *, ascending: bool = True) -> torch.Tensor:
    """See :func:`tokendyn.hard_order`."""
    return torch.sort(scores.detach(), dim=-1, stable=True, descending=not ascending).indices


def take_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.take_tokens`."""
    return x.gather(1, _index(indices, x))


def put_tokens(y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.put_tokens`."""
    return torch.zeros_like(y).scatter(1, _index(indices, y), y)


def _index(indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return indices.long().unsqueeze(-1).expand_as(like)


def softsort(
    scores: torch.Tensor, x: torch.Tensor, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> torch.Tensor:
    """See :func:`tokendyn.softsort`."""
    dtype = compute_dtype(scores, x)
    scores, values = scores.to(dtype), x.to(dtype)
    if power != 1:
        return (_matrix(scores, tau, power, ascending) @ values).to(x.dtype)
    order, placed, ones = _sorted(scores, ascending)
    mass = laplace_kernel(placed, ones, tau) + _poison(scores)
    return (laplace_kernel(placed, take_tokens(values, order), tau) / mass).to(x.dtype)


def softsort_restore(
    scores: torch.Tensor, y: torch.Tensor, *, tau: float = 1.0, power: float = 1, ascending: bool = True
) -> torch.Tensor:
    """See :func:`tokendyn.softsort_restore`."""
    dtype = compute_dtype(scores, y)
    scores, values = scores.to(dtype), y.to(dtype)
    if power != 1:
        weights = _matrix(scores, tau, power, ascending).mT
        return ((weights @ values) / weights.sum(-1, keepdim=True)).to(y.dtype)
    order, placed, ones = _sorted(scores, ascending)
    mass = laplace_kernel(placed, ones, tau) + _poison(scores)
    restored = laplace_kernel(placed, values / mass, tau) / laplace_kernel(placed, ones / mass, tau)
    return put_tokens(restored, order).to(y.dtype)


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
    if power != 1:
        return _matrix(wide, tau, power, ascending).square().sum(-1).reciprocal().to(scores.dtype)
    _, placed, ones = _sorted(wide, ascending)
    mass = laplace_kernel(placed, ones, tau) + _poison(wide)
    return (mass.square() / laplace_kernel(placed, ones, tau / 2)).squeeze(-1).to(scores.dtype)


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
