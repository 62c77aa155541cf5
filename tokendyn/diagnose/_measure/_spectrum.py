"""Eigenvalues of the input-output matrix M = S_Cᵀ S_B: magnitudes and rank."""

from __future__ import annotations

from typing import Any

import torch

from tokendyn import _operations as ops
from tokendyn.diagnose._capture import Capture


def measure_spectrum(capture: Capture) -> dict[str, Any] | None:
    """Eigenvalues of M and of (M + Mᵀ)/2 in float64, the numerical rank of M, ‖M‖₂ and ‖M‖_F; None where unknown.

    ``positive_weight`` is the share of Σ|σ| that positive eigenvalues of the symmetric part hold: 1 for a positive
    parametrisation, 0 for a negative one; their count is the same for every free layer.
    """
    maps = capture.projections
    if maps is None:
        return None
    S_B, S_C = maps.S_B.double().cpu(), maps.S_C.double().cpu()
    if not (torch.isfinite(S_B).all() and torch.isfinite(S_C).all()):
        return None
    eigenvalues, symmetric = ops.io_spectrum(S_B, S_C)
    # The singular values of S_Cᵀ S_B are those of R_C R_Bᵀ of two thin factorisations.
    R_B, R_C = torch.linalg.qr(S_B.mT).R, torch.linalg.qr(S_C.mT).R
    singular = torch.linalg.svdvals(R_C @ R_B.mT)
    top = float(singular[0]) if len(singular) else 0.0
    weight = float(symmetric.abs().sum())
    return {
        "eigenvalues": [[float(v.real), float(v.imag)] for v in eigenvalues],
        "symmetric": symmetric.tolist(),
        "rank": int((singular > top * 1e-10).sum()) if top > 0 else 0,
        "norm": top,
        "frobenius": float(singular.square().sum().sqrt()),
        "largest": float(symmetric.max()) if len(symmetric) else None,
        "least": float(symmetric.min()) if len(symmetric) else None,
        "positive_weight": float(symmetric.clamp_min(0).sum()) / weight if weight > 0 else None,
        "normalised": maps.normalised,
        "biased": maps.biased,
    }
