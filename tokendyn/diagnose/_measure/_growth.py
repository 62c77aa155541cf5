"""Whether tokens grow over depth as the token dynamics predict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokendyn.diagnose._capture import Capture
from tokendyn.diagnose._measure._statistics import number, quantiles, rank_correlation


def measure_growth(capture: Capture, flow: Tensor) -> dict[str, Any] | None:
    """Growth of every token's norm in a layer: predicted ⟨x, P x⟩ / |x|², measured ln(|after| / |before|).

    Predicted of the scan's tokens under dx/dt = P x, with one layer a unit of time; measured of the same tokens of the
    residual stream across the layer's block. The block holds projections, a convolution and a gate of which the theory
    knows nothing, so agreement is a finding and not a matter of course: ``sign_agreement`` is the share of tokens whose
    growth has the sign predicted, ``correlation`` Spearman's over the tokens of a sequence (mean over the batch). None
    where there is no residual stream, or where its tokens are not the scan's one by one.
    """
    before, after = capture.tokens_in, capture.tokens_out
    places = (capture.u.shape[0], capture.u.shape[2])
    if before is None or after is None or before.shape != after.shape or before.shape[:2] != places or capture.reorders:
        return None
    if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
        return None
    x = capture.source.double()
    tiny = torch.finfo(x.dtype).tiny
    predicted = (x * flow.double()).sum(1) / x.square().sum(1).clamp_min(tiny)  # (b, L)
    sizes = [stream.double().norm(dim=-1).clamp_min(tiny) for stream in (before, after)]
    measured = (sizes[1] / sizes[0]).log()
    rows = [rank_correlation(p, m) for p, m in zip(predicted[:8], measured[:8], strict=True)]
    known = [row for row in rows if row is not None]
    return {
        "predicted": quantiles(predicted),
        "measured": quantiles(measured),
        "sign_agreement": number((predicted.sign() == measured.sign()).float().mean()),
        "correlation": sum(known) / len(known) if known else None,
    }
