"""Tokens on the unit sphere: where they are, and how far from each limit point that theory predicts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendyn.diagnose._capture import Capture, Projections
from tokendyn.diagnose._measure._statistics import number, quantiles

_MOST = 512
#: Stable poles whose distances are reported: those with most tokens near them.
_POLES = 16
#: Poles looked at together.
_COLUMNS = 1024


def measure_sphere(capture: Capture, flow: Tensor | None = None) -> dict[str, Any]:
    """Distances of the scan's tokens to every limit point predicted, and where the flow moves them.

    With Δ and a shared by the channels the limits are ±x_1 if x_1ᵀ M x_1 > 0, and for the second token the hyperplane
    xᵀ M x_1 = 0 if it is below 0. With Δ a channel (the real layer) a pole ±e_ν is stable iff x ᵀ M x > 0 there and
    Δ_ν is the largest, or xᵀ M x < 0 and Δ_ν is the smallest. ``limit_points`` holds each: 1 - cosine of the tokens
    with it (of the hyperplane: |cosine| with its normal), the share of tokens nearest to it, and its slowest rate.

    ``towards_first`` is the share of tokens whose cosine with the first one moves away from 0 under the normalised
    flow, at this instant; ``agrees`` says whether the majority does as x_1ᵀ M x_1 has it (``attraction``).
    ``towards_pole``: the share of tokens that move towards their nearest stable pole. 0.5 is chance.
    """
    every = max(1, -(-capture.u.shape[-1] // _MOST))
    x = capture.source[:, :, ::every].mT.double()
    velocity = (capture.state_output() if flow is None else flow)[:, :, ::every].mT.double()
    length = x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    unit = x / length
    first = unit[:, :1]
    cosine = (unit * first).sum(-1)[:, 1:]
    # d/dt of ⟨x̂_l, x̂_1⟩: both ends move, each in its own tangent space.
    tangent = (velocity - (velocity * unit).sum(-1, keepdim=True) * unit) / length
    change = ((tangent * first).sum(-1) + (unit * tangent[:, :1]).sum(-1))[:, 1:]
    product = torch.einsum("bn,bn->b", capture.C[..., 0], capture.B[..., 0])
    found: dict[str, Any] = {"coordinates": _plane(unit[0]), "limit_points": []}
    if cosine.numel():
        attraction = bool(product.mean() > 0)
        towards = float((change * cosine.sign() > 0).float().mean())
        found |= {
            "cosine_with_first": quantiles(cosine),
            "distance_to_first": number((1 - cosine.abs()).mean()),
            "towards_first": towards,
            "attraction": attraction,
            "agrees": (towards > 0.5) == attraction,
        }
        found["limit_points"] += [
            _point(f"{name}x₁", 1 - sign * cosine, (sign * cosine > 0).double(), attraction)
            for sign, name in ((1, "+"), (-1, "−"))
        ]
        if (plane := _hyperplane(capture, every)) is not None:
            found["limit_points"].append(_point("hyperplane xᵀMx₁ = 0", plane, None, not attraction))
    largest = unit.abs().amax(-1)
    found["distance_to_any_pole"] = number((1 - largest).mean())
    if capture.projections is not None:
        poles = stable_poles(capture.projections, _bias(capture))
        found["stable_pole_count"] = len(poles)
        found["stable_poles"] = [{"channel": c, "sign": s, "rate": rate} for c, s, rate in poles[:32]]
        if poles:
            found |= _near_poles(poles, unit, tangent, found["limit_points"])
    return found


def _point(name: str, distance: Tensor, nearest: Tensor | None, predicted: bool) -> dict[str, Any]:
    return {
        "point": name,
        "predicted": predicted,
        "distance": quantiles(distance),
        "nearest": None if nearest is None else number(nearest.mean()),
        "rate": None,
    }


def _hyperplane(capture: Capture, every: int) -> Tensor | None:
    """(b, l) |cosine| of every later token with S_Cᵀ B_1, the normal of xᵀ M x_1 = 0; None where C is not S_C x."""
    maps = capture.projections
    if maps is None or maps.biased or maps.normalised:
        return None
    normal = capture.B[..., 0].double() @ maps.S_C.double().to(capture.B.device)  # (b, d)
    x = capture.source[:, :, ::every].double()[..., 1:]
    scale = normal.norm(dim=-1)[:, None] * x.norm(dim=1)
    return (torch.einsum("bd,bdl->bl", normal, x) / scale.clamp_min(1e-300)).abs()


def _near_poles(
    poles: list[tuple[int, int, float]], unit: Tensor, tangent: Tensor, points: list[dict[str, Any]]
) -> dict[str, Any]:
    signs = unit.new_tensor([sign for _, sign, _ in poles])
    channels = [channel for channel, _, _ in poles]
    coordinates = unit[..., channels] * signs  # cosines
    nearest = coordinates.argmax(-1, keepdim=True)
    moving = (tangent[..., channels] * signs).gather(-1, nearest)
    share = torch.bincount(nearest.flatten(), minlength=len(poles)).double() / nearest.numel()
    for place in share.topk(min(_POLES, len(poles))).indices.tolist():
        channel, sign, rate = poles[place]
        entry = _point(f"{'+' if sign > 0 else '−'}e{channel}", 1 - coordinates[..., place], None, True)
        points.append({**entry, "nearest": float(share[place]), "rate": rate})
    return {
        "distance_to_stable_pole": number((1 - coordinates.amax(-1)).mean()),
        "towards_pole": number((moving > 0).float().mean()),
    }


def stable_poles(maps: Projections, bias: Tensor | None) -> list[tuple[int, int, float]]:
    """(channel, ±1, rate) of every pole ±e_ν at which a first token would stay, with its slowest rate of return.

    At ±e_ν, with xᵀ M x taken there: the eigenvalues are -xᵀ M x (Δ_ν - Δ_d), d ≠ ν, whatever makes Δ, B and C of x;
    with a norm between, Δ is that of the normalised low-rank part, and xᵀ M x is known up to a positive factor, so the
    poles are right and their rates are those without the factor.
    """
    own = (maps.S_C.double() * maps.S_B.double()).sum(0)  # M_νν
    factors = [factor.double() for factor in maps.s_delta]
    if maps.step_gain is not None:  # column ν: the low-rank part of e_ν, normalised
        scale = factors[-1].square().mean(0, keepdim=True).sqrt().clamp_min(1e-300)
        factors[-1] = maps.step_gain.double()[:, None] * factors[-1] / scale
    shift = 0.0 if bias is None else bias.double()[:, None]
    found = []
    for start in range(0, len(own), _COLUMNS):  # a (d, d) matrix of a large layer is never whole
        poles = torch.arange(start, min(start + _COLUMNS, len(own)), device=own.device)
        argument = factors[-1][:, poles]
        for factor in reversed(factors[:-1]):
            argument = factor @ argument
        for sign in (1, -1):
            step = F.softplus(sign * argument + shift)  # (d, ν): Δ_d at the pole of ν
            place = (poles, poles - start)
            mine = step[place]
            step[place] = -torch.inf
            most = mine - step.amax(0)
            step[place] = torch.inf
            least = step.amin(0) - mine
            gap = torch.where(own[poles] > 0, most, least)
            rates = own[poles].abs() * gap
            stable = (gap > 0) & (own[poles] != 0)
            places = torch.nonzero(stable).flatten()
            found += [(start + c, sign, rate) for c, rate in zip(places.tolist(), rates[places].tolist(), strict=True)]
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
    return [[round(a, 4), round(b, 4)] for a, b in points.tolist()]
