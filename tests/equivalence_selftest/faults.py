"""All faults. Most are planted on every backend; the others on PyTorch, which is fast and differentiates everything."""

from __future__ import annotations

from .map_faults import FLOWS, INPUT_OUTPUT
from .order_faults import COMPOSITIONS, ORDERS
from .scan_faults import ATTENTION, SCAN

FAULTS = (*SCAN, *ATTENTION, *ORDERS, *COMPOSITIONS, *INPUT_OUTPUT, *FLOWS)
