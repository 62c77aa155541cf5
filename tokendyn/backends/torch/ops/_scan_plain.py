"""The plain engine: discretise, run the linear recurrence, read out. Ordinary torch code around one solver."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tokendyn.backends.torch.ops._recurrence import linear_recurrence


def compute_dtype(*arrays: torch.Tensor) -> torch.dtype:
    """float32 for half precision, else the widest dtype given."""
    dtype = torch.float32
    for array in arrays:
        dtype = torch.promote_types(dtype, array.dtype)
    return dtype


def softplus(v: torch.Tensor) -> torch.Tensor:
    """``ln(1 + e^v)``, exact: torch's own threshold of 20 errs by 2e-9, which float64 sees."""
    return F.softplus(v, threshold=40.0)


def valid_tokens(lengths: torch.Tensor, length: int) -> torch.Tensor:
    """(b, L) whether a token lies before the end of its sequence."""
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(-1)


def step_size(
    delta: torch.Tensor, bias: torch.Tensor | None, use_softplus: bool, valid: torch.Tensor | None
) -> torch.Tensor:
    """(b, d, L) the step size Δ, 0 where a token is padding."""
    if bias is not None:
        delta = delta + bias.unsqueeze(-1)
    if use_softplus:
        delta = softplus(delta)
    return delta if valid is None else torch.where(valid.unsqueeze(1), delta, 0.0)


def run(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_last_state: bool = False,
    seq_idx: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> Any:
    """See :func:`tokendyn.selective_scan`. Tokens come first and channels last inside: (L, b, G, N, d/G)."""
    out_dtype, dtype = u.dtype, compute_dtype(u)
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    D, z, delta_bias, initial_state = (None if t is None else t.to(dtype) for t in (D, z, delta_bias, initial_state))
    if B.ndim == 3:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    b, d, length = u.shape
    groups, state = B.shape[1], B.shape[2]
    valid = None
    if lengths is not None:
        # Padding is cut off at the inputs, so that whatever it holds reaches neither values nor gradients.
        valid = valid_tokens(lengths, length)
        u, delta = (torch.where(valid[:, None], t, 0.0) for t in (u, delta))
        B, C = (torch.where(valid[:, None, None], t, 0.0) for t in (B, C))
        z = None if z is None else torch.where(valid[:, None], z, 0.0)
    delta = step_size(delta, delta_bias, delta_softplus, valid)

    def tokens_first(t: torch.Tensor) -> torch.Tensor:
        return t.permute(2, 0, 1).reshape(length, b, groups, 1, d // groups)

    A = A.reshape(d, -1).T.reshape(-1, groups, d // groups).transpose(0, 1)
    step = tokens_first(delta)
    exponent = step * A
    if seq_idx is not None:
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        if valid is not None:
            starts = starts & valid
        exponent = exponent.masked_fill(starts.T.reshape(length, b, 1, 1, 1), -torch.inf)
    source = tokens_first(delta * u) * B.permute(3, 0, 1, 2).unsqueeze(-1)
    if initial_state is not None:
        initial_state = initial_state.reshape(b, groups, d // groups, state).transpose(2, 3)
    h = linear_recurrence(exponent.exp(), source, initial_state)
    y = (C.permute(3, 0, 1, 2).unsqueeze(-1) * h).sum(-2).reshape(length, b, d).permute(1, 2, 0)
    if D is not None:
        y = y + D.unsqueeze(-1) * u
    if z is not None:
        y = y * F.silu(z)
    y = y.to(out_dtype)
    if not return_last_state:
        return y
    return y, h[-1].transpose(2, 3).reshape(b, d, state)
