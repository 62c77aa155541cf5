"""The Mamba language model, with the names of public checkpoints."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig
from tokendyn.backends.jax.layers import Mamba
from tokendyn.backends.jax.layers._affine import Linear
from tokendyn.backends.jax.layers._chunk_order import ChunkOrderMamba
from tokendyn.backends.jax.layers._group_order import GroupOrderMamba
from tokendyn.backends.jax.layers._window_order import WindowOrderMamba
from tokendyn.backends.jax.models._norms import Dropout, LayerNorm, RMSNorm
from tokendyn.errors import OptionError, ShapeError

#: Of each block, the states of its convolution and of its scan; a block with an order of chunks has more.
Cache = tuple[tuple[jax.Array, ...], ...]


class Embedding(nnx.Module):
    """Rows of W (rows, channels) by id."""

    def __init__(self, rows: int, channels: int, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, channels), param_dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.weight[...][ids]


class Block(nnx.Module):
    """x + mixer(norm(x)); the norm in the dtype of the residual stream, the mixer in ``dtype``."""

    def __init__(self, norm: nnx.Module | None, mixer: Mamba, dropout: Dropout, dtype: Any) -> None:
        self.norm = norm
        self.mixer = mixer
        self.dropout = dropout
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(self.mixer(self._normed(x)))

    def advance(
        self, x: jax.Array, states: tuple[jax.Array, ...], *, prompt: bool
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """A prompt (b, L, D) or the next token (b, 1, D) of every sequence, and the states after it."""
        call = self.mixer.prefill if prompt else self.mixer.step
        y, *states_after = call(self._normed(x), *states)
        return x + y, tuple(states_after)

    def _normed(self, x: jax.Array) -> jax.Array:
        return (x if self.norm is None else self.norm(x)).astype(self.dtype)  # type: ignore[operator]


class Backbone(nnx.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, embedding: Embedding, layers: list[Block], norm_f: nnx.Module | None) -> None:
        self.embedding = embedding
        self.layers = nnx.List(layers)
        self.norm_f = norm_f


class MambaLM(nnx.Module):
    """Mamba language model: ``x ← x + Mamba(norm(x))``, ``n_layer`` times, then norm and head.

    Names and shapes of the parameters are mamba-ssm's and those of :class:`tokendyn.torch.MambaLM`.

    Args:
        vocab_size: number of token ids.
        d_model, n_layer: width and number of blocks.
        d_state, d_conv, expand, dt_rank, conv_bias, bias, scalar_A, io_regime, io_form: see
            :class:`~tokendyn.jax.Mamba`.
        norm: before every mixer and the head: ``"rms"``, ``"layer"`` or ``"none"`` (paper 1, Table 10).
        norm_eps: added under the norm's square root.
        residual_in_fp32: keep the residual stream in float32 at least.
        tie_embeddings: the head's weights are the embedding's.
        pad_vocab_size_multiple: round the embedding's rows up to a multiple of it.
        dropout, head_dropout: of every branch; once, before the head.
        share_layers: one block's weights for all ``n_layer`` of them (paper 1, Table 10).
        order: the order of every mixer, an :class:`~tokendyn.OrderConfig`, ``"published"`` or a method's name; None for
            tokens as they come.
        order_scope: what is ordered. ``"sequence"``: all tokens of the sequence, as of :class:`~tokendyn.jax.Mamba`;
            earlier outputs then see later tokens, and the model has the attribute ``causal = False`` and does not
            decode. The others are causal. ``"chunks"``: each chunk of ``order_chunk`` tokens, after it was read, for
            the memory of it. ``"groups"``: in each token ``order_groups`` groups of channels, before the scan.
            ``"window"``: at each token it and the d_conv - 1 before it, in the convolution.
        order_chunk, order_groups: see ``order_scope``.
        remat: remake the activations inside a block in the reverse pass instead of keeping them.
        dtype: in which mixers and head compute; None: that of the parameters.
        param_dtype, rngs: see :class:`~tokendyn.jax.S6`; dropout draws from the stream ``dropout``.

    Shapes:
        tokens (b, L) → logits (b, L, vocab_size rounded up).

    Raises:
        OptionError, RegimeError, ShapeError: an unknown option, a regime that the others exclude, an input that does
            not fit.

    Source:
        Gu and Dao (2023); paper 1, Sections 5.1 and App. C.1 for the spectra, Table 10 for what can be left out.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        n_layer: int,
        d_state: int = 16,
        d_conv: int | None = 4,
        expand: float = 2,
        dt_rank: int | str | None = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        scalar_A: bool = False,
        io_regime: str = "free",
        io_form: str = "paper",
        norm: str = "rms",
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        tie_embeddings: bool = True,
        pad_vocab_size_multiple: int = 1,
        dropout: float = 0.0,
        head_dropout: float = 0.0,
        share_layers: bool = False,
        order: OrderConfig | str | None = None,
        order_scope: str = "sequence",
        order_chunk: int = 64,
        order_groups: int = 8,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        for name, size in (
            ("vocab_size", vocab_size),
            ("d_model", d_model),
            ("n_layer", n_layer),
            ("pad_vocab_size_multiple", pad_vocab_size_multiple),
            ("order_chunk", order_chunk),
            ("order_groups", order_groups),
        ):
            check.expect_size("MambaLM", name, size)
        check.expect_choice("MambaLM", "norm", norm, ("rms", "layer", "none"))
        check.expect_choice("MambaLM", "order_scope", order_scope, ("sequence", "chunks", "groups", "window"))
        for name, rate in (("dropout", dropout), ("head_dropout", head_dropout)):
            if not 0 <= rate < 1:
                raise OptionError(f"MambaLM: {name} is {rate!r}, expected 0 <= rate < 1")
        rows = -(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple
        self.vocab_size, self.n_layer = vocab_size, n_layer
        self.residual_in_fp32, self.remat = residual_in_fp32, remat
        self.causal = order is None or order_scope != "sequence"
        self.dtype = dtype or param_dtype

        def make_norm() -> nnx.Module | None:
            kinds = {"rms": RMSNorm, "layer": LayerNorm}
            return kinds[norm](d_model, norm_eps, param_dtype=param_dtype) if norm in kinds else None

        make_mixer = Mamba if order is None else _ordered_mixer(order_scope, order_chunk, order_groups)

        def make_block() -> Block:
            mixer = make_mixer(
                d_model,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                dt_rank=dt_rank,
                conv_bias=conv_bias,
                bias=bias,
                scalar_A=scalar_A,
                io_regime=io_regime,
                io_form=io_form,
                order=order,
                dtype=self.dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            _restart(mixer, n_layer)
            return Block(make_norm(), mixer, Dropout(dropout, rngs=rngs), self.dtype)

        self.backbone = Backbone(
            Embedding(rows, d_model, param_dtype=param_dtype, rngs=rngs),
            [make_block() for _ in range(1 if share_layers else n_layer)],
            make_norm(),
        )
        self.head_dropout = Dropout(head_dropout, rngs=rngs)
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.lm_head = None if tie_embeddings else Linear(d_model, rows, bias=False, **options)
        #: Further names of a parameter in the torch twin's state.
        self.aliases = (("lm_head.weight", "backbone.embedding.weight"),) if tie_embeddings else ()

    def __call__(self, tokens: jax.Array, targets: jax.Array | None = None) -> jax.Array:
        """Logits of the next token, or with ``targets`` minus the logarithm of their probabilities.

        Args:
            tokens: (b, L) ids.
            targets: (b, L) the ids that follow them.

        Returns:
            (b, L, rows) logits; or (b, L) float32 of ``-ln p(targets)`` in nats, for which the logits are made again in
            the reverse pass instead of kept.

        Raises:
            ShapeError: tokens of another shape or dtype.
            DataError: on a CPU and outside jit, an id that the embedding does not have.
        """
        self._expect_ids(tokens)
        x = self._embed(tokens)
        for block in self._blocks():
            x = nnx.remat(Block.__call__)(block, x) if self.remat else block(x)
        x = self.head_dropout(self._normed(x))
        if targets is None:
            return self._head(x)
        check.expect_ids("MambaLM", "targets", targets, len(self.backbone.embedding.weight[...]))

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def losses(x: jax.Array) -> jax.Array:
            logits = self._head(x).astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - chosen

        return losses(x)

    def allocate_inference_cache(self, batch_size: int, dtype: Any = None) -> Cache:
        """Empty states of all blocks for decoding ``batch_size`` sequences of any length, in ``dtype``."""
        return tuple(block.mixer.allocate_inference_cache(batch_size, dtype) for block in self._blocks())

    def prefill(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (b, rows) after the ``tokens`` (b, L) that follow those of ``cache``, and the cache after them."""
        self._expect_ids(tokens)
        return self._advance(tokens, cache, prompt=True)

    def step(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits (b, rows) after one more of each sequence's ``tokens`` (b,), and the ``cache`` after it."""
        return self._advance(tokens[:, None], cache, prompt=False)

    def generate(
        self,
        tokens: jax.Array,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Continue each sequence, one token at a time, in one compiled loop under ``jax.jit``.

        Args:
            tokens: (b, L) the prompts, all of one length.
            max_new_tokens: how many tokens to add.
            temperature: 0 takes the likeliest token; otherwise it is drawn from softmax(logits / temperature).
            top_k: draw among so many of the likeliest only.
            key: of the draws, needed above temperature 0.

        Returns:
            (b, L + max_new_tokens).

        Cost:
            Of a token what :meth:`step` takes: O(1), independent of the length so far.
        """
        check.expect_size("generate", "max_new_tokens", max_new_tokens)
        if temperature < 0 or (temperature > 0) != (key is not None):
            raise OptionError(
                f"generate: temperature is {temperature!r} and a key was {'not ' if key is None else ''}given, "
                f"expected a temperature of 0 without a key, or above 0 with one"
            )
        if top_k is not None:
            check.expect_size("generate", "top_k", top_k)

        def choose(logits: jax.Array, key: jax.Array | None) -> jax.Array:
            logits = logits[:, : self.vocab_size].astype(jnp.float32)
            if key is None:
                return logits.argmax(-1).astype(tokens.dtype)
            if top_k is not None and top_k < self.vocab_size:
                least = jax.lax.top_k(logits, top_k)[0][:, -1:]
                logits = jnp.where(logits < least, -jnp.inf, logits)
            return jax.random.categorical(key, logits / temperature).astype(tokens.dtype)

        def token(carried: tuple[jax.Array, Cache], key: jax.Array | None) -> tuple[tuple[jax.Array, Cache], jax.Array]:
            logits, cache = carried
            chosen = choose(logits, key)
            return self.step(chosen, cache), chosen

        keys = None if key is None else jax.random.split(key, max_new_tokens)
        first = self.prefill(tokens, self.allocate_inference_cache(len(tokens)))
        _, found = jax.lax.scan(token, first, keys, length=max_new_tokens)
        return jnp.concatenate([tokens, found.T], axis=1)

    def _blocks(self) -> list[Block]:
        """In the order of depth: the same one again and again where it is shared."""
        layers = list(self.backbone.layers)
        return layers if len(layers) == self.n_layer else layers * self.n_layer

    def _embed(self, tokens: jax.Array) -> jax.Array:
        check.expect_ids("MambaLM", "tokens", tokens, len(self.backbone.embedding.weight[...]))
        x = self.backbone.embedding(tokens)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if self.residual_in_fp32 else x

    def _normed(self, x: jax.Array) -> jax.Array:
        norm = self.backbone.norm_f
        return (x if norm is None else norm(x)).astype(self.dtype)  # type: ignore[operator]

    def _head(self, x: jax.Array) -> jax.Array:
        if self.lm_head is not None:
            return self.lm_head(x)
        return x @ self.backbone.embedding.weight[...].astype(x.dtype).T

    def _advance(self, tokens: jax.Array, cache: Cache, *, prompt: bool) -> tuple[jax.Array, Cache]:
        x = self._embed(tokens)
        after = []
        for block, states in zip(self._blocks(), cache, strict=True):
            x, states = block.advance(x, states, prompt=prompt)
            after.append(states)
        return self._head(self._normed(x[:, -1])), tuple(after)

    def _expect_ids(self, tokens: jax.Array) -> None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ShapeError(
                f"MambaLM: tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected ids (b, L) of an "
                f"integer dtype"
            )


def _ordered_mixer(scope: str, chunk: int, groups: int) -> Callable[..., Mamba]:
    """The mixer that orders what ``scope`` names."""
    if scope == "chunks":
        return functools.partial(ChunkOrderMamba, chunk=chunk)
    if scope == "groups":
        return functools.partial(GroupOrderMamba, groups=groups)
    return WindowOrderMamba if scope == "window" else Mamba


def _restart(mixer: Mamba, branches: int) -> None:
    """Biases at 0 but that of Δ, and the last projection over √(number of branches).

    The latter keeps the variance of the residual stream from growing with depth (GPT-2's rule, as in mamba-ssm).
    """
    for linear in (mixer.in_proj, mixer.out_proj):
        if linear.bias is not None:
            linear.bias = nnx.Param(jnp.zeros_like(linear.bias[...]))
    mixer.out_proj.weight = nnx.Param(mixer.out_proj.weight[...] / math.sqrt(branches))


def mamba_lm_130m(**options: Any) -> MambaLM:
    """Mamba-130M: 24 blocks of width 768; see :func:`tokendyn.torch.mamba_lm_130m`.

    Args:
        options: arguments of :class:`MambaLM`, ``rngs`` among them.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaLM`.
    """
    return MambaLM(**{"vocab_size": 50280, "d_model": 768, "n_layer": 24, **options})
