"""The H3 layer: two state space models with gates between them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn import _checks as check
from tokendyn.backends.torch.layers._ordering import expect_tokens
from tokendyn.backends.torch.layers._packing import by_sequence
from tokendyn.backends.torch.ops._precision import without_autocast
from tokendyn.errors import OptionError

_CHUNK = 64  # tokens computed by one matrix product


class H3(nn.Module):
    """H3 layer, heads of one channel.

    ::

        q, k, v = in_proj(x);  y = q ∘ SSM_diag(SSM_shift(k) ∘ v);  out_proj(y)

    The shift model holds the last ``d_shift`` tokens, ``SSM_shift(k)_l = Σ_i w_i ∘ k_{l-i}``. The diagonal one has per
    channel ``d_state/2`` conjugate pairs of eigenvalues A_n and one step Δ, by zero-order hold::

        h_l = e^{ΔA} h_{l-1} + (e^{ΔA} - 1)/A u_l,   SSM_diag(u)_l = 2 Re Σ_n C_n h_{nl} + D u_l

    with ``A = -exp(log_A_real) + i A_imag``, at first A_n = -1/2 + iπn. Neither depends on the tokens: the selection of
    Mamba is what H3 lacks.

    Args:
        d_model: channels.
        d_state: real dimension of the diagonal model's state, even.
        d_shift: tokens that the shift model remembers.
        dt_min, dt_max: Δ starts log-uniform between them.
        bias: of in_proj and out_proj.

    Shapes:
        (b, L, d_model) → (b, L, d_model).

    Raises:
        OptionError, ShapeError: an option that cannot be had, or an input that does not fit.

    Cost:
        O(b L D (d_state + d_shift + 64)); one token O(b D (d_state + d_shift)).

    Source:
        Fu et al. (2022), arXiv 2212.14052, Section 3.1; diagonal model as S4D-Lin, arXiv 2206.11893.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_shift: int = 4,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check.expect_size("H3", "d_model", d_model)
        check.expect_size("H3", "d_shift", d_shift)
        if check.expect_size("H3", "d_state", d_state) % 2:
            raise OptionError(f"H3: d_state is {d_state}, expected an even number: eigenvalues come in conjugate pairs")
        self.d_model, self.d_state, self.d_shift = d_model, d_state, d_shift
        pairs = d_state // 2
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.shift = nn.Parameter(torch.empty(d_model, d_shift).uniform_(-1, 1) / math.sqrt(d_shift))
        spread = torch.rand(d_model)
        self.log_dt = nn.Parameter(math.log(dt_min) + spread * (math.log(dt_max) - math.log(dt_min)))
        self.log_A_real = nn.Parameter(torch.full((d_model, pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(pairs, dtype=self.log_dt.dtype).repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, pairs, 2) * math.sqrt(0.5))  # real and imaginary parts
        self.D = nn.Parameter(torch.ones(d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        for kept in (self.shift, self.log_A_real, self.A_imag, self.C):
            setattr(kept, "_no_weight_decay", True)  # noqa: B010

    def forward(self, x: Tensor, *, seq_idx: Tensor | None = None) -> Tensor:
        """x (b, L, d_model) → the same; with ``seq_idx`` (b, L) each of the sequences packed end to end by itself,
        at the cost of (sequences, longest of them)."""
        expect_tokens("H3", x, self.d_model, self.D)
        if seq_idx is not None:
            return by_sequence(self, x, seq_idx)
        q, u, _ = self._gated(x)
        return self.out_proj(q * self._convolve(u).to(q.dtype))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Empty states for decoding ``batch_size`` = b sequences, in ``dtype``.

        (b, D, d_shift) of the shift model; (b, D, d_state/2, 2), in float32 at least, of the diagonal one. They do not
        grow, whatever ``max_seqlen``.
        """
        weight = self.in_proj.weight
        dtype = dtype or weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        return (
            weight.new_zeros(batch_size, self.d_model, self.d_shift, dtype=dtype),
            weight.new_zeros(batch_size, self.d_model, self.d_state // 2, 2, dtype=exact),
        )

    def prefill(self, x: Tensor, shift_state: Tensor, diag_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A whole prompt x (b, L, D) → the same, from the beginning.

        ``shift_state`` and ``diag_state`` are set in place and returned.
        """
        q, u, k = self._gated(x)
        shift_state.copy_(F.pad(k.mT, (self.d_shift - x.shape[1], 0)))  # a negative pad cuts a long prompt
        with without_autocast(x):
            decay, gain = self._discrete()
            ages = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
            powers = torch.exp(decay.unsqueeze(-1) * ages) * gain.unsqueeze(-1)  # (D, N/2, L)
            state = torch.einsum("dnl,bld->bdn", powers, u.to(powers.dtype))
        diag_state.copy_(torch.view_as_real(state))
        return self.out_proj(q * self._convolve(u).to(q.dtype)), shift_state, diag_state

    def step(self, x: Tensor, shift_state: Tensor, diag_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token x (b, 1, D) → the same; ``shift_state`` and ``diag_state`` are advanced in place and returned."""
        q, k, v = self.in_proj(x)[:, 0].chunk(3, dim=-1)
        shift_state.copy_(torch.cat([shift_state[..., 1:], k.unsqueeze(-1).to(shift_state.dtype)], dim=-1))
        u = (shift_state * self.shift.flip(-1)).sum(-1) * v
        with without_autocast(x):
            decay, gain = self._discrete()
            u = u.to(gain.real.dtype)
            state = torch.exp(decay) * torch.view_as_complex(diag_state) + gain * u.unsqueeze(-1)
            y = 2 * (torch.view_as_complex(self.C.to(u.dtype)) * state).sum(-1).real + self.D * u
        diag_state.copy_(torch.view_as_real(state))
        return self.out_proj(q * y.to(q.dtype)).unsqueeze(1), shift_state, diag_state

    def _gated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, SSM_shift(k) ∘ v and k, each (b, L, D)."""
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        padded = F.pad(k.mT, (self.d_shift - 1, 0))
        shifted = F.conv1d(padded, self.shift.flip(-1).unsqueeze(1).to(k.dtype), groups=self.d_model).mT
        return q, shifted * v, k

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """ΔA and (e^{ΔA} - 1)/A, each (D, N/2) complex, in float32 at least."""
        exact = torch.promote_types(self.log_dt.dtype, torch.float32)
        A = torch.complex(-torch.exp(self.log_A_real.to(exact)), self.A_imag.to(exact))
        decay = torch.exp(self.log_dt.to(exact)).unsqueeze(-1) * A
        return decay, (torch.exp(decay) - 1) / A

    def _convolve(self, u: Tensor) -> Tensor:
        """SSM_diag(u), (b, L, D) → (b, L, D), in float32 at least.

        Tokens of one chunk by the (D, chunk, chunk) matrix of the kernel, earlier ones by the state that they left. Not
        by an FFT: its rounding would let every output feel every later token, if only in the last bits.
        """
        length = u.shape[1]
        size = min(length, _CHUNK)
        with without_autocast(u):
            decay, gain = self._discrete()
            u = u.to(gain.real.dtype)
            C = torch.view_as_complex(self.C.to(u.dtype)) * gain
            ages = torch.arange(size, device=u.device)
            powers = torch.exp(decay.unsqueeze(-1) * ages)  # (D, N/2, chunk)
            kernel = 2 * torch.einsum("dn,dnl->dl", C, powers).real
            behind = ages.unsqueeze(1) - ages
            within = torch.where(behind >= 0, kernel[:, behind.clamp(min=0)], 0.0)  # (D, chunk, chunk)
            chunks = F.pad(u, (0, 0, 0, -length % size)).unflatten(1, (-1, size))
            y = torch.einsum("dlj,bcjd->bcld", within, chunks)
            left = torch.einsum("dnj,bcjd->bcdn", powers.flip(-1), chunks.to(powers.dtype))
            states = [torch.zeros_like(left[:, 0])]
            for chunk in left[:, :-1].unbind(1):
                states.append(torch.exp(decay * size) * states[-1] + chunk)
            seen = (C * torch.exp(decay)).unsqueeze(-1) * powers
            y = y + 2 * torch.einsum("dnl,bcdn->bcld", seen, torch.stack(states, dim=1)).real
            return y.flatten(1, 2)[:, :length] + self.D * u
