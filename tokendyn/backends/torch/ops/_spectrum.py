"""Spectrum of the input-output matrix M = S_Cᵀ S_B and of its symmetric part, without D x D matrices."""

from __future__ import annotations

import torch

from tokendyn._operations import IOSpectrum


def io_spectrum(S_B: torch.Tensor, S_C: torch.Tensor) -> IOSpectrum:
    """See :func:`tokendyn.io_spectrum`."""
    state, channels = S_B.shape
    small = S_B @ S_C.T if state <= channels else S_C.T @ S_B
    eigenvalues = torch.linalg.eigvals(small)
    # By descending real part; of a conjugate pair, equal in it, the upper one first.
    eigenvalues = eigenvalues[torch.argsort(eigenvalues.imag, descending=True, stable=True)]
    eigenvalues = eigenvalues[torch.argsort(eigenvalues.real, descending=True, stable=True)]
    with torch.no_grad():
        if channels > 2 * state:
            basis, _ = torch.linalg.qr(torch.cat([S_C, S_B]).T)
        else:
            basis = torch.eye(channels, dtype=S_B.dtype, device=S_B.device)
        half = (S_C @ basis).T @ (S_B @ basis) / 2
        _, vectors = torch.linalg.eigh(half + half.T)
        vectors = basis @ vectors.flip(-1)
    return IOSpectrum(eigenvalues, ((S_C @ vectors) * (S_B @ vectors)).sum(0))
