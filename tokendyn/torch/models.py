"""Trainable models on PyTorch."""

from tokendyn.backends.torch.models import (
    MambaLM,
    MambaLMConfig,
    MambaVision,
    MambaVisionMixer,
    mamba_lm_130m,
    mambavision_16px,
    mambavision_32px,
    mambavision_64px,
    mambavision_t,
)

__all__ = [
    "MambaLM",
    "MambaLMConfig",
    "MambaVision",
    "MambaVisionMixer",
    "mamba_lm_130m",
    "mambavision_16px",
    "mambavision_32px",
    "mambavision_64px",
    "mambavision_t",
]
