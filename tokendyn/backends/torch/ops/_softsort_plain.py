"""The plain engine of SoftSort and its inverse: ordinary torch code, differentiable to any order.

With power 1, K_ij = exp(-|s_i - s_j|/τ) of sorted scores is semiseparable. In sorted coordinates SoftSort is
``P x = (K x) / (K 1)`` and its inverse ``K(y / Z) / K(1 / Z)`` with ``Z = K 1``: products in linear time and memory.
Short sequences, where the matrix is small and its product faster, and other powers are dense.
"""

from __future__ import annotations

import torch

from tokendyn.backends.torch.ops._laplace import laplace_kernel
from tokendyn.backends.torch.ops._permute import put_tokens, sorting, take_tokens
from tokendyn.backends.torch.ops._precision import compute_dtype, without_autocast

#: Up to these lengths the dense product takes less time than the linear one, forward and backward; both are exact.
_DENSE_UP_TO = {"cpu": 256, "cuda": 1024}


def softsort(scores: torch.Tensor, x: torch.Tensor, tau: float, power: float, ascending: bool) -> torch.Tensor:
    """See :func:`tokendyn.softsort`."""
    dtype = compute_dtype(scores, x)
    scores, values = scores.to(dtype), x.to(dtype)
    if is_dense(scores, power):
        with without_autocast(x):
            return (matrix(scores, tau, power, ascending) @ values).to(x.dtype)
    order, placed, ones = in_order(scores, ascending)
    summed = laplace_kernel(placed, torch.cat([take_tokens(values, order), ones], -1), tau)
    return (summed[..., :-1] / (summed[..., -1:] + poison(scores))).to(x.dtype)


def softsort_restore(scores: torch.Tensor, y: torch.Tensor, tau: float, power: float, ascending: bool) -> torch.Tensor:
    """See :func:`tokendyn.softsort_restore`."""
    dtype = compute_dtype(scores, y)
    scores, values = scores.to(dtype), y.to(dtype)
    if is_dense(scores, power):
        weights = matrix(scores, tau, power, ascending).mT
        with without_autocast(y):
            return ((weights @ values) / weights.sum(-1, keepdim=True)).to(y.dtype)
    order, placed, ones = in_order(scores, ascending)
    mass = laplace_kernel(placed, ones, tau) + poison(scores)
    summed = laplace_kernel(placed, torch.cat([values, ones], -1) / mass, tau)
    return put_tokens(summed[..., :-1] / summed[..., -1:], order).to(y.dtype)


def is_dense(scores: torch.Tensor, power: float) -> bool:
    return power != 1 or scores.shape[-1] <= _DENSE_UP_TO.get(scores.device.type, _DENSE_UP_TO["cuda"])


def in_order(scores: torch.Tensor, ascending: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order, the scores in that order (b, L), and a column of ones (b, L, 1)."""
    order = sorting(scores, ascending)
    places = order.clamp(max=scores.shape[-1] - 1)
    return order, scores.gather(-1, places), torch.ones_like(scores).unsqueeze(-1)


def poison(scores: torch.Tensor) -> torch.Tensor:
    """(b, 1, 1): 0, or NaN where a row has a score that is not finite."""
    return (scores.detach() * 0).sum(-1)[:, None, None]


def matrix(scores: torch.Tensor, tau: float, power: float, ascending: bool) -> torch.Tensor:
    _, placed, _ = in_order(scores, ascending)
    distance = placed.unsqueeze(-1) - scores.unsqueeze(-2)
    if power == 1:
        distance = distance.abs()
    elif power == 2:
        distance = distance.square()
    else:
        same = distance == 0  # pins the derivative at 0, which is infinite for power < 1
        distance = torch.where(same, 0.0, torch.where(same, 1.0, distance).abs() ** power)
    return torch.softmax(-distance / tau, -1) + poison(scores)
