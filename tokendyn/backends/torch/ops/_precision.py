"""In which precision sums are made, whatever the inputs' dtype and the autocast around the call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def compute_dtype(*arrays: torch.Tensor) -> torch.dtype:
    """float32 for half precision, else the widest dtype given."""
    dtype = torch.float32
    for array in arrays:
        dtype = torch.promote_types(dtype, array.dtype)
    return dtype


def without_autocast(like: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which matrix products keep the dtype they are given: a scan or a sort rounded to bfloat16 by an
    autocast meant for a model's projections would be another scan, another order."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# Some versions of torch.compile cannot look into it, and would cut the graph there. This is all that
# torch.compiler.assume_constant_result does but load the compiler, which takes longer than the rest of the package.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]
