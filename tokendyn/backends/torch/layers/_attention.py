"""Causal self-attention with rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendyn import _checks as check
from tokendyn.backends.torch.layers._ordering import expect_tokens
from tokendyn.backends.torch.layers._packing import by_sequence
from tokendyn.errors import OptionError


class CausalAttention(nn.Module):
    """Multi-head causal self-attention, ``softmax(q kᵀ / √d_head) v``, positions by rotation of q and k.

    The product is :func:`torch.nn.functional.scaled_dot_product_attention`, so flash attention where there is one.

    Args:
        d_model, n_head: channels, and heads among which they are divided, each with an even number.
        rotary_base: channel pair i of a head is turned by ``position · rotary_base^(-2i/d_head)``.
        bias: of in_proj and out_proj.

    Shapes:
        (b, L, d_model) → (b, L, d_model).

    Raises:
        OptionError, ShapeError: an option that cannot be had, or an input that does not fit.

    Cost:
        O(b L² D).

    Source:
        Vaswani et al. (2017); rotary positions: Su et al. (2021), arXiv 2104.09864.
    """

    def __init__(self, d_model: int, n_head: int, *, rotary_base: float = 10_000.0, bias: bool = False) -> None:
        super().__init__()
        check.expect_size("CausalAttention", "d_model", d_model)
        check.expect_size("CausalAttention", "n_head", n_head)
        if d_model % (2 * n_head):
            raise OptionError(
                f"CausalAttention: d_model is {d_model} and n_head {n_head}, expected heads of an even width"
            )
        self.d_model, self.n_head, self.rotary_base = d_model, n_head, rotary_base
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor, *, seq_idx: Tensor | None = None) -> Tensor:
        """x (b, L, d_model) → the same; with ``seq_idx`` (b, L) each of the sequences packed end to end by itself,
        at the cost of (sequences, longest of them)."""
        expect_tokens("CausalAttention", x, self.d_model, self.in_proj.weight)
        if seq_idx is not None:
            return by_sequence(self, x, seq_idx)
        q, k, v = self._heads(x, torch.arange(x.shape[1], device=x.device))
        return self._join(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (b, n_head, max_seqlen, d_head) each, and how many of the places are filled, ().

        b is ``batch_size``; in ``dtype``, by default that of the weights."""
        weight = self.in_proj.weight
        shape = (batch_size, self.n_head, max_seqlen, self.d_model // self.n_head)
        keys, values = (weight.new_zeros(shape, dtype=dtype or weight.dtype) for _ in range(2))
        return keys, values, torch.zeros((), dtype=torch.int64, device=weight.device)

    def prefill(self, x: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A whole prompt x (b, L, D) → the same, from the beginning.

        The states ``keys``, ``values`` and ``filled`` are set in place and returned.
        """
        q, k, v = self._heads(x, torch.arange(x.shape[1], device=x.device))
        keys[:, :, : x.shape[1]], values[:, :, : x.shape[1]] = k, v
        filled.fill_(x.shape[1])
        return self._join(F.scaled_dot_product_attention(q, k, v, is_causal=True)), keys, values, filled

    def step(self, x: Tensor, keys: Tensor, values: Tensor, filled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One token x (b, 1, D) → the same, in O(max_seqlen).

        The states ``keys``, ``values`` and ``filled`` are advanced in place and returned.
        """
        q, k, v = self._heads(x, filled[None])
        keys.index_copy_(2, filled[None], k.to(keys.dtype))
        values.index_copy_(2, filled[None], v.to(values.dtype))
        seen = torch.arange(keys.shape[2], device=x.device) <= filled  # of fixed size: nothing waits for the device
        y = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=seen[None])
        filled += 1
        return self._join(y), keys, values, filled

    def _heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (b, n_head, L, d_head), q and k turned by their positions (L,)."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        width = q.shape[-1]
        exact = torch.promote_types(q.dtype, torch.float32)
        rates = self.rotary_base ** (-torch.arange(0, width, 2, device=x.device, dtype=exact) / width)
        angles = positions.to(exact).unsqueeze(-1) * rates
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

        def turn(u: Tensor) -> Tensor:
            one, two = u.chunk(2, dim=-1)
            return torch.cat([one * cos - two * sin, one * sin + two * cos], dim=-1)

        return turn(q), turn(k), v

    def _join(self, y: Tensor) -> Tensor:
        return self.out_proj(y.transpose(1, 2).flatten(2))
