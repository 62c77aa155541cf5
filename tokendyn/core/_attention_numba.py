"""Numba twin of :mod:`tokendyn.core._attention`, in float32 or float64.

The elapsed step sizes ``T_{lj} = Σ_{k=j+1..l} Δ_k`` of one row l are held for all j; the next row adds ``Δ_{l+1}`` to
each: still sums of positive terms. SIMD runs over j. Blocks of rows run in parallel, channels inside a block one after
another, so that aggregates need no second pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn.core._activations import softplus
from tokendyn.core._lanes_numba import WIDTH, exp, fill, lanes_at, set_lanes_at
from tokendyn.core._parallel import kernel, run_tiles
from tokendyn.core._scan import sequence_starts
from tokendyn.core._scan_numba import plain

#: Rows in a block.
ROWS = 32
_SEPARATE, _MEAN, _MEAN_ABS = 0, 1, 2


@kernel()
def _blocks(first, last, step, A, B, C, starts, lengths, row_start, row_stop, channel_start, channel_stop, kind, out):
    """Blocks of rows from first up to last. step (b, d, L), B (b, G, N, L), L padded; C (b, G, L, N)."""
    state, length = C.shape[3], C.shape[2]
    per_group = step.shape[1] // B.shape[1]
    padded = step.shape[2]
    scalar = A.shape[1] < state
    channels = channel_stop - channel_start
    zero = step.dtype.type(0)
    elapsed, attention = np.zeros(padded, step.dtype), np.zeros(padded, step.dtype)
    per_batch = (row_stop - row_start + ROWS - 1) // ROWS
    for block in range(first, last):
        b, place = divmod(block, per_batch)
        top = row_start + place * ROWS
        bottom = min(top + ROWS, row_stop, lengths[b])
        for d in range(channel_start, channel_stop):
            g = d // per_group
            begin = 0  # of the packed sequence that row l is in
            for l in range(top, bottom):
                if l == top:
                    total = zero
                    for j in range(l, -1, -1):
                        elapsed[j] = total
                        total += step[b, d, j]
                        if starts[b, j]:
                            begin = j
                            break
                else:
                    if starts[b, l]:
                        begin = l
                    for j in range(begin // WIDTH * WIDTH, l, WIDTH):
                        set_lanes_at(elapsed, j, lanes_at(elapsed, j) + step[b, d, l])
                    elapsed[l] = zero
                for j in range(begin // WIDTH * WIDTH, l + 1, WIDTH):
                    T = lanes_at(elapsed, j)
                    P = fill(zero)
                    for n in range(state):
                        CB = C[b, g, l, n] * lanes_at(B, ((b * B.shape[1] + g) * state + n) * padded + j)
                        P = P + CB if scalar else P + CB * exp(A[d, n] * T)
                    if scalar:
                        P = P * exp(A[d, 0] * T)
                    P = P * lanes_at(step, (b * step.shape[1] + d) * padded + j)  # (4)-(6)
                    set_lanes_at(attention, j, P)
                r = l - row_start
                if kind == _SEPARATE:
                    for j in range(begin, l + 1):
                        out[b, d - channel_start, r, j] = attention[j]
                elif kind == _MEAN:
                    for j in range(begin, l + 1):
                        out[b, 0, r, j] += attention[j]
                else:
                    for j in range(begin, l + 1):
                        out[b, 0, r, j] += abs(attention[j])
        if kind != _SEPARATE:
            for l in range(top, bottom):
                for j in range(length):
                    out[b, 0, l - row_start, j] /= channels


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
) -> np.ndarray:
    """Twin of :func:`tokendyn.core.hidden_attention`, in the dtype of delta (float32 or float64)."""
    dtype = delta.dtype
    batch, d, length = delta.shape
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    start, stop = (0, length) if rows is None else rows
    channels = (0, d) if channel is None else (channel, channel + 1)
    kind = {None: _SEPARATE, "mean": _MEAN, "mean_abs": _MEAN_ABS}[aggregate]
    raw = delta if delta_bias is None else delta + delta_bias[:, None]
    out = np.zeros((batch, channels[1] - channels[0] if kind == _SEPARATE else 1, stop - start, length), dtype)
    arguments = (
        _padded(softplus(raw) if delta_softplus else raw, dtype),
        plain(A.reshape(d, -1), dtype),
        _padded(B, dtype),
        plain(C.swapaxes(2, 3), dtype),
        sequence_starts(seq_idx, batch, length),
        np.full(batch, length) if lengths is None else plain(lengths, np.int64),
        start,
        stop,
        *channels,
        kind,
        out,
    )
    work = 0.5 * batch * (stop - start) * length * (channels[1] - channels[0]) * B.shape[2]
    run_tiles(lambda first, last: _blocks(first, last, *arguments), batch * -(-(stop - start) // ROWS), work=work)
    return out[:, 0] if channel is not None or aggregate is not None else out


def _padded(array: Any, dtype: Any) -> np.ndarray:
    """``array`` with zeros after its last axis, up to a multiple of WIDTH."""
    length = array.shape[-1]
    out = np.zeros((*array.shape[:-1], -(-length // WIDTH) * WIDTH), dtype)
    out[..., :length] = array
    return out
