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
    aligned_zeros,
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
    return aligned_zeros(count * WIDTH, like).reshape(count, WIDTH)


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


@inner()
def general_tokens(h, rate, step, drive, B, C, starts, start, count, out):
    """``out[k] = ⟨C, h⟩`` of the tokens of a chunk, one rate for every state: (1), (2)."""
    for k in range(count):
        l = start + k
        if starts[l]:
            h[:] = 0
        step_l, drive_l = row(step, k), row(drive, k)
        y = fill(out.dtype.type(0))
        for n in range(h.shape[0]):
            v = exp(step_l * row(rate, n)) * row(h, n) + B[l, n] * drive_l
            y = y + C[l, n] * v
            set_row(h, n, v)
        set_row(out, k, y)


@inner()
def scalar_tokens(h, rate, step, drive, B, C, starts, start, count, out):
    """The same with one rate for all states: one exp a token, so what counts is how often h is read and written.

    Four tokens pass over h together where no sequence begins among them: one read and write of h for four, and four
    sums that do not wait for one another (2.5 times faster).
    """
    for k in range(count):
        set_row(step, k, exp(row(step, k) * rate))  # now decays
    k = 0
    while k < count:
        l = start + k
        if starts[l]:
            h[:] = 0
        y0 = y1 = y2 = y3 = fill(out.dtype.type(0))
        if k + 4 <= count and not (starts[l + 1] or starts[l + 2] or starts[l + 3]):
            decay0, decay1, decay2, decay3 = row(step, k), row(step, k + 1), row(step, k + 2), row(step, k + 3)
            drive0, drive1, drive2, drive3 = row(drive, k), row(drive, k + 1), row(drive, k + 2), row(drive, k + 3)
            for n in range(h.shape[0]):
                v = decay0 * row(h, n) + B[l, n] * drive0
                y0 = y0 + C[l, n] * v
                v = decay1 * v + B[l + 1, n] * drive1
                y1 = y1 + C[l + 1, n] * v
                v = decay2 * v + B[l + 2, n] * drive2
                y2 = y2 + C[l + 2, n] * v
                v = decay3 * v + B[l + 3, n] * drive3
                y3 = y3 + C[l + 3, n] * v
                set_row(h, n, v)
            set_row(out, k + 1, y1)
            set_row(out, k + 2, y2)
            set_row(out, k + 3, y3)
            set_row(out, k, y0)
            k += 4
        else:
            decay0, drive0 = row(step, k), row(drive, k)
            for n in range(h.shape[0]):
                v = decay0 * row(h, n) + B[l, n] * drive0
                y0 = y0 + C[l, n] * v
                set_row(h, n, v)
            set_row(out, k, y0)
            k += 1


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
    step, drive, out = new_rows(x, CHUNK), new_rows(x, CHUNK), new_rows(x, CHUNK)
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
            if scalar:
                scalar_tokens(h, row(rate, 0), step, drive, B[b, g], C[b, g], starts[b], start, count, out)
            else:
                general_tokens(h, rate, step, drive, B[b, g], C[b, g], starts[b], start, count, out)
            for k in range(count):
                value = row(out, k)
                if has_D:
                    value = value + row(skip, 0) * row(inputs, k)
                if has_z:
                    value = value * row(gate, k) * sigmoid(row(gate, k))
                set_row(out, k, value)
            store(out, layouts[0], b, d, width, start, count, y)
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
