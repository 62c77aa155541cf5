"""Input-output projections with a spectrum of chosen signs (LDLᵀ)."""

from __future__ import annotations

import torch

from tokendyn.backends.torch.ops._scan_plain import softplus

#: Added to softplus(diagonal) by the published code, and by its variant with equal scales.
_OFFSET = 0.7


def io_projections(
    weight_B: torch.Tensor,
    weight_C: torch.Tensor | None = None,
    diagonal: torch.Tensor | None = None,
    *,
    regime: str = "free",
    form: str = "paper",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`tokendyn.io_projections`."""
    if weight_C is not None:
        return weight_B, weight_C
    assert diagonal is not None
    n = diagonal.shape[0]
    p = softplus(diagonal)
    if form == "scale_matched" or (form == "published_code" and regime != "mixed"):
        p = p + _OFFSET
    if regime == "negative":
        p = -p
    elif regime == "mixed":
        p = torch.where(torch.arange(n, device=p.device) < (n + 1) // 2, p, -p)
    upper = torch.triu(weight_B, 1) + torch.eye(*weight_B.shape, dtype=p.dtype, device=p.device)
    return p.unsqueeze(-1) * upper, upper
