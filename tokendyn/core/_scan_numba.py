"""Numba twin of :mod:`tokendyn.core._scan`: forward and reverse pass in float32 or float64.

A tile is ``WIDTH`` channels of one group of one batch entry. Its state (N, WIDTH) stays in the first-level cache
while time runs through chunks of tokens, whose inputs are first brought into (tokens, WIDTH) form, so that a row is one
SIMD value. Lanes past the last channel hold zeros. Tiles run in parallel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tokendyn.core._lanes_numba import (
    WIDTH,
    exp,
    fill,
    lanes_at,
    row,
    set_lanes_at,
    set_row,
    sigmoid,
    softplus,
    transpose,
)
from tokendyn.core._parallel import inner, kernel, run_tiles
from tokendyn.core._scan import sequence_starts

#: Tokens in a chunk.
CHUNK = 64


class Arguments(NamedTuple):
    """What the kernels take: arrays in memory order, one dtype, every optional array present."""

    x: Any  # (b, d, L), or (b, L, d) if layouts[0]
    delta: Any  # likewise, layouts[1]
    z: Any  # likewise, layouts[2]; empty if there is none
    layouts: tuple[bool, bool, bool]
    A: Any  # (d, N), or (d, 1): scalar
    B: Any  # (b, G, L, N)
    C: Any  # (b, G, L, N)
    D: Any  # (d, 1)
    bias: Any  # (d, 1)
    initial: Any  # (b, d, N)
    starts: Any  # (b, L)
    lengths: Any  # (b,)
    options: tuple[bool, bool, bool]  # softplus, D given, z given


@inner()
def load(source, channels_last, b, d, width, start, count, tile):
    """``tile[k, i] = source[b, d + i, start + k]``; ``source`` is (b, d, L), or (b, L, d) if channels_last."""
    _, rows, columns = source.shape
    if channels_last:
        for k in range(count):
            if width == WIDTH:
                set_row(tile, k, lanes_at(source, (b * rows + start + k) * columns + d))
            else:
                for i in range(width):
                    tile[k, i] = source[b, start + k, d + i]
        return
    blocks = count // WIDTH if width == WIDTH else 0
    for k in range(0, blocks * WIDTH, WIDTH):
        transpose(source, (b * rows + d) * columns + start + k, columns, tile, k * WIDTH, WIDTH)
    for i in range(width):
        for k in range(blocks * WIDTH, count):
            tile[k, i] = source[b, d + i, start + k]


@inner()
def store(tile, channels_last, b, d, width, start, count, target):
    """The inverse of :func:`load`."""
    _, rows, columns = target.shape
    if channels_last:
        for k in range(count):
            if width == WIDTH:
                set_lanes_at(target, (b * rows + start + k) * columns + d, row(tile, k))
            else:
                for i in range(width):
                    target[b, start + k, d + i] = tile[k, i]
        return
    blocks = count // WIDTH if width == WIDTH else 0
    for k in range(0, blocks * WIDTH, WIDTH):
        transpose(tile, k * WIDTH, WIDTH, target, (b * rows + d) * columns + start + k, columns)
    for i in range(width):
        for k in range(blocks * WIDTH, count):
            target[b, d + i, start + k] = tile[k, i]


@inner()
def load_rows(source, d, width, tile):
    """``tile[n, i] = source[d + i, n]``, and 0 in the lanes past ``width``."""
    tile[:] = 0
    for i in range(width):
        for n in range(source.shape[1]):
            tile[n, i] = source[d + i, n]


@inner()
def new_rows(like, count):
    """Zeros (count, WIDTH) in the dtype of ``like``."""
    return np.zeros((count, WIDTH), like.dtype)


@inner()
def store_rows(tile, d, width, target):
    """The inverse of :func:`load_rows`."""
    for i in range(width):
        for n in range(target.shape[1]):
            target[d + i, n] = tile[n, i]


@inner()
def place_of(tile, groups, per_group):
    """Batch entry, group, first channel and width of a tile."""
    tiles_per_group = (per_group + WIDTH - 1) // WIDTH
    b, rest = divmod(tile, groups * tiles_per_group)
    g, place = divmod(rest, tiles_per_group)
    return b, g, g * per_group + place * WIDTH, min(WIDTH, per_group - place * WIDTH)


@inner()
def make_steps(raw, bias, use_softplus, x, count, step, drive):
    """Add the bias to raw step sizes in place; ``step = softplus(raw)`` (3), ``drive = step · x``."""
    for k in range(count):
        v = row(raw, k) + row(bias, 0)
        set_row(raw, k, v)
        if use_softplus:
            v = softplus(v)
        set_row(step, k, v)
        set_row(drive, k, v * row(x, k))


@kernel()
def _forward(first, last, x, delta, z, layouts, A, B, C, D, bias, initial, starts, lengths, options, y, final):
    """Tiles from first up to last: y, in the layout of x, and the state after the last token."""
    use_softplus, has_D, has_z = options
    channels, state = initial.shape[1:]
    groups = B.shape[1]
    scalar = A.shape[1] < state
    rate, h = new_rows(x, A.shape[1]), new_rows(x, state)
    offset, skip = new_rows(x, 1), new_rows(x, 1)
    inputs, raw, gate = new_rows(x, CHUNK), new_rows(x, CHUNK), new_rows(x, CHUNK)
    step, drive = new_rows(x, CHUNK), new_rows(x, CHUNK)
    for tile in range(first, last):
        b, g, d, width = place_of(tile, groups, channels // groups)
        load_rows(A, d, width, rate)
        load_rows(bias, d, width, offset)
        load_rows(D, d, width, skip)
        load_rows(initial[b], d, width, h)
        inputs[:], raw[:], gate[:] = 0, 0, 0
        for start in range(0, lengths[b], CHUNK):
            count = min(CHUNK, lengths[b] - start)
            load(x, layouts[0], b, d, width, start, count, inputs)
            load(delta, layouts[1], b, d, width, start, count, raw)
            if has_z:
                load(z, layouts[2], b, d, width, start, count, gate)
            make_steps(raw, offset, use_softplus, inputs, count, step, drive)
            for k in range(count):
                l = start + k
                if starts[b, l]:
                    h[:] = 0
                out = row(skip, 0) * row(inputs, k) if has_D else fill(x.dtype.type(0))
                step_l, drive_l = row(step, k), row(drive, k)
                if scalar:
                    decay = exp(step_l * row(rate, 0))
                    for n in range(state):
                        v = decay * row(h, n) + B[b, g, l, n] * drive_l  # (1), (2)
                        out = out + C[b, g, l, n] * v
                        set_row(h, n, v)
                else:
                    for n in range(state):
                        v = exp(step_l * row(rate, n)) * row(h, n) + B[b, g, l, n] * drive_l  # (1), (2)
                        out = out + C[b, g, l, n] * v
                        set_row(h, n, v)
                if has_z:
                    out = out * row(gate, k) * sigmoid(row(gate, k))
                set_row(inputs, k, out)
            store(inputs, layouts[0], b, d, width, start, count, y)
        store_rows(h, d, width, final[b])


def selective_scan(
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
) -> Any:
    """Twin of :func:`tokendyn.core.selective_scan`, in the dtype of u (float32 or float64)."""
    a = arrange(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, lengths)
    y = np.empty_like(a.x) if lengths is None else np.zeros_like(a.x)
    last_state = np.empty_like(a.initial)
    run_tiles(lambda first, last: _forward(first, last, *a, y, last_state), tiles_of(a), work=work_of(a))
    y = y.swapaxes(1, 2) if a.layouts[0] else y
    return (y, last_state) if return_last_state else y


def arrange(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: bool,
    initial_state: Any,
    seq_idx: Any,
    lengths: Any,
) -> Arguments:
    dtype = u.dtype
    batch, d, length = u.shape
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    state = B.shape[2]
    x, x_last = in_memory_order(u, dtype)
    delta, delta_last = in_memory_order(delta, dtype)
    gate, gate_last = (np.empty((0, 0, 0), dtype), False) if z is None else in_memory_order(z, dtype)

    def given(array: Any, *absent: int) -> np.ndarray:
        return np.zeros(absent, dtype) if array is None else plain(array, dtype)

    return Arguments(
        x=x,
        delta=delta,
        z=gate,
        layouts=(x_last, delta_last, gate_last),
        A=plain(A.reshape(d, -1), dtype),
        B=plain(B.swapaxes(2, 3), dtype),
        C=plain(C.swapaxes(2, 3), dtype),
        D=given(D, d).reshape(d, 1),
        bias=given(delta_bias, d).reshape(d, 1),
        initial=given(initial_state, batch, d, state),
        starts=sequence_starts(seq_idx, batch, length),
        lengths=np.full(batch, length) if lengths is None else plain(lengths, np.int64),
        options=(bool(delta_softplus), D is not None, z is not None),
    )


def plain(array: Any, dtype: Any) -> np.ndarray:
    """``array`` as kernels take it: C-contiguous, aligned, writeable (else Numba would compile once more)."""
    return np.require(array, dtype, ["C", "A", "W"])


def in_memory_order(array: Any, dtype: Any) -> tuple[np.ndarray, bool]:
    """``array`` (b, d, L), or its (b, L, d) view if that is how it lies in memory; and which of the two."""
    if not array.flags.c_contiguous and array.swapaxes(1, 2).flags.c_contiguous:
        return plain(array.swapaxes(1, 2), dtype), True
    return plain(array, dtype), False


def tiles_of(a: Arguments) -> int:
    """Number of tiles."""
    batch, channels = a.initial.shape[:2]
    groups = a.B.shape[1]
    return batch * groups * -(-channels // groups // WIDTH)


def work_of(a: Arguments) -> float:
    """Rough nanoseconds of the forward pass on one thread."""
    return a.x.size * (2.0 + 0.3 * a.A.shape[1] + 0.1 * a.initial.shape[2])
