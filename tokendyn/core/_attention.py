"""Hidden attention: the matrices (4)-(6) that the selective scan applies, and their reverse pass.

Arguments and results are those of :func:`tokendyn.hidden_attention`; everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tokendyn.core._scan import Scan, like_decay, spread, through_softplus


@np.errstate(over="ignore", invalid="ignore")  # infinities and NaN travel on, as in any engine
def hidden_attention(
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    *,
    seq_idx: Any = None,
    lengths: Any = None,
    channel: int | None = None,
    aggregate: str | None = None,
    rows: tuple[int, int] | None = None,
) -> Any:
    """Spec of :func:`tokendyn.hidden_attention`. Paper 1, (4)-(6), and their form for general A."""
    s = spread(None, delta, A, B, C, None, None, delta_bias, delta_softplus, None, seq_idx, lengths)
    start, stop = (0, s.u.shape[2]) if rows is None else rows
    channels = range(s.u.shape[1]) if channel is None else (channel,)
    P = np.zeros((s.u.shape[0], len(channels), stop - start, s.u.shape[2]))
    for b in range(len(P)):
        for i, d in enumerate(channels):
            for l in range(start, min(stop, s.lengths[b])):
                for j, elapsed in _row(s, b, d, l):
                    P[b, i, l - start, j] = _coefficients(s, b, d, l, j, elapsed).sum() * s.step[b, d, j]
    if channel is not None:
        return P[:, 0]
    if aggregate == "mean":
        return P.mean(axis=1)
    if aggregate == "mean_abs":
        return np.abs(P).mean(axis=1)
    return P


@np.errstate(over="ignore", invalid="ignore")
def hidden_attention_vjp(
    dout: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    *,
    seq_idx: Any = None,
    lengths: Any = None,
    channel: int | None = None,
    aggregate: str | None = None,
    rows: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Gradients of ``⟨dout, hidden_attention(...)⟩`` by argument name.

    With T = Σ_{k=j+1..l} Δ_k and E_n = C_{ln} exp(A_{dn} T) B_{jn}, so that P_{lj} = Δ_j Σ_n E_n::

        dΔ_j += dP Σ_n E_n       dA_n += dP Δ_j T E_n      dΔ_k += dP Δ_j Σ_n A_n E_n   for j < k ≤ l
        dC_{ln} += dP Δ_j exp(A_n T) B_{jn}                dB_{jn} += dP Δ_j exp(A_n T) C_{ln}

    The derivative of ``mean_abs`` where P = 0 is 0.
    """
    s = spread(None, delta, A, B, C, None, None, delta_bias, delta_softplus, None, seq_idx, lengths)
    start, stop = (0, s.u.shape[2]) if rows is None else rows
    channels = range(s.u.shape[1]) if channel is None else (channel,)
    dout = np.asarray(dout, np.float64)
    draw, dA, dB, dC = (np.zeros(v.shape) for v in (s.step, s.A, s.B, s.C))
    for b in range(len(dout)):
        for i, d in enumerate(channels):
            g = s.group[d]
            for l in range(start, min(stop, s.lengths[b])):
                for j, elapsed in _row(s, b, d, l):
                    step = s.step[b, d, j]
                    E = _coefficients(s, b, d, l, j, elapsed)
                    if channel is None and aggregate is None:
                        dP = dout[b, i, l - start, j]
                    elif channel is not None:
                        dP = dout[b, l - start, j]
                    else:
                        dP = dout[b, l - start, j] / len(channels)
                        if aggregate == "mean_abs":
                            dP = dP * np.sign(E.sum() * step)
                    decay = np.exp(s.A[d] * elapsed)
                    draw[b, d, j] += dP * E.sum()
                    draw[b, d, j + 1 : l + 1] += dP * step * (s.A[d] @ E)
                    dA[d] += dP * step * elapsed * E
                    dC[b, g, :, l] += dP * step * decay * s.B[b, g, :, j]
                    dB[b, g, :, j] += dP * step * decay * s.C[b, g, :, l]
    if delta_softplus:
        draw = through_softplus(s, draw)
    gradients = {
        "delta": draw,
        "A": like_decay(dA, A),
        "B": dB.reshape(np.shape(B)),
        "C": dC.reshape(np.shape(C)),
    }
    if delta_bias is not None:
        gradients["delta_bias"] = draw.sum(axis=(0, 2))
    return gradients


def _row(s: Scan, b: int, d: int, l: int) -> Iterator[tuple[int, float]]:
    """The tokens j that token l sees, from l backwards, each with ``Σ_{k=j+1..l} Δ_k``.

    The sum gathers terms as it walks: a difference of two cumulative sums would lose its digits, and a
    ratio of two cumulative products is 0/0 after some hundred tokens.
    """
    elapsed = 0.0
    for j in range(l, -1, -1):
        yield j, elapsed
        if s.starts[b, j]:
            return
        elapsed += s.step[b, d, j]


def _coefficients(s: Scan, b: int, d: int, l: int, j: int, elapsed: float) -> np.ndarray:
    """(N,) ``C_{ln} exp(A_{dn} Σ_{k=j+1..l} Δ_k) B_{jn}``."""
    g = s.group[d]
    return s.C[b, g, :, l] * np.exp(s.A[d] * elapsed) * s.B[b, g, :, j]
