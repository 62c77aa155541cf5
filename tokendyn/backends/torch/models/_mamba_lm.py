"""The Mamba language model, with the names of public checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from tokendyn.backends.torch.layers import Mamba
from tokendyn.backends.torch.layers._chunk_order import ChunkOrderMamba
from tokendyn.backends.torch.layers._group_order import GroupOrderMamba
from tokendyn.backends.torch.layers._window_order import WindowOrderMamba
from tokendyn.backends.torch.models._language import Block, LanguageModel, LanguageModelConfig


@dataclass(frozen=True, kw_only=True)
class MambaLMConfig(LanguageModelConfig):
    """:class:`LanguageModelConfig` and the arguments of :class:`~tokendyn.torch.Mamba`.

    Attributes:
        d_state, d_conv, expand, dt_rank, conv_bias, bias, scalar_A, io_regime, io_form: see
            :class:`~tokendyn.torch.Mamba`; ``d_conv=None`` leaves the convolution out (paper 1, Table 10).
    """

    d_state: int = 16
    d_conv: int | None = 4
    expand: float = 2
    dt_rank: int | Literal["auto"] | None = "auto"
    conv_bias: bool = True
    bias: bool = False
    scalar_A: bool = False
    io_regime: str = "free"
    io_form: str = "paper"


def mamba_block(config: MambaLMConfig, index: int) -> Block:
    """Block number ``index`` of a Mamba, with the order that ``config`` asks for."""
    options: dict[str, Any] = {
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": config.expand,
        "dt_rank": config.dt_rank,
        "conv_bias": config.conv_bias,
        "bias": config.bias,
        "layer_idx": index,
        "scalar_A": config.scalar_A,
        "io_regime": config.io_regime,
        "io_form": config.io_form,
        "order": config.order,
    }
    if config.order is None or config.order_scope == "sequence":
        return Block(config, Mamba(config.d_model, **options))
    if config.order_scope == "chunks":
        return Block(config, ChunkOrderMamba(config.d_model, chunk=config.order_chunk, **options))
    if config.order_scope == "groups":
        return Block(config, GroupOrderMamba(config.d_model, groups=config.order_groups, **options))
    return Block(config, WindowOrderMamba(config.d_model, **options))


class MambaLM(LanguageModel[MambaLMConfig]):
    """Mamba language model: ``x ← x + Mamba(norm(x))``, ``n_layer`` times.

    The names and shapes of its parameters are mamba-ssm's (``backbone.embedding``, ``backbone.layers.0.mixer.in_proj``,
    ..., ``backbone.norm_f``, ``lm_head``); :meth:`from_pretrained` also reads Hugging Face's.

    Args:
        config, options: a :class:`MambaLMConfig`, or its fields by name,
            ``MambaLM(vocab_size=50280, d_model=768, n_layer=24)``.

    Shapes:
        tokens (b, L) → logits (b, L, vocab_size rounded up).

    Raises:
        OptionError, RegimeError, ShapeError: an unknown option, a regime that the others exclude, an input that does
            not fit.

    Source:
        Gu and Dao (2023); paper 1, Sections 5.1 and App. C.1 for the spectra, Table 10 for what can be left out.
    """

    config_type = MambaLMConfig

    def make_block(self, index: int) -> Block:
        return mamba_block(self.config, index)

    def save_pretrained(self, folder: Any, *, layout: str = "tokendyn") -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``.

        Args:
            folder: made if missing; files of these names in it are replaced.
            layout: ``"tokendyn"`` keeps every option. ``"mamba_ssm"`` and ``"transformers"`` are read by these
                packages: there a spectrum regime is written out as the free S_B and S_C that it amounts to, and shared
                layers once for each; the same function, no longer the same parametrisation.

        Raises:
            OptionError: the layout has no word for an option of this model (no norm, no convolution, ...).
        """
        from tokendyn.backends.torch.models._pretrained import save_mamba

        if layout == "tokendyn":
            super().save_pretrained(folder)
        else:
            save_mamba(self, folder, layout)

    @classmethod
    def from_pretrained(
        cls, folder: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The model in a local ``folder`` with ``config.json`` and safetensors, in evaluation mode.

        The folder may be one of :meth:`save_pretrained`, of mamba-ssm (Mamba-1) or of Hugging Face's
        ``MambaForCausalLM``, in one file or in shards; ``config.json`` says which.

        Args:
            folder: where the files are; nothing is fetched.
            device, dtype: of the weights; those of the file unless given.

        Raises:
            CheckpointError: files are missing, damaged, cut short, pickles, or of another model.
        """
        from tokendyn.backends.torch.models._pretrained import load_mamba

        return load_mamba(cls, folder).to(device=device, dtype=dtype).eval()


def mamba_lm_130m(**options: Any) -> MambaLM:
    """Mamba-130M: 24 blocks of width 768, 129,135,360 parameters with the vocabulary of its public checkpoint.

    Args:
        options: fields of :class:`MambaLMConfig`, such as ``vocab_size=50257``, ``io_regime="positive"``.

    Returns:
        The model, freshly initialised.

    Raises:
        OptionError, RegimeError, ShapeError: see :class:`MambaLM`.

    Source:
        Gu and Dao (2023), Table 12; paper 1, Section 5.1.
    """
    return MambaLM(**{"vocab_size": 50280, "d_model": 768, "n_layer": 24, **options})
