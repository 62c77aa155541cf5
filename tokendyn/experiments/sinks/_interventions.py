"""What makes the first token a sink: the scan's own Δ, B and C changed, one thing at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from tokendyn.diagnose import Capture
from tokendyn.diagnose._measure._attention import aggregate, channels_within, rows_to_one, sinks


def _as_it_is(scan: Capture) -> Capture:
    return scan


def _sign_of_m(scan: Capture) -> Capture:
    """-M for M: attraction x_1ᵀ M x_1 changes its sign, and P with it, so |P| does not change at all."""
    return dataclasses.replace(scan, C=-scan.C)


def _consensus(scan: Capture) -> Capture:
    """Every token is token 1: the end of all clustering, with Δ as it is there."""
    return dataclasses.replace(
        scan,
        delta=scan.delta[..., :1].expand_as(scan.delta),
        B=scan.B[..., :1].expand_as(scan.B),
        C=scan.C[..., :1].expand_as(scan.C),
        u=scan.u[..., :1].expand_as(scan.u),
        driven=None if scan.driven is None else scan.driven[..., :1].expand_as(scan.driven),
    )


def _later_steps(factor: float) -> Callable[[Capture], Capture]:
    """Δ of tokens 2, 3, ... times ``factor``: towards the 0 that theory asks for."""

    def change(scan: Capture) -> Capture:
        delta = scan.delta.clone()
        delta[..., 1:] *= factor
        return dataclasses.replace(scan, delta=delta)

    return change


INTERVENTIONS: dict[str, Callable[[Capture], Capture]] = {
    "as it is": _as_it_is,
    "sign of M changed": _sign_of_m,
    "all tokens are token 1": _consensus,
    "later Δ × 0.1": _later_steps(0.1),
    "later Δ × 0.01": _later_steps(0.01),
    "later Δ × 0.001": _later_steps(0.001),
}


@torch.no_grad()
def intervene(scan: Capture) -> dict[str, float]:
    """The first token's sink score under every intervention."""
    d, length = scan.u.shape[1:]
    channels = channels_within(d, length, scan.B.shape[1])
    found = {}
    for name, change in INTERVENTIONS.items():
        weights, _ = aggregate(change(scan), 0, channels)
        found[name] = float(sinks(rows_to_one(weights))[0][0])
    return found
