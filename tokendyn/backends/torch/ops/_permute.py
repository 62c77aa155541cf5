"""Permuting tokens, and the permutation that sorts them.

A row of scores that are not all finite has no order: its indices are L, which names no token, and whatever such
indices permute becomes NaN. So a failure shows where values cannot be looked at, under vmap or on a GPU.
"""

from __future__ import annotations

import torch

from tokendyn._checks import concrete


def sorting(scores: torch.Tensor, ascending: bool) -> torch.Tensor:
    """Indices of the stable order of scores (b, L); L in rows with a score that is not finite."""
    scores = scores.detach()
    order = torch.sort(scores, dim=-1, stable=True, descending=not ascending).indices
    return torch.where(scores.isfinite().all(-1, keepdim=True), order, scores.shape[-1])


def take_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.take_tokens`."""
    return _mark(x.flatten(0, 1).index_select(0, _rows(indices)).view_as(x), indices)


def put_tokens(y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """See :func:`tokendyn.put_tokens`."""
    rows = y.flatten(0, 1)
    return _mark(torch.empty_like(rows).index_copy(0, _rows(indices), rows).view_as(y), indices)


def _rows(indices: torch.Tensor) -> torch.Tensor:
    """Places (b, L) in each sequence as places (b L,) in all of them end to end: whole rows move at once."""
    b, length = indices.shape
    starts = torch.arange(0, b * length, length, device=indices.device)
    return (indices.clamp(max=length - 1) + starts.unsqueeze(-1)).flatten()


def _mark(permuted: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """NaN (or the lowest integer) in the rows whose indices name no token."""
    length = indices.shape[1]
    values = concrete(indices, synchronize=False)
    if values is not None and values.max() < length:
        return permuted
    if permuted.is_floating_point():
        nothing = float("nan")
    else:
        nothing = 0 if permuted.dtype == torch.bool else torch.iinfo(permuted.dtype).min
    return torch.where((indices < length).all(-1)[:, None, None], permuted, nothing)
