// The backward pass of `_scan_cuda_scalar.cu`, whose text comes before this one.

// The gradient that reaches y before the gate.
__device__ __forceinline__ void load_gradient(Tokens& dout, const Block& block, const Eight& dy, const Eight& z, int start) {
    int valid = block.end - start - threadIdx.x % 4 * 4;
    dout.each([&](float& v, int h, int i) {
        v = dy.get(h, i);
#if GATED
        v *= z.get(h, i) * sigmoid(z.get(h, i));
#endif
    });
    if (block.end - start < CHUNK)
        dout.each([&](float& v, int h, int i) {
            if (i >= valid) v = 0.0f;
        });
}

// Gradient of the state before a segment if that of the state after it were 0, and the decay across the segment.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) segment_coends(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
    Block block(p, blockIdx.x);
    if (block.segment == 0) return;
    int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    auto& own = shared.of[warp];
    float* scratch = own.scratch;
    load_rows(shared.rows, p, block);
    begin_segment(shared.carry, shared.across, block);
    int span = block.first + (block.last - 1 - block.first) / SPAN * SPAN, start = span + warp * CHUNK;
    VIEW(0, dy, span, -SPAN);
    VIEW(1, delta, span, -SPAN);
    VIEW(2, z, span, -SPAN);
    Eight next_dy = view_dy.load(block, 0, start), next_delta = view_delta.load(block, 0, start), own_z;
    Places places;
    unsigned *pieces_dy = own.inputs[0][0], *pieces_delta = own.inputs[0][1], *pieces_z = own.inputs[1][0];
    Matrix C = MATRIX(C);
    C.load(p, span);
    __syncthreads();
    for (; span >= block.first; span -= SPAN, start -= SPAN) {
        Right<2, NT> C_by_token;
        Right<NT, 2> C_by_n;
        C.turn(C_by_token, C_by_n, scratch, block.stop - start);
        unsigned resets = find_resets(p, block, start);
        C_by_token = only_together<false>(C_by_token, resets);
        if (span > block.first) C.load(p, span - SPAN);
        for (int tile = 0; tile < block.tiles; tile++) {
            Tokens dout;
            bool done = tile + 1 == block.tiles;
            const auto& ways = shared.ways.by[done];
#if GATED
            own_z = view_z.load(block, tile, start), view_z.advance(ways);
            own_z.deal(pieces_z, places);
#endif
            next_dy.deal(pieces_dy, places), next_delta.deal(pieces_delta, places);
            load_gradient(dout, block, next_dy, own_z, start);
            Steps steps(p, block, shared.rows, next_delta, dout, tile, start);
            view_dy.advance(ways), view_delta.advance(ways);
            if (!done || span > block.first) {
                int next_tile = done ? 0 : tile + 1, next_start = done ? start - SPAN : start;
                next_dy = view_dy.load(block, next_tile, next_start), next_delta = view_delta.load(block, next_tile, next_start);
            }
            dout.each([&](float& v, int h, int i) {
                v = together(resets, -1, 4 * q + i) ? operand(v * ex2(-steps.q.v[h][i])) : 0.0f;
            });
            State local;
            local.clear();
            multiply(local, dout, C_by_token);
            local.write(own.states, STATE);
            if (q == 0)
#pragma unroll
                for (int h = 0; h < 2; h++) shared.decays[g + 8 * h][warp] = resets ? -1.0f : ex2(-steps.total[h]);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < OWN_ENTRIES; k++) {
                Entry entry(k);
                if (!entry.exists) break;
                float& carry = shared.carry[tile][entry.number];
                carry = join_chunks<true, false, sizeof(shared.of[0]) / 4>(shared.of[0].states, shared.decays, shared.decays, entry.number, carry, &shared.across[tile][entry.number]);
            }
            __syncthreads();
        }
    }
    end_segment(shared.carry, shared.across, p, block);
}

#define BACKWARD_SCRATCH 512  // floats a warp: a walk's, a tile or G that is turned, three tiles in PIECES
static_assert(BACKWARD_SCRATCH >= 2 * SQUARE && 2 * ENTRIES >= SQUARE && BACKWARD_SCRATCH >= TURNED && (!PIECES || BACKWARD_SCRATCH >= 3 * TILE_WORDS), "");
#define BUFFERS (ELEMENT == 0 ? 1 : 2)  // 2: a tile's inputs are on their way while the one before is worked on; in float32 there is no space
struct BackwardShared {
    struct {
        float states[ENTRIES], costates[ENTRIES], scratch[BACKWARD_SCRATCH];
        float M[CHUNK * MATRIX_PITCH];         // C_t . B_s, s < t, rows s
        float B[CHUNK * STATE_PITCH], C[CHUNK * STATE_PITCH];
        float diagonal[CHUNK];
        unsigned inputs[BUFFERS][3][TILE_WORDS];  // u, delta and dy of a tile
        float sums[2][ENTRIES];                   // of dB and dC
    } of[WARPS];  // each warp's own; states and costates are joined by all threads
    float decays[ROWS][WARPS], scales[ROWS][WARPS];
    Rows rows;
    Ways ways;
    int index[4];
    struct {
        float carry[ENTRIES], sums[3][WARPS][ROWS];
    } tiles[1];  // as many as a block has
};
static_assert(sizeof(BackwardShared) == BACKWARD_BYTES, "the launch must know how much shared memory to ask for");

// Adds what another block has left of a warp's dB or dC, tokens column<2>(g, h), in a part (L, STATE): past the L1 cache.
__device__ __forceinline__ void add_part(State& sum, const float* part, int tokens) {
    const float* lane = part + threadIdx.x % 4 * (2 * NT);
    State before;
    before.clear();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int t = column<2>(threadIdx.x % 32 / 4, h);
        if (t < tokens)
#pragma unroll
            for (int i = 0; i < 2 * NT; i += 2) {
                float2 two = __ldcg((const float2*)(lane + t * STATE + i));
                before.v[h][i] = two.x, before.v[h][i + 1] = two.y;
            }
    }
    sum.each([&](float& v, int h, int i) { v += before.v[h][i]; });
}
__device__ __forceinline__ void store_part(const State& sum, float* part, int tokens) {
    float* lane = part + threadIdx.x % 4 * (2 * NT);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int t = column<2>(threadIdx.x % 32 / 4, h);
        if (t < tokens)
#pragma unroll
            for (int i = 0; i < 2 * NT; i += 2) *(float2*)(lane + t * STATE + i) = make_float2(sum.v[h][i], sum.v[h][i + 1]);
    }
}

// All gradients of a segment. F_t, the gradient of token t's log decay, is the sum of all that flows across it: from
// sources s < t, or the state before the chunk, to targets >= t, or the state after it. Pairs s = t do not cross anything
// and are kept apart, so that strong decays, which leave nothing else, cancel nothing. Where factors are used, F is a
// running sum from the chunk's end, of what tokens receive less what they send, made of the very products that y and dx
// sum, so that its rounding does not accumulate.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gradients(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    BackwardShared& shared = *(BackwardShared*)memory;
    int index = blockIdx.x;
    if (p.chain > 1) {  // blocks number themselves as they begin, so that one which waits for another knows that it runs
        if (threadIdx.x == 0) shared.index[0] = (int)atomicAdd((unsigned*)p.counters, 1u);
        __syncthreads();
        index = uniform(shared.index[0]);
    }
    Block block(p, index);
    int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    auto& own = shared.of[warp];
    float* scratch = own.scratch;
    unsigned* pieces = (unsigned*)scratch;
    Places places;
    load_rows(shared.rows, p, block);
    begin_states([&](int tile) { return shared.tiles[tile].carry; }, p, block, p.last_gradient, block.segment + 1);
    for (int i = threadIdx.x; i < block.tiles * 3 * WARPS * ROWS; i += THREADS) (&shared.tiles[i / (3 * WARPS * ROWS)].sums[0][0][0])[i % (3 * WARPS * ROWS)] = 0.0f;
    int chained = block.tile % (int)p.chain;
    i64 part_index = ((i64)block.batch * p.groups + block.group) * p.parts + block.tile / (int)p.chain;
    float* part = (float*)p.parts_out + part_index * 2 * STATE * p.length;
    unsigned* flags = (unsigned*)p.counters + 1 + part_index * p.chunks * WARPS + warp;
    int span = block.first + (block.last - 1 - block.first) / SPAN * SPAN, start = span + warp * CHUNK;
    VIEW(0, u, span, -SPAN);
    VIEW(1, delta, span, -SPAN);
    VIEW(2, dy, span, -SPAN);
    VIEW(3, z, span, -SPAN);
    VIEW(4, du, span, -SPAN);
    VIEW(5, ddelta, span, -SPAN);
    VIEW(6, dz, span, -SPAN);
    int buffer = 0;
    auto fetch = [&](int tile, int start) {
        auto& inputs = own.inputs[buffer];
#if OWNER == SINGLE  // all on their way before one is waited for
        Eight u = view_u.load_singly(block, tile, start), delta = view_delta.load_singly(block, tile, start), dy = view_dy.load_singly(block, tile, start);
        u.write(inputs[0], places), delta.write(inputs[1], places), dy.write(inputs[2], places);
#else
        view_u.fetch(inputs[0], places, block, tile, start), view_delta.fetch(inputs[1], places, block, tile, start), view_dy.fetch(inputs[2], places, block, tile, start);
#endif
    };
    auto fetch_next = [&](int tile) {
        bool done = tile + 1 == block.tiles;
        const auto& ways = shared.ways.by[done];
        view_u.advance(ways), view_delta.advance(ways), view_dy.advance(ways);
        buffer ^= BUFFERS - 1;
        if (!done || span > block.first) fetch(done ? 0 : tile + 1, done ? start - SPAN : start);
    };
    fetch(0, start);
    Matrix B = MATRIX(B), C = MATRIX(C);
    __syncthreads();
    for (; span >= block.first; span -= SPAN, start -= SPAN) {
        {
            B.load(p, span), C.load(p, span);  // no earlier: registers that waited for them would be spilled
            B.deal(own.B, block.stop - start), C.deal(own.C, block.stop - start);
            __syncwarp();
            Right<NT, 2> B_by_n = by_column<NT>(own.B, STATE_PITCH), C_by_n = by_column<NT>(own.C, STATE_PITCH);
            Tokens products;  // s x t
            products.clear();
            multiply<true>(products, B_by_n, C_by_n);
            products.each([&](float& v, int h, int i) {
                int s = column<2>(g, h), t = 4 * q + i;
                if (s == t) own.diagonal[t] = v;
                v = s < t ? operand(v) : 0.0f;
            });
#pragma unroll
            for (int h = 0; h < 2; h++)
                *(float4*)(own.M + column<2>(g, h) * MATRIX_PITCH + 4 * q) = make_float4(products.v[h][0], products.v[h][1], products.v[h][2], products.v[h][3]);
        }
        unsigned resets = find_resets(p, block, start);
        const Kept* kept_states = block.slot<Kept>(p, p.states, p.chunks, span / SPAN);
        hold(kept_states);
        __syncwarp();
        Tokens G;  // t x s: sums over channels of dy_t x_s times the weight
        State dB, dC;  // between tiles in shared memory
        G.clear(), dB.clear(), dC.clear();
        for (int which = 0; which < 2; which++) set_aside(own.sums[which], dB);
        for (int tile = 0; tile < block.tiles; tile++) {
            const auto& ways = shared.ways.by[tile + 1 == block.tiles];
            float kept[OWN_ENTRIES];
#pragma unroll
            for (int k = 0; k < OWN_ENTRIES; k++) {
                Entry entry(k);
                kept[k] = entry.within(block, tile) ? from_kept(kept_states[entry.offset(tile)]) : 0.0f;
            }
            Eight own_u, own_delta, own_dy, own_z;
            const auto& inputs = own.inputs[buffer];
            fetched();
            own_u.read(inputs[0], places), own_delta.read(inputs[1], places), own_dy.read(inputs[2], places);
            if (BUFFERS == 2) fetch_next(tile);
#if GATED
            own_z = view_z.load(block, tile, start), view_z.advance(ways);
            own_z.deal(pieces, places);
#endif
            Tokens u, dout;
            u.each([&](float& v, int h, int i) { v = own_u.get(h, i); });
            load_gradient(dout, block, own_dy, own_z, start);
            Steps steps(p, block, shared.rows, own_delta, u, tile, start);
            // What flows from token s is sent[s] times a product, and to token t received[t] times one.
            Tokens out_factor, in_factor, sent, received;
            out_factor.each([&](float& v, int h, int i) { v = ex2(steps.q.v[h][i]), sent.v[h][i] = exact_operand(steps.x.v[h][i] * v); });
            in_factor.each([&](float& v, int h, int i) { v = ex2(-steps.q.v[h][i]), received.v[h][i] = exact_operand(dout.v[h][i] * v); });
            bool walks = __any_sync(~0u, resets != 0 || !steps.tame(sum_of(sent)) || !(fabsf(sum_of(received)) < 1e37f));
            float scale[2], whole[2];
            volatile float aside[8];  // no registers for what few chunks need
#pragma unroll
            for (int h = 0; h < 2; h++) scale[h] = whole[h] = ex2(-steps.total[h]);
            if (walks) {
                Walk walk;
                __syncwarp();  // the tile before is read
                walk.run<true>(steps.s, steps.x, dout, own.M, resets, scratch, own.states, G);  // and costates: both are free
                walk.crossing.each([&](float& v, int h, int i) { aside[4 * h + i] = v; });
                out_factor = walk.to_end, in_factor = walk.from_start;
                sent.each([&](float& v, int h, int i) { v = together(resets, 4 * q + i, CHUNK - 1) ? exact_operand(steps.x.v[h][i] * out_factor.v[h][i]) : 0.0f; });
                received.each([&](float& v, int h, int i) { v = together(resets, -1, 4 * q + i) ? exact_operand(dout.v[h][i] * in_factor.v[h][i]) : 0.0f; });
#pragma unroll
                for (int h = 0; h < 2; h++) scale[h] = 1.0f, whole[h] = resets ? -1.0f : walk.whole[h];
            }
            {
                State local;
                __syncwarp();  // the tile before is read
                local.clear();
                multiply(local, sent, only_together<true>(by_token<NT>(own.B, STATE_PITCH), resets));
                local.each([&](float& v, int h, int i) { v *= scale[h]; });
                local.write(own.states, STATE);
                local.clear();
                multiply(local, received, only_together<false>(by_token<NT>(own.C, STATE_PITCH), resets));
                local.write(own.costates, STATE);
            }
            if (q == 0)
#pragma unroll
                for (int h = 0; h < 2; h++) shared.decays[g + 8 * h][warp] = whole[h], shared.scales[g + 8 * h][warp] = scale[h];
            __syncthreads();
#pragma unroll
            for (int k = 0; k < OWN_ENTRIES; k++) {
                Entry entry(k);
                if (!entry.exists) break;
                float& carry = shared.tiles[tile].carry[entry.number];
                join_chunks<false, true, sizeof(shared.of[0]) / 4>(shared.of[0].states, shared.decays, shared.scales, entry.number, kept[k], nullptr);
                carry = join_chunks<true, true, sizeof(shared.of[0]) / 4>(shared.of[0].costates, shared.decays, shared.scales, entry.number, carry, nullptr);
            }
            __syncthreads();
            State before, after;  // the state before the chunk; the gradient of the state after it, times the scale
            before.read(own.states, STATE);
            after.read(own.costates, STATE);
            float through[2] = {0.0f, 0.0f};  // what flows from the one to the other, then all across the chunk's end
            before.each([&](float& v, int h, int i) { through[h] = fmaf(v, after.v[h][i], through[h]); });
            Tokens y, dx;
            y.clear(), dx.clear();
            multiply(y, before, by_column<NT>(own.C, STATE_PITCH));
            multiply(dx, after, by_column<NT>(own.B, STATE_PITCH));
            Tokens F;
            if (!walks) {
                sent.each([&](float& v, int h, int i) { through[h] = fmaf(v, dx.v[h][i], through[h]); });
                multiply(y, sent, by_token<2>(own.M, MATRIX_PITCH));
                multiply(dx, received, by_column<2>(own.M, MATRIX_PITCH));
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float sum = 0.0f;
#pragma unroll
                    for (int i = 3; i >= 0; i--) F.v[h][i] = sum = fmaf(received.v[h][i], y.v[h][i], fmaf(-sent.v[h][i], dx.v[h][i], sum));
                    float neighbour = __shfl_xor_sync(~0u, sum, 1), others = __shfl_xor_sync(~0u, sum + neighbour, 2);
                    float later = add_over_quad(through[h]) + (q & 1 ? 0.0f : neighbour) + (q & 2 ? 0.0f : others);
#pragma unroll
                    for (int i = 0; i < 4; i++) F.v[h][i] += later;
                }
                y.each([&](float& v, int h, int i) { v *= in_factor.v[h][i]; });
                dx.each([&](float& v, int h, int i) { v *= out_factor.v[h][i]; });
            } else {
                // y and dx hold what comes from and goes to states: cut off where a sequence begins between.
                Tokens y_inside, dx_inside;
                y_inside.read(scratch, CHUNK), dx_inside.read(scratch + SQUARE, CHUNK);
                F.each([&](float& v, int h, int i) { v = aside[4 * h + i]; });
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float in[4], out[4], sum_in = 0.0f, sum_out = 0.0f;
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        bool begun = !together(resets, -1, 4 * q + i), cut = !together(resets, 4 * q + i, CHUNK - 1);
                        in[i] = begun ? 0.0f : received.v[h][i] * y.v[h][i];
                        out[i] = cut ? 0.0f : sent.v[h][i] * dx.v[h][i];
                        y.v[h][i] = (begun ? 0.0f : in_factor.v[h][i] * y.v[h][i]) + y_inside.v[h][i];
                        dx.v[h][i] = (cut ? 0.0f : out_factor.v[h][i] * dx.v[h][i]) + dx_inside.v[h][i];
                        F.v[h][i] += sum_out;
                        sum_out += out[i];
                    }
                    float carried = add_over_quad(resets ? 0.0f : whole[h] * through[h]);
                    float neighbour = __shfl_xor_sync(~0u, sum_out, 1), others = __shfl_xor_sync(~0u, sum_out + neighbour, 2);
                    float earlier = (q & 1 ? neighbour : 0.0f) + (q & 2 ? others : 0.0f);
#pragma unroll
                    for (int i = 3; i >= 0; i--) sum_in += in[i], in[i] = sum_in;
                    neighbour = __shfl_xor_sync(~0u, sum_in, 1), others = __shfl_xor_sync(~0u, sum_in + neighbour, 2);
                    float later = (q & 1 ? 0.0f : neighbour) + (q & 2 ? 0.0f : others);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        F.v[h][i] += earlier + later + in[i] + carried;
                        if (resets >> (4 * q + i) & 1) F.v[h][i] = 0.0f;
                    }
                }
            }
            {
                Right<2, 2> sent_turned = turned(sent, scratch), received_turned = turned(received, scratch);
                take_back(dB, own.sums[0]);
                multiply(dB, sent_turned, turned<NT>(own.costates));
                set_aside(own.sums[0], dB);
                take_back(dC, own.sums[1]);
                multiply(dC, received_turned, turned<NT>(own.states));
                set_aside(own.sums[1], dC);
                if (!walks) multiply(G, received_turned, sent_turned);
            }

            float2 D = of_rows(shared.rows.D, tile), A = of_rows(shared.rows.A, tile), bias = of_rows(shared.rows.bias, tile);
            float4 four = *(const float4*)(own.diagonal + 4 * q);
            float diagonal[4] = {four.x, four.y, four.z, four.w};
            own_u.read(inputs[0], places), own_delta.read(inputs[1], places), own_dy.read(inputs[2], places);  // again, so that no registers keep them
            if (BUFFERS == 1) fetch_next(tile);
            u.each([&](float& v, int h, int i) { v = own_u.get(h, i); });
            load_gradient(dout, block, own_dy, own_z, start);
            int valid = block.end - start - 4 * q;
            if (block.end - start < CHUNK)
                u.each([&](float& v, int h, int i) {
                    if (i >= valid) v = F.v[h][i] = 0.0f;
                });
            float sums[2][3];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                sums[h][0] = sums[h][1] = sums[h][2] = 0.0f;
                float skip = h ? D.y : D.x, rate = h ? A.y : A.x, shift = h ? bias.y : bias.x;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float g_out = dout.v[h][i], value = u.v[h][i], step = steps.step.v[h][i];
                    float inflow = fmaf(diagonal[i], g_out, dx.v[h][i]), flow = F.v[h][i];
#if GATED
                    float ungated = fmaf(skip, value, fmaf(diagonal[i], steps.x.v[h][i], y.v[h][i])), gate = own_z.get(h, i), part_of_gate = sigmoid(gate);
                    y.v[h][i] = own_dy.get(h, i) * ungated * part_of_gate * (1.0f + gate * (1.0f - part_of_gate));
#endif
                    float dstep = fmaf(value, inflow, rate * flow);
                    if (p.softplus) dstep *= sigmoid(own_delta.get(h, i) + shift);
                    sums[h][0] = fmaf(step, flow, sums[h][0]);
                    sums[h][1] = fmaf(g_out, value, sums[h][1]);
                    dx.v[h][i] = fmaf(step, inflow, skip * g_out);
                    F.v[h][i] = dstep;
                }
            }
            if (block.end - start < CHUNK)
                F.each([&](float& v, int h, int i) {
                    if (i >= valid) v = dx.v[h][i] = y.v[h][i] = 0.0f;
                });
            F.each([&](float& v, int h, int i) { sums[h][2] += v; });
            view_du.store(dx, block, tile, start, pieces, places), view_du.advance(ways);
            view_ddelta.store(F, block, tile, start, pieces + TILE_WORDS, places), view_ddelta.advance(ways);
#if GATED
            view_dz.store(y, block, tile, start, pieces + 2 * TILE_WORDS, places), view_dz.advance(ways);
#endif
#pragma unroll
            for (int which = 0; which < 3; which++) {  // lanes with odd q take the second channel
                float sum = (q & 1 ? sums[1][which] : sums[0][which]) + __shfl_xor_sync(~0u, q & 1 ? sums[0][which] : sums[1][which], 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (q < 2) shared.tiles[tile].sums[which][warp][2 * g + q] += sum;
            }
        }

        // dC_t += sum_{s <= t} G_ts B_s, dB_s += sum_{t >= s} G_ts C_t.
        G.each([&](float& v, int h, int i) {
            v = 4 * q + i <= column<2>(g, h) ? operand(v) : 0.0f;
        });
        take_back(dB, own.sums[0]), take_back(dC, own.sums[1]);
        multiply(dC, G, by_token<NT>(own.B, STATE_PITCH));
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; h++) *(float4*)(scratch + column<2>(g, h) * MATRIX_PITCH + 4 * q) = make_float4(G.v[h][0], G.v[h][1], G.v[h][2], G.v[h][3]);
        __syncwarp();
        G.each([&](float& v, int h, int i) { v = scratch[(4 * q + i) * MATRIX_PITCH + column<2>(g, h)]; });
        multiply(dB, G, by_token<NT>(own.C, STATE_PITCH));
        if (block.stop - start < CHUNK) {
            dB.each([&](float& v, int h, int i) { v = column<2>(g, h) < block.stop - start ? v : 0.0f; });
            dC.each([&](float& v, int h, int i) { v = column<2>(g, h) < block.stop - start ? v : 0.0f; });
        }
        // A warp waits for the same warp of the block before: last, so that it waits for sums alone, not for work.
        unsigned* flag = flags + span / SPAN * WARPS;
        if (chained) {
            if (lane == 0) await_flag(flag, chained);
            __syncwarp();
        }
        float *part_B = part + (i64)start * STATE, *part_C = part_B + p.length * STATE;
        int tokens = (int)p.length - start;
        if (chained) add_part(dB, part_B, tokens), add_part(dC, part_C, tokens);
        store_part(dB, part_B, tokens), store_part(dC, part_C, tokens);
        if (p.chain > 1) {
            __syncwarp();
            if (lane == 0) write_flag(flag, chained + 1);
        }
    }
    if (block.segment == 0) end_states([&](int tile) { return shared.tiles[tile].carry; }, p, block, p.dfirst);
    __syncthreads();
    i64 at = ((i64)block.batch * p.segments + block.segment) * p.channels + block.channel;
    for (int i = threadIdx.x; i < 3 * block.rows; i += THREADS) {
        int which = i / block.rows, row = i % block.rows;
        i64 target = which == 0 ? p.dA : which == 1 ? p.dD : p.dbias;
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += shared.tiles[row / ROWS].sums[which][w][place_of(row % ROWS)];
        if (target) ((float*)target)[at + row] = sum;
    }
}
