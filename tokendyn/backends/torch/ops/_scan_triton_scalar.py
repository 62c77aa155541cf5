"""Triton kernels of the selective scan for scalar A (A_d = -a_d I): matrix products over chunks of 64 tokens.

With s = a Δ and x = Δ u, inside a chunk that starts from the state S and with W_lj = exp(-Σ_{k=j+1..l} s_k)::

    y_l = Σ_{j<=l} W_lj (C_l · B_j) x_j + W_l,start (C_l · S)

C_l · B_j is one matrix for all channels, so tensor cores do the sums if W factors into a function of l and
one of j. It must do so without overflow: a chunk is four blocks of 16 tokens. Pairs in two blocks factor at
the start of the later one, both factors at most 1; pairs in one block factor at its start into e^{-t_l} e^{t_j},
t the sum of s since then. Where t exceeds LIMIT in some block (a reset, or a decay below e^{-LIMIT} within 16
tokens), the program walks through that chunk token by token instead, which is exact for every s.

Chunks follow each other inside a segment, with the state in registers. Segments run in parallel, see
`_scan_triton_general` for how their states are joined.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokendyn.backends.torch.ops._scan_triton_tiles import LOG2E, sigmoid, softplus

CHUNK = tl.constexpr(64)
#: exponent (base 2) of a reset: exp2(-RESET) = 0
RESET = tl.constexpr(1e4)


@triton.jit
def _product(a, b, c, PRECISION: tl.constexpr):
    """a @ b + c in float32; PRECISION "bf16" rounds a and b first."""
    if PRECISION == "bf16":
        result = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), c)
    else:
        result = tl.dot(a, b, c, input_precision=PRECISION)
    return result


@triton.jit
def _load(pointer, rows, exists, stride_d, stride_l, start, length):
    """(ROWS, 64) float32, 0 outside."""
    at = start + tl.arange(0, CHUNK)
    where = rows.to(tl.int64)[:, None] * stride_d + at.to(tl.int64)[None, :] * stride_l
    return tl.load(pointer + where, mask=exists[:, None] & (at < length)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, tile, rows, exists, stride_d, stride_l, start, length):
    at = start + tl.arange(0, CHUNK)
    where = rows.to(tl.int64)[:, None] * stride_d + at.to(tl.int64)[None, :] * stride_l
    tl.store(pointer + where, tile.to(pointer.dtype.element_ty), mask=exists[:, None] & (at < length)[None, :])


@triton.jit
def _load_shared(pointer, state, length, start, stop, STATE: tl.constexpr):
    """B or C of a chunk, (STATE, 64) float32; 0 past the stop."""
    n = tl.arange(0, STATE)
    at = start + tl.arange(0, CHUNK)
    where = n[:, None] * length + at[None, :]
    return tl.load(pointer + where, mask=(n < state)[:, None] & (at < stop)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _steps(raw, shift, start, stop, SOFTPLUS: tl.constexpr):
    step = raw + shift[:, None]
    if SOFTPLUS:
        step = softplus(step)
    return tl.where((start + tl.arange(0, CHUNK) < stop)[None, :], step, 0.0)


@triton.jit
def _exponents(step, A_row, seq_idx, start, stop):
    """s in base 2, RESET where a packed sequence begins."""
    s = step * (-A_row * LOG2E)[:, None]
    if seq_idx is not None:
        at = start + tl.arange(0, CHUNK)
        inside = (at > 0) & (at < stop)
        here = tl.load(seq_idx + at, mask=inside, other=0)
        before = tl.load(seq_idx + at - 1, mask=inside, other=0)
        s = tl.where((here == before)[None, :], s, RESET)
    return s


@triton.jit
def _four(a, b, c, d, ROWS: tl.constexpr):
    """Four (ROWS,) vectors as (ROWS, 4, 1)."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, 4, 1])


@triton.jit
def _wide(x, ROWS: tl.constexpr):
    return tl.reshape(x, [ROWS, CHUNK])


@triton.jit
def _factors(s, ROWS: tl.constexpr):
    """Decays of a chunk, all from sums inside one block of 16.

    Returns e^{-t} and e^{t} as (ROWS, 4, 16), and per block, (ROWS, 4, 1), the decays: from the chunk's start to
    the block's, from the block's start to the chunk's end, to the next block's start where that one is odd, from
    block 0 or 1 to block 2, from block 2 to block 2 or 3; and the decay of the whole chunk (ROWS,).
    """
    blocks = tl.reshape(s, [ROWS, 4, 16])
    t = tl.cumsum(blocks, axis=2)
    even, odd = tl.split(tl.reshape(tl.exp2(-tl.sum(blocks, axis=2)), [ROWS, 2, 2]))
    d0, d2 = tl.split(even)
    d1, d3 = tl.split(odd)
    one = tl.full([ROWS], 1.0, tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    from_start = _four(one, d0, d0 * d1, d0 * d1 * d2, ROWS)
    to_end = _four(d0 * d1 * d2 * d3, d1 * d2 * d3, d2 * d3, d3, ROWS)
    low16 = _four(d0, zero, d2, zero, ROWS)
    low32 = _four(d0 * d1, d1, zero, zero, ROWS)
    up32 = _four(zero, zero, one, d2, ROWS)
    return tl.exp2(-t), tl.exp2(t), from_start, to_end, low16, low32, up32, d0 * d1 * d2 * d3


@triton.jit
def _pairs(products):
    """B_j · C_l (j, l) split by how the decay of the pair factors: in one block, at an odd block, at block 2."""
    j = tl.arange(0, CHUNK)[:, None]
    l = tl.arange(0, CHUNK)[None, :]
    within = tl.where((j // 16 == l // 16) & (j <= l), products, 0.0)
    at16 = tl.where((j // 32 == l // 32) & (j // 16 < l // 16), products, 0.0)
    at32 = tl.where(j // 32 < l // 32, products, 0.0)
    return within, at16, at32


@triton.jit
def _is_mild(s, LIMIT: tl.constexpr, ROWS: tl.constexpr):
    return tl.max(tl.sum(tl.abs(tl.reshape(s, [ROWS, 4, 16])), axis=2)) <= LIMIT


@triton.jit
def _column(tile, k):
    return tl.sum(tl.where((tl.arange(0, CHUNK) == k)[None, :], tile, 0.0), axis=1)


@triton.jit
def _shared_column(pointer, state, length, at, stop, STATE: tl.constexpr):
    n = tl.arange(0, STATE)
    return tl.load(pointer + n * length + at, mask=(n < state) & (at < stop), other=0.0).to(tl.float32)


@triton.jit
def _place(program, tiles, groups, group_size, ROWS: tl.constexpr):
    """Batch entry, group, tile, rows and which of them exist, of a program."""
    tile, rest = program % tiles, program // tiles
    group, batch = rest % groups, (rest // groups).to(tl.int64)
    lane = tile * ROWS + tl.arange(0, ROWS)
    return batch, group, tile, group * group_size + lane, lane < group_size


@triton.jit
def _vector(pointer, rows, exists):
    values = tl.zeros_like(rows).to(tl.float32)
    if pointer is not None:
        values = tl.load(pointer + rows, mask=exists, other=0.0).to(tl.float32)
    return values


@triton.jit
def _stop(lengths, batch, length):
    if lengths is None:
        stop = length
    else:
        stop = tl.load(lengths + batch).to(tl.int32)
    return stop


@triton.jit
def segment_states(
    u, delta, A, B, bias, seq_idx, lengths, ends, decays,
    u_b, u_d, u_l, delta_b, delta_d, delta_l,
    length, channels, group_size, groups, tiles, state, chunks, segment,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """State after every segment if it were 0 before, and the factor by which a state decays across it."""
    batch, group, tile, rows, exists = _place(tl.program_id(0), tiles, groups, group_size, ROWS)
    part = tl.program_id(1)
    stop = _stop(lengths, batch, length)
    A_row, shift = _vector(A, rows, exists), _vector(bias, rows, exists)
    u += batch * u_b
    delta += batch * delta_b
    B += (batch * groups + group) * state * length
    S = tl.zeros([ROWS, STATE], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for chunk in range(part * segment, tl.minimum((part + 1) * segment, chunks)):
        start = chunk * CHUNK
        step = _steps(_load(delta, rows, exists, delta_d, delta_l, start, length), shift, start, stop, SOFTPLUS)
        valid = (start + tl.arange(0, CHUNK) < stop)[None, :]
        x = step * tl.where(valid, _load(u, rows, exists, u_d, u_l, start, length), 0.0)
        if seq_idx is None:
            s = _exponents(step, A_row, None, start, stop)
        else:
            s = _exponents(step, A_row, seq_idx + batch * length, start, stop)
        total += tl.sum(s, axis=1)
        if _is_mild(s, LIMIT, ROWS):
            B_tile = _load_shared(B, state, length, start, stop, STATE)
            decay, grow, from_start, to_end, low16, low32, up32, whole = _factors(s, ROWS)
            inflow = _wide(tl.reshape(x, [ROWS, 4, 16]) * grow * to_end, ROWS)
            S = _product(inflow, tl.trans(B_tile), S * whole[:, None], PRECISION)
        else:
            for k in range(CHUNK):
                B_k = _shared_column(B, state, length, start + k, stop, STATE)
                S = tl.exp2(-_column(s, k))[:, None] * S + _column(x, k)[:, None] * B_k[None, :]
    n = tl.arange(0, STATE)
    at = ((batch * tl.num_programs(1) + part) * state + n)[None, :] * channels + rows[:, None]
    mask = exists[:, None] & (n < state)[None, :]
    tl.store(ends + at, S, mask=mask)
    tl.store(decays + at, tl.broadcast_to(tl.exp2(-total)[:, None], [ROWS, STATE]), mask=mask)


@triton.jit
def outputs(
    u, delta, z, A, B, C, D, bias, seq_idx, lengths, slots, states, y,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, y_b, y_d, y_l,
    length, channels, group_size, groups, tiles, state, chunks, segment,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
    STORE_LAST: tl.constexpr,
):  # fmt: skip
    """y of every segment from the state before it; the states before all chunks where ``states`` is given."""
    batch, group, tile, rows, exists = _place(tl.program_id(0), tiles, groups, group_size, ROWS)
    part = tl.program_id(1)
    stop = _stop(lengths, batch, length)
    A_row, shift, skip = _vector(A, rows, exists), _vector(bias, rows, exists), _vector(D, rows, exists)
    u += batch * u_b
    delta += batch * delta_b
    y += batch * y_b
    B += (batch * groups + group) * state * length
    C += (batch * groups + group) * state * length
    n = tl.arange(0, STATE)
    mask = exists[:, None] & (n < state)[None, :]
    at = n[None, :] * channels + rows[:, None]
    slots += (batch * (tl.num_programs(1) + 1) + part) * state * channels
    S = tl.load(slots + at, mask=mask, other=0.0)
    columns = tl.arange(0, CHUNK)[None, :]
    for chunk in range(part * segment, tl.minimum((part + 1) * segment, chunks)):
        start = chunk * CHUNK
        if states is not None:
            tl.store(states + (batch * chunks + chunk) * state * channels + at, S, mask=mask)
        valid = start + columns < stop
        step = _steps(_load(delta, rows, exists, delta_d, delta_l, start, length), shift, start, stop, SOFTPLUS)
        value = tl.where(valid, _load(u, rows, exists, u_d, u_l, start, length), 0.0)
        x = step * value
        if seq_idx is None:
            s = _exponents(step, A_row, None, start, stop)
        else:
            s = _exponents(step, A_row, seq_idx + batch * length, start, stop)
        if _is_mild(s, LIMIT, ROWS):
            B_tile = _load_shared(B, state, length, start, stop, STATE)
            C_tile = _load_shared(C, state, length, start, stop, STATE)
            decay, grow, from_start, to_end, low16, low32, up32, whole = _factors(s, ROWS)
            nothing = tl.zeros([CHUNK, CHUNK], tl.float32)
            within, at16, at32 = _pairs(_product(tl.trans(B_tile), C_tile, nothing, PRECISION))
            zero = tl.zeros([ROWS, CHUNK], tl.float32)
            inflow = tl.reshape(x, [ROWS, 4, 16]) * grow
            out = _product(_wide(inflow, ROWS), within, zero, PRECISION)
            out = _product(_wide(inflow * low16, ROWS), at16, out, PRECISION)
            far = _product(_wide(inflow * low32, ROWS), at32, zero, PRECISION)
            old = _product(S, C_tile, zero, PRECISION)
            far = tl.reshape(far, [ROWS, 4, 16]) * up32 + tl.reshape(old, [ROWS, 4, 16]) * from_start
            out = _wide((tl.reshape(out, [ROWS, 4, 16]) + far) * decay, ROWS)
            S = _product(_wide(inflow * to_end, ROWS), tl.trans(B_tile), S * whole[:, None], PRECISION)
        else:
            out = tl.zeros([ROWS, CHUNK], tl.float32)
            for k in range(CHUNK):
                B_k = _shared_column(B, state, length, start + k, stop, STATE)
                C_k = _shared_column(C, state, length, start + k, stop, STATE)
                S = tl.exp2(-_column(s, k))[:, None] * S + _column(x, k)[:, None] * B_k[None, :]
                out = tl.where(columns == k, tl.sum(S * C_k[None, :], axis=1)[:, None], out)
        out += skip[:, None] * value
        if z is not None:
            gate = _load(z + batch * z_b, rows, exists, z_d, z_l, start, length)
            out *= gate * sigmoid(gate)
        out = tl.where(valid, out, 0.0)
        _store(y, out, rows, exists, y_d, y_l, start, length)
    if STORE_LAST:
        tl.store(slots + state * channels + at, S, mask=mask)


@triton.jit
def segment_costates(
    dy, delta, z, A, C, bias, seq_idx, lengths, ends, decays,
    dy_b, dy_d, dy_l, delta_b, delta_d, delta_l, z_b, z_d, z_l,
    length, channels, group_size, groups, tiles, state, chunks, segment,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Gradient of the state before every segment if that of the state after it were 0, and the decay across it."""
    batch, group, tile, rows, exists = _place(tl.program_id(0), tiles, groups, group_size, ROWS)
    part = tl.program_id(1)
    stop = _stop(lengths, batch, length)
    A_row, shift = _vector(A, rows, exists), _vector(bias, rows, exists)
    dy += batch * dy_b
    delta += batch * delta_b
    C += (batch * groups + group) * state * length
    E = tl.zeros([ROWS, STATE], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first, last = part * segment, tl.minimum((part + 1) * segment, chunks)
    for done in range(0, last - first):
        start = (last - 1 - done) * CHUNK
        valid = (start + tl.arange(0, CHUNK) < stop)[None, :]
        step = _steps(_load(delta, rows, exists, delta_d, delta_l, start, length), shift, start, stop, SOFTPLUS)
        dout = tl.where(valid, _load(dy, rows, exists, dy_d, dy_l, start, length), 0.0)
        if z is not None:
            gate = tl.where(valid, _load(z + batch * z_b, rows, exists, z_d, z_l, start, length), 0.0)
            dout *= gate * sigmoid(gate)
        if seq_idx is None:
            s = _exponents(step, A_row, None, start, stop)
        else:
            s = _exponents(step, A_row, seq_idx + batch * length, start, stop)
        total += tl.sum(s, axis=1)
        if _is_mild(s, LIMIT, ROWS):
            C_tile = _load_shared(C, state, length, start, stop, STATE)
            decay, grow, from_start, to_end, low16, low32, up32, whole = _factors(s, ROWS)
            pull = _wide(tl.reshape(dout, [ROWS, 4, 16]) * decay * from_start, ROWS)
            E = _product(pull, tl.trans(C_tile), E * whole[:, None], PRECISION)
        else:
            for back in range(CHUNK):
                k = CHUNK - 1 - back
                C_k = _shared_column(C, state, length, start + k, stop, STATE)
                E = tl.exp2(-_column(s, k))[:, None] * (E + _column(dout, k)[:, None] * C_k[None, :])
    n = tl.arange(0, STATE)
    at = ((batch * tl.num_programs(1) + part) * state + n)[None, :] * channels + rows[:, None]
    mask = exists[:, None] & (n < state)[None, :]
    tl.store(ends + at, E, mask=mask)
    tl.store(decays + at, tl.broadcast_to(tl.exp2(-total)[:, None], [ROWS, STATE]), mask=mask)


@triton.jit
def gradients(
    dy, u, delta, z, A, B, C, D, bias, seq_idx, lengths, states, slots,
    du, ddelta, dz, dA, dB, dC, dD, dbias, scratch,
    dy_b, dy_d, dy_l, u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l,
    du_b, du_d, du_l, ddelta_b, ddelta_d, ddelta_l, dz_b, dz_d, dz_l,
    length, channels, group_size, groups, tiles, state, chunks, segment,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr, LIMIT: tl.constexpr,
    STORE_FIRST: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment, chunk by chunk from the right; E is the gradient of the state after a chunk.

    The gradient of an exponent s_k is -F_k, F_k the sum of all paths across token k. At the chunk's first
    token it is <S, dS>; after that F_{k+1} = F_k + x_k dx_k - dy_k y_k.
    """
    batch, group, tile, rows, exists = _place(tl.program_id(0), tiles, groups, group_size, ROWS)
    part = tl.program_id(1)
    stop = _stop(lengths, batch, length)
    A_row, shift, skip = _vector(A, rows, exists), _vector(bias, rows, exists), _vector(D, rows, exists)
    dy += batch * dy_b
    u += batch * u_b
    delta += batch * delta_b
    du += batch * du_b
    ddelta += batch * ddelta_b
    B += (batch * groups + group) * state * length
    C += (batch * groups + group) * state * length
    shared = ((batch * groups + group) * tiles + tile) * state * length
    dB += shared
    dC += shared
    n = tl.arange(0, STATE)
    mask = exists[:, None] & (n < state)[None, :]
    at = n[None, :] * channels + rows[:, None]
    slots += (batch * (tl.num_programs(1) + 1) + part) * state * channels
    E = tl.load(slots + state * channels + at, mask=mask, other=0.0)
    lane = tl.arange(0, ROWS)
    own = lane[:, None] * STATE + n[None, :]
    scratch += (tl.program_id(0) * tl.num_programs(1) + part).to(tl.int64) * 8 * ROWS * STATE
    columns = tl.arange(0, CHUNK)[None, :]
    sum_A = tl.zeros([ROWS], tl.float32)
    sum_D = tl.zeros([ROWS], tl.float32)
    sum_bias = tl.zeros([ROWS], tl.float32)
    first, last = part * segment, tl.minimum((part + 1) * segment, chunks)
    for done in range(0, last - first):
        chunk = last - 1 - done
        start = chunk * CHUNK
        valid = start + columns < stop
        S = tl.load(states + (batch * chunks + chunk) * state * channels + at, mask=mask, other=0.0)
        step = _steps(_load(delta, rows, exists, delta_d, delta_l, start, length), shift, start, stop, SOFTPLUS)
        value = tl.where(valid, _load(u, rows, exists, u_d, u_l, start, length), 0.0)
        x = step * value
        dout = tl.where(valid, _load(dy, rows, exists, dy_d, dy_l, start, length), 0.0)
        if z is not None:
            gate = tl.where(valid, _load(z + batch * z_b, rows, exists, z_d, z_l, start, length), 0.0)
            dout *= gate * sigmoid(gate)
        if seq_idx is None:
            s = _exponents(step, A_row, None, start, stop)
        else:
            s = _exponents(step, A_row, seq_idx + batch * length, start, stop)
        if _is_mild(s, LIMIT, ROWS):
            B_tile = _load_shared(B, state, length, start, stop, STATE)
            C_tile = _load_shared(C, state, length, start, stop, STATE)
            decay, grow, from_start, to_end, low16, low32, up32, whole = _factors(s, ROWS)
            square = tl.zeros([CHUNK, CHUNK], tl.float32)
            within, at16, at32 = _pairs(_product(tl.trans(B_tile), C_tile, square, PRECISION))
            zero = tl.zeros([ROWS, CHUNK], tl.float32)
            inflow = tl.reshape(x, [ROWS, 4, 16]) * grow
            pull = tl.reshape(dout, [ROWS, 4, 16]) * decay
            near, mid = _wide(inflow, ROWS), _wide(inflow * low16, ROWS)
            distant, leaving = _wide(inflow * low32, ROWS), _wide(inflow * to_end, ROWS)
            pulled, pulled32 = _wide(pull, ROWS), _wide(pull * up32, ROWS)
            entering = _wide(pull * from_start, ROWS)
            out = _product(near, within, zero, PRECISION)
            out = _product(mid, at16, out, PRECISION)
            far = tl.reshape(_product(distant, at32, zero, PRECISION), [ROWS, 4, 16]) * up32
            far += tl.reshape(_product(S, C_tile, zero, PRECISION), [ROWS, 4, 16]) * from_start
            out = _wide((tl.reshape(out, [ROWS, 4, 16]) + far) * decay, ROWS)
            dx = tl.reshape(_product(pulled, tl.trans(within), zero, PRECISION), [ROWS, 4, 16])
            dx += tl.reshape(_product(pulled, tl.trans(at16), zero, PRECISION), [ROWS, 4, 16]) * low16
            dx += tl.reshape(_product(pulled32, tl.trans(at32), zero, PRECISION), [ROWS, 4, 16]) * low32
            dx += tl.reshape(_product(E, B_tile, zero, PRECISION), [ROWS, 4, 16]) * to_end
            dx = _wide(dx * grow, ROWS)
            # Σ_d W_lj dy_l x_j for every pair (j, l).
            weights = _pairs(_product(tl.trans(near), pulled, square, PRECISION))[0]
            weights += _pairs(_product(tl.trans(mid), pulled, square, PRECISION))[1]
            weights += _pairs(_product(tl.trans(distant), pulled32, square, PRECISION))[2]
            empty = tl.zeros([STATE, CHUNK], tl.float32)
            dB_tile = _product(C_tile, tl.trans(weights), empty, PRECISION)
            dB_tile = _product(tl.trans(E), leaving, dB_tile, PRECISION)
            dC_tile = _product(B_tile, weights, empty, PRECISION)
            dC_tile = _product(tl.trans(S), entering, dC_tile, PRECISION)
            E = _product(entering, tl.trans(C_tile), E * whole[:, None], PRECISION)
            change = x * dx - dout * out
            F = tl.sum(S * E, axis=1)[:, None] + tl.cumsum(change, axis=1) - change
            keep = (n < state)[:, None] & (start + columns < length)
            tl.store(dB + n[:, None] * length + start + columns, dB_tile, mask=keep)
            tl.store(dC + n[:, None] * length + start + columns, dC_tile, mask=keep)
        else:
            # States before every eighth token first; then back, token by token, from the nearest of them.
            running = S
            for k in range(CHUNK):
                if k % 8 == 0:
                    tl.store(scratch + (k // 8) * ROWS * STATE + own, running)
                B_k = _shared_column(B, state, length, start + k, stop, STATE)
                running = tl.exp2(-_column(s, k))[:, None] * running + _column(x, k)[:, None] * B_k[None, :]
            tl.debug_barrier()
            out = tl.zeros([ROWS, CHUNK], tl.float32)
            dx = tl.zeros([ROWS, CHUNK], tl.float32)
            F = tl.zeros([ROWS, CHUNK], tl.float32)
            for back in range(CHUNK):
                k = CHUNK - 1 - back
                before = tl.load(scratch + (k // 8) * ROWS * STATE + own)
                for i in range(k // 8 * 8, k):
                    B_i = _shared_column(B, state, length, start + i, stop, STATE)
                    before = tl.exp2(-_column(s, i))[:, None] * before + _column(x, i)[:, None] * B_i[None, :]
                B_k = _shared_column(B, state, length, start + k, stop, STATE)
                C_k = _shared_column(C, state, length, start + k, stop, STATE)
                x_k, dy_k, a_k = _column(x, k), _column(dout, k), tl.exp2(-_column(s, k))
                before *= a_k[:, None]
                after = before + x_k[:, None] * B_k[None, :]
                E += dy_k[:, None] * C_k[None, :]
                out = tl.where(columns == k, tl.sum(after * C_k[None, :], axis=1)[:, None], out)
                dx = tl.where(columns == k, tl.sum(E * B_k[None, :], axis=1)[:, None], dx)
                F = tl.where(columns == k, tl.sum(E * before, axis=1)[:, None], F)
                inside = (n < state) & (start + k < length)
                tl.store(dB + n * length + start + k, tl.sum(E * x_k[:, None], axis=0), mask=inside)
                tl.store(dC + n * length + start + k, tl.sum(after * dy_k[:, None], axis=0), mask=inside)
                E *= a_k[:, None]
            tl.debug_barrier()
        sum_A += tl.sum(step * F, axis=1)
        dstep = A_row[:, None] * F + value * dx
        if SOFTPLUS:
            raw = _load(delta, rows, exists, delta_d, delta_l, start, length)
            dstep *= sigmoid(raw + shift[:, None])
        dstep = tl.where(valid, dstep, 0.0)
        _store(du, step * dx + skip[:, None] * dout, rows, exists, du_d, du_l, start, length)
        _store(ddelta, dstep, rows, exists, ddelta_d, ddelta_l, start, length)
        if z is not None:
            ungated = tl.where(valid, _load(dy, rows, exists, dy_d, dy_l, start, length), 0.0)
            half = sigmoid(gate)
            dgate = ungated * (out + skip[:, None] * value) * half * (1.0 + gate * (1.0 - half))
            _store(dz + batch * dz_b, dgate, rows, exists, dz_d, dz_l, start, length)
        sum_D += tl.sum(dout * value, axis=1)
        sum_bias += tl.sum(dstep, axis=1)
    sums = (batch * tl.num_programs(1) + part) * channels + rows
    tl.store(dA + sums, sum_A, mask=exists)
    if D is not None:
        tl.store(dD + sums, sum_D, mask=exists)
    if bias is not None:
        tl.store(dbias + sums, sum_bias, mask=exists)
    if STORE_FIRST:
        tl.store(slots + at, E, mask=mask)
