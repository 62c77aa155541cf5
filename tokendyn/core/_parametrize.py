"""Input-output maps: LDLᵀ projections with a spectrum of chosen signs, and the spectrum of any projections.

Arguments and results are those of :func:`tokendyn.io_projections` and :func:`tokendyn.io_spectrum`;
everything is computed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn._operations import IOSpectrum
from tokendyn.core._activations import sigmoid, softplus

#: Added to softplus(D') by paper 1's public code.
PUBLISHED_OFFSET = 0.7


def io_projections(
    weight_B: Any, weight_C: Any = None, diagonal: Any = None, *, regime: str = "free", form: str = "paper"
) -> tuple[np.ndarray, np.ndarray]:
    """Spec of :func:`tokendyn.io_projections`. Paper 1, App. C.1."""
    weight_B = np.asarray(weight_B, np.float64)
    if regime == "free":
        return weight_B.copy(), np.array(weight_C, np.float64)
    U = _unit_trapezoid(weight_B)
    signs, offset = _signs_and_offset(len(U), regime, form)
    q = signs * (softplus(diagonal) + offset)
    return q[:, None] * U, U


def io_projections_vjp(
    dout: Any,
    weight_B: Any,
    weight_C: Any = None,
    diagonal: Any = None,
    *,
    regime: str = "free",
    form: str = "paper",
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dS_B, S_B⟩ + ⟨dS_C, S_C⟩`` by argument name; either of the pair ``dout`` may be None.

    ``dU = dS_C + diag(q) dS_B``, of which only the places above the diagonal are weights;
    ``dq_n = Σ_j dS_B[n, j] U[n, j]``, ``dD' = v ∘ softplus'(D') ∘ dq``.
    """
    weight_B = np.asarray(weight_B, np.float64)
    dS_B, dS_C = (np.zeros_like(weight_B) if v is None else np.asarray(v, np.float64) for v in dout)
    if regime == "free":
        return {"weight_B": dS_B, "weight_C": dS_C}
    U = _unit_trapezoid(weight_B)
    signs, offset = _signs_and_offset(len(U), regime, form)
    q = signs * (softplus(diagonal) + offset)
    dq = (dS_B * U).sum(axis=1)
    return {"weight_B": np.triu(dS_C + q[:, None] * dS_B, 1), "diagonal": signs * sigmoid(diagonal) * dq}


def _unit_trapezoid(weight: np.ndarray) -> np.ndarray:
    """The places of ``weight`` above the diagonal, ones on it, zeros below."""
    return np.triu(weight, 1) + np.eye(*weight.shape)


def _signs_and_offset(state: int, regime: str, form: str) -> tuple[np.ndarray, float]:
    """The signs v (N,) and the offset in ``q = v ∘ (softplus(D') + offset)``: the table of the docstring."""
    signs = np.ones(state)
    if regime == "negative":
        signs[:] = -1.0
    elif regime == "mixed":
        signs[(state + 1) // 2 :] = -1.0
    shifted = form == "scale_matched" or (form == "published_code" and regime != "mixed")
    return signs, PUBLISHED_OFFSET if shifted else 0.0


def io_spectrum(S_B: Any, S_C: Any) -> IOSpectrum:
    """Spec of :func:`tokendyn.io_spectrum`."""
    S_B, S_C = np.asarray(S_B, np.float64), np.asarray(S_C, np.float64)
    eigenvalues = np.linalg.eigvals(_small_product(S_B, S_C)).astype(np.complex128)
    order = np.argsort(-eigenvalues.real, kind="stable")
    symmetric = np.linalg.eigvalsh(_small_symmetric(S_B, S_C)[0])
    return IOSpectrum(eigenvalues[order], symmetric[::-1].copy())


def io_spectrum_vjp(dout: Any, S_B: Any, S_C: Any) -> dict[str, np.ndarray]:
    """Gradients by argument name, for distinct eigenvalues.

    Args:
        dout: pair (g, s), either may be None: g complex (min(N, D),), s real (min(2N, D),), in the order of
            :func:`io_spectrum`. They stand for the real loss with ``dL = Re Σ_i conj(g_i) dλ_i + Σ_i s_i dσ_i``,
            so ``g = ∂L/∂Re λ + i ∂L/∂Im λ`` (PyTorch's convention; JAX hands over the conjugate).

    With right and left eigenvectors ``X v = λ v``, ``wᴴ X = λ wᴴ`` of the small real matrix X:
    ``dλ = wᴴ dX v / wᴴ v``. For the symmetric part, with its unit eigenvector v in R^D:
    ``dσ = vᵀ (dS_Cᵀ S_B + S_Cᵀ dS_B) v``.
    """
    from scipy.linalg import eig

    g, s = dout
    S_B, S_C = np.asarray(S_B, np.float64), np.asarray(S_C, np.float64)
    dS_B, dS_C = np.zeros_like(S_B), np.zeros_like(S_C)
    if g is not None:
        X = _small_product(S_B, S_C)
        decomposition: Any = eig(X, left=True, right=True)
        eigenvalues, left, right = decomposition
        order = np.argsort(-eigenvalues.real, kind="stable")
        dX = np.zeros_like(X)
        for g_i, i in zip(np.asarray(g), order, strict=True):
            w, v = left[:, i], right[:, i]
            dX += np.real(np.conj(g_i) * np.outer(w.conj(), v) / (w.conj() @ v))
        if len(X) == len(S_B):  # X = S_B S_Cᵀ
            dS_B += dX @ S_C
            dS_C += dX.T @ S_B
        else:  # X = S_Cᵀ S_B
            dS_B += S_C @ dX
            dS_C += S_B @ dX.T
    if s is not None:
        small, Q = _small_symmetric(S_B, S_C)
        _, vectors = np.linalg.eigh(small)
        for s_i, w in zip(np.asarray(s), vectors.T[::-1], strict=True):
            v = Q @ w
            dS_B += s_i * np.outer(S_C @ v, v)
            dS_C += s_i * np.outer(S_B @ v, v)
    return {"S_B": dS_B, "S_C": dS_C}


def _small_product(S_B: np.ndarray, S_C: np.ndarray) -> np.ndarray:
    """The smaller of ``S_B S_Cᵀ`` (N x N) and ``S_Cᵀ S_B`` (D x D): their nonzero eigenvalues are the same."""
    return S_B @ S_C.T if S_B.shape[0] <= S_B.shape[1] else S_C.T @ S_B


def _small_symmetric(S_B: np.ndarray, S_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(r, r) symmetric matrix with the eigenvalues of (M + Mᵀ)/2, and Q (D, r) that carries its eigenvectors.

    With ``[S_C; S_B]ᵀ = Q R``, r = min(2N, D), and J the swap of the two halves: (M + Mᵀ)/2 = ½ Q (R J Rᵀ) Qᵀ.
    The equal ``½ J [S_C; S_B] [S_C; S_B]ᵀ`` is not symmetric, and defective where S_B and S_C have the same
    row space, as LDLᵀ projections have: it would give up half of the digits.
    """
    Q, R = np.linalg.qr(np.concatenate([S_C, S_B]).T)
    N = len(S_B)
    half = R[:, :N] @ R[:, N:].T
    return (half + half.T) / 2, Q
