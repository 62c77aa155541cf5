"""In which precision sums are made, whatever the inputs' dtype and the autocast around the call."""

from __future__ import annotations

import torch


def compute_dtype(*arrays: torch.Tensor) -> torch.dtype:
    """float32 for half precision, else the widest dtype given."""
    dtype = torch.float32
    for array in arrays:
        dtype = torch.promote_types(dtype, array.dtype)
    return dtype


def without_autocast(like: torch.Tensor) -> torch.autocast:
    """A context in which matrix products keep the dtype they are given: a scan or a sort rounded to bfloat16 by an
    autocast meant for a model's projections would be another scan, another order."""
    return torch.autocast(like.device.type, enabled=False)
