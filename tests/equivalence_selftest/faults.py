"""All faults. The main ones are planted on every backend, most on NumPy and PyTorch, gradients on PyTorch at least."""

from __future__ import annotations

from .map_faults import FLOWS, INPUT_OUTPUT
from .order_faults import COMPOSITIONS, ORDERS
from .scan_faults import ATTENTION, SCAN, STEP

FAULTS = (*SCAN, *STEP, *ATTENTION, *ORDERS, *COMPOSITIONS, *INPUT_OUTPUT, *FLOWS)
