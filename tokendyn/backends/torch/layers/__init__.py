"""Trainable layers on PyTorch."""

from tokendyn.backends.torch.layers._mamba import Mamba
from tokendyn.backends.torch.layers._ordering import OrderRecord, TokenOrdering, record_orders
from tokendyn.backends.torch.layers._reorder import TokenReorder
from tokendyn.backends.torch.layers._s6 import S6

__all__ = ["S6", "Mamba", "OrderRecord", "TokenOrdering", "TokenReorder", "record_orders"]
