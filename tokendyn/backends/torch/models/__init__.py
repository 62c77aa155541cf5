"""Models on PyTorch."""

from tokendyn.backends.torch.models._mambavision import (
    MambaVision,
    mambavision_16px,
    mambavision_32px,
    mambavision_64px,
    mambavision_t,
)
from tokendyn.backends.torch.models._mambavision_mixer import MambaVisionMixer

__all__ = [
    "MambaVision",
    "MambaVisionMixer",
    "mambavision_16px",
    "mambavision_32px",
    "mambavision_64px",
    "mambavision_t",
]
