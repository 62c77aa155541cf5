# type: ignore  # triton.jit hides from type checkers what kernels are
"""Triton kernels of the selective scan for scalar A (A_d = -a_d I): matrix products over chunks of 32 tokens.

With s = a Δ and x = Δ u, inside a chunk that starts from the state S and with W_lj = exp(-Σ_{k=j+1..l} s_k)::

    y_l = Σ_{j<=l} W_lj (C_l · B_j) x_j + W_l,start (C_l · S)

C_l · B_j is one matrix for all channels, so tensor cores do the sums if W factors into a function of l and one
of j. It must do so without overflow. Pairs on two sides of the middle of a chunk factor there, both factors at
most 1; so do all paths to and from states, at the ends. Pairs in one half factor at its own middle into
e^{-q_l} e^{q_j}, with s cut at CLAMP so that q stays in range. The cut keeps a weight of at most
2^-CLAMP = 4.3e-5 where the true one is smaller, for every step size: a hundredth of bfloat16's rounding.
Packed sequences are kept apart by masks, not by decay.

Chunks follow each other inside a segment, with the state in registers. Segments run in parallel, see
`_scan_triton_general` for how their states are joined.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokendyn.backends.torch.ops._scan_triton_tiles import LOG2E, sigmoid, softplus

CHUNK = tl.constexpr(32)
HALF = tl.constexpr(16)


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """x as the tensor cores will see it."""
    if PRECISION == "bf16":
        result = x.to(tl.bfloat16)
    else:
        result = x
    return result


@triton.jit
def _product(a, b, c, PRECISION: tl.constexpr):
    """a @ b + c in float32."""
    if PRECISION == "bf16":
        result = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), c)
    else:
        result = tl.dot(a, b, c, input_precision=PRECISION)
    return result


@triton.jit
def _load(pointer, rows, exists, stride_d, stride_l, start, length):
    """(ROWS, 32) float32, 0 outside."""
    at = start + tl.arange(0, CHUNK)
    where = rows.to(tl.int64)[:, None] * stride_d + at.to(tl.int64)[None, :] * stride_l
    return tl.load(pointer + where, mask=exists[:, None] & (at < length)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, tile, rows, exists, stride_d, stride_l, start, length):
    at = start + tl.arange(0, CHUNK)
    where = rows.to(tl.int64)[:, None] * stride_d + at.to(tl.int64)[None, :] * stride_l
    tl.store(pointer + where, tile.to(pointer.dtype.element_ty), mask=exists[:, None] & (at < length)[None, :])


@triton.jit
def _load_shared(pointer, state, length, start, stop, STATE: tl.constexpr, PRECISION: tl.constexpr):
    """B or C of a chunk, (STATE, 32); 0 past the stop."""
    n = tl.arange(0, STATE)
    at = start + tl.arange(0, CHUNK)
    where = n[:, None] * length + at[None, :]
    tile = tl.load(pointer + where, mask=(n < state)[:, None] & (at < stop)[None, :], other=0.0)
    return _rounded(tile.to(tl.float32), PRECISION)


@triton.jit
def _steps(raw, shift, start, stop, SOFTPLUS: tl.constexpr):
    step = raw + shift[:, None]
    if SOFTPLUS:
        step = softplus(step)
    return tl.where((start + tl.arange(0, CHUNK) < stop)[None, :], step, 0.0)


@triton.jit
def _begins(seq_idx, batch, length, start, stop):
    """(32,) where a packed sequence begins, token 0 apart."""
    at = start + tl.arange(0, CHUNK)
    inside = (at > 0) & (at < stop)
    here = tl.load(seq_idx + batch * length + at, mask=inside, other=0)
    before = tl.load(seq_idx + batch * length + at - 1, mask=inside, other=0)
    return here != before


@triton.jit
def _runs(seq_idx, batch, length, start, stop):
    """(32,) how many packed sequences have begun in the chunk up to each token."""
    if seq_idx is None:
        runs = tl.zeros([CHUNK], tl.int32)
    else:
        runs = tl.cumsum(tl.where(_begins(seq_idx, batch, length, start, stop), 1, 0), axis=0)
    return runs


@triton.jit
def _decays(s, ROWS: tl.constexpr):
    """From the state before the chunk to a token, from a token to the state after it, and to or from the middle."""
    along = tl.cumsum(s, axis=1)
    early = tl.arange(0, CHUNK)[None, :] < HALF
    middle = along - tl.sum(tl.where(early, s, 0.0), axis=1)[:, None]
    from_start = tl.exp2(-along)
    to_end = tl.exp2(along - tl.sum(s, axis=1)[:, None])
    return from_start, to_end, tl.exp2(tl.where(early, middle, -middle))


@triton.jit
def _near(s, ROWS: tl.constexpr, CLAMP: tl.constexpr):
    """q: the sum of the cut exponents from the middle of a token's half of the chunk."""
    halves = tl.reshape(tl.minimum(s, CLAMP), [ROWS, 2, HALF])
    return tl.reshape(tl.cumsum(halves, axis=2) - 0.5 * tl.sum(halves, axis=2)[:, :, None], [ROWS, CHUNK])


@triton.jit
def _near_pairs(products, runs):
    """Entries (j, l), j <= l, of one sequence and in one half."""
    j = tl.arange(0, CHUNK)[:, None]
    l = tl.arange(0, CHUNK)[None, :]
    return tl.where((j // HALF == l // HALF) & (j <= l) & (runs[:, None] == runs[None, :]), products, 0.0)


@triton.jit
def _far_pairs(products, runs):
    """Entries (j, l) of one sequence, j in the first half and l in the second."""
    j = tl.arange(0, CHUNK)[:, None]
    l = tl.arange(0, CHUNK)[None, :]
    return tl.where((j < HALF) & (l >= HALF) & (runs[:, None] == runs[None, :]), products, 0.0)


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
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr,
    CLAMP: tl.constexpr,
):  # fmt: skip
    """State after every segment if it were 0 before, and the factor by which a state decays across it."""
    batch, group, _tile, rows, exists = _place(tl.program_id(0), tiles, groups, group_size, ROWS)
    part = tl.program_id(1)
    stop = _stop(lengths, batch, length)
    A_row, shift = _vector(A, rows, exists), _vector(bias, rows, exists)
    u += batch * u_b
    delta += batch * delta_b
    B += (batch * groups + group) * state * length
    S = tl.zeros([ROWS, STATE], tl.float32)
    across = tl.full([ROWS], 1.0, tl.float32)
    for chunk in range(part * segment, tl.minimum((part + 1) * segment, chunks)):
        start = chunk * CHUNK
        valid = (start + tl.arange(0, CHUNK) < stop)[None, :]
        step = _steps(_load(delta, rows, exists, delta_d, delta_l, start, length), shift, start, stop, SOFTPLUS)
        x = step * tl.where(valid, _load(u, rows, exists, u_d, u_l, start, length), 0.0)
        B_tile = _load_shared(B, state, length, start, stop, STATE, PRECISION)
        runs = _runs(seq_idx, batch, length, start, stop)
        begun = tl.max(runs)
        s = step * (-A_row * LOG2E)[:, None]
        _from_start, to_end, _to_middle = _decays(s, ROWS)
        leaving = tl.where((runs == begun)[None, :], x * to_end, 0.0)
        whole = tl.where(begun == 0, tl.exp2(-tl.sum(s, axis=1)), 0.0)
        across *= whole
        S = _product(leaving, tl.trans(B_tile), S * whole[:, None], PRECISION)
    n = tl.arange(0, STATE)
    at = ((batch * tl.num_programs(1) + part) * state + n)[None, :] * channels + rows[:, None]
    mask = exists[:, None] & (n < state)[None, :]
    tl.store(ends + at, S, mask=mask)
    tl.store(decays + at, tl.broadcast_to(across[:, None], [ROWS, STATE]), mask=mask)


@triton.jit
def outputs(
    u, delta, z, A, B, C, D, bias, seq_idx, lengths, slots, states, y,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, y_b, y_d, y_l,
    length, channels, group_size, groups, tiles, state, chunks, segment,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr,
    CLAMP: tl.constexpr, STORE_LAST: tl.constexpr,
):  # fmt: skip
    """y of every segment from the state before it; the states before all chunks where ``states`` is given."""
    batch, group, _tile, rows, exists = _place(tl.program_id(0), tiles, groups, group_size, ROWS)
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
    zero = tl.zeros([ROWS, CHUNK], tl.float32)
    for chunk in range(part * segment, tl.minimum((part + 1) * segment, chunks)):
        start = chunk * CHUNK
        if states is not None:
            tl.store(states + (batch * chunks + chunk) * state * channels + at, S, mask=mask)
        valid = (start + tl.arange(0, CHUNK) < stop)[None, :]
        step = _steps(_load(delta, rows, exists, delta_d, delta_l, start, length), shift, start, stop, SOFTPLUS)
        value = tl.where(valid, _load(u, rows, exists, u_d, u_l, start, length), 0.0)
        B_tile = _load_shared(B, state, length, start, stop, STATE, PRECISION)
        C_tile = _load_shared(C, state, length, start, stop, STATE, PRECISION)
        products = _product(tl.trans(B_tile), C_tile, tl.zeros([CHUNK, CHUNK], tl.float32), PRECISION)
        runs = _runs(seq_idx, batch, length, start, stop)
        begun = tl.max(runs)
        s = step * (-A_row * LOG2E)[:, None]
        from_start, to_end, to_middle = _decays(s, ROWS)
        q = _near(s, ROWS, CLAMP)
        x = step * value
        out = _product(x * tl.exp2(q), _near_pairs(products, runs), zero, PRECISION) * tl.exp2(-q)
        out += _product(x * to_middle, _far_pairs(products, runs), zero, PRECISION) * to_middle
        old = _product(S, C_tile, zero, PRECISION) * from_start
        out += tl.where((runs == 0)[None, :], old, 0.0) + skip[:, None] * value
        leaving = tl.where((runs == begun)[None, :], x * to_end, 0.0)
        whole = tl.where(begun == 0, tl.exp2(-tl.sum(s, axis=1)), 0.0)
        S = _product(leaving, tl.trans(B_tile), S * whole[:, None], PRECISION)
        if z is not None:
            gate = _load(z + batch * z_b, rows, exists, z_d, z_l, start, length)
            out *= gate * sigmoid(gate)
        _store(y, tl.where(valid, out, 0.0), rows, exists, y_d, y_l, start, length)
    if STORE_LAST:
        tl.store(slots + state * channels + at, S, mask=mask)


@triton.jit
def segment_costates(
    dy, delta, z, A, C, bias, seq_idx, lengths, ends, decays,
    dy_b, dy_d, dy_l, delta_b, delta_d, delta_l, z_b, z_d, z_l,
    length, channels, group_size, groups, tiles, state, chunks, segment,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr,
    CLAMP: tl.constexpr,
):  # fmt: skip
    """Gradient of the state before every segment if that of the state after it were 0, and the decay across it."""
    batch, group, _tile, rows, exists = _place(tl.program_id(0), tiles, groups, group_size, ROWS)
    part = tl.program_id(1)
    stop = _stop(lengths, batch, length)
    A_row, shift = _vector(A, rows, exists), _vector(bias, rows, exists)
    dy += batch * dy_b
    delta += batch * delta_b
    C += (batch * groups + group) * state * length
    E = tl.zeros([ROWS, STATE], tl.float32)
    across = tl.full([ROWS], 1.0, tl.float32)
    first, last = part * segment, tl.minimum((part + 1) * segment, chunks)
    for done in range(0, last - first):
        start = (last - 1 - done) * CHUNK
        valid = (start + tl.arange(0, CHUNK) < stop)[None, :]
        step = _steps(_load(delta, rows, exists, delta_d, delta_l, start, length), shift, start, stop, SOFTPLUS)
        dout = tl.where(valid, _load(dy, rows, exists, dy_d, dy_l, start, length), 0.0)
        if z is not None:
            gate = tl.where(valid, _load(z + batch * z_b, rows, exists, z_d, z_l, start, length), 0.0)
            dout *= gate * sigmoid(gate)
        C_tile = _load_shared(C, state, length, start, stop, STATE, PRECISION)
        runs = _runs(seq_idx, batch, length, start, stop)
        s = step * (-A_row * LOG2E)[:, None]
        from_start, _to_end, _to_middle = _decays(s, ROWS)
        entering = tl.where((runs == 0)[None, :], dout * from_start, 0.0)
        whole = tl.where(tl.max(runs) == 0, tl.exp2(-tl.sum(s, axis=1)), 0.0)
        across *= whole
        E = _product(entering, tl.trans(C_tile), E * whole[:, None], PRECISION)
    n = tl.arange(0, STATE)
    at = ((batch * tl.num_programs(1) + part) * state + n)[None, :] * channels + rows[:, None]
    mask = exists[:, None] & (n < state)[None, :]
    tl.store(ends + at, E, mask=mask)
    tl.store(decays + at, tl.broadcast_to(across[:, None], [ROWS, STATE]), mask=mask)


@triton.jit
def _both_ways(x, g, pairs, PRECISION: tl.constexpr, ROWS: tl.constexpr):
    """One kind of pairs in both directions, x and g scaled by their factors.

    Returns their unscaled shares of y and dx, their share of x dx - dy y, and the sums over channels of
    dy_l x_j W_lj. The third is made of the very products that the first two sum, so that its running sum over
    tokens, which is mostly cancellation, does not collect their rounding.
    """
    x, g = _rounded(x, PRECISION), _rounded(g, PRECISION)
    zero = tl.zeros([ROWS, CHUNK], tl.float32)
    out = _product(x, pairs, zero, PRECISION)
    back = _product(g, tl.trans(pairs), zero, PRECISION)
    weights = _product(tl.trans(x), g, tl.zeros([CHUNK, CHUNK], tl.float32), PRECISION)
    return out, back, x.to(tl.float32) * back - g.to(tl.float32) * out, weights


@triton.jit
def gradients(
    dy, u, delta, z, A, B, C, D, bias, seq_idx, lengths, states, slots,
    du, ddelta, dz, dA, dB, dC, dD, dbias,
    dy_b, dy_d, dy_l, u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l,
    du_b, du_d, du_l, ddelta_b, ddelta_d, ddelta_l, dz_b, dz_d, dz_l,
    length, channels, group_size, groups, tiles, state, chunks, segment,
    SOFTPLUS: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr,
    CLAMP: tl.constexpr, STORE_FIRST: tl.constexpr,
):  # fmt: skip
    """All gradients of a segment, chunk by chunk from the right; E is the gradient of the state after a chunk.

    The gradient of an exponent s_k is -F_k, F_k the sum of all paths across token k. F_{k+1} - F_k is
    x_k dx_k - dy_k y_k, and at the chunk's first token F is <S, dS>.
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
    n = tl.arange(0, STATE)
    mask = exists[:, None] & (n < state)[None, :]
    at = n[None, :] * channels + rows[:, None]
    slots += (batch * (tl.num_programs(1) + 1) + part) * state * channels
    E = tl.load(slots + state * channels + at, mask=mask, other=0.0)
    columns = tl.arange(0, CHUNK)
    zero = tl.zeros([ROWS, CHUNK], tl.float32)
    sum_A = tl.zeros([ROWS], tl.float32)
    sum_D = tl.zeros([ROWS], tl.float32)
    sum_bias = tl.zeros([ROWS], tl.float32)
    first, last = part * segment, tl.minimum((part + 1) * segment, chunks)
    for done in range(0, last - first):
        chunk = last - 1 - done
        start = chunk * CHUNK
        valid = (start + columns < stop)[None, :]
        step = _steps(_load(delta, rows, exists, delta_d, delta_l, start, length), shift, start, stop, SOFTPLUS)
        value = tl.where(valid, _load(u, rows, exists, u_d, u_l, start, length), 0.0)
        dout = tl.where(valid, _load(dy, rows, exists, dy_d, dy_l, start, length), 0.0)
        if z is not None:
            gate = tl.where(valid, _load(z + batch * z_b, rows, exists, z_d, z_l, start, length), 0.0)
            dout *= gate * sigmoid(gate)
        S = tl.load(states + (batch * chunks + chunk) * state * channels + at, mask=mask, other=0.0)
        B_tile = _load_shared(B, state, length, start, stop, STATE, PRECISION)
        C_tile = _load_shared(C, state, length, start, stop, STATE, PRECISION)
        products = _product(tl.trans(B_tile), C_tile, tl.zeros([CHUNK, CHUNK], tl.float32), PRECISION)
        runs = _runs(seq_idx, batch, length, start, stop)
        begun = tl.max(runs)
        s = step * (-A_row * LOG2E)[:, None]
        from_start, to_end, to_middle = _decays(s, ROWS)
        q = _near(s, ROWS, CLAMP)
        grow, decay = tl.exp2(q), tl.exp2(-q)
        x = step * value
        out, dx, change, near = _both_ways(x * grow, dout * decay, _near_pairs(products, runs), PRECISION, ROWS)
        out_far, dx_far, change_far, far = _both_ways(
            x * to_middle, dout * to_middle, _far_pairs(products, runs), PRECISION, ROWS
        )
        out = out * decay + out_far * to_middle
        dx = dx * grow + dx_far * to_middle
        change += change_far
        weights = _near_pairs(near, runs) + _far_pairs(far, runs)
        dB_tile = _product(C_tile, tl.trans(weights), tl.zeros([STATE, CHUNK], tl.float32), PRECISION)
        dC_tile = _product(B_tile, weights, tl.zeros([STATE, CHUNK], tl.float32), PRECISION)
        # From the state before the chunk to its tokens.
        entering = _rounded(tl.where((runs == 0)[None, :], dout * from_start, 0.0), PRECISION)
        old = tl.where((runs == 0)[None, :], _product(S, C_tile, zero, PRECISION), 0.0)
        through = entering.to(tl.float32) * old
        change -= through
        out += old * from_start
        dC_tile = _product(tl.trans(S), entering, dC_tile, PRECISION)
        # From its tokens to the state after it.
        leaving = _rounded(tl.where((runs == begun)[None, :], x * to_end, 0.0), PRECISION)
        new = tl.where((runs == begun)[None, :], _product(E, B_tile, zero, PRECISION), 0.0)
        change += leaving.to(tl.float32) * new
        dx += new * to_end
        dB_tile = _product(tl.trans(E), leaving, dB_tile, PRECISION)
        E *= tl.where(begun == 0, tl.exp2(-tl.sum(s, axis=1)), 0.0)[:, None]
        F = (tl.sum(through, axis=1) + tl.sum(S * E, axis=1))[:, None] + tl.cumsum(change, axis=1) - change
        if seq_idx is not None:
            F = tl.where(_begins(seq_idx, batch, length, start, stop)[None, :], 0.0, F)
        F = tl.where(s < CLAMP, F, 0.0)
        E = _product(entering, tl.trans(C_tile), E, PRECISION)
        keep = (n < state)[:, None] & (start + columns < length)[None, :]
        where = shared + n[:, None] * length + start + columns[None, :]
        tl.store(dB + where, dB_tile, mask=keep)
        tl.store(dC + where, dC_tile, mask=keep)
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
