"""Models on PyTorch."""

from tokendyn.backends.torch.models._mamba_lm import MambaLM, MambaLMConfig, mamba_lm_130m
from tokendyn.backends.torch.models._mambavision import (
    MambaVision,
    mambavision_16px,
    mambavision_32px,
    mambavision_64px,
    mambavision_t,
)
from tokendyn.backends.torch.models._mambavision_mixer import MambaVisionMixer

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
