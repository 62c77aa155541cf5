"""The Transformer language model."""

from __future__ import annotations

from dataclasses import dataclass

from tokendyn.backends.torch.layers import CausalAttention
from tokendyn.backends.torch.models._language import Block, LanguageModel, LanguageModelConfig, Mlp, reordered


@dataclass(frozen=True, kw_only=True)
class TransformerLMConfig(LanguageModelConfig):
    """:class:`LanguageModelConfig` and the sizes of the attention.

    Attributes:
        n_head, rotary_base: see :class:`~tokendyn.torch.CausalAttention`.
        mlp_ratio: hidden width of the MLPs over ``d_model``.
        bias: of all linear layers but the head.
    """

    n_head: int = 12
    rotary_base: float = 10_000.0
    mlp_ratio: float = 4.0
    bias: bool = False


class TransformerLM(LanguageModel[TransformerLMConfig]):
    """Pre-norm Transformer with rotary positions: ``x ← x + attention(norm(x))``, ``x ← x + MLP(norm(x))``.

    Args:
        config, options: a :class:`TransformerLMConfig`, or its fields by name.

    Shapes:
        tokens (b, L) → logits (b, L, vocab_size rounded up).

    Raises:
        OptionError, ShapeError: an option that cannot be had, or an input that does not fit.

    Source:
        Radford et al. (2019), with rotary positions and root-mean-square norms; paper 1, Table 6.
    """

    config_type = TransformerLMConfig

    def make_block(self, index: int) -> Block:
        config = self.config
        mixer = CausalAttention(config.d_model, config.n_head, rotary_base=config.rotary_base, bias=config.bias)
        return Block(
            config, reordered(mixer, config), Mlp(config.d_model, int(config.d_model * config.mlp_ratio), config.bias)
        )
