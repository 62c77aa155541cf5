"""Trainable models on Flax NNX."""

from tokendyn.backends.jax.models import (
    MambaLM,
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
    "MambaVision",
    "MambaVisionMixer",
    "mamba_lm_130m",
    "mambavision_16px",
    "mambavision_32px",
    "mambavision_64px",
    "mambavision_t",
]
