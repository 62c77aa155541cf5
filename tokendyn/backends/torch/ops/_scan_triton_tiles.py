# type: ignore  # triton.jit hides from type checkers what kernels are
"""Tiles for the Triton kernels: ROWS channels x STEPS tokens, one channel a lane, its tokens in that lane's registers.

With a whole run of tokens in one thread the recurrence over time needs no shuffles, and B and C are read once
for all lanes. Triton chooses layouts itself; what fixes them here is how tiles are made: by joining vectors
(or 16-byte runs of tokens), which puts the joined axis into registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = tl.constexpr(32)
STEPS = tl.constexpr(16)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pack(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    """Sixteen (ROWS,) vectors as one (ROWS, 16) tile."""
    a0, a1, a2, a3 = tl.join(x0, x8), tl.join(x1, x9), tl.join(x2, x10), tl.join(x3, x11)
    a4, a5, a6, a7 = tl.join(x4, x12), tl.join(x5, x13), tl.join(x6, x14), tl.join(x7, x15)
    b0, b1, b2, b3 = tl.join(a0, a4), tl.join(a1, a5), tl.join(a2, a6), tl.join(a3, a7)
    c0, c1 = tl.join(b0, b2), tl.join(b1, b3)
    return tl.reshape(tl.join(c0, c1), [ROWS, STEPS])


@triton.jit
def unpack(tile):
    """The sixteen columns of a (ROWS, 16) tile."""
    c0, c1 = tl.split(tl.reshape(tile, [ROWS, 2, 2, 2, 2]))
    b0, b2 = tl.split(c0)
    b1, b3 = tl.split(c1)
    a0, a4 = tl.split(b0)
    a1, a5 = tl.split(b1)
    a2, a6 = tl.split(b2)
    a3, a7 = tl.split(b3)
    x0, x8 = tl.split(a0)
    x1, x9 = tl.split(a1)
    x2, x10 = tl.split(a2)
    x3, x11 = tl.split(a3)
    x4, x12 = tl.split(a4)
    x5, x13 = tl.split(a5)
    x6, x14 = tl.split(a6)
    x7, x15 = tl.split(a7)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def load_tile(pointers, limits, stride_l, start, VECTOR: tl.constexpr):
    """Tokens start..start+15 of every row as (ROWS, 16) float32; 0 from token ``limits`` of the row on.

    VECTOR tokens are read at once; above 1 it needs stride_l = 1, 16-byte alignment and limits it divides.
    """
    if VECTOR == 8:
        run = start + tl.arange(0, 8)[None, :]
        x0 = tl.load(pointers[:, None] + run, mask=(limits > start)[:, None], other=0.0)
        x1 = tl.load(pointers[:, None] + 8 + run, mask=(limits > start + 8)[:, None], other=0.0)
        tile = tl.reshape(tl.permute(tl.join(x0, x1), [0, 2, 1]), [ROWS, STEPS])
    elif VECTOR == 4:
        run = start + tl.arange(0, 4)[None, :]
        x0 = tl.load(pointers[:, None] + run, mask=(limits > start)[:, None], other=0.0)
        x1 = tl.load(pointers[:, None] + 4 + run, mask=(limits > start + 4)[:, None], other=0.0)
        x2 = tl.load(pointers[:, None] + 8 + run, mask=(limits > start + 8)[:, None], other=0.0)
        x3 = tl.load(pointers[:, None] + 12 + run, mask=(limits > start + 12)[:, None], other=0.0)
        halves = tl.join(tl.join(x0, x2), tl.join(x1, x3))
        tile = tl.reshape(tl.permute(halves, [0, 2, 3, 1]), [ROWS, STEPS])
    else:
        at = pointers + start.to(tl.int64) * stride_l
        left = limits - start
        tile = pack(
            tl.load(at, mask=left > 0, other=0.0),
            tl.load(at + 1 * stride_l, mask=left > 1, other=0.0),
            tl.load(at + 2 * stride_l, mask=left > 2, other=0.0),
            tl.load(at + 3 * stride_l, mask=left > 3, other=0.0),
            tl.load(at + 4 * stride_l, mask=left > 4, other=0.0),
            tl.load(at + 5 * stride_l, mask=left > 5, other=0.0),
            tl.load(at + 6 * stride_l, mask=left > 6, other=0.0),
            tl.load(at + 7 * stride_l, mask=left > 7, other=0.0),
            tl.load(at + 8 * stride_l, mask=left > 8, other=0.0),
            tl.load(at + 9 * stride_l, mask=left > 9, other=0.0),
            tl.load(at + 10 * stride_l, mask=left > 10, other=0.0),
            tl.load(at + 11 * stride_l, mask=left > 11, other=0.0),
            tl.load(at + 12 * stride_l, mask=left > 12, other=0.0),
            tl.load(at + 13 * stride_l, mask=left > 13, other=0.0),
            tl.load(at + 14 * stride_l, mask=left > 14, other=0.0),
            tl.load(at + 15 * stride_l, mask=left > 15, other=0.0),
        )
    return tile.to(tl.float32)


@triton.jit
def load_shared(pointer):
    """Sixteen float32 at ``pointer`` (16-byte aligned), the same for every row, as (ROWS, 16)."""
    at = pointer + tl.zeros([ROWS], tl.int32)[:, None] + tl.arange(0, 4)[None, :]
    x0, x1, x2, x3 = tl.load(at), tl.load(at + 4), tl.load(at + 8), tl.load(at + 12)
    return tl.reshape(tl.permute(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [0, 2, 3, 1]), [ROWS, STEPS])


@triton.jit
def store_tile(pointers, tile, limits, stride_l, start, VECTOR: tl.constexpr):
    """The reverse of :func:`load_tile`."""
    tile = tile.to(pointers.dtype.element_ty)
    if VECTOR == 8:
        run = start + tl.arange(0, 8)[None, :]
        x0, x1 = tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, 8]), [0, 2, 1]))
        tl.store(pointers[:, None] + run, x0, mask=(limits > start)[:, None])
        tl.store(pointers[:, None] + 8 + run, x1, mask=(limits > start + 8)[:, None])
    elif VECTOR == 4:
        run = start + tl.arange(0, 4)[None, :]
        even, odd = tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, 2, 4]), [0, 3, 1, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        tl.store(pointers[:, None] + run, x0, mask=(limits > start)[:, None])
        tl.store(pointers[:, None] + 4 + run, x1, mask=(limits > start + 4)[:, None])
        tl.store(pointers[:, None] + 8 + run, x2, mask=(limits > start + 8)[:, None])
        tl.store(pointers[:, None] + 12 + run, x3, mask=(limits > start + 12)[:, None])
    else:
        at = pointers + start.to(tl.int64) * stride_l
        left = limits - start
        columns = unpack(tile)
        for k in tl.static_range(STEPS):
            tl.store(at + k * stride_l, columns[k], mask=left > k)


@triton.jit
def softplus(v):
    """ln(1 + e^v) to float32 accuracy for every v: max(v, 0) + 2 artanh(w / (2 + w)), w = e^-|v|."""
    w = tl.exp2(-tl.abs(v) * LOG2E)
    s = w / (2.0 + w)
    q = s * s
    series = 1.0 + q * (
        1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15))))))
    )
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(-v * LOG2E))


@triton.jit
def kept(seq_idx, start, stop):
    """(1, 16) false where a packed sequence begins and the state is reset. ``seq_idx`` points at a row."""
    at = start + tl.arange(0, STEPS)
    inside = (at > 0) & (at < stop)
    here = tl.load(seq_idx + at, mask=inside, other=0)
    before = tl.load(seq_idx + at - 1, mask=inside, other=0)
    return (here == before)[None, :]


@triton.jit
def _passed(a, h, CUTS: tl.constexpr):
    """a h; with CUTS 0 where a is negative, which no decay is, though h be no number."""
    passed = a * h
    if CUTS:
        passed = tl.where(a < 0.0, 0.0, passed)
    return passed


@triton.jit
def advance(a, x, h, CUTS: tl.constexpr):
    """h <- a_k h + x_k over the tile; CUTS as in :func:`_passed`.

    Returns the states before each token, after each token, and the last.
    """
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15 = unpack(a)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = unpack(x)
    h0 = _passed(a0, h, CUTS) + x0
    h1 = _passed(a1, h0, CUTS) + x1
    h2 = _passed(a2, h1, CUTS) + x2
    h3 = _passed(a3, h2, CUTS) + x3
    h4 = _passed(a4, h3, CUTS) + x4
    h5 = _passed(a5, h4, CUTS) + x5
    h6 = _passed(a6, h5, CUTS) + x6
    h7 = _passed(a7, h6, CUTS) + x7
    h8 = _passed(a8, h7, CUTS) + x8
    h9 = _passed(a9, h8, CUTS) + x9
    h10 = _passed(a10, h9, CUTS) + x10
    h11 = _passed(a11, h10, CUTS) + x11
    h12 = _passed(a12, h11, CUTS) + x12
    h13 = _passed(a13, h12, CUTS) + x13
    h14 = _passed(a14, h13, CUTS) + x14
    h15 = _passed(a15, h14, CUTS) + x15
    before = pack(h, h0, h1, h2, h3, h4, h5, h6, h7, h8, h9, h10, h11, h12, h13, h14)
    after = pack(h0, h1, h2, h3, h4, h5, h6, h7, h8, h9, h10, h11, h12, h13, h14, h15)
    return before, after, h15


@triton.jit
def retreat(a, c, e, CUTS: tl.constexpr):
    """g_k = c_k + e_{k+1}, e_k = a_k g_k, from the last token to the first; e enters from the right.

    Returns the g of every token (the gradient of the state after it) and e_0.
    """
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15 = unpack(a)
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15 = unpack(c)
    g15 = c15 + e
    g14 = c14 + _passed(a15, g15, CUTS)
    g13 = c13 + _passed(a14, g14, CUTS)
    g12 = c12 + _passed(a13, g13, CUTS)
    g11 = c11 + _passed(a12, g12, CUTS)
    g10 = c10 + _passed(a11, g11, CUTS)
    g9 = c9 + _passed(a10, g10, CUTS)
    g8 = c8 + _passed(a9, g9, CUTS)
    g7 = c7 + _passed(a8, g8, CUTS)
    g6 = c6 + _passed(a7, g7, CUTS)
    g5 = c5 + _passed(a6, g6, CUTS)
    g4 = c4 + _passed(a5, g5, CUTS)
    g3 = c3 + _passed(a4, g4, CUTS)
    g2 = c2 + _passed(a3, g3, CUTS)
    g1 = c1 + _passed(a2, g2, CUTS)
    g0 = c0 + _passed(a1, g1, CUTS)
    return pack(g0, g1, g2, g3, g4, g5, g6, g7, g8, g9, g10, g11, g12, g13, g14, g15), _passed(a0, g0, CUTS)
