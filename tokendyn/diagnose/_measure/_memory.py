"""Step sizes and how far back a layer remembers."""

from __future__ import annotations

from typing import Any

from tokendyn.diagnose._capture import Capture
from tokendyn.diagnose._measure._statistics import quantiles, rounded

#: Decay rates below which a state never forgets: sums over 10⁴ tokens and more at a step size of 0.1.
RATE_VANISHED = 1e-3


def measure_memory(capture: Capture) -> dict[str, Any]:
    """Δ over tokens and channels, decay rates -A, and horizons.

    A pair (d, n) keeps a token for 1 / (|A_dn| mean Δ_d) tokens before it has decayed to 1/e: its horizon. ``slowest``
    are the horizons of every channel's slowest state. ``first_token_step`` is Δ at the first token over the mean Δ of
    the others: a sink on the first token needs the others' near 0 (or its own large). ``vanished``: the share of rates
    below 10⁻³, ``not_decaying`` of those that are 0 or of the wrong sign. ``channels``: mean Δ and horizon of each.
    """
    step = capture.delta.float().mean(dim=(0, 2))  # (d,)
    rates = -capture.A.float()
    horizons = 1.0 / (rates * step[:, None])
    others = capture.delta[..., 1:].float().mean() if capture.delta.shape[-1] > 1 else None
    slowest = horizons.amax(-1)
    ratio = None if others is None or not others > 0 else float(capture.delta[..., 0].float().mean() / others)
    return {
        "delta": quantiles(capture.delta),
        "delta_mean_of_channel": quantiles(step),
        "decay_rate": quantiles(rates),
        "horizon": quantiles(horizons),
        "slowest": quantiles(slowest),
        "first_token_step": ratio,
        "vanished": float((rates < RATE_VANISHED).float().mean()),
        "not_decaying": float((rates <= 0).float().mean()),
        "channels": {"delta": [rounded(v) for v in step.tolist()], "horizon": [rounded(v) for v in slowest.tolist()]},
    }
