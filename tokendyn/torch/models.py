"""Trainable models on PyTorch."""

from tokendyn.backends.torch.models import (
    MambaVision,
    MambaVisionMixer,
    mambavision_16px,
    mambavision_32px,
    mambavision_64px,
    mambavision_t,
)

__all__ = [
    "MambaVision",
    "MambaVisionMixer",
    "mambavision_16px",
    "mambavision_32px",
    "mambavision_64px",
    "mambavision_t",
]
