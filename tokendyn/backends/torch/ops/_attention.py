"""Hidden attention by segment sums: exact at any range, since only positive terms are ever added."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokendyn.backends.torch.ops._function import transformed
from tokendyn.backends.torch.ops._precision import compute_dtype, without_autocast
from tokendyn.backends.torch.ops._scan_plain import sequence_starts, step_size, valid_tokens

#: Elements of one (channels, b, R, L) block while an aggregate is made.
_BLOCK_ELEMENTS = 1 << 22


def hidden_attention(
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    seq_idx: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    channel: int | None = None,
    aggregate: str | None = None,
    rows: tuple[int, int] | None = None,
) -> torch.Tensor:
    """See :func:`tokendyn.hidden_attention`."""
    out_dtype, dtype = delta.dtype, compute_dtype(delta)
    delta, A, B, C = (t.to(dtype) for t in (delta, A, B, C))
    if B.ndim == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    b, d, length = delta.shape
    per_group = d // B.shape[1]
    start, stop = rows or (0, length)
    valid = None
    if lengths is not None:
        valid = valid_tokens(lengths, length)
        delta = torch.where(valid[:, None], delta, 0.0)
        B, C = (torch.where(valid[:, None, None], t, 0.0) for t in (B, C))
    step = step_size(delta, None if delta_bias is None else delta_bias.to(dtype), delta_softplus, valid)
    C = C[..., start:stop]
    A = A.reshape(d, -1)

    token = torch.arange(length, device=delta.device)
    row = token[start:stop]
    visible = (token <= row[:, None]).expand(b, -1, -1)
    if seq_idx is not None:
        sequence = sequence_starts(seq_idx).cumsum(-1)
        visible = visible & (sequence[:, start:stop, None] == sequence[:, None, :])

    def block(first: int, last: int) -> torch.Tensor:
        """(b, last - first, R, L) of neighbouring channels of one group."""
        group = first // per_group
        return _attention(step[:, first:last], A[first:last], B[:, group], C[:, group], visible, start)

    with without_autocast(delta):
        if channel is not None:
            return block(channel, channel + 1).squeeze(1).to(out_dtype)
        if aggregate is None:
            return torch.cat([block(first, first + per_group) for first in range(0, d, per_group)], 1).to(out_dtype)

        def total(first: int, last: int) -> torch.Tensor:
            weights = block(first, last)
            return (weights.abs() if aggregate == "mean_abs" else weights).sum(1)

        # So that autograd, too, never holds all channels: their blocks are made again in the backward pass.
        frugal = functools.partial(checkpoint, total, use_reentrant=False) if _can_checkpoint() else total
        width = min(per_group, max(1, _BLOCK_ELEMENTS // (b * (stop - start) * length)))
        mean = torch.zeros((b, stop - start, length), dtype=dtype, device=delta.device)
        for low in range(0, d, per_group):
            for first in range(low, low + per_group, width):
                mean = mean + frugal(first, min(first + width, low + per_group))
        return (mean / d).to(out_dtype)


def _can_checkpoint() -> bool:
    """Checkpoints know neither torch.func nor forward mode."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed()


def _attention(
    step: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, visible: torch.Tensor, start: int
) -> torch.Tensor:
    """(b, c, R, L) for step (b, c, L), A (c, N or 1), B (b, N, L), C (b, N, R), visible (b, R, L)."""
    length, count = step.shape[-1], C.shape[-1]
    # Segment sums Σ_{k=j+1..l} Δ_k: row `start` from its end backwards, later rows by adding one term each.
    first = F.pad(step[..., 1 : start + 1].flip(-1).cumsum(-1).flip(-1), (0, length - start))
    token = torch.arange(length, device=step.device)
    row = token[start + 1 : start + count]
    terms = torch.where(token < row[:, None], step[..., start + 1 : start + count, None], 0.0)
    segments = torch.cat([first.unsqueeze(-2), terms], -2).cumsum(-2)
    # Masked before the exponential: a mask after it would multiply 0 by infinity in the gradient.
    hidden = ~visible.unsqueeze(1)

    def decay(n: int) -> torch.Tensor:
        return (segments * A[:, n, None, None]).masked_fill(hidden, -torch.inf).exp()

    if A.shape[1] == 1:
        weights = torch.einsum("bnr,bnl->brl", C, B).unsqueeze(1) * decay(0)
    else:
        weights = sum((C[:, n, :, None] * B[:, n, None, :]).unsqueeze(1) * decay(n) for n in range(A.shape[1]))
    # Masked again, because what is not a number gets past a decay of 0.
    return (weights * step.unsqueeze(-2)).masked_fill(hidden, 0.0)
