"""Several sequences packed end to end in one row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokendyn.backends.torch.ops._scan_plain import sequence_starts


def by_sequence(function: Callable[[Tensor], Tensor], x: Tensor, seq_idx: Tensor) -> Tensor:
    """``function`` (n, l, D) → (n, l, ...) of each packed sequence by itself, in a row of its own with zeros behind it.

    For causal functions, which do not see what is behind. The shape of the rows depends on the data, so a GPU is waited
    for.

    Args:
        x: (b, L, D).
        seq_idx: (b, L) integers; another sequence begins wherever the value differs from the one before it.

    Cost:
        That of ``function`` on (sequences, longest of them, D).
    """
    starts = sequence_starts(seq_idx)
    starts[:, 0] = True
    starts = starts.flatten()
    row = starts.cumsum(0) - 1
    place = torch.arange(len(row), device=x.device) - starts.nonzero().squeeze(1)[row]
    rows = x.new_zeros(int(row[-1]) + 1, int(place.max()) + 1, x.shape[-1])
    rows = rows.index_put((row, place), x.flatten(0, 1))
    return function(rows)[row, place].unflatten(0, x.shape[:2])
