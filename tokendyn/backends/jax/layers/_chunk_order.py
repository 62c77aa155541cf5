"""Mamba that orders each chunk of tokens anew once it has read it; see the torch layers' twin."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig, expect_order_without_gate
from tokendyn.backends.jax.layers._mamba import Mamba, exact_dtype, expect_one_token


class ChunkOrderMamba(Mamba):
    """Mamba that remembers each chunk of ``chunk`` tokens in the order of their scores, and is causal.

    ::

        y_k = S6(x_k | H_k)                       the tokens of chunk k as they come, from the state H_k
        H_{k+1} = last state of S6(P x_k | H_k)   the same chunk in the order P of its scores

    Args:
        d_model, options: of :class:`Mamba`.
        chunk: tokens of a chunk.
        order: how a chunk is ordered; without ``reorder_gate``. ``restore`` has no meaning here: nothing that was
            ordered is put out.

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

    def mix(self, x: jax.Array, z: jax.Array) -> jax.Array:
        length = x.shape[1]
        x, z = self._chunks(x), self._chunks(z)
        empty = jnp.zeros((len(x), self.d_inner, self.d_state), exact_dtype(x))
        y, _ = self._read(x, z, self._memories(x[:, :-1], empty))
        return y[:, :length]

    def _chunks(self, v: jax.Array) -> jax.Array:
        """(b, L, d) → (b, K, chunk, d), with zeros behind."""
        b, length, d = v.shape
        return jnp.pad(v, ((0, 0), (0, -length % self.chunk), (0, 0))).reshape(b, -1, self.chunk, d)

    def _read(
        self, x: jax.Array, z: jax.Array, memories: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """y (b, K chunk, d_inner) of chunks (b, K, chunk, d_inner), each from its own of ``memories`` (b, K, ...).

        Also the state after each chunk, or after as many tokens of it as ``lengths`` (K,) says.
        """
        (b, count), rows = x.shape[:2], lambda v: v.reshape(-1, *v.shape[2:])
        every = None if lengths is None else jnp.tile(lengths, b)
        y, last = self.scan(rows(x), rows(z), initial_state=rows(memories), return_last_state=True, lengths=every)
        return y.reshape(b, -1, self.d_inner), last.reshape(b, count, *last.shape[1:])

    def _memories(self, x: jax.Array, first: jax.Array) -> jax.Array:
        """(b, K + 1, d_inner, N): ``first``, and the memory after each of the chunks x (b, K, chunk, d_inner).

        A chunk in its order begins at state 0; its last state and its decay make H_{k+1} of H_k.
        """
        b, count = x.shape[:2]
        if not count:
            return first[:, None]
        chunks = x.reshape(-1, *x.shape[2:])
        order = self.token_order(chunks)
        ordered = chunks if order is None else order.apply(chunks)
        _, last = self.scan(ordered, return_last_state=True)
        decay, last = (v.reshape(b, count, *v.shape[1:]).swapaxes(0, 1) for v in (self._decay(ordered), last))

        def then(memory: jax.Array, of: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            memory = of[0] * memory + of[1]
            return memory, memory

        memories = jax.lax.scan(then, first, (decay, last))[1]
        return jnp.concatenate([first[:, None], memories.swapaxes(0, 1)], 1)

    def _decay(self, x: jax.Array) -> jax.Array:
        """(b, d_inner, N or 1) what is left of a state after all tokens of x: exp(A Σ_l Δ(x_l))."""
        _, delta, A, _, _, _, _, bias = self._select(x, None)
        delta = delta.astype(A.dtype)
        step = jax.nn.softplus(delta if bias is None else delta + bias).sum(1)
        return jnp.exp(step[..., None] * A.reshape(self.d_inner, -1))

    def allocate_inference_cache(self, batch_size: int, dtype: Any = None) -> tuple[jax.Array, ...]:
        """Empty states for decoding: of the convolution, of the scan, the memory before the chunk that is read, its
        tokens (b, chunk, d_inner), and how many of them there are, ()."""
        convolution, state = super().allocate_inference_cache(batch_size, dtype)
        tokens = jnp.zeros((batch_size, self.chunk, self.d_inner), convolution.dtype)
        return convolution, state, state, tokens, jnp.zeros((), jnp.int32)

    def prefill(self, hidden_states: jax.Array, *states: jax.Array) -> tuple[jax.Array, ...]:  # type: ignore[override]
        """Tokens ``hidden_states`` (b, L, d_model) that follow those of ``states``, wherever in a chunk these end.

        Returns:
            (b, L, d_model), and the states after them.
        """
        convolution, state, memory, tokens, read = states
        x, z, convolution = self._advance(hidden_states, convolution)
        b, length, d = x.shape
        # The open chunk's tokens go before, so that chunks begin where they would in one pass. The last chunk of these
        # stays open.
        count = (self.chunk - 1 + length) // self.chunk + 1
        before = jnp.zeros((b, count * self.chunk, d), x.dtype)
        x = jax.lax.dynamic_update_slice_in_dim(before.at[:, : self.chunk].set(tokens.astype(x.dtype)), x, read, 1)
        z = jax.lax.dynamic_update_slice_in_dim(before.astype(z.dtype), z, read, 1)
        x, end = self._chunks(x), read + length
        memories = self._memories(x[:, :-1], memory.astype(exact_dtype(x)))
        lengths = jnp.clip(end - self.chunk * jnp.arange(count), 0, self.chunk)
        y, last = self._read(x, self._chunks(z), memories, lengths)

        def of_open_chunk(v: jax.Array, like: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(v, end // self.chunk, 1, keepdims=False).astype(like.dtype)

        return (
            self.out_proj(jax.lax.dynamic_slice_in_dim(y, read, length, 1)),
            convolution,
            of_open_chunk(last, state),
            of_open_chunk(memories, memory),
            of_open_chunk(x, tokens),
            end % self.chunk,
        )

    def step(self, hidden_states: jax.Array, *states: jax.Array) -> tuple[jax.Array, ...]:  # type: ignore[override]
        """One token: ``hidden_states`` (b, 1, d_model) and the ``states`` → the same after it.

        Every ``chunk``-th token also makes the memory of its chunk.
        """
        expect_one_token(hidden_states)
        convolution, state, memory, tokens, read = states
        x, z, convolution = self._advance(hidden_states, convolution)
        y, after = self.update(state.astype(exact_dtype(x)), x[:, 0], z[:, 0])
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, x.astype(tokens.dtype), read, 1)

        def closed() -> tuple[jax.Array, ...]:
            made = self._memories(tokens[:, None].astype(x.dtype), memory.astype(exact_dtype(x)))[:, -1]
            made = made.astype(memory.dtype)
            return made, made, jnp.zeros_like(tokens), jnp.zeros_like(read)

        def open_() -> tuple[jax.Array, ...]:
            return after.astype(state.dtype), memory, tokens, read + 1

        return self.out_proj(y[:, None]), convolution, *jax.lax.cond(read + 1 == self.chunk, closed, open_)

    def _expect_decodable(self) -> None:
        pass
