"""Spectrum of the input-output matrix M = S_Cᵀ S_B and of its symmetric part, without D x D matrices."""

from __future__ import annotations

from typing import Any

import torch

from tokendyn._operations import IOSpectrum
from tokendyn.backends.torch.ops._function import Function
from tokendyn.backends.torch.ops._precision import without_autocast


def io_spectrum(S_B: torch.Tensor, S_C: torch.Tensor) -> IOSpectrum:
    """See :func:`tokendyn.io_spectrum`."""
    with without_autocast(S_B):
        small = S_B @ S_C.mT if S_B.shape[0] <= S_B.shape[1] else S_C.mT @ S_B
        eigenvalues = torch.linalg.eigvals(small)
        order = torch.argsort(eigenvalues.real, descending=True, stable=True)
        symmetric, _ = _Symmetric.call(S_B, S_C)
    return IOSpectrum(eigenvalues[order], symmetric)


class _Symmetric(Function):
    """The r = min(2N, D) eigenvalues σ and unit eigenvectors V (D, r) of H = (M + Mᵀ)/2 in the row space of
    [S_C; S_B], which holds all that belong to eigenvalues other than 0.

    With ``[S_C; S_B]ᵀ = Q R`` they come from the r x r matrix ``Qᵀ H Q``, but are differentiated as those of H: the
    factorisation has no derivative where S_B and S_C share row space, as LDLᵀ projections do. With E = Vᵀ dH V and
    F_ij = 1/(σ_j - σ_i)::

        dσ = diag(E)        dV = V (F ∘ E) + (I - V Vᵀ) dH V diag(1/σ)

    The eigenvectors are an output only so that second derivatives come out right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(S_B: torch.Tensor, S_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Q, _ = torch.linalg.qr(torch.cat([S_C, S_B]).mT)
        half = (S_C @ Q).mT @ (S_B @ Q) / 2
        values, vectors = torch.linalg.eigh(half + half.mT)
        return values.flip(-1), Q @ vectors.flip(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        S_B, S_C, values, V = ctx.saved_tensors
        dvalues, dV = cotangents
        # The cotangent of H is V X Vᵀ + Y Vᵀ, of M its symmetric part W; then dS_B = S_C W and dS_C = S_B W.
        X = torch.diag_embed(dvalues) + _reciprocal(values.unsqueeze(-2) - values.unsqueeze(-1)) * (V.mT @ dV)
        Y = (dV - V @ (V.mT @ dV)) * _reciprocal(values) / 2

        def times(S: torch.Tensor) -> torch.Tensor:
            return (S @ V) @ ((X + X.mT) / 2 @ V.mT + Y.mT) + (S @ Y) @ V.mT

        return times(S_C), times(S_B)

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[torch.Tensor, torch.Tensor]:
        S_B, S_C, values, V = ctx.saved_tensors
        dS_B, dS_C = (torch.zeros_like(S_B) if t is None else t for t in tangents)
        B, C = S_B @ V, S_C @ V
        moved = (dS_C.mT @ B + S_C.mT @ (dS_B @ V) + dS_B.mT @ C + S_B.mT @ (dS_C @ V)) / 2  # dH V
        E = V.mT @ moved
        dV = V @ (_reciprocal(values.unsqueeze(-2) - values.unsqueeze(-1)) * E)
        return E.diagonal(dim1=-2, dim2=-1), dV + (moved - V @ E) * _reciprocal(values)


def _reciprocal(v: torch.Tensor) -> torch.Tensor:
    """1/v, and 0 for 0: of equal eigenvalues no one eigenvector moves."""
    zero = v == 0
    return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, v))
