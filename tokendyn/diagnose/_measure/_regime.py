"""In which regime a layer works on the inputs given: from the signs and sizes of x_lᵀ M x_j and Δ.

Under the token dynamics (7), ``d(x_dl²)/dt = 2 x_dl (P x)_dl``: a token's coordinate grows where ``x_dl (P x)_dl > 0``,
with P made of the x_lᵀ M x_j = ⟨C_l, B_j⟩ and the Δ of the inputs at hand. Where it grows, the sign of the part of Δ's
argument that follows the token, S_Δ x, says how: above 0 Δ rises with the token (fast divergence), below 0
it falls (slow divergence). The count of eigenvalue signs of M is not used: for a free layer it is always N and N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokendyn.diagnose._capture import Capture
from tokendyn.diagnose._measure._statistics import number, quantiles, rounded

#: A layer is of one regime if this share of its movement is; else it is mixed.
DOMINANT = 0.8
#: Movement per layer below this is called stationary: relative change of a token's norm.
STATIONARY = 1e-6
KINDS = ("convergence", "slow divergence", "fast divergence", "divergence", "mixed", "stationary")
_POINTS = 96


def measure_regime(capture: Capture, flow: Tensor | None = None) -> dict[str, Any]:
    """Regime of the layer, of its channels and of its tokens.

    ``shares``: of the movement Σ |x_dl (P x)_dl| over channels and tokens, the parts that shrink tokens, grow them with
    Δ falling, grow them with Δ rising. ``rate`` of a token: ⟨x_l, (P x)_l⟩ / |x_l|², the relative growth of its norm in
    one unit of time, and ``e_fold`` the time 1/|rate| in which it would change by a factor e: layers of depth, if one
    is a unit of time. ``self_product``: x_lᵀ M x_l, whose sign at the first token decides its fate by itself.
    ``channels``: the same of every channel by itself, its regime as a place in ``kinds``.
    """
    x = capture.source.double()
    moved = x * (capture.state_output() if flow is None else flow).double()  # x_dl (P x)_dl
    size = moved.abs()
    total = size.sum()
    growing = moved > 0
    shrinks = size * (moved < 0)
    parts: dict[str, Tensor | None] = {"convergence": shrinks, "slow divergence": None, "fast divergence": None}
    if capture.pre is not None:
        fast = capture.pre > 0
        parts |= {"slow divergence": size * (growing & ~fast), "fast divergence": size * (growing & fast)}
    shares = {kind: None if part is None else number(part.sum() / total) for kind, part in parts.items()}
    tiny = torch.finfo(x.dtype).tiny
    rate = moved.sum(1) / x.square().sum(1).clamp_min(tiny)  # (b, L)
    product = torch.einsum("bnl,bnl->bl", capture.C, capture.B)
    channel = moved.sum(dim=(0, 2)) / x.square().sum(dim=(0, 2)).clamp_min(tiny)  # (d,)
    pairs = _pairs(capture)
    return {
        "kind": _kind(shares, float(rate.abs().amax())),
        "shares": shares,
        "rate": quantiles(rate),
        "e_fold": number(1.0 / rate.abs().median().clamp_min(tiny)),
        "tokens_growing": number((rate > 0).float().mean()),
        "channels_growing": number((channel > 0).float().mean()),
        "channel_rate": quantiles(channel),
        "channels": _channels(size, parts, channel),
        "extreme_channels": {
            "growing": [int(i) for i in channel.topk(min(3, len(channel))).indices],
            "shrinking": [int(i) for i in (-channel).topk(min(3, len(channel))).indices],
        },
        "self_product": {**quantiles(product), "positive": number((product > 0).float().mean())},
        "first_token": {"product": number(product[:, 0].mean()), "rate": number(rate[:, 0].mean())},
        "pair_positive": number((pairs > 0).float().mean()),
        "step_rises": None if capture.pre is None else number((capture.pre > 0).float().mean()),
        "rate_of_token": _thinned(rate.mean(0)),
    }


def _channels(size: Tensor, parts: dict[str, Tensor | None], rate: Tensor) -> dict[str, Any]:
    """Rate and regime of every channel: its own shares of its own movement, by the rules for a layer."""
    total = size.sum(dim=(0, 2)).clamp_min(torch.finfo(size.dtype).tiny)
    shares = {kind: None if part is None else (part.sum(dim=(0, 2)) / total).tolist() for kind, part in parts.items()}
    rates = rate.tolist()
    kinds = [
        KINDS.index(_kind({kind: None if share is None else share[c] for kind, share in shares.items()}, abs(own)))
        for c, own in enumerate(rates)
    ]
    return {"rate": [rounded(v) for v in rates], "kind": kinds, "kinds": list(KINDS)}


def _pairs(capture: Capture) -> Tensor:
    """x_lᵀ M x_j for j ≤ l of the first sequence, of every k-th token where there are many."""
    every = max(1, capture.u.shape[-1] // 512)
    C, B = capture.C[0, :, ::every], capture.B[0, :, ::every]
    products = C.mT @ B
    return products[torch.ones_like(products, dtype=torch.bool).tril()]


def _kind(shares: dict[str, float | None], largest: float) -> str:
    """One of ``KINDS``, from shares of the movement and the largest rate."""
    if largest < STATIONARY:
        return "stationary"
    for kind, share in shares.items():
        if share is not None and share >= DOMINANT:
            return kind
    shrink = shares["convergence"]
    return "divergence" if shrink is not None and 1 - shrink >= DOMINANT else "mixed"


def _thinned(values: Tensor) -> dict[str, list[float]]:
    """At most some points of a line over the sequence, with their places."""
    every = max(1, -(-len(values) // _POINTS))
    return {"place": list(range(0, len(values), every)), "value": values[::every].float().tolist()}
