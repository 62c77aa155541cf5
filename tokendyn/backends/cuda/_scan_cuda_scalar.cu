// Selective scan for scalar A, N <= 32: products on tensor cores over chunks of 16 tokens.
//
// With q_t the sum of -A step_k log2 e over a chunk's tokens k <= t, and x = step u,
//
//     y_t = sum_{s <= t} 2^(q_s - q_t) (C_t . B_s) x_s + 2^-q_t (C_t . h_start)
//
// C_t . B_s is one matrix M for all channels of a group, and the weight factors: x_s 2^q_s goes in, the result is times
// 2^-q_t. Where these could leave float32's range (q beyond LIMIT in some channel), where a state grows, or a packed
// sequence begins inside the chunk, or something is not finite, the warp walks through the chunk token by token, with the
// weights themselves (`Walk`): right for any decay, several times as slow.
//
// A block owns up to MOST_TILES tiles of 16 channels of one batch entry and takes SPAN = 16 x WARPS tokens at a time, 16 a
// warp, for one tile after the other: M, B and C of a warp's tokens serve all tiles, and dB and dC are summed over the
// tiles in registers. For each tile the warps' states are joined in shared memory, between two barriers. States are kept
// before every SPAN for the backward pass. Where batch and channels do not fill the GPU, sequences are cut into segments
// (`segment_ends`, `join_segments`, `outputs`; `segment_coends`, `join_segments`, `gradients`).
//
// See `_scan_cuda_tiles.cu` for how tiles lie in lanes, `_scan_cuda_scalar_backward.cu` for the gradients.

#define SPAN (CHUNK * WARPS)
#define MOST_TILES 6
#define LIMIT (ELEMENT == 0 ? 32.0f : 60.0f)
#define SQUARE (CHUNK * CHUNK)

// What a block knows of its channels.
struct Rows {
    float bias[MOST_TILES * ROWS], rate[MOST_TILES * ROWS], A[MOST_TILES * ROWS], D[MOST_TILES * ROWS];
};
__device__ __forceinline__ void load_rows(Rows& rows, const Args& p, const Block& block) {
    for (int row = threadIdx.x; row < MOST_TILES * ROWS; row += THREADS) {
        int channel = row / ROWS * ROWS + channel_at(row % ROWS);
        bool exists = channel < block.rows;
        i64 at = block.channel + channel;
        rows.bias[row] = exists && p.bias ? ((const float*)p.bias)[at] : 0.0f;
        rows.A[row] = exists ? ((const float*)p.A)[at] : 0.0f;
        rows.rate[row] = 0.0f - rows.A[row] * LOG2E;  // not -0 where there is no channel: a sign is growth, through which warps walk
        rows.D[row] = exists && p.D ? ((const float*)p.D)[at] : 0.0f;
    }
}

// Which of a warp's tokens begin a packed sequence, as bits.
__device__ __forceinline__ unsigned find_resets(const Args& p, const Block& block, int start) {
#if PACKED
    int t = threadIdx.x % 32;
    return __ballot_sync(~0u, t < CHUNK && begins(p, block.batch, start + t, block.stop));
#else
    return 0;
#endif
}
// Whether token s is of the same packed sequence as token t >= s.
__device__ __forceinline__ bool together(unsigned resets, int s, int t) { return (resets >> (s + 1) & ((1u << (t - s)) - 1)) == 0; }

// B's tokens that reach the chunk's end, or C's that its start reaches: the others' factors are 0, which what is not a number
// would get past.
template <bool TO_END>
__device__ __forceinline__ Right<2, NT> only_together(Right<2, NT> by_token, unsigned resets) {
#if PACKED
    int q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (!(TO_END ? together(resets, 4 * q + i, CHUNK - 1) : together(resets, -1, 4 * q + i)))
#pragma unroll
            for (int j = 0; j < NT; j++) by_token.v[i / 2][j][i % 2] = 0.0f;
#endif
    return by_token;
}

__device__ __forceinline__ float add_over_quad(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// The steps of a lane's tokens, the inflow x = step u, and the decay exponents; 0 outside the sequence.
struct Steps {
    Tokens step, x, s;
    float total[2];  // exponents over the chunk
    Tokens q;        // and from its first token on
    __device__ __forceinline__ Steps(const Args& p, const Block& block, const Rows& rows, const Eight& raw, Tokens& u, int tile, int start) {
        int g = threadIdx.x % 32 / 4, lane_q = threadIdx.x % 4, valid = block.end - start - 4 * lane_q;
        float2 bias = *(const float2*)(rows.bias + tile * ROWS + 2 * g), rate = *(const float2*)(rows.rate + tile * ROWS + 2 * g);
        step.each([&](float& v, int h, int i) { v = raw.get(h, i) + (h ? bias.y : bias.x); });
        if (p.softplus) step.each([&](float& v, int h, int i) { v = softplus(v); });
        if (block.end - start < CHUNK)
            step.each([&](float& v, int h, int i) {
                if (i >= valid) v = 0.0f, u.v[h][i] = 0.0f;
            });
        x.each([&](float& v, int h, int i) { v = step.v[h][i] * u.v[h][i]; });
        s.each([&](float& v, int h, int i) { v = step.v[h][i] * (h ? rate.y : rate.x); });
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = q.v[h][0] = s.v[h][0];
#pragma unroll
            for (int i = 1; i < 4; i++) q.v[h][i] = sum = sum + s.v[h][i];
            float neighbour = __shfl_xor_sync(~0u, sum, 1), pair = sum + neighbour, others = __shfl_xor_sync(~0u, pair, 2);
            total[h] = pair + others;
            float before = (lane_q & 1 ? neighbour : 0.0f) + (lane_q & 2 ? others : 0.0f);
#pragma unroll
            for (int i = 0; i < 4; i++) q.v[h][i] += before;
        }
    }
    // Whether factors 2^q and 2^-q will do in this lane.
    __device__ __forceinline__ bool tame(float sum) const {
        unsigned signs = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) signs |= __float_as_uint(s.v[i / 4][i % 4]);
        return total[0] <= LIMIT && total[1] <= LIMIT && fabsf(sum) < 1e37f && (int)signs >= 0;
    }
};

__device__ __forceinline__ float sum_of(const Tokens& x) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x.v[i / 4][i % 4];
    return sum;
}

// A chunk token by token: every pair of tokens s <= t of one sequence with the product of the decays at s + 1, ..., t.
struct Walk {
    Tokens from_start, to_end;  // weights from the state before the chunk and to the state after it; 0 where cut off
    float whole[2];             // decay across the chunk
    Tokens crossing;            // F (see `gradients`) of what flows inside the chunk
    // M: s x t in shared memory, MATRIX_PITCH floats a row. In `scratch`, afterwards: y and dx, sums over pairs s < t of the chunk
    // (forward: y alone, s <= t). `douts` is more space. G gets the sums over channels of dy_t x_s times the weight.
    template <bool GRADIENTS>
    __device__ __forceinline__ void run(const Tokens& s, const Tokens& x, const Tokens& dy, const float* M, unsigned resets, float* scratch, float* douts, Tokens& G) {
        int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
        float *decays = scratch, *weighted = scratch + SQUARE;
        Tokens y, dx, &weight = to_end;
        y.each([&](float& v, int h, int i) { v = ex2(-s.v[h][i]); });
        __syncwarp();
        y.write(decays, CHUNK);
        if (GRADIENTS) dy.write(douts, CHUNK);
        __syncwarp();
        weight.clear(), y.clear(), dx.clear(), crossing.clear(), from_start.clear();
        whole[0] = whole[1] = 1.0f;
#pragma unroll 1
        for (int t = 0; t < CHUNK; t++) {
            unsigned begun = resets & ((2u << t) - 1);
            int begin = begun ? 31 - __clz(begun) : 0;  // of t's sequence
            float m[4], sum_G = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) m[i] = M[(4 * q + i) * MATRIX_PITCH + t];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float d = decays[(g + 8 * h) * CHUNK + t], dout = GRADIENTS ? douts[(g + 8 * h) * CHUNK + t] : 0.0f;
                float before[4], share[4], sum = 0.0f;
                whole[h] *= d;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int source = 4 * q + i;
                    bool in = source >= begin && source <= t, pair = in && (!GRADIENTS || source < t);
                    weight.v[h][i] = !in ? 0.0f : source < t ? weight.v[h][i] * d : 1.0f;
                    share[i] = in ? weight.v[h][i] * x.v[h][i] : 0.0f;
                    before[i] = sum;
                    sum += pair ? share[i] * m[i] : 0.0f;
                    if (GRADIENTS && pair) dx.v[h][i] += weight.v[h][i] * dout * m[i];
                    if (source == t) from_start.v[h][i] = begun ? 0.0f : whole[h];
                }
                float neighbour = __shfl_xor_sync(~0u, sum, 1), two = sum + neighbour, others = __shfl_xor_sync(~0u, two, 2);
                float lower = (q & 1 ? neighbour : 0.0f) + (q & 2 ? others : 0.0f);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (4 * q + i == t) y.v[h][i] = two + others;
                    if (GRADIENTS && 4 * q + i <= t && 4 * q + i > begin) crossing.v[h][i] += dout * (lower + before[i]);
                }
                if (GRADIENTS) *(float4*)(weighted + (g + 8 * h) * CHUNK + 4 * q) = make_float4(share[0], share[1], share[2], share[3]);
            }
            if (!GRADIENTS) continue;
            __syncwarp();
            if (lane % CHUNK <= t)
                for (int row = lane / CHUNK; row < ROWS; row += 2) sum_G += douts[row * CHUNK + t] * weighted[row * CHUNK + lane % CHUNK];
            sum_G += __shfl_xor_sync(~0u, sum_G, 16);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float value = __shfl_sync(~0u, sum_G, 4 * q + i);
                if (column<2>(g, 0) == t) G.v[0][i] += value;
                if (column<2>(g, 1) == t) G.v[1][i] += value;
            }
            __syncwarp();
        }
        __syncwarp();
        y.write(scratch, CHUNK);
        if (GRADIENTS) dx.write(scratch + SQUARE, CHUNK);
    }
};

// Loads two values of a lane's rows.
__device__ __forceinline__ float2 of_rows(const float* array, int tile) {
    return *(const float2*)(array + tile * ROWS + threadIdx.x % 32 / 4 * 2);
}

#define COPIES (ELEMENT == 0 || PIECES)  // whether the next tile's inputs come by way of shared memory: in float32 registers are scarce
#define FORWARD_SCRATCH (STATE * MATRIX_PITCH > SQUARE ? STATE * MATRIX_PITCH : SQUARE)
struct ForwardShared {
    struct {
        float states[ENTRIES], scratch[FORWARD_SCRATCH], M[CHUNK * MATRIX_PITCH];
        unsigned inputs[2][2][32 * 8];  // u and delta of a tile, and of the one that is on its way; PIECES leave half of each free
    } of[WARPS];  // each warp's own; states are joined by all threads
    float carry[MOST_TILES][ENTRIES], across[MOST_TILES][ENTRIES];
    float decays[ROWS][WARPS];
    Rows rows;
    Ways ways;
};
static_assert(sizeof(ForwardShared) == FORWARD_BYTES, "the launch must know how much shared memory to ask for");

// Joins the states of a tile's chunks, PITCH floats apart: every slot gets the state before its chunk (backwards: after it),
// with OPERANDS as a number that products see, backwards times the chunk's scale. The decay across a chunk is negative where
// a packed sequence begins in it.
template <bool BACKWARDS, bool OPERANDS, int PITCH>
__device__ __forceinline__ float join_chunks(float* states, const float (&decays)[ROWS][WARPS], const float (&scales)[ROWS][WARPS], int entry, float h, float* across) {
    float over[WARPS], scale[WARPS];
#pragma unroll
    for (int warp = 0; warp < WARPS; warp += 4) {
        float4 four = *(const float4*)&decays[entry / STATE][warp];
        over[warp] = four.x, over[warp + 1] = four.y, over[warp + 2] = four.z, over[warp + 3] = four.w;
        four = *(const float4*)&scales[entry / STATE][warp];
        scale[warp] = four.x, scale[warp + 1] = four.y, scale[warp + 2] = four.z, scale[warp + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        int warp = BACKWARDS ? WARPS - 1 - i : i;
        float local = states[warp * PITCH + entry], decay = over[warp];
        states[warp * PITCH + entry] = !OPERANDS ? h : exact_operand(BACKWARDS ? h * scale[warp] : h);
#if PACKED
        h = decay < 0.0f ? local : fmaf(decay, h, local);
        if (across) *across = decay < 0.0f || *across < 0.0f ? -1.0f : *across * decay;
#else
        h = fmaf(decay, h, local);
        if (across) *across *= decay;
#endif
    }
    return h;
}

// The states that a segment's blocks begin with: what another segment has left, or the user's.
template <typename F>
__device__ __forceinline__ void begin_states(F carry, const Args& p, const Block& block, i64 given, int slot) {
    const float* slots = block.slot(p, p.slots, p.segments + 1, slot);
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; tile++)
#pragma unroll
        for (int k = 0; k < OWN_ENTRIES; k++) {
            Entry entry(k);
            const float* from = p.segments == 1 ? entry.given(p, block, given, tile) : entry.within(block, tile) ? slots + entry.offset(tile) : nullptr;
            if (entry.exists) carry(tile)[entry.number] = from ? *from : 0.0f;
        }
}
// A segment of which only the end and the decay across it are wanted.
__device__ __forceinline__ void begin_segment(float (&carry)[MOST_TILES][ENTRIES], float (&across)[MOST_TILES][ENTRIES], const Block& block) {
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; tile++)
        for (int entry = threadIdx.x; entry < ENTRIES; entry += THREADS) carry[tile][entry] = 0.0f, across[tile][entry] = 1.0f;
}
__device__ __forceinline__ void end_segment(const float (&carry)[MOST_TILES][ENTRIES], const float (&across)[MOST_TILES][ENTRIES], const Args& p, const Block& block) {
    float *ends = block.slot(p, p.ends, p.segments, block.segment), *decays = block.slot(p, p.decays, p.segments, block.segment);
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; tile++)
#pragma unroll
        for (int k = 0; k < OWN_ENTRIES; k++) {
            Entry entry(k);
            if (entry.within(block, tile)) ends[entry.offset(tile)] = carry[tile][entry.number], decays[entry.offset(tile)] = across[tile][entry.number];
        }
}
// Gives the user the states that blocks end with.
template <typename F>
__device__ __forceinline__ void end_states(F carry, const Args& p, const Block& block, i64 given) {
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; tile++)
#pragma unroll
        for (int k = 0; k < OWN_ENTRIES; k++) {
            Entry entry(k);
            float* to = entry.given(p, block, given, tile);
            if (to) *to = carry(tile)[entry.number];
        }
}

// The scan of a block's segment. With OUTPUTS: y, states before every SPAN and the last state, from the true first state.
// Without: the state at the segment's end from zero, and the decay across it.
template <bool OUTPUTS>
__device__ __forceinline__ void forward(const Args& p) {
    extern __shared__ float4 memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
    Block block(p, blockIdx.x);
    if (!OUTPUTS && block.segment == p.segments - 1) return;  // nothing follows it
    int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    auto& own = shared.of[warp];
    float* scratch = own.scratch;
    Places places;
    unsigned *pieces_y = own.inputs[0][0] + TILE_WORDS, *pieces_z = own.inputs[0][1] + TILE_WORDS;
    load_rows(shared.rows, p, block);
    if (OUTPUTS)
        begin_states([&](int tile) { return shared.carry[tile]; }, p, block, p.first_state, block.segment);
    else
        begin_segment(shared.carry, shared.across, block);
    VIEW(0, u, block.first, SPAN);
    VIEW(1, delta, block.first, SPAN);
    VIEW(2, z, block.first, SPAN);
    VIEW(3, y, block.first, SPAN);
    int start = block.first + warp * CHUNK;
    int buffer = 0;
    Eight next_u, next_delta;
    auto fetch = [&](int tile, int start) {
        if (COPIES)
            view_u.fetch(own.inputs[buffer][0], places, block, tile, start), view_delta.fetch(own.inputs[buffer][1], places, block, tile, start);
        else
            next_u = view_u.load(block, tile, start), next_delta = view_delta.load(block, tile, start);
    };
    fetch(0, start);
    Matrix B = MATRIX(B), C = MATRIX(C);
    B.load(p, block.first);
    if (OUTPUTS) C.load(p, block.first);
    __syncthreads();
    for (int span = block.first; span < block.last; span += SPAN, start += SPAN) {
        Right<2, NT> B_by_token, C_by_token;
        Right<NT, 2> B_by_n, C_by_n;
        Right<2, 2> M;  // s x t
        B.turn(B_by_token, B_by_n, scratch, block.stop - start);
        if (OUTPUTS) {
            C.turn(C_by_token, C_by_n, scratch, block.stop - start);
            Tokens products;
            products.clear();
            multiply<true>(products, C_by_n, B_by_n);
            products.each([&](float& v, int h, int i) { M.v[i / 2][h][i % 2] = 4 * q + i <= column<2>(g, h) ? operand(v) : 0.0f; });
        }
        unsigned resets = find_resets(p, block, start);
        B_by_token = only_together<true>(B_by_token, resets);
        Kept* kept = block.slot<Kept>(p, p.states, p.chunks, span / SPAN);
        if (span + SPAN < block.last) {
            B.load(p, span + SPAN);
            if (OUTPUTS) C.load(p, span + SPAN);
        }
        for (int tile = 0; tile < block.tiles; tile++) {
            const auto& inputs = own.inputs[buffer];
            Eight own_u = next_u, own_delta = next_delta, own_z;
            if (COPIES) {
                fetched();
                own_u.read(inputs[0], places), own_delta.read(inputs[1], places);
            }
            Tokens u;
            u.each([&](float& v, int h, int i) { v = own_u.get(h, i); });
            Steps steps(p, block, shared.rows, own_delta, u, tile, start);
            bool done = tile + 1 == block.tiles;
            const auto& ways = shared.ways.by[done];
            view_u.advance(ways), view_delta.advance(ways);
            if (!done || span + SPAN < block.last) {  // the next tile's loads are under way while this one is worked on
                int next_tile = done ? 0 : tile + 1, next_start = done ? start + SPAN : start;
                buffer ^= 1;
                fetch(next_tile, next_start);
            }
            if (OUTPUTS && p.z) own_z = view_z.load(block, tile, start), view_z.advance(ways);
            Tokens x, factor;
            x.each([&](float& v, int h, int i) { v = steps.x.v[h][i] * ex2(steps.q.v[h][i]); });
            bool walks = __any_sync(~0u, resets != 0 || !steps.tame(sum_of(x)));
            float scale[2], whole[2];
            if (!walks) {
                x.each([&](float& v, int h, int i) { v = operand(v), factor.v[h][i] = ex2(-steps.q.v[h][i]); });
#pragma unroll
                for (int h = 0; h < 2; h++) scale[h] = whole[h] = ex2(-steps.total[h]);
            } else {
                Walk walk;
#pragma unroll
                for (int i = 0; i < 8; i++) own.M[(4 * q + i % 4) * MATRIX_PITCH + column<2>(g, i / 4)] = M.v[i % 4 / 2][i / 4][i % 2];
                walk.run<false>(steps.s, steps.x, steps.x, own.M, resets, scratch, nullptr, factor);
                factor = walk.from_start;
                x.each([&](float& v, int h, int i) { v = together(resets, 4 * q + i, CHUNK - 1) ? operand(steps.x.v[h][i] * walk.to_end.v[h][i]) : 0.0f; });
#pragma unroll
                for (int h = 0; h < 2; h++) scale[h] = 1.0f, whole[h] = resets ? -1.0f : walk.whole[h];
            }
            State local;
            local.clear();
            multiply(local, x, B_by_token);
            local.each([&](float& v, int h, int i) { v *= scale[h]; });
            local.write(own.states, STATE);
            if (q == 0) shared.decays[g][warp] = whole[0], shared.decays[g + 8][warp] = whole[1];
            __syncthreads();
#pragma unroll
            for (int k = 0; k < OWN_ENTRIES; k++) {
                Entry entry(k);
                if (!entry.exists) break;
                float& carry = shared.carry[tile][entry.number];
                if (OUTPUTS && p.keep && entry.within(block, tile)) kept[entry.offset(tile)] = to_kept(carry);
                carry = join_chunks<false, false, sizeof(shared.of[0]) / 4>(shared.of[0].states, shared.decays, shared.decays, entry.number, carry, OUTPUTS ? nullptr : &shared.across[tile][entry.number]);
            }
            __syncthreads();
            if (!OUTPUTS) continue;
            State before;
            before.read(own.states, STATE);
            before.each([&](float& v, int h, int i) { v = operand(v); });
            Tokens out;
            out.clear();
            multiply(out, before, C_by_n);
            if (!walks) {
                multiply(out, x, M);
                out.each([&](float& v, int h, int i) { v *= factor.v[h][i]; });
            } else {
                Tokens inside;
                inside.read(scratch, CHUNK);
                out.each([&](float& v, int h, int i) { v = (together(resets, -1, 4 * q + i) ? v * factor.v[h][i] : 0.0f) + inside.v[h][i]; });
            }
            float2 D = of_rows(shared.rows.D, tile);
            if (COPIES && !PIECES) own_u.read(inputs[0], places);  // again, so that no registers keep it
            out.each([&](float& v, int h, int i) { v = fmaf(h ? D.y : D.x, COPIES ? own_u.get(h, i) : u.v[h][i], v); });
            if (p.z) {
                own_z.deal(pieces_z, places);
                out.each([&](float& v, int h, int i) { v *= own_z.get(h, i) * sigmoid(own_z.get(h, i)); });
            }
            if (block.stop - start < CHUNK)
                out.each([&](float& v, int h, int i) {
                    if (4 * q + i >= block.stop - start) v = 0.0f;
                });
            view_y.store(out, block, tile, start, pieces_y, places), view_y.advance(ways);
        }
    }
    if (!OUTPUTS)
        end_segment(shared.carry, shared.across, p, block);
    else if (block.last == p.length)
        end_states([&](int tile) { return shared.carry[tile]; }, p, block, p.last_state);
}

#define BLOCKS (STATE > 16 ? 1 : 512 / THREADS)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) outputs(const __grid_constant__ Args p) { forward<true>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) segment_ends(const __grid_constant__ Args p) { forward<false>(p); }
