"""Models on Flax NNX."""

from tokendyn.backends.jax.models._mamba_lm import MambaLM, mamba_lm_130m
from tokendyn.backends.jax.models._mambavision import (
    MambaVision,
    mambavision_16px,
    mambavision_32px,
    mambavision_64px,
    mambavision_t,
)
from tokendyn.backends.jax.models._mambavision_mixer import MambaVisionMixer

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
