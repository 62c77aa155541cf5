"""What all language models here share: embedding, residual blocks, head, loss, decoding token by token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokendyn import _checks as check
from tokendyn._layers import OrderConfig
from tokendyn.backends.torch.layers import TokenReorder
from tokendyn.backends.torch.models._token_losses import token_losses
from tokendyn.errors import OptionError, ShapeError

Norm = Literal["rms", "layer", "none"]
OrderScope = Literal["sequence", "chunks", "groups", "window"]
Cache = list[tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """What all language models here have in common.

    Attributes:
        vocab_size: number of token ids.
        d_model, n_layer: width and number of blocks.
        norm: before every mixer and the head: ``"rms"``, ``"layer"`` or ``"none"`` (paper 1, Table 10).
        norm_eps: added under the norm's square root.
        residual_in_fp32: keep the residual stream in float32 where the weights are in half precision.
        tie_embeddings: the head's weights are the embedding's.
        pad_vocab_size_multiple: round the embedding's rows up to a multiple of it.
        dropout: of every branch before it is added to the residual stream.
        head_dropout: once, before the head (where paper 1's public code has its only dropout).
        share_layers: one block's weights for all ``n_layer`` of them (paper 1, Table 10).
        order: the order of every mixer, an :class:`~tokendyn.OrderConfig`, ``"published"`` or a method's name; None for
            tokens as they come.
        order_scope: what is ordered. ``"sequence"``: all tokens of the sequence before the mixer, by the layers'
            ``order=`` or :class:`~tokendyn.torch.TokenReorder`, so that earlier outputs see later tokens: such a model
            has the attribute ``causal = False``. The others are causal, and MambaLM's alone. ``"chunks"``: each chunk
            of ``order_chunk`` tokens, after it was read, for the memory of it. ``"groups"``: in each token
            ``order_groups`` groups of channels, before the scan. ``"window"``: at each token it and the d_conv - 1
            before it, in the convolution.
        order_chunk, order_groups: see ``order_scope``.
    """

    vocab_size: int
    d_model: int
    n_layer: int
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 1
    dropout: float = 0.0
    head_dropout: float = 0.0
    share_layers: bool = False
    order: OrderConfig | str | None = None
    order_scope: OrderScope = "sequence"
    order_chunk: int = 64
    order_groups: int = 8

    def __post_init__(self) -> None:
        name = type(self).__name__
        for size in ("vocab_size", "d_model", "n_layer", "pad_vocab_size_multiple", "order_chunk", "order_groups"):
            check.expect_size(name, size, getattr(self, size))
        check.expect_choice(name, "norm", self.norm, ("rms", "layer", "none"))
        check.expect_choice(name, "order_scope", self.order_scope, get_args(OrderScope))
        order: Any = self.order
        if isinstance(order, dict):  # out of config.json
            order = OrderConfig(**order)
        object.__setattr__(self, "order", OrderConfig.of(order))
        for rate in ("dropout", "head_dropout"):
            if not 0 <= getattr(self, rate) < 1:
                raise OptionError(f"{name}: {rate} is {getattr(self, rate)!r}, expected 0 <= rate < 1")

    @property
    def causal(self) -> bool:
        """No output sees a later token."""
        return self.order is None or self.order_scope != "sequence"

    @property
    def rows(self) -> int:
        """Rows of the embedding: ``vocab_size`` rounded up."""
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


Config = TypeVar("Config", bound=LanguageModelConfig)


def make_config(name: str, config_type: type[Config], options: dict[str, Any]) -> Config:
    """``config_type`` of the ``options`` given to the model ``name``.

    Raises:
        TypeError: an option that it does not have, or one missing that it needs.
    """
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    unknown = [key for key in options if key not in fields]
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(fields)}")
    needed = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in options]
    if needed:
        raise TypeError(f"{name} needs {', '.join(needed)} too")
    return config_type(**options)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) ∘ w, computed in float32 at least, in the dtype of the weights."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(exact, self.weight.shape, self.weight.to(exact.dtype), self.eps).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """Layer normalisation, computed in float32 at least, in the dtype of the weights."""

    def forward(self, input: Tensor) -> Tensor:
        exact = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(exact), self.bias.to(exact)
        return F.layer_norm(input.to(exact), self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class NoNorm(nn.Module):
    """Nothing, in the dtype of the mixer's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("dtype_of", torch.empty(0), persistent=False)  # moves with the model

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype_of.dtype)  # type: ignore[union-attr]


def make_norm(config: LanguageModelConfig) -> nn.Module:
    """The norm that ``config`` names."""
    if config.norm == "none":
        return NoNorm()
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.d_model, eps=config.norm_eps)


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def reordered(mixer: nn.Module, config: LanguageModelConfig) -> nn.Module:
    """``mixer`` with the order of ``config`` around it, if there is one.

    Raises:
        OptionError: the order is inside a mixer, and this one has none.
    """
    if config.order is None:
        return mixer
    if config.order_scope != "sequence":
        raise OptionError(
            f"{type(config).__name__}: order_scope is {config.order_scope!r}, which MambaLM alone has; expected "
            f"'sequence', or order=None"
        )
    return TokenReorder(mixer, config.d_model, config.order)


class Block(nn.Module):
    """x + mixer(norm(x)), and if there is an ``mlp`` then x + mlp(norm2(x)).

    A mixer maps (b, L, D) to (b, L, D), takes ``seq_idx`` where sequences are packed, and decodes by
    ``allocate_inference_cache(b, L)``, ``prefill(x, *states)`` and ``step(x, *states)``, the last two returning the
    output and then the states.
    """

    def __init__(self, config: LanguageModelConfig, mixer: nn.Module, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.mixer: Any = mixer
        self.norm2 = None if mlp is None else make_norm(config)
        self.mlp = mlp
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """x (b, L, D) → the same; ``options`` go to the mixer."""
        return self._through_mlp(x + self.dropout(self.mixer(self.norm(x), **options)))

    def advance(self, x: Tensor, states: tuple[Tensor, ...], *, prompt: bool) -> Tensor:
        """A whole prompt or the next token of every sequence; ``states`` are advanced in place."""
        call = self.mixer.prefill if prompt else self.mixer.step
        return self._through_mlp(x + call(self.norm(x), *states)[0])

    def _through_mlp(self, x: Tensor) -> Tensor:
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self.dropout(self.mlp(self.norm2(x)))


class Backbone(nn.Module):
    """Token ids (b, L) → normed features (b, L, D). With ``share_layers`` all of ``layers`` is one module.

    Attributes:
        recompute: in training keep the input of each block only and compute the rest again in the backward pass: about
            a third more time, for activations of one block instead of all.
    """

    recompute = False

    def __init__(self, config: LanguageModelConfig, make_block: Callable[[int], Block]) -> None:
        super().__init__()
        self.n_layer, self.in_fp32 = config.n_layer, config.residual_in_fp32
        self.embedding = nn.Embedding(config.rows, config.d_model)
        self.layers = nn.ModuleList(make_block(i) for i in range(1 if config.share_layers else config.n_layer))
        self.norm_f = make_norm(config)

    def blocks(self) -> Sequence[Any]:
        """The blocks in the order of depth: ``n_layer`` of them, the same one again and again where it is shared."""
        return list(self.layers) if len(self.layers) == self.n_layer else [self.layers[0]] * self.n_layer

    def embed(self, tokens: Tensor) -> Tensor:
        check.expect_ids("the language model", "tokens", tokens, self.embedding.num_embeddings)
        x = self.embedding(tokens)
        return x.to(torch.promote_types(x.dtype, torch.float32)) if self.in_fp32 else x

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        x = self.embed(tokens)
        again = self.recompute and torch.is_grad_enabled()
        for block in self.blocks():
            x = checkpoint(block, x, use_reentrant=False, **options) if again else block(x, **options)
        return self.norm_f(x)  # type: ignore[arg-type]

    def advance(self, tokens: Tensor, cache: Cache, *, prompt: bool) -> Tensor:
        x = self.embed(tokens)
        for block, states in zip(self.blocks(), cache, strict=True):
            x = block.advance(x, states, prompt=prompt)
        return self.norm_f(x)


def initialise(model: nn.Module, backbone: Backbone) -> None:
    """Embeddings at deviation 0.02, biases 0, and the last projection of each branch over √(number of branches).

    The last keeps the variance of the residual stream from growing with depth (GPT-2's rule, as in mamba-ssm).
    """
    branches = backbone.n_layer * (1 if backbone.layers[0].mlp is None else 2)
    nn.init.normal_(backbone.embedding.weight, std=0.02)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
        if name.endswith((".out_proj", ".fc2")):
            with torch.no_grad():
                module.weight.div_(math.sqrt(branches))


class LanguageModel(nn.Module, Generic[Config]):
    """A language model: ``lm_head(backbone(tokens))``; the base of all here.

    Args:
        config, options: the model's configuration, or its fields by name.

    Attributes:
        config: what the model was made with.
        causal: False if an order of whole sequences lets its outputs see later tokens
            (:func:`~tokendyn.torch.expect_causal` refuses it, and its likelihoods are none).
        backbone, lm_head: its parts.
    """

    config_type: type[Any]

    def __init__(self, config: Config | None = None, /, **options: Any) -> None:
        super().__init__()
        if config is None:
            config = make_config(type(self).__name__, self.config_type, options)
        elif options or not isinstance(config, self.config_type):
            raise OptionError(
                f"{type(self).__name__}: expected either a {self.config_type.__name__} or its fields by name, not "
                f"{type(config).__name__}{' with ' + ', '.join(options) if options else ''}"
            )
        self.config: Config = config  # type: ignore[assignment]
        self.causal = self.config.causal
        self.backbone = Backbone(self.config, self.make_block)
        self.head_dropout = nn.Dropout(self.config.head_dropout)
        self.lm_head = nn.Linear(self.config.d_model, self.config.rows, bias=False)
        initialise(self, self.backbone)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def make_block(self, index: int) -> Block:
        """Block number ``index``, on the CPU."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, seq_idx: Tensor | None = None) -> Tensor:
        """Logits of the next token, or with ``targets`` minus the logarithm of their probabilities.

        Args:
            tokens: (b, L) ids.
            targets: (b, L) the ids that follow them.
            seq_idx: (b, L) integers: sequences packed end to end, of which none sees another. One begins wherever the
                value differs from that before it.

        Returns:
            (b, L, rows) logits in the dtype of the weights; or (b, L) float32 of ``-ln p(targets)`` in nats, for which
            the logits are made for a few thousand tokens at a time and never all kept. In training they are made again
            for the gradient; on a GPU in half precision their gradient is kept instead, unless ``backbone.recompute``.

        Raises:
            ShapeError: tokens, targets or seq_idx of another shape or dtype.
            DataError: on a CPU, an id that the embedding does not have.
        """
        expect_token_ids(type(self).__name__, tokens)
        packed = {} if seq_idx is None else {"seq_idx": self._expect_packed(seq_idx, tokens)}
        features = self.head_dropout(self.backbone(tokens, **packed))
        if targets is None:
            return self.lm_head(features)
        if targets.shape != tokens.shape:
            raise ShapeError(
                f"{type(self).__name__}: targets have shape {tuple(targets.shape)}, expected that of tokens, "
                f"{tuple(tokens.shape)}"
            )
        losses = token_losses(features.flatten(0, 1), self.lm_head, targets.flatten(), keep=not self.backbone.recompute)
        return losses.view_as(targets)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Cache:
        """Empty states of all blocks for decoding ``batch_size`` sequences of at most ``max_seqlen`` tokens.

        In ``dtype``, by default that of the weights; states of scans in float32 at least.

        Raises:
            OptionError: the model is not causal, so it cannot go on from a state.
        """
        if not self.config.causal:
            raise OptionError(
                f"{type(self).__name__}: a model that orders whole sequences sees later tokens and cannot decode token "
                f"by token"
            )
        blocks = self.backbone.blocks()
        return [tuple(block.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)) for block in blocks]

    def prefill(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (b, rows) after a whole prompt, ``tokens`` (b, L); ``cache`` is filled in place."""
        expect_token_ids(type(self).__name__, tokens)
        return self.lm_head(self.backbone.advance(tokens, cache, prompt=True)[:, -1])

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits (b, rows) after one more of each sequence's ``tokens`` (b,); ``cache`` is advanced in place."""
        return self.lm_head(self.backbone.advance(tokens.unsqueeze(1), cache, prompt=False)[:, -1])

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each sequence, one token at a time.

        Args:
            tokens: (b, L) the prompts, all of one length.
            max_new_tokens: how many tokens to add at most.
            temperature: 0 takes the likeliest token; otherwise it is drawn from softmax(logits / temperature).
            top_k: draw among so many of the likeliest only.
            stop_token: end a sequence there (the rest of it repeats this token); all ended, none is made any more.
            generator: of the draws, on the device of the tokens.

        Returns:
            (b, L + n) the prompts and what follows them, n ≤ max_new_tokens.

        Cost:
            Of a token what :meth:`step` takes: for MambaLM and H3LM O(1), independent of the length so far.
        """
        check.expect_size("generate", "max_new_tokens", max_new_tokens)
        if temperature < 0:
            raise OptionError(f"generate: temperature is {temperature!r}, expected 0 or more")
        if top_k is not None:
            check.expect_size("generate", "top_k", top_k)
        was_training = self.training
        self.eval()
        try:
            cache = self.allocate_inference_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
            logits = self.prefill(tokens, cache)
            found = [tokens]
            ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
            for place in range(max_new_tokens):
                chosen = _choose(logits[:, : self.config.vocab_size], temperature, top_k, generator)
                if stop_token is not None:
                    chosen = torch.where(ended, stop_token, chosen)
                    ended = ended | (chosen == stop_token)
                found.append(chosen.unsqueeze(1))
                if place + 1 == max_new_tokens or (stop_token is not None and bool(ended.all())):
                    break
                logits = self.step(chosen, cache)
        finally:
            self.train(was_training)
        return torch.cat(found, dim=1)

    def parameter_count(self, *, embedding: bool = True) -> int:
        """Numbers in the parameters, tied ones once; without those of the embedding and a head tied to it."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if embedding:
            return total
        heads = {id(self.backbone.embedding.weight): self.backbone.embedding.weight, id(self.lm_head.weight): None}
        return total - len(heads) * self.backbone.embedding.weight.numel()

    def save_pretrained(self, folder: Any) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``."""
        from tokendyn.backends.torch.models._pretrained import save_own

        save_own(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The model in a local ``folder`` that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            folder: where the files are; nothing is fetched.
            device, dtype: of the weights; those of the file unless given.

        Raises:
            CheckpointError: files are missing, damaged, cut short, pickles, or of another model.
        """
        from tokendyn.backends.torch.models._pretrained import load_own

        return load_own(cls, folder).to(device=device, dtype=dtype).eval()

    def _expect_packed(self, seq_idx: Tensor, tokens: Tensor) -> Tensor:
        if seq_idx.shape != tokens.shape or seq_idx.is_floating_point():
            raise ShapeError(
                f"{type(self).__name__}: seq_idx has shape {tuple(seq_idx.shape)} and dtype {seq_idx.dtype}, expected "
                f"integers of the shape of tokens, {tuple(tokens.shape)}"
            )
        return seq_idx


def expect_token_ids(model: str, tokens: Tensor) -> None:
    """``tokens`` are ids (b, L)."""
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ShapeError(
            f"{model}: tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected ids (b, L) of an "
            f"integer dtype"
        )


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """(b, V) → (b,) the next token of each sequence."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
