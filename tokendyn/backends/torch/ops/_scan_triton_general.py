# type: ignore  # triton.jit hides from type checkers what kernels are
# ruff: noqa: RUF005  (Triton knows tuple addition, not unpacking)
"""Triton kernels of the selective scan for any real A: one channel a lane, tokens in order.

A sequence is cut into chunks of TILES x 16 tokens that run in parallel. Forward: end states of all chunks
from zero (`chunk_states`), one short pass over chunks (`pass_states`), then the outputs (`outputs`).
Backward: the same for the gradients of states, right to left (`chunk_costates`, `pass_states`), then all
gradients (`gradients`), which recomputes states from the chunk's first one. No tensor of size L x N x d is
written, nothing is added atomically, so results are the same bits on every run.

Every program is one warp and walks over work items; what it must keep between tiles (a state per channel
and n) lies in a scratch buffer of its own, which stays in L1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokendyn.backends.torch.ops._scan_triton_tiles import (
    LOG2E,
    ROWS,
    STEPS,
    advance,
    kept,
    load_shared,
    load_tile,
    retreat,
    sigmoid,
    softplus,
    store_tile,
)


@triton.jit
def _step_sizes(raw, bias, valid, SOFTPLUS: tl.constexpr):
    step = raw + bias[:, None]
    if SOFTPLUS:
        step = softplus(step)
    return tl.where(valid, step, 0.0)


@triton.jit
def _fetch(pointer, stride, mask, COUNT: tl.constexpr):
    """COUNT vectors, ``stride`` apart. All loads are under way before the first is waited for."""
    vectors = ()
    for i in tl.static_range(COUNT):
        vectors = vectors + (tl.load(pointer + i * stride, mask=mask, other=0.0).to(tl.float32),)
    return vectors


@triton.jit
def _put(pointer, vectors, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(pointer + i * ROWS, vectors[i])


@triton.jit
def _rows(bias, group, block, group_size, length):
    """Channels of a block of lanes, which of them exist, how many tokens they have, and their bias."""
    lane = block * ROWS + tl.arange(0, ROWS)
    exists = lane < group_size
    limits = tl.where(exists, length, 0)
    rows = group * group_size + lane
    shift = tl.zeros([ROWS], tl.float32)
    if bias is not None:
        shift = tl.load(bias + rows, mask=exists, other=0.0).to(tl.float32)
    return rows, exists, limits, shift


@triton.jit
def _stop(lengths, batch, length):
    """Where the tokens of this batch entry end."""
    if lengths is None:
        stop = length
    else:
        stop = tl.load(lengths + batch).to(tl.int32)
    return stop


@triton.jit
def chunk_states(
    u, delta, A, B, bias, seq_idx, lengths, ends, decays, work,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, A_n,
    length, padded, channels, group_size, groups, blocks, state, chunks, items,
    SOFTPLUS: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """State after every chunk if it were 0 before, and the factor by which a state decays across it."""
    lane = tl.arange(0, ROWS)
    every = lane < ROWS
    work += tl.program_id(0) * state * ROWS + lane
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk, rest = item % chunks, item // chunks
        block, rest = rest % blocks, rest // blocks
        group, batch = rest % groups, (rest // groups).to(tl.int64)
        rows, exists, limits, shift = _rows(bias, group, block, group_size, length)
        stop = _stop(lengths, batch, length)
        u_rows = u + batch * u_b + rows.to(tl.int64) * u_d
        delta_rows = delta + batch * delta_b + rows.to(tl.int64) * delta_d
        B_group = B + (batch * groups + group) * state * padded
        for n in range(state):
            tl.store(work + n * ROWS, tl.zeros([ROWS], tl.float32))
        total = tl.zeros([ROWS], tl.float32)
        intact = 1
        for tile in range(TILES):
            start = (chunk * TILES + tile) * STEPS
            if start < stop:
                valid = (start + tl.arange(0, STEPS) < stop)[None, :]
                step = _step_sizes(load_tile(delta_rows, limits, delta_l, start, VECTOR), shift, valid, SOFTPLUS)
                inflow = step * tl.where(valid, load_tile(u_rows, limits, u_l, start, VECTOR), 0.0)
                total += tl.sum(step, axis=1)
                if seq_idx is not None:
                    keep = kept(seq_idx + batch * length, start, stop)
                    intact = tl.minimum(intact, tl.min(tl.where(keep, 1, 0)))
                for n in range(0, state, UNROLL):
                    A_rows = _fetch(A + n * A_n + rows, A_n, exists, UNROLL)
                    entering = _fetch(work + n * ROWS, ROWS, every, UNROLL)
                    leaving = ()
                    for i in tl.static_range(UNROLL):
                        B_tile = load_shared(B_group + (n + i) * padded + start)
                        if lengths is not None:
                            B_tile = tl.where(valid, B_tile, 0.0)
                        a = tl.exp2(step * (A_rows[i] * LOG2E)[:, None])
                        if seq_idx is not None:
                            a = tl.where(keep, a, -1.0)
                        leaving = leaving + (advance(a, inflow * B_tile, entering[i], seq_idx is not None)[2],)
                    _put(work + n * ROWS, leaving, UNROLL)
        at = (batch * chunks + chunk) * state * channels + rows
        for n in range(state):
            A_row = tl.load(A + n * A_n + rows, mask=exists, other=0.0).to(tl.float32)
            tl.store(ends + at + n * channels, tl.load(work + n * ROWS), mask=exists)
            tl.store(
                decays + at + n * channels, tl.where(intact == 1, tl.exp2(A_row * LOG2E * total), -1.0), mask=exists
            )


@triton.jit
def chunk_costates(
    dy, delta, z, A, C, bias, seq_idx, lengths, ends, decays, work,
    dy_b, dy_d, dy_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, A_n,
    length, padded, channels, group_size, groups, blocks, state, chunks, items,
    SOFTPLUS: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
    VECTOR: tl.constexpr, VECTOR_DY: tl.constexpr,
):  # fmt: skip
    """Gradient of the state before every chunk if that of the state after it were 0, and the chunk's decay."""
    lane = tl.arange(0, ROWS)
    every = lane < ROWS
    work += tl.program_id(0) * state * ROWS + lane
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk, rest = item % chunks, item // chunks
        block, rest = rest % blocks, rest // blocks
        group, batch = rest % groups, (rest // groups).to(tl.int64)
        rows, exists, limits, shift = _rows(bias, group, block, group_size, length)
        stop = _stop(lengths, batch, length)
        dy_rows = dy + batch * dy_b + rows.to(tl.int64) * dy_d
        delta_rows = delta + batch * delta_b + rows.to(tl.int64) * delta_d
        C_group = C + (batch * groups + group) * state * padded
        for n in range(state):
            tl.store(work + n * ROWS, tl.zeros([ROWS], tl.float32))
        total = tl.zeros([ROWS], tl.float32)
        intact = 1
        for backwards in range(TILES):
            start = (chunk * TILES + TILES - 1 - backwards) * STEPS
            if start < stop:
                valid = (start + tl.arange(0, STEPS) < stop)[None, :]
                step = _step_sizes(load_tile(delta_rows, limits, delta_l, start, VECTOR), shift, valid, SOFTPLUS)
                dout = tl.where(valid, load_tile(dy_rows, limits, dy_l, start, VECTOR_DY), 0.0)
                if z is not None:
                    z_rows = z + batch * z_b + rows.to(tl.int64) * z_d
                    gate = load_tile(z_rows, limits, z_l, start, VECTOR)
                    dout *= tl.where(valid, gate * sigmoid(gate), 0.0)
                total += tl.sum(step, axis=1)
                if seq_idx is not None:
                    keep = kept(seq_idx + batch * length, start, stop)
                    intact = tl.minimum(intact, tl.min(tl.where(keep, 1, 0)))
                for n in range(0, state, UNROLL):
                    A_rows = _fetch(A + n * A_n + rows, A_n, exists, UNROLL)
                    entering = _fetch(work + n * ROWS, ROWS, every, UNROLL)
                    leaving = ()
                    for i in tl.static_range(UNROLL):
                        C_tile = load_shared(C_group + (n + i) * padded + start)
                        if lengths is not None:
                            C_tile = tl.where(valid, C_tile, 0.0)
                        a = tl.exp2(step * (A_rows[i] * LOG2E)[:, None])
                        if seq_idx is not None:
                            a = tl.where(keep, a, -1.0)
                        leaving = leaving + (retreat(a, dout * C_tile, entering[i], seq_idx is not None)[1],)
                    _put(work + n * ROWS, leaving, UNROLL)
        at = (batch * chunks + chunk) * state * channels + rows
        for n in range(state):
            A_row = tl.load(A + n * A_n + rows, mask=exists, other=0.0).to(tl.float32)
            tl.store(ends + at + n * channels, tl.load(work + n * ROWS), mask=exists)
            tl.store(
                decays + at + n * channels, tl.where(intact == 1, tl.exp2(A_row * LOG2E * total), -1.0), mask=exists
            )


@triton.jit
def _then(p, x, q, y):
    """The map h -> p h + x followed by h -> q h + y. A negative factor stands for a reset, which nothing gets past."""
    return tl.where((p < 0.0) | (q < 0.0), -1.0, p * q), tl.where(q < 0.0, y, q * x + y)


@triton.jit
def pass_states(
    ends, decays, first, slots, first_b, first_n, first_d,
    state, channels, chunks, BACKWARDS: tl.constexpr, AT_ONCE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """States at all chunk boundaries: slots (b, chunks + 1, N, d) from the chunks' ends and decays."""
    batch = tl.program_id(0).to(tl.int64)
    size = state * channels
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < size
    if first is None:
        h = tl.zeros([WIDTH], tl.float32)
    else:
        source = first + batch * first_b + (column // channels) * first_n + (column % channels) * first_d
        h = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    slots += batch * (chunks + 1) * size + column
    tl.store(slots + ((batch * 0 + chunks) * size if BACKWARDS else 0), h, mask=inside)
    offset = batch * chunks * size + column
    step = tl.arange(0, AT_ONCE)
    for done in range(0, chunks, AT_ONCE):
        at = done + step
        index = ((chunks - 1 - at) if BACKWARDS else at).to(tl.int64)
        mask = (at < chunks)[:, None] & inside[None, :]
        where = offset[None, :] + index[:, None] * size
        p = tl.load(decays + where, mask=mask, other=1.0)
        x = tl.load(ends + where, mask=mask, other=0.0)
        p, x = tl.associative_scan((p, x), 0, _then)
        after = tl.where(p < 0.0, x, p * h[None, :] + x)
        slot = slots[None, :] + (index if BACKWARDS else index + 1)[:, None] * size
        tl.store(slot, after, mask=mask)
        h = tl.sum(tl.where((step == AT_ONCE - 1)[:, None], after, 0.0), axis=0)


@triton.jit
def outputs(
    u, delta, z, A, B, C, D, bias, seq_idx, lengths, states, y, work,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, y_b, y_d, y_l, A_n,
    length, padded, channels, group_size, groups, blocks, state, chunks, items,
    SOFTPLUS: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr,
    STORE_LAST: tl.constexpr,
):  # fmt: skip
    """y of every chunk from the state before it; with STORE_LAST also the state after it."""
    lane = tl.arange(0, ROWS)
    every = lane < ROWS
    work += tl.program_id(0) * state * ROWS + lane
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk, rest = item % chunks, item // chunks
        block, rest = rest % blocks, rest // blocks
        group, batch = rest % groups, (rest // groups).to(tl.int64)
        rows, exists, limits, shift = _rows(bias, group, block, group_size, length)
        stop = _stop(lengths, batch, length)
        u_rows = u + batch * u_b + rows.to(tl.int64) * u_d
        delta_rows = delta + batch * delta_b + rows.to(tl.int64) * delta_d
        y_rows = y + batch * y_b + rows.to(tl.int64) * y_d
        group_offset = (batch * groups + group) * state * padded
        slot = states + (batch * (chunks + 1) + chunk) * state * channels + rows
        for n in range(state):
            tl.store(work + n * ROWS, tl.load(slot + n * channels, mask=exists, other=0.0))
        for tile in range(TILES):
            start = (chunk * TILES + tile) * STEPS
            if start < length:
                valid = (start + tl.arange(0, STEPS) < stop)[None, :]
                step = _step_sizes(load_tile(delta_rows, limits, delta_l, start, VECTOR), shift, valid, SOFTPLUS)
                value = tl.where(valid, load_tile(u_rows, limits, u_l, start, VECTOR), 0.0)
                inflow = step * value
                if seq_idx is not None:
                    keep = kept(seq_idx + batch * length, start, stop)
                if D is None:
                    out = tl.zeros([ROWS, STEPS], tl.float32)
                else:
                    out = tl.load(D + rows, mask=exists, other=0.0).to(tl.float32)[:, None] * value
                for n in range(0, state, UNROLL):
                    A_rows = _fetch(A + n * A_n + rows, A_n, exists, UNROLL)
                    entering = _fetch(work + n * ROWS, ROWS, every, UNROLL)
                    leaving = ()
                    for i in tl.static_range(UNROLL):
                        B_tile = load_shared(B + group_offset + (n + i) * padded + start)
                        C_tile = load_shared(C + group_offset + (n + i) * padded + start)
                        if lengths is not None:
                            B_tile = tl.where(valid, B_tile, 0.0)
                            C_tile = tl.where(valid, C_tile, 0.0)
                        a = tl.exp2(step * (A_rows[i] * LOG2E)[:, None])
                        if seq_idx is not None:
                            a = tl.where(keep, a, -1.0)
                        states_of_n = advance(a, inflow * B_tile, entering[i], seq_idx is not None)
                        leaving = leaving + (states_of_n[2],)
                        out += states_of_n[1] * C_tile
                    _put(work + n * ROWS, leaving, UNROLL)
                if z is not None:
                    z_rows = z + batch * z_b + rows.to(tl.int64) * z_d
                    gate = load_tile(z_rows, limits, z_l, start, VECTOR)
                    out *= gate * sigmoid(gate)
                if lengths is not None:
                    out = tl.where(valid, out, 0.0)
                store_tile(y_rows, out, limits, y_l, start, VECTOR)
        if STORE_LAST:
            for n in range(state):
                tl.store(slot + (state + n) * channels, tl.load(work + n * ROWS), mask=exists)


@triton.jit
def gradients(
    dy, u, delta, z, A, B, C, D, bias, seq_idx, lengths, states, costates,
    du, ddelta, dz, dA, dB, dC, dD, dbias, tile_states, work,
    dy_b, dy_d, dy_l, u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l,
    du_b, du_d, du_l, ddelta_b, ddelta_d, ddelta_l, dz_b, dz_d, dz_l, A_n,
    length, padded, channels, group_size, groups, blocks, bands, state, chunks, items,
    SOFTPLUS: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr, BLOCKS_A_BAND: tl.constexpr,
    VECTOR: tl.constexpr, VECTOR_DY: tl.constexpr,
    STORE_FIRST: tl.constexpr, PRECISION: tl.constexpr, GRAD_UNROLL: tl.constexpr,
):  # fmt: skip
    """All gradients of a chunk from the state before it and the gradient of the state after it.

    With k = h_{t-1}, a = exp(ΔA), g the gradient of h_t and v = u Δ::

        q = g a k      dΔ += A q      dA += Δ q      dv += g B      dB = Σ_d g v      dC = Σ_d dy h

    The sums over the 32 channels of a block are matrix products with a matrix of ones in row n, so a block
    of 16 n ends in one (16, 32) accumulator of dB and dC. Sums over the blocks of a band are made in order.
    """
    lane = tl.arange(0, ROWS)
    every = lane < ROWS
    sixteen = tl.arange(0, 16)
    work += tl.program_id(0) * state * ROWS + lane
    tile_states += tl.program_id(0) * TILES * state * ROWS + lane
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        chunk, rest = item % chunks, item // chunks
        band, rest = rest % bands, rest // bands
        group, batch = rest % groups, (rest // groups).to(tl.int64)
        stop = _stop(lengths, batch, length)
        group_offset = (batch * groups + group) * state * padded
        band_offset = ((batch * groups + group) * bands + band) * state * padded
        for part in range(BLOCKS_A_BAND):
            block = band * BLOCKS_A_BAND + part
            if block < blocks:
                rows, exists, limits, shift = _rows(bias, group, block, group_size, length)
                dy_rows = dy + batch * dy_b + rows.to(tl.int64) * dy_d
                u_rows = u + batch * u_b + rows.to(tl.int64) * u_d
                delta_rows = delta + batch * delta_b + rows.to(tl.int64) * delta_d
                du_rows = du + batch * du_b + rows.to(tl.int64) * du_d
                ddelta_rows = ddelta + batch * ddelta_b + rows.to(tl.int64) * ddelta_d
                slot = states + (batch * (chunks + 1) + chunk) * state * channels + rows
                coslot = costates + (batch * (chunks + 1) + chunk) * state * channels + rows
                dA_rows = dA + (batch * chunks + chunk) * state * channels + rows
                skip = tl.zeros([ROWS], tl.float32)
                if D is not None:
                    skip = tl.load(D + rows, mask=exists, other=0.0).to(tl.float32)
                for n in range(state):
                    tl.store(tile_states + n * ROWS, tl.load(slot + n * channels, mask=exists, other=0.0))
                    tl.store(work + n * ROWS, tl.load(coslot + (state + n) * channels, mask=exists, other=0.0))
                    tl.store(dA_rows + n * channels, tl.zeros([ROWS], tl.float32), mask=exists)
                # States before every tile.
                for tile in range(TILES - 1):
                    start = (chunk * TILES + tile) * STEPS
                    if start + STEPS < length:
                        valid = (start + tl.arange(0, STEPS) < stop)[None, :]
                        step = _step_sizes(
                            load_tile(delta_rows, limits, delta_l, start, VECTOR), shift, valid, SOFTPLUS
                        )
                        inflow = step * tl.where(valid, load_tile(u_rows, limits, u_l, start, VECTOR), 0.0)
                        if seq_idx is not None:
                            keep = kept(seq_idx + batch * length, start, stop)
                        for n in range(0, state, UNROLL):
                            A_rows = _fetch(A + n * A_n + rows, A_n, exists, UNROLL)
                            entering = _fetch(tile_states + (tile * state + n) * ROWS, ROWS, every, UNROLL)
                            leaving = ()
                            for i in tl.static_range(UNROLL):
                                B_tile = load_shared(B + group_offset + (n + i) * padded + start)
                                if lengths is not None:
                                    B_tile = tl.where(valid, B_tile, 0.0)
                                a = tl.exp2(step * (A_rows[i] * LOG2E)[:, None])
                                if seq_idx is not None:
                                    a = tl.where(keep, a, -1.0)
                                leaving = leaving + (advance(a, inflow * B_tile, entering[i], seq_idx is not None)[2],)
                            _put(tile_states + ((tile + 1) * state + n) * ROWS, leaving, UNROLL)
                sum_D = tl.zeros([ROWS], tl.float32)
                sum_bias = tl.zeros([ROWS], tl.float32)
                for backwards in range(TILES):
                    tile = TILES - 1 - backwards
                    start = (chunk * TILES + tile) * STEPS
                    if start < length:
                        valid = (start + tl.arange(0, STEPS) < stop)[None, :]
                        step = _step_sizes(
                            load_tile(delta_rows, limits, delta_l, start, VECTOR), shift, valid, SOFTPLUS
                        )
                        value = tl.where(valid, load_tile(u_rows, limits, u_l, start, VECTOR), 0.0)
                        inflow = step * value
                        dout = tl.where(valid, load_tile(dy_rows, limits, dy_l, start, VECTOR_DY), 0.0)
                        ungated = dout
                        if z is not None:
                            z_rows = z + batch * z_b + rows.to(tl.int64) * z_d
                            gate = tl.where(valid, load_tile(z_rows, limits, z_l, start, VECTOR), 0.0)
                            dout = ungated * gate * sigmoid(gate)
                            out = skip[:, None] * value
                        if seq_idx is not None:
                            keep = kept(seq_idx + batch * length, start, stop)
                        dinflow = tl.zeros([ROWS, STEPS], tl.float32)
                        dstep = tl.zeros([ROWS, STEPS], tl.float32)
                        for first_n in range(0, state, 16):
                            sums = tl.zeros([16, 2 * STEPS], tl.float32)
                            for n in range(first_n, tl.minimum(first_n + 16, state), GRAD_UNROLL):
                                dA_n = dA_rows + n * channels
                                A_rows = _fetch(A + n * A_n + rows, A_n, exists, GRAD_UNROLL)
                                entering = _fetch(tile_states + (tile * state + n) * ROWS, ROWS, every, GRAD_UNROLL)
                                arriving = _fetch(work + n * ROWS, ROWS, every, GRAD_UNROLL)
                                dA_before = _fetch(dA_n, channels, exists, GRAD_UNROLL)
                                leaving = ()
                                dA_after = ()
                                for i in tl.static_range(GRAD_UNROLL):
                                    B_tile = load_shared(B + group_offset + (n + i) * padded + start)
                                    C_tile = load_shared(C + group_offset + (n + i) * padded + start)
                                    if lengths is not None:
                                        B_tile = tl.where(valid, B_tile, 0.0)
                                        C_tile = tl.where(valid, C_tile, 0.0)
                                    a = tl.exp2(step * (A_rows[i] * LOG2E)[:, None])
                                    if seq_idx is not None:
                                        a = tl.where(keep, a, -1.0)
                                    before, after, _last = advance(a, inflow * B_tile, entering[i], seq_idx is not None)
                                    g, e = retreat(a, dout * C_tile, arriving[i], seq_idx is not None)
                                    leaving = leaving + (e,)
                                    q = g * a * before
                                    if seq_idx is not None:
                                        q = tl.where(keep, q, 0.0)
                                    dstep += q * A_rows[i][:, None]
                                    dinflow += g * B_tile
                                    if z is not None:
                                        out += after * C_tile
                                    dA_after = dA_after + (dA_before[i] + tl.sum(q * step, axis=1),)
                                    pair = tl.reshape(tl.join(g * inflow, dout * after), [ROWS, 2 * STEPS])
                                    ones = tl.where((sixteen == n + i - first_n)[:, None], 1.0, 0.0)
                                    ones = tl.broadcast_to(ones, [16, ROWS])
                                    sums = tl.dot(ones, pair, sums, input_precision=PRECISION)
                                _put(work + n * ROWS, leaving, GRAD_UNROLL)
                                for i in tl.static_range(GRAD_UNROLL):
                                    tl.store(dA_n + i * channels, dA_after[i], mask=exists)
                            dB_sum, dC_sum = tl.split(tl.reshape(sums, [16, STEPS, 2]))
                            n_at = (first_n + sixteen)[:, None]
                            at = band_offset + n_at * padded + start + tl.arange(0, STEPS)[None, :]
                            inside = n_at < state
                            if part > 0:
                                dB_sum += tl.load(dB + at, mask=inside, other=0.0)
                                dC_sum += tl.load(dC + at, mask=inside, other=0.0)
                            tl.store(dB + at, dB_sum, mask=inside)
                            tl.store(dC + at, dC_sum, mask=inside)
                        # Read again rather than kept in registers through the loop over n.
                        value = tl.where(valid, load_tile(u_rows, limits, u_l, start, VECTOR), 0.0)
                        dvalue = step * dinflow + skip[:, None] * dout
                        dstep += value * dinflow
                        if SOFTPLUS:
                            raw = load_tile(delta_rows, limits, delta_l, start, VECTOR)
                            dstep *= sigmoid(raw + shift[:, None])
                        dstep = tl.where(valid, dstep, 0.0)
                        store_tile(du_rows, dvalue, limits, du_l, start, VECTOR)
                        store_tile(ddelta_rows, dstep, limits, ddelta_l, start, VECTOR)
                        if z is not None:
                            dz_rows = dz + batch * dz_b + rows.to(tl.int64) * dz_d
                            half = sigmoid(gate)
                            dgate = ungated * out * half * (1.0 + gate * (1.0 - half))
                            store_tile(dz_rows, dgate, limits, dz_l, start, VECTOR)
                        if D is not None:
                            sum_D += tl.sum(dout * value, axis=1)
                        if bias is not None:
                            sum_bias += tl.sum(dstep, axis=1)
                at = (batch * chunks + chunk) * channels + rows
                if D is not None:
                    tl.store(dD + at, sum_D, mask=exists)
                if bias is not None:
                    tl.store(dbias + at, sum_bias, mask=exists)
                if STORE_FIRST:
                    for n in range(state):
                        tl.store(coslot + n * channels, tl.load(work + n * ROWS), mask=exists)
