"""Trainable layers on Flax NNX."""

from tokendyn.backends.jax.layers._mamba import Mamba
from tokendyn.backends.jax.layers._ordering import TokenOrdering
from tokendyn.backends.jax.layers._reorder import TokenReorder
from tokendyn.backends.jax.layers._s6 import S6

__all__ = ["S6", "Mamba", "TokenOrdering", "TokenReorder"]
