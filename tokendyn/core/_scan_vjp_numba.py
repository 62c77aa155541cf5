"""Numba twin of the reverse pass of :mod:`tokendyn.core._scan`, in float32 or float64.

Tiles and chunks as in :mod:`tokendyn.core._scan_numba`. A first walk keeps the state at the head of every chunk; then
chunks are taken from the last to the first, their states and decays computed again and kept while time runs
backwards. So every exponential is taken twice, and memory is a few states a chunk instead of one a token.

The sums over channels in dB and dC: the tiles of a group are dealt out to at most ``PIECES`` pieces of work, each with
a sum of its own, and these are added at the end. How they are dealt out depends on shapes alone, so the result does
not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tokendyn.core._lanes_numba import WIDTH, exp, fill, row, set_row, sigmoid, total
from tokendyn.core._parallel import kernel, run_tiles
from tokendyn.core._scan import like_decay
from tokendyn.core._scan_numba import (
    arrange,
    in_memory_order,
    load,
    load_rows,
    make_steps,
    new_rows,
    place_of,
    plain,
    store,
    store_rows,
    tiles_of,
    work_of,
)

#: Tokens in a chunk: their states and decays, 2 · CHUNK · N rows, stay in the second-level cache.
CHUNK = 32
PIECES = 32


@kernel()
def _reverse(
    first, last, pieces, dy, dy_last, dfinal,
    x, delta, z, layouts, A, B, C, D, bias, initial, starts, lengths, options,
    dx, ddelta, dz, dA, dB, dC, dD, dbias, dinitial,
):  # fmt: skip
    """Pieces of work from first up to last, of ``pieces`` for every group. dB, dC (pieces, b, G, L, N)."""
    use_softplus, has_D, has_z = options
    channels, state = initial.shape[1:]
    groups, length = B.shape[1:3]
    per_group = channels // groups
    tiles_per_group = (per_group + WIDTH - 1) // WIDTH
    decays = A.shape[1]
    scalar = decays < state
    zero, one = x.dtype.type(0), x.dtype.type(1)

    rate, dA_sum, dA_chunk = new_rows(x, decays), new_rows(x, decays), new_rows(x, decays)
    offset, skip, dD_sum, dbias_sum = new_rows(x, 1), new_rows(x, 1), new_rows(x, 1), new_rows(x, 1)
    h, G = new_rows(x, state), new_rows(x, state)
    heads = new_rows(x, ((length + CHUNK - 1) // CHUNK) * state)
    before, decay = new_rows(x, CHUNK * state), new_rows(x, CHUNK * decays)
    inputs, raw, gate, grad = new_rows(x, CHUNK), new_rows(x, CHUNK), new_rows(x, CHUNK), new_rows(x, CHUNK)
    step, drive = new_rows(x, CHUNK), new_rows(x, CHUNK)
    for work in range(first, last):
        within, piece = divmod(work, pieces)
        for position in range(tiles_per_group * piece // pieces, tiles_per_group * (piece + 1) // pieces):
            b, g, d, width = place_of(within * tiles_per_group + position, groups, per_group)
            load_rows(A, d, width, rate)
            load_rows(bias, d, width, offset)
            load_rows(D, d, width, skip)
            load_rows(initial[b], d, width, h)
            load_rows(dfinal[b], d, width, G)
            inputs[:], raw[:], gate[:], grad[:] = 0, 0, 0, 0
            dA_sum[:], dD_sum[:], dbias_sum[:] = 0, 0, 0

            chunks = (lengths[b] + CHUNK - 1) // CHUNK
            for chunk in range(chunks):  # the states at their heads
                start = chunk * CHUNK
                count = min(CHUNK, lengths[b] - start)
                for n in range(state):
                    set_row(heads, chunk * state + n, row(h, n))
                if chunk == chunks - 1:
                    break
                load(x, layouts[0], b, d, width, start, count, inputs)
                load(delta, layouts[1], b, d, width, start, count, raw)
                make_steps(raw, offset, use_softplus, inputs, count, step, drive)
                for k in range(count):
                    if starts[b, start + k]:
                        h[:] = 0
                    for n in range(decays):
                        set_row(decay, n, exp(row(step, k) * row(rate, n)))
                    for n in range(state):
                        keep = row(decay, 0 if scalar else n)
                        set_row(h, n, keep * row(h, n) + B[b, g, start + k, n] * row(drive, k))

            for chunk in range(chunks - 1, -1, -1):
                start = chunk * CHUNK
                count = min(CHUNK, lengths[b] - start)
                load(x, layouts[0], b, d, width, start, count, inputs)
                load(delta, layouts[1], b, d, width, start, count, raw)
                load(dy, dy_last, b, d, width, start, count, grad)
                if has_z:
                    load(z, layouts[2], b, d, width, start, count, gate)
                make_steps(raw, offset, use_softplus, inputs, count, step, drive)
                for n in range(state):
                    set_row(h, n, row(heads, chunk * state + n))
                for k in range(count):  # the states once more
                    if starts[b, start + k]:
                        h[:] = 0
                    for n in range(decays):
                        set_row(decay, k * decays + n, exp(row(step, k) * row(rate, n)))
                    out = row(skip, 0) * row(inputs, k) if has_D else fill(zero)
                    for n in range(state):
                        set_row(before, k * state + n, row(h, n))
                        keep = row(decay, k if scalar else k * decays + n)
                        v = keep * row(h, n) + B[b, g, start + k, n] * row(drive, k)
                        out = out + C[b, g, start + k, n] * v
                        set_row(h, n, v)
                    if has_z:
                        open_ = sigmoid(row(gate, k))
                        dgated = row(grad, k)
                        set_row(grad, k, dgated * row(gate, k) * open_)
                        set_row(gate, k, dgated * out * open_ * (one + row(gate, k) * (one - open_)))
                dA_chunk[:] = 0
                dD_chunk, dbias_chunk = fill(zero), fill(zero)
                for k in range(count - 1, -1, -1):
                    l = start + k
                    dout, step_l, drive_l = row(grad, k), row(step, k), row(drive, k)
                    from_B, from_A, through = fill(zero), fill(zero), fill(zero)
                    for n in range(state):
                        b_n = B[b, g, l, n]
                        keep = row(decay, k if scalar else k * decays + n)
                        kept = keep * row(before, k * state + n)
                        G_n = C[b, g, l, n] * dout + row(G, n)
                        dC[piece, b, g, l, n] += total(dout * (kept + b_n * drive_l))
                        dB[piece, b, g, l, n] += total(drive_l * G_n)
                        from_B = from_B + b_n * G_n
                        if scalar:
                            through = through + kept * G_n
                        else:
                            t = kept * G_n
                            from_A = from_A + row(rate, n) * t
                            set_row(dA_chunk, n, row(dA_chunk, n) + step_l * t)
                        set_row(G, n, keep * G_n)
                    if scalar:
                        from_A = row(rate, 0) * through
                        set_row(dA_chunk, 0, row(dA_chunk, 0) + step_l * through)
                    if starts[b, l]:
                        G[:] = 0
                    dstep = row(inputs, k) * from_B + from_A
                    if use_softplus:
                        dstep = dstep * sigmoid(row(raw, k))
                    dinput = step_l * from_B
                    if has_D:
                        dinput = dinput + row(skip, 0) * dout
                        dD_chunk = dD_chunk + dout * row(inputs, k)
                    dbias_chunk = dbias_chunk + dstep
                    set_row(raw, k, dstep)
                    set_row(inputs, k, dinput)
                for n in range(decays):
                    set_row(dA_sum, n, row(dA_sum, n) + row(dA_chunk, n))
                set_row(dD_sum, 0, row(dD_sum, 0) + dD_chunk)
                set_row(dbias_sum, 0, row(dbias_sum, 0) + dbias_chunk)
                store(inputs, layouts[0], b, d, width, start, count, dx)
                store(raw, layouts[1], b, d, width, start, count, ddelta)
                if has_z:
                    store(gate, layouts[2], b, d, width, start, count, dz)
            store_rows(G, d, width, dinitial[b])
            store_rows(dA_sum, d, width, dA[b])
            store_rows(dD_sum, d, width, dD[b])
            store_rows(dbias_sum, d, width, dbias[b])


@np.errstate(over="ignore", invalid="ignore")  # infinities and NaN travel on
def selective_scan_vjp(
    dout: Any,
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    *,
    initial_state: Any = None,
    return_last_state: bool = False,
    seq_idx: Any = None,
    lengths: Any = None,
) -> dict[str, np.ndarray]:
    """Twin of :func:`tokendyn.core.selective_scan_vjp`, in the dtype of u (float32 or float64)."""
    dy, dlast_state = dout if return_last_state else (dout, None)
    a = arrange(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, lengths)
    batch, channels, _ = a.initial.shape
    groups = a.B.shape[1]
    dy, dy_last = in_memory_order(np.zeros_like(u) if dy is None else dy, u.dtype)
    dfinal = np.zeros_like(a.initial) if dlast_state is None else plain(dlast_state, u.dtype)
    # Padding gets no gradient; without it every place is written.
    dx, ddelta, dz = (np.empty_like(v) if lengths is None else np.zeros_like(v) for v in (a.x, a.delta, a.z))
    dA = np.empty((batch, *a.A.shape), u.dtype)
    dD, dbias = np.empty((2, batch, channels, 1), u.dtype)
    dinitial = np.empty_like(a.initial)
    pieces = min(tiles_of(a) // (batch * groups), -(-PIECES // (batch * groups)))
    dB, dC = np.zeros((2, pieces, *a.B.shape), u.dtype)

    def compute(first: int, last: int) -> None:
        _reverse(
            first, last, pieces, dy, dy_last, dfinal, *a, dx, ddelta, dz, dA, dB, dC, dD, dbias, dinitial
        )  # fmt: skip

    run_tiles(compute, batch * groups * pieces, work=4.0 * work_of(a))

    def original(array: np.ndarray, channels_last: bool) -> np.ndarray:
        return array.swapaxes(1, 2) if channels_last else array

    gradients = {
        "u": original(dx, a.layouts[0]),
        "delta": original(ddelta, a.layouts[1]),
        "A": like_decay(dA.sum(axis=0), A),
        "B": dB.sum(axis=0).swapaxes(2, 3).reshape(B.shape),
        "C": dC.sum(axis=0).swapaxes(2, 3).reshape(C.shape),
    }
    if D is not None:
        gradients["D"] = dD.sum(axis=0)[:, 0]
    if z is not None:
        gradients["z"] = original(dz, a.layouts[2])
    if delta_bias is not None:
        gradients["delta_bias"] = dbias.sum(axis=0)[:, 0]
    if initial_state is not None:
        gradients["initial_state"] = dinitial
    return gradients
