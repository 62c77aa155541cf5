"""Trainable layers on PyTorch."""

from tokendyn.backends.torch.layers._attention import CausalAttention
from tokendyn.backends.torch.layers._h3 import H3
from tokendyn.backends.torch.layers._mamba import Mamba
from tokendyn.backends.torch.layers._ordering import OrderRecord, TokenOrdering, record_orders
from tokendyn.backends.torch.layers._reorder import TokenReorder
from tokendyn.backends.torch.layers._s6 import S6

__all__ = ["H3", "S6", "CausalAttention", "Mamba", "OrderRecord", "TokenOrdering", "TokenReorder", "record_orders"]
