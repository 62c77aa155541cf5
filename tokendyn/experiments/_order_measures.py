"""What orders do to tokens: measures on held-out data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokendyn.backends.torch.layers import OrderRecord, record_orders


def measure_orders(model: nn.Module, *inputs: Any) -> dict[str, dict[str, float]]:
    """:func:`of_order` by ordering module, of those that ordered anything."""
    with torch.no_grad(), record_orders(model) as records:
        if records:
            model(*inputs)
    return {name: of_order(found[0]) for name, found in records.items() if found}


def of_order(record: OrderRecord) -> dict[str, float]:
    """How many tokens, and means over sequences and places of a record."""
    return {
        "tokens": record.order.scores.shape[1],
        "effective_tokens": record.effective_tokens.mean().item(),
        "variance_kept": record.variance_kept.mean().item(),
        "score_deviation": record.order.scores.std(dim=1, correction=0).mean().item(),
    }
