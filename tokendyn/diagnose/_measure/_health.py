"""What is not finite, and how far the rest is from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokendyn.diagnose._capture import Capture
from tokendyn.diagnose._measure._statistics import number

QUANTITIES = ("u", "delta", "A", "B", "C", "z", "y")


def measure_health(capture: Capture) -> dict[str, Any]:
    """Of every tensor its largest value, how many entries are not finite, and the first of them.

    ``headroom``: powers of ten between the largest value of any of them and the overflow of the model's dtype.
    """
    limit = torch.finfo(capture.u.dtype).max
    quantities: dict[str, Any] = {}
    largest = 0.0
    for name in QUANTITIES:
        value: Tensor | None = getattr(capture, name)
        if value is None:
            continue
        finite = torch.isfinite(value)
        bad = int(value.numel() - int(finite.sum()))
        top = value.abs().amax() if not bad else value.masked_fill(~finite, 0.0).abs().amax()
        largest = max(largest, float(top))
        first = None if not bad else torch.argwhere(~finite)[0].tolist()
        quantities[name] = {"max": number(top), "not_finite": bad, "first": first}
    return {
        "finite": not any(q["not_finite"] for q in quantities.values()),
        "quantities": quantities,
        "headroom": math.log10(limit) - math.log10(largest) if largest > 0 else None,
    }
