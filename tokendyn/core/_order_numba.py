"""SoftSort with power 1 by two scans: numerically the definition in :mod:`tokendyn.core._order`, in O(L D).

Let K be the Laplace kernel, ``K_{ij} = exp(-|s_i - s_j| / τ)``, Π the permutation that sorts, and Z = K 1. Then
``P = Π diag(1/Z) K``, so that::

    softsort(x) = Π (K x / Z)            softsort_restore(y) = K (Πᵀy / Z) / K (1/Z)

Between neighbours in sorted order put ``a_k = exp(-|s_[k] - s_[k-1]| / τ)``. K is semiseparable: the entry between
two places is the product of the a between them, so (K v)_k is what has come down to k from places before, and from
places after::

    (K v)_k = F_k + a_{k+1} R_{k+1}      F_k = v_k + a_k F_{k-1}      R_k = v_k + a_{k+1} R_{k+1}

exact for every τ, and no exponent is ever positive. In reverse, with G the gradient of K v::

    dv = K G            ds_k = -(σ/τ) (⟨G_k, (E v)_k⟩ + ⟨v_k, (E G)_k⟩)

``(E v)_k`` is the sum over places before minus the sum over places after, without those whose score equals s_[k]: the
derivative of |·| at 0 is 0. σ = 1 where scores ascend, -1 where they descend.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn.core._lanes_numba import WIDTH, fill, row, set_row, total
from tokendyn.core._parallel import kernel, run_tiles
from tokendyn.core._scan_numba import load, new_rows, plain, store


@kernel()
def _product(first, last, a, v, out):
    """``out = K v`` on tiles of WIDTH columns from first up to last. a (b, L), v (b, L, D), in sorted order."""
    _, length, columns = v.shape
    tiles = (columns + WIDTH - 1) // WIDTH
    values, sums = new_rows(v, length), new_rows(v, length)
    zero = v.dtype.type(0)
    for tile in range(first, last):
        b, place = divmod(tile, tiles)
        d = place * WIDTH
        width = min(WIDTH, columns - d)
        load(v, True, b, d, width, 0, length, values)
        F, R = fill(zero), fill(zero)
        for k in range(length):
            F = row(values, k) + a[b, k] * F
            set_row(sums, k, F)
        for k in range(length - 1, -1, -1):
            set_row(sums, k, row(sums, k) + R)
            R = a[b, k] * (row(values, k) + R)
        store(sums, True, b, d, width, 0, length, out)


@kernel()
def _product_reverse(first, last, a, tied, v, G, out, slope):
    """``out = K G``, and ``slope[tile, b, k]``: what the tile's columns give to ``⟨G, E v⟩ + ⟨v, E G⟩``."""
    _, length, columns = v.shape
    tiles = (columns + WIDTH - 1) // WIDTH
    values, grads, sums, slopes = new_rows(v, length), new_rows(v, length), new_rows(v, length), new_rows(v, length)
    zero = v.dtype.type(0)
    for tile in range(first, last):
        b, place = divmod(tile, tiles)
        d = place * WIDTH
        width = min(WIDTH, columns - d)
        values[:], grads[:] = 0, 0
        load(v, True, b, d, width, 0, length, values)
        load(G, True, b, d, width, 0, length, grads)
        F, F_G, E, E_G = fill(zero), fill(zero), fill(zero), fill(zero)
        for k in range(length):
            if not tied[b, k]:
                E, E_G = a[b, k] * F, a[b, k] * F_G
            set_row(slopes, k, row(grads, k) * E + row(values, k) * E_G)
            F = row(values, k) + a[b, k] * F
            F_G = row(grads, k) + a[b, k] * F_G
            set_row(sums, k, F_G)
        R, R_G, E, E_G = fill(zero), fill(zero), fill(zero), fill(zero)
        for k in range(length - 1, -1, -1):
            if k == length - 1 or not tied[b, k + 1]:
                E, E_G = R, R_G
            slope[place, b, k] = total(row(slopes, k) - (row(grads, k) * E + row(values, k) * E_G))
            set_row(sums, k, row(sums, k) + R_G)
            R = a[b, k] * (row(values, k) + R)
            R_G = a[b, k] * (row(grads, k) + R_G)
        store(sums, True, b, d, width, 0, length, out)


class LaplaceKernel:
    """K of one batch of scores, in sorted order, with what follows from the scores alone.

    Attributes:
        order: (b, L) indices that sort.
        Z: (b, L, 1) float64, ``K 1``.
    """

    def __init__(self, scores: Any, tau: float, ascending: bool) -> None:
        scores = np.asarray(scores, np.float64)
        self.order = np.argsort(scores if ascending else -scores, axis=1, kind="stable")
        ordered = np.take_along_axis(scores, self.order, axis=1)
        self._a = np.zeros_like(ordered)
        self._a[:, 1:] = np.exp(-np.abs(np.diff(ordered, axis=1)) / tau)
        self._tied = np.zeros(ordered.shape, bool)
        self._tied[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        self._slope = -1.0 / tau if ascending else 1.0 / tau
        self.Z = self.times(np.ones((*scores.shape, 1)))

    def times(self, v: np.ndarray) -> np.ndarray:
        """``K v`` for v (b, L, D) in sorted order, in its dtype."""
        v = plain(v, v.dtype)
        out = np.empty_like(v)
        a = self._a.astype(v.dtype)
        run_tiles(lambda first, last: _product(first, last, a, v, out), self._tiles(v), work=4.0 * v.size)
        return out

    def times_vjp(self, G: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradients of ``⟨G, K v⟩``: (b, L, D) for v, and (b, L) for the sorted scores."""
        G, v = plain(G, v.dtype), plain(v, v.dtype)
        out = np.empty_like(v)
        slope = np.empty((-(-v.shape[2] // WIDTH), *v.shape[:2]), v.dtype)
        a = self._a.astype(v.dtype)
        run_tiles(
            lambda first, last: _product_reverse(first, last, a, self._tied, v, G, out, slope),
            self._tiles(v),
            work=12.0 * v.size,
        )
        return out, self._slope * slope.sum(axis=0, dtype=np.float64)

    def sorted(self, x: np.ndarray) -> np.ndarray:
        """x (b, L, ...) from its own order into sorted order."""
        return np.take_along_axis(x, self.order.reshape(*self.order.shape, *[1] * (x.ndim - 2)), axis=1)

    def unsorted(self, y: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`sorted`."""
        out = np.empty_like(y)
        np.put_along_axis(out, self.order.reshape(*self.order.shape, *[1] * (y.ndim - 2)), y, axis=1)
        return out

    @staticmethod
    def _tiles(v: np.ndarray) -> int:
        return v.shape[0] * -(-v.shape[2] // WIDTH)


def softsort(scores: Any, x: Any, *, tau: float = 1.0, ascending: bool = True) -> np.ndarray:
    """Twin of :func:`tokendyn.core.softsort` for power 1, in the dtype of x."""
    K = LaplaceKernel(scores, tau, ascending)
    return K.times(K.sorted(x)) / K.Z.astype(x.dtype)


def softsort_vjp(dout: Any, scores: Any, x: Any, *, tau: float = 1.0, ascending: bool = True) -> dict[str, np.ndarray]:
    """Twin of :func:`tokendyn.core.softsort_vjp` for power 1.

    With ``y = K v / Z``: ``dKv = dy / Z``, ``dZ = -⟨dKv, y⟩``, ``dv = K dKv``.
    """
    K = LaplaceKernel(scores, tau, ascending)
    v, Z = K.sorted(x), K.Z.astype(x.dtype)
    G = dout / Z
    dv, ds = K.times_vjp(G, v)
    dZ = -_dot(G, K.times(v) / Z)
    _, ds_Z = K.times_vjp(dZ, np.ones_like(K.Z))
    return {"scores": K.unsorted(ds + ds_Z).astype(scores.dtype), "x": K.unsorted(dv)}


def softsort_restore(scores: Any, y: Any, *, tau: float = 1.0, ascending: bool = True) -> np.ndarray:
    """Twin of :func:`tokendyn.core.softsort_restore` for power 1, in the dtype of y."""
    K = LaplaceKernel(scores, tau, ascending)
    weight = K.times(1.0 / K.Z)
    return K.unsorted(K.times(y / K.Z.astype(y.dtype)) / weight.astype(y.dtype))


def softsort_restore_vjp(
    dout: Any, scores: Any, y: Any, *, tau: float = 1.0, ascending: bool = True
) -> dict[str, np.ndarray]:
    """Twin of :func:`tokendyn.core.softsort_restore_vjp` for power 1.

    With r = 1/Z, w = r y, c = K r, ``x = K w / c``: ``dKw = dx / c``, ``dc = -⟨dKw, x⟩``, ``dw = K dKw``,
    ``dy = r dw``, ``dr = ⟨dw, y⟩ + K dc`` and ``dZ = -r² dr``.
    """
    K = LaplaceKernel(scores, tau, ascending)
    r = 1.0 / K.Z
    c = K.times(r)
    w = y * r.astype(y.dtype)
    G = K.sorted(dout) / c.astype(y.dtype)
    x = K.times(w) / c.astype(y.dtype)
    dw, ds_w = K.times_vjp(G, w)
    dr_c, ds_c = K.times_vjp(-_dot(G, x), r)
    dr = _dot(dw, y) + dr_c
    _, ds_Z = K.times_vjp(-dr * r * r, np.ones_like(r))
    return {"scores": K.unsorted(ds_w + ds_c + ds_Z).astype(scores.dtype), "y": dw * r.astype(y.dtype)}


def effective_tokens(scores: Any, *, tau: float = 1.0, ascending: bool = True) -> np.ndarray:
    """Twin of :func:`tokendyn.core.effective_tokens` for power 1: ``Z(τ)² / Z(τ/2)``, for P² is K at τ/2 over Z²."""
    Z, Z_half = (LaplaceKernel(scores, t, ascending).Z[..., 0] for t in (tau, tau / 2))
    return (Z * Z / Z_half).astype(scores.dtype)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(b, L, 1) float64: ``⟨a_k, b_k⟩``."""
    return np.einsum("bld,bld->bl", a, b, dtype=np.float64, casting="same_kind")[..., None]
