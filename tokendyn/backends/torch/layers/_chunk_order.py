"""Mamba that orders each chunk of tokens anew once it has read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig, expect_order_without_gate
from tokendyn.backends.torch.layers._mamba import Mamba
from tokendyn.backends.torch.layers._packing import by_sequence
from tokendyn.backends.torch.ops._scan_plain import softplus


class ChunkOrderMamba(Mamba):
    """Mamba that remembers each chunk of ``chunk`` tokens in the order of their scores, and is causal.

    ::

        y_k = S6(x_k | H_k)                       the tokens of chunk k as they come, from the state H_k
        H_{k+1} = last state of S6(P x_k | H_k)   the same chunk in the order P of its scores

    The outputs of a chunk see its own tokens up to each, and H_k, which holds earlier chunks alone. What the order
    decides is what the memory forgets: a state fades with every token after it, so those that come last are kept best,
    with ascending scores the highest.

    Args:
        d_model, options: of :class:`Mamba`.
        chunk: tokens of a chunk.
        order: how a chunk is ordered, see :class:`~tokendyn.OrderConfig`; without ``reorder_gate``. ``restore`` has no
            meaning here: nothing that was ordered is put out.

    Shapes:
        (b, L, d_model) → (b, L, d_model).

    Cost:
        Two scans, and one step of the state a chunk. Decoding keeps the tokens of the chunk that is being read.
    """

    def __init__(self, d_model: int, *, chunk: int, order: OrderConfig | str, **options: Any) -> None:
        check.expect_size("ChunkOrderMamba", "chunk", chunk)
        expect_order_without_gate("ChunkOrderMamba", order)
        super().__init__(d_model, order=order, **options)
        self.chunk = chunk

    def mix(self, x: Tensor, z: Tensor, *, seq_idx: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        # Padding on the right comes after all that matters: lengths has nothing to add.
        if seq_idx is None:
            return self._read(x, z)[0]
        both = torch.cat([x, z], dim=-1)
        return by_sequence(lambda rows: self._read(*rows.chunk(2, dim=-1))[0], both, seq_idx)

    def _read(self, x: Tensor, z: Tensor, *, states: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y (b, L, d_inner); with ``states`` also the state after the last token, and the memory before its chunk."""
        b, length, _ = x.shape
        whole = length // self.chunk * self.chunk
        # The memory after the last chunk is needed only if something follows it.
        remembered = whole if states or whole < length else max(whole - self.chunk, 0)
        memories = self._memories(x[:, :remembered])
        pieces = []
        if whole:
            count = whole // self.chunk
            folded = (t[:, :whole].unflatten(1, (count, -1)).flatten(0, 1) for t in (x, z))
            y = self.scan(*folded, initial_state=memories[:, :count].flatten(0, 1))
            pieces.append(y.unflatten(0, (b, count)).flatten(1, 2))
        state = memories[:, -1] if states else None
        if whole < length:
            y, state = self.scan(x[:, whole:], z[:, whole:], initial_state=memories[:, -1], return_last_state=True)
            pieces.append(y)
        return torch.cat(pieces, dim=1), state, memories[:, -1] if states else None

    def _memories(self, x: Tensor) -> Tensor:
        """(b, K + 1, d_inner, N) the states before each of the K chunks of x, and after the last.

        A chunk in its order begins at state 0; its last state and its decay make H_{k+1} of H_k.
        """
        b, length, width = x.shape
        exact = torch.promote_types(x.dtype, torch.float32)
        states = [x.new_zeros(b, width, self.d_state, dtype=exact)]
        if length:
            chunks = x.unflatten(1, (-1, self.chunk)).flatten(0, 1)
            order = self.token_order(chunks)
            ordered = chunks if order is None else order.apply(chunks)
            _, last = self.scan(ordered, return_last_state=True)
            decays, last = (t.unflatten(0, (b, -1)).unbind(1) for t in (self._decay(ordered), last))
            for decay, state in zip(decays, last, strict=True):
                states.append(decay * states[-1] + state)
        return torch.stack(states, dim=1)

    def _decay(self, x: Tensor) -> Tensor:
        """(b, d_inner, N) what is left of a state after all tokens of x: exp(A Σ_l Δ(x_l))."""
        _, delta, A, _, _, _, _, bias = self._select(x, None)
        delta = delta.to(A.dtype)
        step = softplus(delta if bias is None else delta + bias).sum(1)
        return torch.exp(step.unsqueeze(-1) * A.reshape(self.d_inner, -1))

    def _expect_decodable(self) -> None:
        pass

    def allocate_inference_cache(  # type: ignore[override]
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[Tensor, ...]:
        """Empty states for decoding: of the convolution, of the scan, the memory before the chunk that is read, its
        tokens (b, chunk, d_inner), and how many of them there are, ()."""
        convolution, state = super().allocate_inference_cache(batch_size, max_seqlen, dtype)
        tokens = convolution.new_zeros(batch_size, self.chunk, self.d_inner)
        return convolution, state, state.clone(), tokens, torch.zeros((), dtype=torch.int64)

    def prefill(  # type: ignore[override]
        self, hidden_states: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """A whole prompt (b, L, d_model) → (b, L, d_model), from the beginning; the states are set and returned."""
        convolution, state, memory, tokens, read = states
        x, z = self._convolved_prompt(hidden_states, convolution)
        y, last, before = self._read(x, z, states=True)
        assert last is not None
        assert before is not None
        rest = x.shape[1] % self.chunk
        tokens[:, :rest] = x[:, x.shape[1] - rest :]
        state.copy_(last)
        memory.copy_(before)
        read.fill_(rest)
        return self.out_proj(y), *states

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """One token (b, 1, d_model) → (b, 1, d_model); the states are advanced in place and returned. Every
        ``chunk``-th token also makes the memory of its chunk."""
        convolution, state, memory, tokens, read = states
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = self.convolve_next(x, convolution)
        y, after = self.update(state, x[:, 0], z[:, 0])
        place = int(read)
        tokens[:, place] = x[:, 0]
        if place + 1 == self.chunk:
            order = self.token_order(tokens)
            ordered = tokens if order is None else order.apply(tokens)
            _, after = self.scan(ordered, initial_state=memory, return_last_state=True)
            memory.copy_(after)
        state.copy_(after)
        read.fill_((place + 1) % self.chunk)
        return self.out_proj(y.unsqueeze(1)), *states
