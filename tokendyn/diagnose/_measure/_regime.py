"""In which regime a layer works on the inputs given: from the signs and sizes of x_lᵀ M x_j and Δ.

Under the token dynamics (7), ``d(x_dl²)/dt = 2 x_dl (P x)_dl``: a token's coordinate grows where ``x_dl (P x)_dl > 0``,
with P made of the x_lᵀ M x_j = ⟨C_l, B_j⟩ and the Δ of the inputs at hand. Where it grows, the sign of the part of Δ's
argument that follows the token, S_Δ x, says how: above 0 Δ rises with the token (fast divergence), below 0
it falls (slow divergence). The count of eigenvalue signs of M is not used: for a free layer it is always N and N.
"""

from __future__ import annotations

from typing import Any

import torch

from tokendyn.diagnose._capture import Capture
from tokendyn.diagnose._measure._statistics import number, quantiles

#: A layer is of one regime if this share of its movement is; else it is mixed.
DOMINANT = 0.8
#: Movement per layer below this is called stationary: relative change of a token's norm.
STATIONARY = 1e-6
_POINTS = 96


def measure_regime(capture: Capture) -> dict[str, Any]:
    """Regime of the layer, of its channels and of its tokens.

    ``shares``: of the movement Σ |x_dl (P x)_dl| over channels and tokens, the parts that shrink tokens, grow them with
    Δ falling, grow them with Δ rising. ``rate`` of a token: ⟨x_l, (P x)_l⟩ / |x_l|², the relative growth of its norm in
    one unit of time. ``self_product``: x_lᵀ M x_l, whose sign at the first token decides its fate by itself.
    """
    x = capture.source.double()
    moved = x * capture.state_output().double()  # x_dl (P x)_dl
    size = moved.abs()
    total = size.sum()
    growing = moved > 0
    if capture.pre is None:
        fast = None
        grow_fast = grow_slow = None
    else:
        fast = capture.pre > 0
        grow_fast = (size * (growing & fast)).sum() / total
        grow_slow = (size * (growing & ~fast)).sum() / total
    shrink = (size * (moved < 0)).sum() / total
    norms = x.square().sum(1)
    rate = moved.sum(1) / norms.clamp_min(torch.finfo(x.dtype).tiny)  # (b, L)
    product = torch.einsum("bnl,bnl->bl", capture.C, capture.B)
    shares = {
        "convergence": number(shrink),
        "slow divergence": None if grow_slow is None else number(grow_slow),
        "fast divergence": None if grow_fast is None else number(grow_fast),
    }
    channel = moved.sum(dim=(0, 2)) / x.square().sum(dim=(0, 2)).clamp_min(torch.finfo(x.dtype).tiny)  # (d,)
    pairs = _pairs(capture)
    return {
        "kind": _kind(shares, float(shrink), rate),
        "shares": shares,
        "rate": quantiles(rate),
        "tokens_growing": number((rate > 0).float().mean()),
        "channels_growing": number((channel > 0).float().mean()),
        "channel_rate": quantiles(channel),
        "extreme_channels": {
            "growing": [int(i) for i in channel.topk(min(3, len(channel))).indices],
            "shrinking": [int(i) for i in (-channel).topk(min(3, len(channel))).indices],
        },
        "self_product": {**quantiles(product), "positive": number((product > 0).float().mean())},
        "first_token": {"product": number(product[:, 0].mean()), "rate": number(rate[:, 0].mean())},
        "pair_positive": number((pairs > 0).float().mean()),
        "step_rises": None if fast is None else number(fast.float().mean()),
        "rate_of_token": _thinned(rate.mean(0)),
    }


def _pairs(capture: Capture) -> torch.Tensor:
    """x_lᵀ M x_j for j ≤ l of the first sequence, of every k-th token where there are many."""
    every = max(1, capture.u.shape[-1] // 512)
    C, B = capture.C[0, :, ::every], capture.B[0, :, ::every]
    products = C.mT @ B
    return products[torch.ones_like(products, dtype=torch.bool).tril()]


def _kind(shares: dict[str, float | None], shrink: float, rate: torch.Tensor) -> str:
    if float(rate.abs().amax()) < STATIONARY:
        return "stationary"
    for kind, share in shares.items():
        if share is not None and share >= DOMINANT:
            return kind
    if 1 - shrink >= DOMINANT:
        return "divergence"
    return "mixed"


def _thinned(values: torch.Tensor) -> dict[str, list[float]]:
    """At most some points of a line over the sequence, with their places."""
    every = max(1, -(-len(values) // _POINTS))
    return {"place": list(range(0, len(values), every)), "value": values[::every].float().tolist()}
