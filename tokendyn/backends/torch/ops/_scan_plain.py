"""The plain engine: discretise, run the linear recurrence, read out. Ordinary torch code around one solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tokendyn.backends.torch.ops._precision import compute_dtype
from tokendyn.backends.torch.ops._recurrence import linear_recurrence


def softplus(v: torch.Tensor) -> torch.Tensor:
    """``ln(1 + e^v)``.

    Not ``F.softplus``: its threshold of 20 errs by 2e-9, which float64 sees, and torch.compile mistakes the layout of
    its gradient where the cotangent is laid out otherwise than v, as it is behind a projection.
    """
    return torch.logaddexp(v, v.new_zeros(()))


def valid_tokens(lengths: torch.Tensor, length: int) -> torch.Tensor:
    """(b, L) whether a token lies before the end of its sequence."""
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(-1)


def sequence_starts(seq_idx: torch.Tensor) -> torch.Tensor:
    """(b, L) booleans: another packed sequence begins at this token. Never at the first."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def step_size(
    delta: torch.Tensor, bias: torch.Tensor | None, use_softplus: bool, valid: torch.Tensor | None
) -> torch.Tensor:
    """(b, d, L) the step size Δ, 0 where a token is padding."""
    if bias is not None:
        delta = delta + bias.unsqueeze(-1)
    if use_softplus:
        delta = softplus(delta)
    return delta if valid is None else torch.where(valid.unsqueeze(1), delta, 0.0)


@dataclass(frozen=True)
class Recurrence:
    """A scan brought to its core ``h_l = exp(Δ_l A) ∘ h_{l-1} + v_l B_l``, ``y_l = ⟨C_l, h_l⟩``.

    Tokens come first and channels last, of each of the G groups, c = d / G: a step of the recurrence then works
    on contiguous memory, with channels in the vector lanes.

    Attributes:
        step: (L, b, G, 1, c) step size Δ.
        v: (L, b, G, 1, c) input Δ u.
        A: (G, N, c), or (G, 1, c) for scalar A.
        B, C: (L, b, G, N, 1).
        h0: (b, G, N, c) or None.
        resets: (L, b, 1, 1, 1) booleans or None: the state is 0 before this token.
    """

    step: torch.Tensor
    v: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    h0: torch.Tensor | None
    resets: torch.Tensor | None


def solve_plainly(r: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
    """y (L, b, G, 1, c) and the last state (b, G, N, c), with all states of all tokens in memory."""
    exponent = r.step * r.A
    if r.resets is None:
        h = linear_recurrence(exponent.exp(), r.v * r.B, r.h0)
    else:
        # A reset is -0, which no decay is, though one may be 0. Masked before the exponential too, for the gradient.
        decay = exponent.masked_fill(r.resets, -torch.inf).exp().masked_fill(r.resets, -0.0)
        h = linear_recurrence(decay, r.v * r.B, r.h0, cuts=True)
    return (r.C * h).sum(-2, keepdim=True), h[-1]


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
    solve: Callable[[Recurrence], tuple[torch.Tensor, torch.Tensor]] = solve_plainly,
) -> Any:
    """See :func:`tokendyn.selective_scan`; ``solve`` is what engines differ in."""
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
    resets = None
    if seq_idx is not None:
        resets = sequence_starts(seq_idx)
        resets = (resets if valid is None else resets & valid).T.reshape(length, b, 1, 1, 1)

    def tokens_first(t: torch.Tensor) -> torch.Tensor:
        return t.permute(2, 0, 1).reshape(length, b, groups, 1, d // groups)

    if initial_state is not None:
        initial_state = initial_state.reshape(b, groups, d // groups, state).mT
    y, last_state = solve(
        Recurrence(
            step=tokens_first(delta),
            v=tokens_first(delta * u),
            A=A.reshape(groups, d // groups, -1).mT,
            B=B.permute(3, 0, 1, 2).unsqueeze(-1),
            C=C.permute(3, 0, 1, 2).unsqueeze(-1),
            h0=initial_state,
            resets=resets,
        )
    )
    y = y.reshape(length, b, d).permute(1, 2, 0)
    if D is not None:
        y = y + D.unsqueeze(-1) * u
    if z is not None:
        y = y * F.silu(z)
    y = y.to(out_dtype)
    return (y, last_state.mT.reshape(b, d, state)) if return_last_state else y
