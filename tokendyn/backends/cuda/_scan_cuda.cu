// Selective scan for any real A, N <= 32: a state of (channel, n) stays in one thread's registers from token to token.
//
// A block of 128 threads owns ROWS channels of one batch entry and walks over their tokens, STAGE at a time. A lane holds
// four n of one channel; QUADS lanes share a channel. In a warp, lane % 4 and the upper bits of lane / 4 number the
// channels, the QUADS values below them the fours of n: the operand layout of mma.m16n8k8, which adds dB and dC over
// channels. Where b and d do not fill the GPU, sequences are cut into segments that run side by side: `segment_ends`
// runs each from a zero state, `join_segments` passes the states on, and then `outputs` starts every segment from its
// true state (`segment_coends`, `join_segments`, `gradients` backward). The backward pass recomputes states from those
// kept every KEPT chunks. dB and dC are added over the blocks of a cluster in their shared memory, then over clusters in
// turn. Nothing is added atomically: the same input gives the same bits.
//
// Compiled at run time with the common text's options, QUADS 1, 2, 4, 8, KEPT, CLUSTER, how many blocks one has, WHOLE,
// whether it has all channels of a group, OWNER, how the elements of a stage are dealt to threads for loading: eight side
// by side along tokens, along channels, or SINGLE ones; RUN and MATRIX_RUN, of how many of eight tokens of an activation,
// and of B and C, a word can be made.

#define WARPS 4
#define ROWS (THREADS / QUADS)
#define STATE_PITCH (STATE + 4)
#define HALF (8 * QUADS)   // tokens of which every thread owns eight
#define CHUNK (2 * HALF)   // of which a block works on all gradients at a time
#define BETWEEN (KEPT * CHUNK)  // two states that are kept
#define TILE 8
#define SHIFT (2 * QUADS < 4 ? 4 : 2 * QUADS)
#define GROUPS (8 / QUADS)  // of four channels a warp
#define WARP_ROWS (4 * GROUPS)
#define TOKEN_RUNS 0
#define SINGLE 1
#define CHANNEL_RUNS 2
#define OWN_ROWS (OWNER == TOKEN_RUNS ? 1 : 8)
#define SUM_PITCH 36
#define FOURS (ELEMENT == 0 ? 2 : 1)  // words of 16 bytes in eight elements
#define SUMS (2 * TILE * SUM_PITCH)  // floats of a warp's sums of dB and dC over one tile

// Blocks of a cluster, side by side along the channels, read each other's shared memory.
#ifndef EMULATED
#define SHARED_MEMORY extern __shared__ float4 memory[]
#if CLUSTER > 1
#define IN_CLUSTERS __attribute__((cluster_dims(CLUSTER, 1, 1)))
__device__ __forceinline__ int cluster_rank() { return (int)(blockIdx.x % CLUSTER); }
// After __syncthreads: what the block did before is done for all that have waited for the cluster. One warp's release,
// which waits for what it has stored, speaks for the block.
__device__ __forceinline__ void cluster_arrive() {
    if (threadIdx.x < 32)
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    else
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// A word that the block of this rank has where this block has `p`.
template <typename T>
__device__ __forceinline__ T load_from(int rank, const T* p) {
    unsigned at = (unsigned)__cvta_generic_to_shared(p), word;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(at), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
    return *(T*)&word;
}
#else
#define IN_CLUSTERS
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <typename T>
__device__ __forceinline__ T load_from(int, const T* p) { return *p; }
#endif
#endif

// Adds the first token's dB and dC, and the second's, over the four lanes of every column (lane / 4): to d[0..1] and
// d[2..3] of the lanes whose tokens, 2 (lane % 4) and the next, `first` and `second` select by a 1 in that column.
__device__ __forceinline__ void add_over_channels(float (&d)[4], float dB0, float dC0, float dB1, float dC1, float first, float second) {
    mma(d[0], d[1], d[2], d[3], dB0, dC0, dB1, dC1, first, second);
}

// Eight elements of one thread.
struct Eight {
    unsigned words[4 * FOURS];
    __device__ __forceinline__ float operator[](int i) const {
#if ELEMENT == 0
        return __uint_as_float(words[i]);
#elif ELEMENT == 1
        return __uint_as_float(i & 1 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
#else
        return narrowed_bits_to_float(i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu);
#endif
    }
    __device__ __forceinline__ void set(int i, float x) {
#if ELEMENT == 0
        words[i] = __float_as_uint(x);
#else
        words[i / 2] = i & 1 ? (words[i / 2] & 0xffffu) | narrow(x) << 16 : narrow(x);
#endif
    }
    __device__ __forceinline__ element bits(int i) const {
#if ELEMENT == 0
        return __uint_as_float(words[i]);
#else
        return (element)(i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu);
#endif
    }
    __device__ __forceinline__ void set_bits(int i, element x) {
#if ELEMENT == 0
        words[i] = __float_as_uint(x);
#else
        words[i / 2] = i & 1 ? (words[i / 2] & 0xffffu) | (unsigned)x << 16 : (unsigned)x;
#endif
    }
};

// Which elements of HALF tokens a thread loads and stores.
__device__ __forceinline__ int own_row(int i) {
#if OWNER == TOKEN_RUNS
    return threadIdx.x / QUADS;
#elif OWNER == SINGLE
    return threadIdx.x / HALF + i * (THREADS / HALF);
#else
    return threadIdx.x % (ROWS / 8) * 8 + i;
#endif
}
__device__ __forceinline__ int own_token(int i) {
#if OWNER == TOKEN_RUNS
    return threadIdx.x % QUADS * 8 + i;
#elif OWNER == SINGLE
    return threadIdx.x % HALF;
#else
    return threadIdx.x / (ROWS / 8);
#endif
}

// Where token t of a row lies in a shared array of STAGE tokens: rotated so that eight rows never meet in a bank.
template <int STAGE>
__device__ __forceinline__ int place(int row, int t) {
    return row * (STAGE + 4) + ((t + SHIFT * (row >> 3)) & (STAGE - 1));
}

// Whether in 16 bits words are of four elements; then half of an eight may exist.
#define HALVES(run) (ELEMENT != 0 && (run) == 4)

// Eight elements `stride` apart, as words where they lie so; 0 from the `count`-th on.
template <int WORD>
__device__ __forceinline__ Eight load_eight(const element* from, i64 stride, bool side_by_side, int count) {
    Eight got;
    if (side_by_side && (count >= 8 || (HALVES(WORD) && count == 4))) {
        if (HALVES(WORD)) {
            uint2 v = ((const uint2*)from)[0], w = make_uint2(0u, 0u);
            if (count >= 8) w = ((const uint2*)from)[1];
            got.words[0] = v.x, got.words[1] = v.y, got.words[2] = w.x, got.words[3] = w.y;
        } else {
#pragma unroll
            for (int k = 0; k < FOURS; k++) {
                uint4 v = ((const uint4*)from)[k];
                got.words[4 * k] = v.x, got.words[4 * k + 1] = v.y, got.words[4 * k + 2] = v.z, got.words[4 * k + 3] = v.w;
            }
        }
    } else {
        element single[8];
#pragma unroll
        for (int i = 0; i < 8; i++) single[i] = i < count ? from[i * stride] : (element)0;
#pragma unroll
        for (int i = 0; i < 8; i++) got.set_bits(i, single[i]);
    }
    return got;
}

// A (b, d, L) array as a thread of a block sees it: where its first own element lies, and how far the others are apart.
struct View {
    element* first;
    i64 token, step;
    bool runs;
    __device__ __forceinline__ View(i64 base, i64 batch_stride, i64 row_stride, i64 token_stride, i64 runs_, int batch, i64 channel)
        : token(token_stride), runs(OWNER != SINGLE && runs_ != 0) {
        first = (element*)base + batch * batch_stride + (channel + own_row(0)) * row_stride + own_token(0) * token_stride;
        step = OWNER == TOKEN_RUNS ? token_stride : OWNER == SINGLE ? THREADS / HALF * row_stride : row_stride;
    }
    // How many of the thread's elements exist in the HALF tokens from `start` on.
    __device__ __forceinline__ static int count(int start, int rows, int length) {
        int rows_left = rows - own_row(0), left = length - start - own_token(0);
#if OWNER == TOKEN_RUNS
        return rows_left > 0 ? left : 0;
#elif OWNER == SINGLE
        return left > 0 ? (rows_left + THREADS / HALF - 1) / (THREADS / HALF) : 0;
#else
        return left > 0 ? rows_left : 0;
#endif
    }
    __device__ __forceinline__ Eight load(int start, int rows, int length) const {
        return load_eight<RUN>(first + start * token, step, runs, count(start, rows, length));
    }
    __device__ __forceinline__ void store(const Eight& values, int start, int rows, int length) const {
        element* to = first + start * token;
        int existing = count(start, rows, length);
        if (runs && (existing >= 8 || (HALVES(RUN) && existing == 4))) {
            if (HALVES(RUN)) {
                ((uint2*)to)[0] = make_uint2(values.words[0], values.words[1]);
                if (existing >= 8) ((uint2*)to)[1] = make_uint2(values.words[2], values.words[3]);
            } else {
#pragma unroll
                for (int k = 0; k < FOURS; k++)
                    ((uint4*)to)[k] = make_uint4(values.words[4 * k], values.words[4 * k + 1], values.words[4 * k + 2], values.words[4 * k + 3]);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i < existing) to[i * step] = values.bits(i);
        }
    }
};
#define VIEW(name) View(p.name, p.name##_b, p.name##_d, p.name##_l, p.name##_runs, block.batch, block.channel)

// What a block works on.
struct Block {
    int batch, group, tile, segment, rows, first, last;
    i64 channel;
    int stop;  // the sequence's length
    __device__ __forceinline__ Block(const Args& p, int index) {
        tile = index % (int)p.tiles, index /= (int)p.tiles;
        segment = index % (int)p.segments, index /= (int)p.segments;
        group = index % (int)p.groups, batch = index / (int)p.groups;
        channel = group * p.group_size + (i64)tile * ROWS;
        rows = min((int)p.group_size - tile * ROWS, ROWS);
        first = segment * (int)p.segment_tokens;
        last = min(first + (int)p.segment_tokens, (int)p.length);
        stop = p.lengths ? (int)((const i64*)p.lengths)[batch] : (int)p.length;
    }
};

// The part of a channel's state that a lane holds.
struct Lane {
    int row, n;
    bool exists;
    bool idle;  // the whole warp: it only takes part in what the block does together
    __device__ __forceinline__ explicit Lane(const Block& block) {
        int lane = threadIdx.x % 32, column = lane / 4;
        row = threadIdx.x / 32 * WARP_ROWS + column / QUADS * 4 + lane % 4;
        n = column % QUADS * 4;
        exists = row < block.rows;
        idle = uniform(threadIdx.x / 32) * WARP_ROWS >= block.rows;
    }
    // Offset of this lane's four n in an array (b, slots, d, STATE).
    __device__ __forceinline__ i64 slot(const Args& p, const Block& block, i64 slots, i64 index) const {
        return ((block.batch * slots + index) * p.channels + block.channel + row) * STATE + n;
    }
};

// What every thread of a block shares about its channels.
struct Rows {
    float bias[ROWS], D[ROWS];
};

__device__ __forceinline__ void load_rows(Rows& rows, const Args& p, const Block& block) {
    if (threadIdx.x < ROWS) {
        bool exists = threadIdx.x < block.rows;
        i64 at = block.channel + threadIdx.x;
        rows.bias[threadIdx.x] = exists && p.bias ? ((const float*)p.bias)[at] : 0.0f;
        rows.D[threadIdx.x] = exists && p.D ? ((const float*)p.D)[at] : 0.0f;
    }
}

// Four rates A of a lane, times log2 e if `scaled`; 0 where there is no channel or no such n.
__device__ __forceinline__ void load_rates(float (&A)[4], const Args& p, const Block& block, const Lane& lane, float scale) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        bool exists = lane.exists && lane.n + j < p.state;
        i64 at = (block.channel + lane.row) * p.state + lane.n + j;
        A[j] = exists ? ((const float*)p.A)[at] * scale : 0.0f;
    }
}

__device__ __forceinline__ void load_state(float (&h)[4], const float* from, const Lane& lane) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (lane.exists) v = *(const float4*)from;
    h[0] = v.x, h[1] = v.y, h[2] = v.z, h[3] = v.w;
}
__device__ __forceinline__ void store_state(float* to, const float (&h)[4], const Lane& lane) {
    if (lane.exists) *(float4*)to = make_float4(h[0], h[1], h[2], h[3]);
}

// A user's (b, d, N) array, read or 0; written where there is such a channel and n.
__device__ __forceinline__ void load_given_state(float (&h)[4], i64 from, const Args& p, const Block& block, const Lane& lane) {
    i64 at = ((i64)block.batch * p.channels + block.channel + lane.row) * p.state + lane.n;
#pragma unroll
    for (int j = 0; j < 4; j++) h[j] = from && lane.exists && lane.n + j < p.state ? ((const float*)from)[at + j] : 0.0f;
}
__device__ __forceinline__ void store_given_state(i64 to, const float (&h)[4], const Args& p, const Block& block, const Lane& lane) {
    i64 at = ((i64)block.batch * p.channels + block.channel + lane.row) * p.state + lane.n;
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (lane.exists && lane.n + j < p.state) ((float*)to)[at + j] = h[j];
}

// B and C of STAGE tokens: each thread's runs of eight tokens of one n, and where they go in shared memory as (STAGE,
// STATE) float32, 0 outside the sequence and beyond N.
template <int STAGE, bool WITH_B, bool WITH_C>
struct Matrices {
    static constexpr int runs = STATE * STAGE / 8, count = ((WITH_B + WITH_C) * runs + THREADS - 1) / THREADS;
    Eight own[count];

    __device__ __forceinline__ void load(const Args& p, const Block& block, int start) {
#pragma unroll
        for (int i = 0; i < count; i++) {
            int index = threadIdx.x + i * THREADS, n = index % STATE, t = start + index / STATE % (STAGE / 8) * 8;
            bool is_C = WITH_C && (!WITH_B || index >= runs);
            i64 base = is_C ? p.C : p.B, stride_b = is_C ? p.C_b : p.B_b, stride_g = is_C ? p.C_g : p.B_g;
            i64 stride_n = is_C ? p.C_n : p.B_n, stride_l = is_C ? p.C_l : p.B_l;
            const element* from = (const element*)base + block.batch * stride_b + block.group * stride_g + n * stride_n + t * stride_l;
            bool needed = n < p.state && index < (WITH_B + WITH_C) * runs;
            own[i] = load_eight<MATRIX_RUN>(from, stride_l, p.matrix_runs, needed ? (int)p.length - t : 0);
        }
    }
    __device__ __forceinline__ void deal(float* B, float* C, const Block& block, int start) const {
#pragma unroll
        for (int i = 0; i < count; i++) {
            int index = threadIdx.x + i * THREADS, n = index % STATE, t = index / STATE % (STAGE / 8) * 8;
            if (index >= (WITH_B + WITH_C) * runs) break;
            float* to = (WITH_C && (!WITH_B || index >= runs) ? C : B) + t * STATE_PITCH + n;
            int inside = block.stop - start - t;
#pragma unroll
            for (int k = 0; k < 8; k++) to[k * STATE_PITCH] = k < inside ? own[i][k] : 0.0f;
        }
    }
};

// Marks the tokens of a stage at which a packed sequence begins and the state is reset.
__device__ __forceinline__ void load_resets(int* resets, const Args& p, const Block& block, int start, int stage) {
#if PACKED
    if (threadIdx.x < stage) resets[threadIdx.x] = begins(p, block.batch, start + threadIdx.x, block.stop);
#endif
}

// Whether a thread's i-th element from `start` on is a token of the sequence.
__device__ __forceinline__ bool counts(const Block& block, int start, int i) {
    return start + own_token(i) < min(block.stop, block.last) && own_row(i) < block.rows;
}

// Puts HALF tokens of a shared array, from the `half`-th on, from the threads that own them.
template <int STAGE, typename F>
__device__ __forceinline__ void deal(float* to, int half, F value) {
#if OWNER == TOKEN_RUNS
#pragma unroll
    for (int i = 0; i < 8; i += 4)
        *(float4*)(to + place<STAGE>(own_row(i), half * HALF + own_token(i))) = make_float4(value(i), value(i + 1), value(i + 2), value(i + 3));
#else
#pragma unroll
    for (int i = 0; i < 8; i++) to[place<STAGE>(own_row(i), half * HALF + own_token(i))] = value(i);
#endif
}

// Step sizes and inflows delta u.
template <int STAGE>
__device__ __forceinline__ void deal_inflow(float* steps, float* inflow, const Rows& rows, const Args& p, const Block& block,
                                            const Eight& u, const Eight& raw, int start, int half) {
    float step[8];
    start += half * HALF;
#pragma unroll
    for (int i = 0; i < 8; i++) step[i] = counts(block, start, i) ? step_size(p, raw[i] + rows.bias[own_row(i)]) : 0.0f;
    if (inflow) deal<STAGE>(inflow, half, [&](int i) { return counts(block, start, i) ? step[i] * u[i] : 0.0f; });
    deal<STAGE>(steps, half, [&](int i) { return step[i]; });
}

// The gradient that reaches y before the gate; 0 outside the sequence.
template <int STAGE>
__device__ __forceinline__ void deal_gradient(float* to, const Block& block, const Eight& dy, const Eight& z, int start, int half) {
    deal<STAGE>(to, half, [&](int i) {
        float value = dy[i];
#if GATED
        value *= z[i] * sigmoid(z[i]);
#endif
        return counts(block, start + half * HALF, i) ? value : 0.0f;
    });
}

// Four neighbouring tokens of a lane's row.
template <int STAGE>
__device__ __forceinline__ void four(float (&got)[4], const float* array, const Lane& lane, int t) {
    float4 v = *(const float4*)(array + place<STAGE>(lane.row, t));
    got[0] = v.x, got[1] = v.y, got[2] = v.z, got[3] = v.w;
}
__device__ __forceinline__ void four_n(float (&got)[4], const float* matrix, const Lane& lane, int t) {
    float4 v = *(const float4*)(matrix + t * STATE_PITCH + lane.n);
    got[0] = v.x, got[1] = v.y, got[2] = v.z, got[3] = v.w;
}

// Adds four tokens' values over the lanes of a channel and writes each sum once, at `to[place(row, t + token)]`.
template <int STAGE>
__device__ __forceinline__ void add_over_lanes(float* to, const float (&v)[4], const Lane& lane, int t) {
    float* at = to + place<STAGE>(lane.row, t);
    int quad = threadIdx.x / 4 % QUADS;
#if QUADS == 1
    *(float4*)at = make_float4(v[0], v[1], v[2], v[3]);
#elif QUADS == 2
    bool upper = quad & 1;
    float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(~0u, upper ? v[0] : v[2], 4);
    float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(~0u, upper ? v[1] : v[3], 4);
    *(float2*)(at + 2 * quad) = make_float2(a, b);
#else
    bool upper = quad & 2, odd = quad & 1;
    float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(~0u, upper ? v[0] : v[2], 8);
    float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(~0u, upper ? v[1] : v[3], 8);
    float sum = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 4);
#if QUADS == 8
    sum += __shfl_xor_sync(~0u, sum, 16);
#endif
    at[quad & 3] = sum;
#endif
}

struct ForwardShared {
    float steps[ROWS * (HALF + 4)], inflow[ROWS * (HALF + 4)];
    float B[HALF * STATE_PITCH], C[HALF * STATE_PITCH];
    int resets[HALF];
    Rows rows;
};
static_assert(sizeof(ForwardShared) == FORWARD_BYTES, "the launch must know how much shared memory to ask for");

// The scan of a block's segment. With OUTPUTS: y, states every CHUNK tokens and the last state, from the true first
// state. Without: the state at the segment's end from zero, and the decay across it.
template <bool OUTPUTS>
__device__ __forceinline__ void forward(const Args& p) {
    extern __shared__ float4 memory[];
    ForwardShared& s = *(ForwardShared*)memory;
    Block block(p, blockIdx.x);
    if (!OUTPUTS && block.segment == p.segments - 1) return;  // nothing follows it
    Lane lane(block);
    load_rows(s.rows, p, block);
    float A[4], h[4] = {0.0f, 0.0f, 0.0f, 0.0f}, total = 0.0f;
    bool intact = true;
    load_rates(A, p, block, lane, LOG2E);
    if (OUTPUTS) {
        if (p.segments > 1)
            load_state(h, (const float*)p.slots + lane.slot(p, block, p.segments + 1, block.segment), lane);
        else
            load_given_state(h, p.first_state, p, block, lane);
    }
    View u = VIEW(u), delta = VIEW(delta), z = VIEW(z), y = VIEW(y);
    Eight own_u = u.load(block.first, block.rows, block.last), own_delta = delta.load(block.first, block.rows, block.last);
    Matrices<HALF, true, OUTPUTS> matrices;
    matrices.load(p, block, block.first);
    __syncthreads();
    for (int start = block.first; start < block.last; start += HALF) {
        if (OUTPUTS && p.keep && start % BETWEEN == 0)
            store_state((float*)p.states + lane.slot(p, block, p.chunks, start / BETWEEN), h, lane);
        deal_inflow<HALF>(s.steps, s.inflow, s.rows, p, block, own_u, own_delta, start, 0);
        matrices.deal(s.B, s.C, block, start);
        load_resets(s.resets, p, block, start, HALF);
        __syncthreads();
        Eight skipped = own_u, own_z;
        if (start + HALF < block.last) {  // the next tokens' loads are under way while these are worked on
            own_u = u.load(start + HALF, block.rows, block.last);
            own_delta = delta.load(start + HALF, block.rows, block.last);
            matrices.load(p, block, start + HALF);
        }
        if (OUTPUTS && p.z) own_z = z.load(start, block.rows, block.last);
#pragma unroll 2
        for (int t = 0; t < HALF && !lane.idle; t += 4) {
            float step[4], inflow[4], out[4];
            four<HALF>(step, s.steps, lane, t);
            four<HALF>(inflow, s.inflow, lane, t);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float B[4], C[4];
                four_n(B, s.B, lane, t + k);
                if (OUTPUTS) four_n(C, s.C, lane, t + k);
#if PACKED
                if (s.resets[t + k]) {
                    h[0] = h[1] = h[2] = h[3] = 0.0f;
                    intact = false;
                }
#endif
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    h[j] = fmaf(ex2(step[k] * A[j]), h[j], inflow[k] * B[j]);
                    if (OUTPUTS) out[k] = j ? fmaf(h[j], C[j], out[k]) : h[j] * C[j];
                }
                if (!OUTPUTS) total += step[k];
            }
            if (OUTPUTS) add_over_lanes<HALF>(s.inflow, out, lane, t);
        }
        __syncthreads();
        if (OUTPUTS) {
            Eight out;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float value = fmaf(s.rows.D[own_row(i)], skipped[i], s.inflow[place<HALF>(own_row(i), own_token(i))]);
                if (p.z) value *= own_z[i] * sigmoid(own_z[i]);
                out.set(i, start + own_token(i) < block.stop ? value : 0.0f);
            }
            y.store(out, start, block.rows, block.last);
        }
    }
    if (OUTPUTS) {
        if (p.last_state && block.last == p.length) store_given_state(p.last_state, h, p, block, lane);
    } else {
        i64 at = lane.slot(p, block, p.segments, block.segment);
        store_state((float*)p.ends + at, h, lane);
#pragma unroll
        for (int j = 0; j < 4; j++) h[j] = intact ? ex2(A[j] * total) : -1.0f;
        store_state((float*)p.decays + at, h, lane);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) outputs(const __grid_constant__ Args p) { forward<true>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 4) segment_ends(const __grid_constant__ Args p) { forward<false>(p); }

// Gradient of the state before a segment if that of the state after it were 0, and the decay across the segment.
extern "C" __global__ void __launch_bounds__(THREADS, 4) segment_coends(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    ForwardShared& s = *(ForwardShared*)memory;
    Block block(p, blockIdx.x);
    if (block.segment == 0) return;
    Lane lane(block);
    load_rows(s.rows, p, block);
    float A[4], e[4] = {0.0f, 0.0f, 0.0f, 0.0f}, total = 0.0f;
    bool intact = true;
    load_rates(A, p, block, lane, LOG2E);
    View dy = VIEW(dy), delta = VIEW(delta), z = VIEW(z);
    int start = block.first + (block.last - 1 - block.first) / HALF * HALF;
    Eight own_dy = dy.load(start, block.rows, block.last), own_delta = delta.load(start, block.rows, block.last), own_z = own_dy;
    Matrices<HALF, false, true> matrices;
    matrices.load(p, block, start);
    __syncthreads();
    for (; start >= block.first; start -= HALF) {
#if GATED
        own_z = z.load(start, block.rows, block.last);
#endif
        deal_inflow<HALF>(s.steps, nullptr, s.rows, p, block, own_dy, own_delta, start, 0);
        deal_gradient<HALF>(s.inflow, block, own_dy, own_z, start, 0);
        matrices.deal(s.B, s.C, block, start);
        load_resets(s.resets, p, block, start, HALF);
        __syncthreads();
        if (start > block.first) {
            own_dy = dy.load(start - HALF, block.rows, block.last);
            own_delta = delta.load(start - HALF, block.rows, block.last);
            matrices.load(p, block, start - HALF);
        }
#pragma unroll 2
        for (int t = HALF - 4; t >= 0; t -= 4) {
            float step[4], dout[4];
            four<HALF>(step, s.steps, lane, t);
            four<HALF>(dout, s.inflow, lane, t);
#pragma unroll
            for (int k = 3; k >= 0; k--) {
                float C[4];
                four_n(C, s.C, lane, t + k);
#pragma unroll
                for (int j = 0; j < 4; j++) e[j] = ex2(step[k] * A[j]) * fmaf(C[j], dout[k], e[j]);
                total += step[k];
#if PACKED
                if (s.resets[t + k]) {
                    e[0] = e[1] = e[2] = e[3] = 0.0f;
                    intact = false;
                }
#endif
            }
        }
        __syncthreads();
    }
    i64 at = lane.slot(p, block, p.segments, block.segment);
    store_state((float*)p.ends + at, e, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) e[j] = intact ? ex2(A[j] * total) : -1.0f;
    store_state((float*)p.decays + at, e, lane);
}

#define TOKENS (ROWS * (CHUNK + 4))
struct BackwardShared {
    float steps[TOKENS], inflow[TOKENS], dout[TOKENS];
#if GATED
    float ungated[TOKENS];
#endif
    float B[CHUNK * STATE_PITCH], C[CHUNK * STATE_PITCH];
    float4 starts[CHUNK / TILE * THREADS];  // every thread's state before every tile, then the tile's dB and dC
    float sums[2][WARPS * SUMS];
    int resets[CHUNK];
    Rows rows;
    int index;
};
static_assert(sizeof(BackwardShared) == BACKWARD_BYTES, "the launch must know how much shared memory to ask for");

// dB and dC of one tile over a block's channels are 2 x STATE x TILE sums, dealt to threads by number.
#define TILE_SUMS (2 * STATE * TILE)
__device__ __forceinline__ void add_warps(float* to, const float* sums) {
#pragma unroll
    for (int i = 0; i < TILE_SUMS; i += THREADS) {
        int index = i + threadIdx.x;
        if (index >= TILE_SUMS) break;
        int t = index % TILE, n = index / TILE % STATE, which = index / (TILE * STATE);
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++)
#pragma unroll
            for (int group = 0; group < GROUPS; group++)
                sum += sums[warp * SUMS + (which * TILE + t) * SUM_PITCH + group * STATE + n];
        to[index] = sum;
    }
}
// Adds a chunk's sums, over all blocks of the cluster, to `part`, or puts them there; WHOLE makes them dB and dC. Each
// block of a cluster does a share.
__device__ __forceinline__ void add_to_part(const float4* starts, const Args& p, const Block& block, float* part, bool put, int begin) {
    constexpr int all = CHUNK / TILE * TILE_SUMS, own = (all + CLUSTER * THREADS - 1) / (CLUSTER * THREADS);
#if WHOLE
    typedef element Out;
    i64 matrix = ((i64)block.batch * p.groups + block.group) * p.state * p.length;
#else
    typedef float Out;
#endif
    constexpr int at_once = own < 16 ? own : 16;  // more would not stay in registers
    for (int first = 0; first < own; first += at_once) {
        Out* to[at_once];
        float before[at_once], sums[at_once];
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            unsigned number = ((first + i) * CLUSTER + cluster_rank()) * THREADS + threadIdx.x;
            int index = number % TILE_SUMS, tile = number / TILE_SUMS;
            int t = begin + tile * TILE + index % TILE, n = index / TILE % STATE, which = index / (TILE * STATE);
            bool exists = tile < CHUNK / TILE && n < p.state && t < p.length;
#if WHOLE
            to[i] = exists ? (element*)(which ? p.dC : p.dB) + matrix + n * p.length + t : nullptr;
            before[i] = 0.0f;
#else
            to[i] = exists ? part + (which * p.state + n) * p.length + t : nullptr;
            before[i] = exists && !put ? __ldcg(to[i]) : 0.0f;  // all on their way before the first is needed
#endif
            sums[i] = 0.0f;
#pragma unroll
            for (int rank = 0; rank < CLUSTER; rank++) sums[i] += exists ? load_from(rank, (const float*)(starts + tile * THREADS) + index) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            if (!to[i]) continue;
#if WHOLE
            *to[i] = to_element(sums[i]);
#else
            *to[i] = before[i] + sums[i];
#endif
        }
    }
}

// The state after four more tokens of a chunk.
__device__ __forceinline__ void step_on(float (&h)[4], const BackwardShared& s, const Lane& lane, const float (&A)[4], int t) {
    float step[4], inflow[4];
    four<CHUNK>(step, s.steps, lane, t);
    four<CHUNK>(inflow, s.inflow, lane, t);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float B[4];
        four_n(B, s.B, lane, t + k);
#if PACKED
        if (s.resets[t + k]) h[0] = h[1] = h[2] = h[3] = 0.0f;
#endif
#pragma unroll
        for (int j = 0; j < 4; j++) h[j] = fmaf(ex2(step[k] * A[j]), h[j], inflow[k] * B[j]);
    }
}

// The states before chunks `first`, which is kept, to `last`.
__device__ __forceinline__ void states_behind(float4* starts, BackwardShared& s, const Args& p, const Block& block, const Lane& lane,
                                              const float (&A)[4], int first, int last) {
    float h[4];
    load_state(h, (const float*)p.states + lane.slot(p, block, p.chunks, first / KEPT), lane);
    View u = VIEW(u), delta = VIEW(delta);
    for (int chunk = first; chunk <= last; chunk++) {
        starts[chunk - first] = make_float4(h[0], h[1], h[2], h[3]);
        if (chunk == last) return;
        int begin = chunk * CHUNK;
        Matrices<CHUNK, true, false> matrix;
        matrix.load(p, block, begin);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int start = begin + half * HALF;
            Eight own_u = u.load(start, block.rows, block.last), own_delta = delta.load(start, block.rows, block.last);
            deal_inflow<CHUNK>(s.steps, s.inflow, s.rows, p, block, own_u, own_delta, begin, half);
        }
        matrix.deal(s.B, nullptr, block, begin);
        load_resets(s.resets, p, block, begin, CHUNK);
        __syncthreads();
        for (int t = 0; t < CHUNK && !lane.idle; t += 4) step_on(h, s, lane, A, t);
        __syncthreads();
    }
}

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 3) gradients(const __grid_constant__ Args p) {
    SHARED_MEMORY;
    BackwardShared& s = *(BackwardShared*)memory;
    int index = blockIdx.x;
    if (p.chain > 1) {  // clusters number themselves as they begin, so that one which waits for another knows that it runs
        if (threadIdx.x == 0 && cluster_rank() == 0) s.index = (int)atomicAdd((unsigned*)p.counters, 1u);
        __syncthreads(), cluster_arrive(), cluster_wait();
        index = load_from(0, &s.index) * CLUSTER + cluster_rank();
    }
    Block block(p, index);
    Lane lane(block);
    load_rows(s.rows, p, block);
    float A[4], e[4], dA[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float sum_D[OWN_ROWS], sum_bias[OWN_ROWS];
#pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) sum_D[i] = sum_bias[i] = 0.0f;
    load_rates(A, p, block, lane, LOG2E);
    if (p.segments > 1)
        load_state(e, (const float*)p.slots + lane.slot(p, block, p.segments + 1, block.segment + 1), lane);
    else
        load_given_state(e, p.last_gradient, p, block, lane);
    int chained = block.tile / CLUSTER % (int)p.chain;
    i64 part_index = ((i64)block.batch * p.groups + block.group) * p.parts + block.tile / CLUSTER / (int)p.chain;
    float* part = (float*)p.parts_out + part_index * 2 * p.state * p.length;
    unsigned* flags = (unsigned*)p.counters + 1 + part_index * p.chunks * KEPT * CLUSTER + cluster_rank();
    float selects[TILE];  // 1 where the lane's column is the token's number
#pragma unroll
    for (int k = 0; k < TILE; k++) selects[k] = threadIdx.x % 32 / 4 == k ? 1.0f : 0.0f;
    __syncthreads();

#if KEPT > 1
    float4 starts[KEPT];  // of the chunks behind a kept state; in local memory, being rarely used
#endif
    for (int chunk = (block.last - 1) / CHUNK; chunk >= block.first / CHUNK; chunk--) {
        int begin = chunk * CHUNK;
        float h[4];
#if KEPT > 1
        if (chunk % KEPT == KEPT - 1 || chunk == (block.last - 1) / CHUNK)
            states_behind(starts, s, p, block, lane, A, chunk / KEPT * KEPT, chunk);
        float4 start = starts[chunk % KEPT];
        h[0] = start.x, h[1] = start.y, h[2] = start.z, h[3] = start.w;
#else
        load_state(h, (const float*)p.states + lane.slot(p, block, p.chunks, chunk), lane);
#endif
        {
            View u = VIEW(u), delta = VIEW(delta), z = VIEW(z), dy = VIEW(dy);
            Eight own_u[2], own_delta[2], own_dy[2], own_z[2];
            Matrices<CHUNK, true, true> matrices;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int start = begin + half * HALF;
                own_u[half] = u.load(start, block.rows, block.last), own_delta[half] = delta.load(start, block.rows, block.last);
                own_dy[half] = dy.load(start, block.rows, block.last);
#if GATED
                own_z[half] = z.load(start, block.rows, block.last);
#endif
            }
            matrices.load(p, block, begin);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                deal_inflow<CHUNK>(s.steps, s.inflow, s.rows, p, block, own_u[half], own_delta[half], begin, half);
                deal_gradient<CHUNK>(s.dout, block, own_dy[half], own_z[half], begin, half);
            }
            matrices.deal(s.B, s.C, block, begin);
            load_resets(s.resets, p, block, begin, CHUNK);
        }
        __syncthreads();
        if (chunk < (block.last - 1) / CHUNK) cluster_wait();  // until the cluster has read this block's last sums

        for (int t = 0; t < CHUNK && !lane.idle; t += 4) {
            if (t % TILE == 0) s.starts[t / TILE * THREADS + threadIdx.x] = make_float4(h[0], h[1], h[2], h[3]);
            step_on(h, s, lane, A, t);
        }

        auto cut = [&](int t) { return PACKED && s.resets[t] != 0; };  // not a decay of 0, which what is not a number gets past
        for (int t = CHUNK - TILE; t >= 0; t -= TILE) {
            if (begin + t >= block.last) continue;  // the same in all threads
            float products[4][4];
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) products[j][k] = 0.0f;
            if (!lane.idle) {
                float4 v = s.starts[t / TILE * THREADS + threadIdx.x];
                float decay[TILE][4], before[TILE + 1][4];
                before[0][0] = v.x, before[0][1] = v.y, before[0][2] = v.z, before[0][3] = v.w;
#pragma unroll
                for (int first = 0; first < TILE; first += 4) {
                    float step[4], inflow[4];
                    four<CHUNK>(step, s.steps, lane, t + first);
                    four<CHUNK>(inflow, s.inflow, lane, t + first);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int k = first + i;
                        float B[4];
                        four_n(B, s.B, lane, t + k);
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            decay[k][j] = ex2(step[i] * A[j]);
                            before[k + 1][j] = cut(t + k) ? inflow[i] * B[j] : fmaf(decay[k][j], before[k][j], inflow[i] * B[j]);
                        }
                    }
                }
#pragma unroll
                for (int first = TILE - 4; first >= 0; first -= 4) {
                    float step[4], inflow[4], dout[4], dinflow[4], dstep[4], out[4], dB[2][4], dC[2][4];
                    four<CHUNK>(step, s.steps, lane, t + first);
                    four<CHUNK>(inflow, s.inflow, lane, t + first);
                    four<CHUNK>(dout, s.dout, lane, t + first);
#pragma unroll
                    for (int i = 3; i >= 0; i--) {
                        int k = first + i;
                        float B[4], C[4];
                        four_n(B, s.B, lane, t + k);
                        four_n(C, s.C, lane, t + k);
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float g = fmaf(C[j], dout[i], e[j]);
                            dinflow[i] = j ? fmaf(g, B[j], dinflow[i]) : g * B[j];
                            e[j] = cut(t + k) ? 0.0f : decay[k][j] * g;
                            float q = cut(t + k) ? 0.0f : e[j] * before[k][j];  // gradient of the decay, times it
                            dstep[i] = j ? fmaf(q, A[j], dstep[i]) : q * A[j];
                            dA[j] = fmaf(q, step[i], dA[j]);
#if GATED
                            out[i] = j ? fmaf(before[k + 1][j], C[j], out[i]) : before[k + 1][j] * C[j];
#endif
                            dB[i & 1][j] = g * inflow[i], dC[i & 1][j] = dout[i] * before[k + 1][j];
                        }
                        if (i % 2 == 0)
#pragma unroll
                            for (int j = 0; j < 4; j++) {
#if ELEMENT == 1
                                add_over_channels(products[j], dB[0][j], dC[0][j], dB[1][j], dC[1][j], selects[k], selects[k + 1]);
#else
                                // TF32 keeps the first half of a float32; the rest goes through in a second product.
                                float high[4] = {high_part(dB[0][j]), high_part(dC[0][j]), high_part(dB[1][j]), high_part(dC[1][j])};
                                add_over_channels(products[j], high[0], high[1], high[2], high[3], selects[k], selects[k + 1]);
                                add_over_channels(products[j], dB[0][j] - high[0], dC[0][j] - high[1], dB[1][j] - high[2],
                                                  dC[1][j] - high[3], selects[k], selects[k + 1]);
#endif
                            }
                    }
                    add_over_lanes<CHUNK>(s.inflow, dinflow, lane, t + first);
                    add_over_lanes<CHUNK>(s.dout, dstep, lane, t + first);
#if GATED
                    add_over_lanes<CHUNK>(s.ungated, out, lane, t + first);
#endif
                }
            }
            float* buffer = s.sums[t / TILE & 1];
            float* sums = buffer + threadIdx.x / 32 * SUMS + threadIdx.x % 4 * 2 * SUM_PITCH + threadIdx.x % 32 / 4 * 4;
#pragma unroll
            for (int k = 0; k < 4; k++)
                *(float4*)(sums + (k / 2 * TILE + k % 2) * SUM_PITCH) = make_float4(products[0][k], products[1][k], products[2][k], products[3][k]);
            __syncthreads();
            add_warps((float*)(s.starts + t / TILE * THREADS), buffer);  // nobody needs this tile's start any more
        }
        __syncthreads();
        cluster_arrive();  // this block's sums can be read

        View u = VIEW(u), delta = VIEW(delta), z = VIEW(z), dy = VIEW(dy), du = VIEW(du), ddelta = VIEW(ddelta), dz = VIEW(dz);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int start = begin + half * HALF;
            Eight own_u = u.load(start, block.rows, block.last), own_delta = delta.load(start, block.rows, block.last);
            Eight own_dy = dy.load(start, block.rows, block.last), own_z = own_dy, out_u, out_delta, out_z;
#if GATED
            own_z = z.load(start, block.rows, block.last);
#endif
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int row = own_row(i), at = place<CHUNK>(row, half * HALF + own_token(i)), k = OWNER == TOKEN_RUNS ? 0 : i;
                bool valid = counts(block, start, i);
                float raw = own_delta[i] + s.rows.bias[row], value = own_u[i];
                float step = s.steps[at], dstep = s.dout[at] * (1.0f / LOG2E);
                float dinflow = s.inflow[at], gradient = own_dy[i];
#if GATED
                float gate = own_z[i], part_of_gate = sigmoid(gate);
                float skipped = fmaf(s.rows.D[row], value, s.ungated[at]);
                out_z.set(i, valid ? gradient * skipped * part_of_gate * (1.0f + gate * (1.0f - part_of_gate)) : 0.0f);
                gradient *= gate * part_of_gate;
#endif
                dstep = fmaf(value, dinflow, dstep);
                if (p.softplus) dstep *= sigmoid(raw);
                dstep = valid ? dstep : 0.0f;
                out_u.set(i, valid ? fmaf(step, dinflow, s.rows.D[row] * gradient) : 0.0f);
                out_delta.set(i, dstep);
                sum_bias[k] += dstep;
                sum_D[k] += valid ? gradient * value : 0.0f;
            }
            du.store(out_u, start, block.rows, block.last);
            ddelta.store(out_delta, start, block.rows, block.last);
#if GATED
            dz.store(out_z, start, block.rows, block.last);
#endif
        }
        if (chained) {  // last, so that a cluster waits for its neighbour's sums alone, not for its work
            if (threadIdx.x == 0) await_flag(flags + chunk * CLUSTER, chained);
            __syncthreads();
        }
        cluster_wait();
        add_to_part(s.starts, p, block, part, chained == 0, begin);
        __syncthreads();
        cluster_arrive();
        if (p.chain > 1) {
            if (threadIdx.x == 0) write_flag(flags + chunk * CLUSTER, chained + 1);
        }
    }
    cluster_wait();  // no block ends before the cluster has read its sums
    if (p.dfirst && block.segment == 0) store_given_state(p.dfirst, e, p, block, lane);
    i64 at = ((i64)block.batch * p.segments + block.segment) * p.channels + block.channel;
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (lane.exists && lane.n + j < p.state) ((float*)p.dA)[(at + lane.row) * p.state + lane.n + j] = dA[j];
    // Sums over the tokens of a row, whose threads are side by side in `slot`.
    int slot = OWNER == TOKEN_RUNS ? threadIdx.x % QUADS : own_token(0), slots = OWNER == TOKEN_RUNS ? QUADS : HALF;
#pragma unroll
    for (int which = 0; which < 2; which++) {
        i64 target = which == 0 ? p.dD : p.dbias;
        if (!target) continue;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OWN_ROWS; i++) s.inflow[own_row(i) * slots + slot] = which == 0 ? sum_D[i] : sum_bias[i];
        __syncthreads();
        if (threadIdx.x < block.rows) {
            float sum = 0.0f;
            for (int i = 0; i < slots; i++) sum += s.inflow[threadIdx.x * slots + i];
            ((float*)target)[at + threadIdx.x] = sum;
        }
    }
}
