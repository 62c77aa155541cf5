"""The H3 language model."""

from __future__ import annotations

from dataclasses import dataclass

from tokendyn.backends.torch.layers import H3
from tokendyn.backends.torch.models._language import Block, LanguageModel, LanguageModelConfig, Mlp, reordered


@dataclass(frozen=True, kw_only=True)
class H3LMConfig(LanguageModelConfig):
    """:class:`LanguageModelConfig` and the sizes of H3.

    Attributes:
        d_state, d_shift: see :class:`~tokendyn.torch.H3`.
        mlp_ratio: hidden width of the MLPs over ``d_model``.
        bias: of all linear layers but the head.
    """

    d_state: int = 64
    d_shift: int = 4
    mlp_ratio: float = 4.0
    bias: bool = True
    norm: str = "layer"  # type: ignore[assignment]


class H3LM(LanguageModel[H3LMConfig]):
    """H3 language model: ``x ← x + H3(norm(x))``, ``x ← x + MLP(norm(x))``, ``n_layer`` times.

    Args:
        config, options: a :class:`H3LMConfig`, or its fields by name.

    Shapes:
        tokens (b, L) → logits (b, L, vocab_size rounded up).

    Raises:
        OptionError, ShapeError: an option that cannot be had, or an input that does not fit.

    Source:
        Fu et al. (2022), arXiv 2212.14052, without its two attention layers; paper 1, Table 6.
    """

    config_type = H3LMConfig

    def make_block(self, index: int) -> Block:
        config = self.config
        mixer = H3(config.d_model, config.d_state, config.d_shift, bias=config.bias)
        return Block(
            config, reordered(mixer, config), Mlp(config.d_model, int(config.d_model * config.mlp_ratio), config.bias)
        )
