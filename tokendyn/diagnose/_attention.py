"""Hidden attention in blocks, fast enough for every channel of a trained layer.

For l ≥ j with a token c between them, ``exp(A Σ_{k=j+1..l} Δ_k)`` is the product of ``exp(A Σ_{k=c+1..l} Δ_k)`` and
``exp(A Σ_{k=j+1..c} Δ_k)``: two factors not above 1, so nothing overflows. With c the end of j's block, an
off-diagonal block of a channel is one product of (T, N) and (N, T);
exponentials are taken of O(L T) pairs instead of O(L²).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tokendyn.diagnose._capture import Capture

#: Tokens in a block.
BLOCK = 64
#: Elements of one array while a diagonal block is made.
_ELEMENTS = 1 << 23


def attention_blocks(
    capture: Capture, sequence: int, channels: Sequence[int], dtype: torch.dtype, block: int = BLOCK
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, P (c, rows, columns)) for all blocks on and under the diagonal, in rows of blocks.

    Args:
        capture: a layer's scan.
        sequence: which of the batch.
        channels: c channels.
        dtype: float32 or float64, of the computation.
        block: tokens in a block.

    Cost:
        O(c L² N) multiplications, O(c L T N) exponentials; memory O(c T (T + L N / T)).

    Source:
        Paper 1, Eqs. (4)-(6).
    """
    chosen = list(channels)
    delta = capture.delta[sequence, chosen].to(dtype)  # (c, L)
    A = capture.A.reshape(capture.A.shape[0], -1)[chosen].to(dtype)  # (c, N)
    B, C = capture.B[sequence].to(dtype), capture.C[sequence].to(dtype)  # (N, L)
    length = delta.shape[-1]
    spans = [slice(start, min(start + block, length)) for start in range(0, length, block)]
    totals = torch.stack([delta[:, span].sum(-1) for span in spans])  # Σ Δ over each block
    right: list[Tensor] = []
    for i, rows in enumerate(spans):
        step = delta[:, rows]
        after = F.pad(step[:, 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))  # Σ_{k=j+1..end}
        left = (A[:, None, :] * step.cumsum(-1)[..., None]).exp() * C[:, rows].mT  # (c, T, N)
        between = torch.zeros_like(totals[0])
        row: list[tuple[slice, Tensor]] = []
        for j in range(i - 1, -1, -1):
            carried = left * (A * between[:, None]).exp()[:, None, :]
            row.append((spans[j], carried @ right[j]))
            between = between + totals[j]
        for span, weights in reversed(row):
            yield rows, span, weights
        yield rows, rows, _diagonal(step, A, B[:, rows], C[:, rows])
        right.append((A[:, :, None] * after[:, None, :]).exp() * (B[None, :, rows] * step[:, None, :]))  # (c, N, T)


def _diagonal(step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """(c, T, T) of one block by segment sums: step (c, T), A (c, N), B and C (N, T)."""
    size = step.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=step.device).tril(-1)
    segments = torch.where(below, step[:, :, None], 0.0).cumsum(-2)  # Σ_{k=j+1..l}
    hidden = torch.ones(size, size, dtype=torch.bool, device=step.device).triu(1)
    weights = torch.empty_like(segments)
    width = max(1, _ELEMENTS // (size * size * A.shape[1]))
    for first in range(0, len(step), width):
        part = slice(first, first + width)
        decay = (A[part, :, None, None] * segments[part, None]).exp_()
        weights[part] = torch.einsum("nr,nl,cnrl->crl", C, B, decay)
    return (weights * step[:, None, :]).masked_fill_(hidden, 0.0)
