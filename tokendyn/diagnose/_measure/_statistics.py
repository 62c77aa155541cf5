"""Distributions as a few numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Elements above which quantiles are taken of every k-th element: torch.quantile refuses more than 2^24.
_MOST = 1 << 20


def quantiles(values: Tensor) -> dict[str, float | None]:
    """Least, 5 %, median, 95 % and greatest of the finite values; None where there are none."""
    flat = values.detach().flatten().float()
    flat = flat[torch.isfinite(flat)]
    names = ("min", "p05", "median", "p95", "max")
    if flat.numel() == 0:
        return dict.fromkeys(names)
    thinned = flat[:: max(1, math.ceil(flat.numel() / _MOST))]
    inner = torch.quantile(thinned, torch.tensor([0.05, 0.5, 0.95], device=flat.device)).tolist()
    return dict(zip(names, [flat.min().item(), *inner, flat.max().item()], strict=True))


def number(value: Tensor | float) -> float | None:
    """A Python float, None if it is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None


def rounded(value: float) -> float | None:
    """Four significant digits, for long lists."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's correlation of two vectors; None where one of them is constant or short."""
    from scipy.stats import rankdata

    if a.numel() < 3:
        return None
    ranks = [torch.from_numpy(rankdata(v.double().cpu().numpy())) for v in (a, b)]
    first, second = (r - r.mean() for r in ranks)
    size = first.norm() * second.norm()
    return float(first @ second / size) if size > 0 else None
