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
    return take_tokens(y, _inverse(indices))


def _inverse(indices: torch.Tensor) -> torch.Tensor:
    """Where each token went, L if nowhere; numbers move, which cost little beside tokens."""
    b, length = indices.shape
    places = torch.arange(length, device=indices.device).expand(b, length)
    nowhere = places.new_full((b, length + 1), length)  # the last column takes what indices outside the sequence put
    return nowhere.scatter(1, torch.where(_named(indices), indices.long(), length), places)[:, :length]


def _named(indices: torch.Tensor) -> torch.Tensor:
    """(b, L) booleans: the index names a token."""
    return (indices >= 0) & (indices < indices.shape[1])


def _rows(indices: torch.Tensor) -> torch.Tensor:
    """Places (b, L) in each sequence as places (b L,) in all of them end to end: whole rows move at once."""
    b, length = indices.shape
    starts = torch.arange(0, b * length, length, device=indices.device)
    return (indices.clamp(0, length - 1) + starts.unsqueeze(-1)).flatten()


def _mark(permuted: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """NaN (or the lowest integer) where an index names no token."""
    if concrete(indices, synchronize=False) is not None:
        return permuted  # the table has looked at them
    if permuted.is_floating_point():
        nothing = float("nan")
    else:
        nothing = 0 if permuted.dtype == torch.bool else torch.iinfo(permuted.dtype).min
    return torch.where(_named(indices).unsqueeze(-1), permuted, nothing)
