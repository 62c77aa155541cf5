"""Spectrum of the input-output matrix M = S_Cᵀ S_B and of its symmetric part, without D x D matrices.

Both derivatives are made one eigenvalue at a time from its own eigenvectors, so that eigenvalues which
coincide (those of a rank-deficient M at 0) leave the derivatives of the others alone. A second derivative
would need those of left eigenvectors: JAX has them only on demand, and raises NotImplementedError.

JAX solves nonsymmetric eigenproblems on the CPU and the GPU (there, left eigenvectors on the host), not on TPUs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokendyn._operations import IOSpectrum
from tokendyn.backends.jax.ops._arguments import EXACT


@jax.jit
def io_spectrum(S_B: jax.Array, S_C: jax.Array) -> IOSpectrum:
    """See :func:`tokendyn.io_spectrum`."""
    state, channels = S_B.shape
    small = _dot(S_B, S_C.T) if state <= channels else _dot(S_C.T, S_B)
    return IOSpectrum(_eigenvalues(small), _symmetric(S_B, S_C))


@jax.custom_jvp
def _eigenvalues(X: jax.Array) -> jax.Array:
    """Eigenvalues of a real square matrix, by descending real part, of a conjugate pair the upper one first."""
    values = jnp.linalg.eigvals(X)
    return values[_descending(values)]


@_eigenvalues.defjvp
def _eigenvalues_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """``dλ = wᴴ dX v / wᴴ v`` with the left and right eigenvectors w and v of λ."""
    (X,), (dX,) = primals, tangents
    values, left, right = jax.lax.linalg.eig(X)
    order = _descending(values)
    left, right = left[:, order].conj(), right[:, order]
    dX = jax.lax.complex(dX, jnp.zeros_like(dX))
    change = jnp.einsum("ni,nm,mi->i", left, dX, right, precision=EXACT)
    return values[order], change / (left * right).sum(0)


def _descending(values: jax.Array) -> jax.Array:
    return jnp.lexsort((-values.imag, -values.real))


@jax.custom_jvp
def _symmetric(S_B: jax.Array, S_C: jax.Array) -> jax.Array:
    """Eigenvalues of (M + Mᵀ)/2 that are not 0 by rank alone, descending."""
    return _eigh(S_B, S_C)[0]


@_symmetric.defjvp
def _symmetric_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """``dσ = (dS_C v)·(S_B v) + (S_C v)·(dS_B v)`` with the unit eigenvector v of σ."""
    (S_B, S_C), (dS_B, dS_C) = primals, tangents
    values, v = _eigh(S_B, S_C)
    return values, (_dot(dS_C, v) * _dot(S_B, v) + _dot(S_C, v) * _dot(dS_B, v)).sum(0)


def _eigh(S_B: jax.Array, S_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (r,) of (M + Mᵀ)/2, r = min(2N, D), and their unit eigenvectors (D, r).

    For D > 2N with ``[S_C; S_B]ᵀ = Q R``: (M + Mᵀ)/2 = ½ Q (R J Rᵀ) Qᵀ, J the swap of the two halves.
    """
    state, channels = S_B.shape
    if channels > 2 * state:
        Q, R = jnp.linalg.qr(jnp.concatenate([S_C, S_B]).T)
        half = _dot(R[:, :state], R[:, state:].T)
        values, vectors = jnp.linalg.eigh((half + half.T) / 2)
        vectors = _dot(Q, vectors)
    else:
        M = _dot(S_C.T, S_B)
        values, vectors = jnp.linalg.eigh((M + M.T) / 2)
    return values[::-1], vectors[:, ::-1]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=EXACT)
