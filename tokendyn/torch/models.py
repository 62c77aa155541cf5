"""Trainable models on PyTorch."""

from tokendyn.backends.torch.models import (
    H3LM,
    H3LMConfig,
    LanguageModel,
    LanguageModelConfig,
    MambaClassifier,
    MambaLM,
    MambaLMConfig,
    MambaVision,
    MambaVisionMixer,
    TransformerLM,
    TransformerLMConfig,
    mamba_lm_130m,
    mambavision_16px,
    mambavision_32px,
    mambavision_64px,
    mambavision_t,
)

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
