"""Tokens on the unit sphere: where they are, and how far from the limit points of the normalised flow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendyn.diagnose._capture import Capture, Projections
from tokendyn.diagnose._measure._statistics import number, quantiles

_MOST = 512


def measure_sphere(capture: Capture) -> dict[str, Any]:
    """Cosines of the scan's tokens with the predicted limit points, and where the flow moves them.

    With Δ and a shared by the channels the limits are ±x_1 if x_1ᵀ M x_1 > 0. With Δ a channel (the real layer) a pole
    ±e_ν is stable iff M_νν > 0 and Δ_ν is the largest there, or M_νν < 0 and it is the smallest. ``towards_first`` is
    the share of tokens whose cosine with the first one moves away from 0 under the normalised flow, at this instant:
    theory has attraction where x_1ᵀ M x_1 > 0 (``attraction``), and ``agrees`` says whether the majority does so.
    """
    every = max(1, -(-capture.u.shape[-1] // _MOST))
    x = capture.source[:, :, ::every].mT.double()
    velocity = capture.state_output()[:, :, ::every].mT.double()
    length = x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    unit = x / length
    first = unit[:, :1]
    cosine = (unit * first).sum(-1)[:, 1:]
    # d/dt of ⟨x̂_l, x̂_1⟩: both ends move, each in its own tangent space.
    tangent = (velocity - (velocity * unit).sum(-1, keepdim=True) * unit) / length
    change = ((tangent * first).sum(-1) + (unit * tangent[:, :1]).sum(-1))[:, 1:]
    product = torch.einsum("bn,bn->b", capture.C[..., 0], capture.B[..., 0])
    found: dict[str, Any] = {"coordinates": _plane(unit[0])}
    if cosine.numel():
        towards = float((change * cosine.sign() > 0).float().mean())
        found |= {
            "cosine_with_first": quantiles(cosine),
            "distance_to_first": number((1 - cosine.abs()).mean()),
            "towards_first": towards,
            "attraction": bool(product.mean() > 0),
            "agrees": (towards > 0.5) == bool(product.mean() > 0),
        }
    largest = unit.abs().amax(-1)
    found["distance_to_any_pole"] = number((1 - largest).mean())
    if capture.projections is not None:
        poles = stable_poles(capture.projections, _bias(capture))
        found["stable_poles"] = [{"channel": c, "sign": s} for c, s in poles[:32]]
        found["stable_pole_count"] = len(poles)
        if poles:
            coordinates = torch.stack([unit[..., c] * s for c, s in poles], dim=-1)
            found["distance_to_stable_pole"] = number((1 - coordinates.amax(-1)).mean())
    return found


def stable_poles(maps: Projections, bias: Tensor | None) -> list[tuple[int, int]]:
    """(channel, ±1) of every pole ±e_ν at which a first token would stay: section's case of Δ per channel.

    At ±e_ν the step sizes are softplus(± S_Δ e_ν + bias); the eigenvalues are -M_νν (Δ_ν - Δ_d), d ≠ ν.
    """
    own = (maps.S_C.float() * maps.S_B.float()).sum(0)  # M_νν
    s_delta = maps.s_delta[0].float()
    for factor in maps.s_delta[1:]:
        s_delta = s_delta @ factor.float()
    shift = 0.0 if bias is None else bias.float()[:, None]
    found = []
    for sign in (1, -1):
        step = F.softplus(sign * s_delta + shift)  # (d, ν): Δ_d at the pole of ν
        mine = step.diagonal()
        step = step.clone()
        step.fill_diagonal_(-torch.inf)
        most = mine > step.amax(0)
        step.fill_diagonal_(torch.inf)
        least = mine < step.amin(0)
        stable = ((own > 0) & most) | ((own < 0) & least)
        found += [(int(c), sign) for c in torch.nonzero(stable).flatten()]
    return found


def _bias(capture: Capture) -> Tensor | None:
    """(d,) what Δ's argument holds beside S_Δ x: the same at every token."""
    if capture.pre is None:
        return None
    step = capture.delta[0, :, 0].double()
    argument = step + torch.log(-torch.expm1(-step.clamp_min(1e-30)))  # inverse of softplus
    return argument - capture.pre[0, :, 0].double()


def _plane(unit: Tensor) -> list[list[float]]:
    """Coordinates of normalised tokens on the first one and on the direction in which the rest spread most."""
    rest = unit - (unit @ unit[0])[:, None] * unit[0]
    if len(unit) < 2 or float(rest.norm()) < 1e-6:
        return [[1.0, 0.0]] * len(unit)
    _, vectors = torch.linalg.eigh(rest.mT @ rest) if rest.shape[1] <= rest.shape[0] else (None, None)
    if vectors is None:
        _, small = torch.linalg.eigh(rest @ rest.mT)
        direction = F.normalize(rest.mT @ small[:, -1], dim=0)
    else:
        direction = vectors[:, -1]
    every = max(1, -(-len(unit) // 200))
    points = torch.stack([unit @ unit[0], unit @ direction], dim=-1)[::every]
    return [[round(float(a), 4), round(float(b), 4)] for a, b in points]
