"""Models on PyTorch."""

from tokendyn.backends.torch.models._classifier import MambaClassifier
from tokendyn.backends.torch.models._h3_lm import H3LM, H3LMConfig
from tokendyn.backends.torch.models._language import LanguageModel, LanguageModelConfig
from tokendyn.backends.torch.models._mamba_lm import MambaLM, MambaLMConfig, mamba_lm_130m
from tokendyn.backends.torch.models._mambavision import (
    MambaVision,
    mambavision_16px,
    mambavision_32px,
    mambavision_64px,
    mambavision_t,
)
from tokendyn.backends.torch.models._mambavision_mixer import MambaVisionMixer
from tokendyn.backends.torch.models._transformer_lm import TransformerLM, TransformerLMConfig

__all__ = [
    "H3LM",
    "H3LMConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "MambaClassifier",
    "MambaLM",
    "MambaLMConfig",
    "MambaVision",
    "MambaVisionMixer",
    "TransformerLM",
    "TransformerLMConfig",
    "mamba_lm_130m",
    "mambavision_16px",
    "mambavision_32px",
    "mambavision_64px",
    "mambavision_t",
]
