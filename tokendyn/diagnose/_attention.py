"""Hidden attention in blocks, fast enough for every channel of a trained layer.

For l ≥ j with a token c between them, ``exp(A Σ_{k=j+1..l} Δ_k)`` is the product of ``exp(A Σ_{k=c+1..l} Δ_k)`` and
``exp(A Σ_{k=j+1..c} Δ_k)``: two factors not above 1, so nothing overflows. With c the end of j's block, an off-diagonal
block of a channel is one product of (T, N) and (N, T); exponentials are taken of the pairs inside the smallest blocks
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tokendyn.diagnose._capture import Capture

#: Tokens in a block, and in the blocks that a block on the diagonal is made of; in the smallest, every pair's decay is
#: an exponential of its own.
BLOCKS = (64, 16)


def attention_blocks(
    capture: Capture, sequence: int, channels: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, P (c, rows, columns)) for all blocks on and under the diagonal, in rows of blocks.

    Args:
        capture: a layer's scan.
        sequence: which of the batch.
        channels: c channels.
        dtype: float32 or float64, of the computation.

    Cost:
        O(c L² N) multiplications, O(c L N) exponentials times the smallest block's 16 tokens; memory O(c L N).

    Source:
        Paper 1, Eqs. (4)-(6).
    """
    chosen = list(channels)
    delta = capture.delta[sequence, chosen].to(dtype)  # (c, L)
    A = capture.A.reshape(capture.A.shape[0], -1)[chosen].to(dtype)  # (c, N)
    yield from _blocks(delta, A, capture.B[sequence].to(dtype), capture.C[sequence].to(dtype), BLOCKS)


def _blocks(
    delta: Tensor, A: Tensor, B: Tensor, C: Tensor, sizes: tuple[int, ...]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """delta (c, L), A (c, N), B and C (N, L); blocks of ``sizes[0]``, those on the diagonal made of smaller ones."""
    length = delta.shape[-1]
    spans = [slice(start, min(start + sizes[0], length)) for start in range(0, length, sizes[0])]
    totals = [delta[:, span].sum(-1) for span in spans]  # Σ Δ over each block
    right: list[Tensor] = []
    for i, rows in enumerate(spans):
        step = delta[:, rows]
        after = F.pad(step[:, 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))  # Σ_{k=j+1..end}
        left = (A[:, None, :] * step.cumsum(-1)[..., None]).exp_() * C[:, rows].mT  # (c, T, N)
        between = torch.zeros_like(totals[0])
        row: list[tuple[slice, Tensor]] = []
        for j in range(i - 1, -1, -1):
            carried = left * (A * between[:, None]).exp()[:, None, :]
            row.append((spans[j], carried @ right[j]))
            between = between + totals[j]
        for span, weights in reversed(row):
            yield rows, span, weights
        yield rows, rows, _diagonal(step, A, B[:, rows], C[:, rows], sizes[1:])
        right.append((A[:, :, None] * after[:, None, :]).exp_() * (B[None, :, rows] * step[:, None, :]))  # (c, N, T)


def _diagonal(step: Tensor, A: Tensor, B: Tensor, C: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(c, T, T) of one block on the diagonal: step (c, T), A (c, N), B and C (N, T)."""
    size = step.shape[-1]
    weights = step.new_zeros(len(step), size, size)
    if sizes:
        for rows, columns, inner in _blocks(step, A, B, C, sizes):
            weights[:, rows, columns] = inner
        return weights
    below = torch.ones(size, size, dtype=torch.bool, device=step.device).tril(-1)
    segments = torch.where(below, step[:, :, None], 0.0).cumsum(-2)  # Σ_{k=j+1..l}
    for n in range(A.shape[1]):
        weights += (A[:, n, None, None] * segments).exp_().mul_(torch.outer(C[n], B[n]))
    return weights.mul_(step[:, None, :]).tril_()
