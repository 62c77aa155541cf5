// SoftSort and its inverse with the distance |s_i - s_j|: two decayed scans over the tokens in the order of their scores.
//
// With the scores s in order, the matrix K_ij = exp(-|s_i - s_j|/tau) times v is one scan from each end:
//   before_i = k_i (before_{i-1} + v_{i-1}),  k_i = exp(-|s_i - s_{i-1}|/tau),   (K v)_i = before_i + v_i + after_i.
// SoftSort is K x / Z with Z = K 1, read from the tokens' places and written in order; its inverse is K w / M with
// w = y / Z, M = K (1/Z), read in order and written to the tokens' places. `arrange` sorts by counting (or takes an order)
// and makes Z and M; `product` is K v; `gradients` and `finish` make the gradient of the scores,
//   tau ds_m = sum_j sgn(s_j - s_m) K_mj (<a_m, b_j> + <b_m, a_j> - c_m/Z_j - c_j/Z_m - q_m - q_j),
// where a is the gradient of the output divided by Z (M), b is x (w). SoftSort: c = 0 and q_m = sum_j K_mj <a_m, b_j> / Z_m. Its
// inverse: c_m = sum_j K_mj <a_m, b_j> / M_m, q_m = sum_j K_mj <b_m, a_j> / Z_m - (K c)_m / Z_m^2. Sums over sgn > 0 and
// sgn < 0 are scans too; equal scores take no part in them ("strict"). Nothing of size L x L exists, nothing is added
// atomically: the same input gives the same bits. Everything inside is float32.
//
// A warp owns 32 channels of one sequence, a lane one channel, and walks over the tokens CHUNK at a time: once from the
// first to the last to note what every chunk starts with, and once back, when it makes the scan of a chunk again.
// `arrange` and `finish`, which see single numbers a token, give a sequence to a block, and a run of its tokens to a thread.
//
// Compiled at run time with ELEMENT 0 float32, 1 bfloat16, 2 float16; THREADS of a block; COUNTED, the length up to which `arrange` sorts,
// after `struct Args` and _cuda_numbers.cu.

#define WARPS (THREADS / 32)
#define CHUNK 16
#define ALL 0xffffffffu

__device__ __forceinline__ float to_float(element x) {
#if ELEMENT == 0
    return x;
#else
    return narrowed_bits_to_float(x);
#endif
}
__device__ __forceinline__ element to_element(float x) {
#if ELEMENT == 0
    return x;
#else
    return (element)narrow(x);
#endif
}

// Weight of two tokens whose scores differ by `gap`, by its sign: negative (and 1) where they are equal.
__device__ __forceinline__ float decay(const Args& p, float gap) {
    return gap == 0.0f ? -1.0f : ex2(-fabsf(gap) * __uint_as_float((unsigned)p.scale));
}

// Sums over a sequence -------------------------------------------------------------------------------------------------

#define MOST 4
// What the runs of a block hand on, from the first token (0) and from the last (1).
struct Carry {
    float decay[2][THREADS], inclusive[2][MOST][THREADS], strict[2][MOST][THREADS];
};

struct Shared {
    Carry carry;
    float scores[COUNTED];
    int finite;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launch must know how much shared memory to ask for");

// A thread's run of tokens, in order or (`after`) from the last: `use(i, after, strict, before)` for every token i, with
// the sums over the tokens before it, of which `inclusive` and `strict` hold the last. `alone`: nothing is before the run.
template <int N, typename Value, typename Use>
__device__ __forceinline__ void walk(const Args& p, const float* placed, bool after, bool alone, float (&inclusive)[N], float (&strict)[N], Value value, Use use) {
    int length = (int)p.length, run = (length + THREADS - 1) / THREADS, last = length - 1;
    int first = threadIdx.x * run, stop = min(first + run, length);
    for (int j = first; j < stop; j++) {
        int i = after ? last - j : j;
        float k = j > first || (!alone && j > 0) ? decay(p, placed[i] - placed[after ? i + 1 : i - 1]) : 0.0f;
        float own[N], before[N];
        value(i, own);
#pragma unroll
        for (int n = 0; n < N; n++) {
            before[n] = fabsf(k) * inclusive[n];
            if (k >= 0.0f) strict[n] = before[n];
            inclusive[n] = before[n] + own[n];
        }
        use(i, after, strict, before);
    }
}

// For every token i of a sequence, and for N values a token: the decayed sums over the tokens before it in order, then
// (`after`) over those after it; all of them, and those of another score alone ("strict"). For all threads of a block.
template <int N, typename Value, typename Use>
__device__ __forceinline__ void sweep(const Args& p, const float* placed, Carry& carry, Value value, Use use) {
    int length = (int)p.length, run = (length + THREADS - 1) / THREADS, last = length - 1;
    int first = threadIdx.x * run, stop = min(first + run, length);
    float inclusive[N], strict[N];
    for (int after = 0; after < 2; after++) {
#pragma unroll
        for (int n = 0; n < N; n++) inclusive[n] = strict[n] = 0.0f;
        walk<N>(p, placed, after, true, inclusive, strict, value, [](int i, bool after, const float (&strict)[N], const float (&before)[N]) {});
        bool follows = first > 0 && first < stop;
        carry.decay[after][threadIdx.x] = follows ? decay(p, placed[after ? last - stop + 1 : stop - 1] - placed[after ? last - first + 1 : first - 1]) : 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++) carry.inclusive[after][n][threadIdx.x] = inclusive[n], carry.strict[after][n][threadIdx.x] = strict[n];
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0 && threadIdx.x / 32 < 2) {  // one thread for each direction
        int after = threadIdx.x / 32;
#pragma unroll
        for (int n = 0; n < N; n++) inclusive[n] = strict[n] = 0.0f;
#pragma unroll 8
        for (int t = 0; t < THREADS; t++) {
            float k = carry.decay[after][t];
#pragma unroll
            for (int n = 0; n < N; n++) {
                float ends = carry.inclusive[after][n][t], ends_strict = carry.strict[after][n][t];
                carry.inclusive[after][n][t] = inclusive[n], carry.strict[after][n][t] = strict[n];
                strict[n] = k < 0.0f ? strict[n] : fmaf(k, inclusive[n], ends_strict);
                inclusive[n] = fmaf(fabsf(k), inclusive[n], ends);
            }
        }
    }
    __syncthreads();
    for (int after = 0; after < 2; after++) {
#pragma unroll
        for (int n = 0; n < N; n++) inclusive[n] = carry.inclusive[after][n][threadIdx.x], strict[n] = carry.strict[after][n][threadIdx.x];
        walk<N>(p, placed, after, false, inclusive, strict, value, use);
        __syncthreads();
    }
}

// out = K value.
template <typename Value>
__device__ __forceinline__ void sums(const Args& p, const float* placed, Carry& carry, float* out, Value value) {
    sweep<1>(p, placed, carry, [&](int i, float (&v)[1]) { v[0] = value(i); },
             [&](int i, bool after, const float (&strict)[1], const float (&before)[1]) {
                 out[i] = after ? out[i] + before[0] + value(i) : before[0];
             });
}

// The order of a sequence's tokens, their scores in it, Z and (if asked for) M; NaN where a score is not finite.
extern "C" __global__ void __launch_bounds__(THREADS) arrange(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    Shared& shared = *(Shared*)memory;
    float* tile = shared.scores;
    Carry& carry = shared.carry;
    int& finite = shared.finite;
    i64 from = (i64)blockIdx.x * p.length;
    int length = (int)p.length;
    const float* scores = (const float*)p.scores + blockIdx.x * p.scores_b;
    float *placed = (float*)p.placed + from, *mass = (float*)p.mass + from;
    int* order = (int*)p.order + from;
    if (threadIdx.x == 0) finite = 1;
    __syncthreads();
    for (int i = threadIdx.x; i < length; i += THREADS)
        if (!(scores[i * p.scores_l] * 0.0f == 0.0f)) finite = 0;
    __syncthreads();
    if (!finite) {
        for (int i = threadIdx.x; i < length; i += THREADS) {
            placed[i] = 0.0f, order[i] = i, mass[i] = __uint_as_float(0x7fc00000u);
            if (p.total) ((float*)p.total + from)[i] = __uint_as_float(0x7fc00000u);
        }
        return;
    }
    if (p.given_order) {
        const i64* given = (const i64*)p.given_order + from;
        for (int i = threadIdx.x; i < length; i += THREADS) {
            order[i] = (int)given[i];
            placed[i] = scores[given[i] * p.scores_l];
        }
    } else {  // a token's place is the number of tokens that come before it; the table holds all scores
        for (int i = threadIdx.x; i < length; i += THREADS) tile[i] = p.ascending ? scores[i * p.scores_l] : -scores[i * p.scores_l];
        __syncthreads();
        for (int i = threadIdx.x; i < length; i += THREADS) {
            float own = tile[i];
            int place = 0;
#pragma unroll 8
            for (int j = 0; j < i; j++) place += tile[j] <= own;
#pragma unroll 8
            for (int j = i + 1; j < length; j++) place += tile[j] < own;
            order[place] = i;
            placed[place] = p.ascending ? own : -own;
        }
    }
    __syncthreads();
    sums(p, placed, carry, mass, [](int i) { return 1.0f; });
    if (p.total) sums(p, placed, carry, (float*)p.total + from, [&](int i) { return 1.0f / mass[i]; });
}

// Products -------------------------------------------------------------------------------------------------------------

// The 32 channels of a sequence that a warp owns.
struct Unit {
    i64 batch;
    int part, channel, lane;
    bool exists;
    __device__ __forceinline__ explicit Unit(const Args& p) {
        i64 index = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
        lane = threadIdx.x % 32;
        batch = index / p.parts, part = (int)(index % p.parts);
        channel = part * 32 + lane;
        exists = batch < p.batch;
    }
};

// An array (b, L, D) as a lane sees it, in order or through the order, maybe divided by a number a token. Where there is
// no token or channel, others are read and not used: loads without conditions are under way together.
struct Tokens {
    element* own;
    i64 step;
    const int* order;
    const float* divisor;
    int length;
    bool exists;
    int row;       // where the token of the chunk at hand lies whose number is the lane's, and what divides it
    float factor;
    __device__ __forceinline__ Tokens(const Args& p, const Unit& unit, i64 base, i64 b, i64 l, i64 d, i64 ordered, i64 divided)
        : own((element*)base + unit.batch * b + min(unit.channel, (int)p.width - 1) * d), step(l),
          order(ordered ? (const int*)p.order + unit.batch * p.length : nullptr),
          divisor(divided ? (const float*)divided + unit.batch * p.length : nullptr), length((int)p.length),
          exists(unit.channel < p.width) {}

    // Asks where the tokens of the chunk from `start` on lie.
    __device__ __forceinline__ void seek(const Unit& unit, int start) {
        int i = max(0, min(start + unit.lane % CHUNK, length - 1));
        row = order ? order[i] : i;
        factor = divisor ? divisor[i] : 1.0f;
    }
    // The tokens of the chunk from `start` on, which was sought before.
    __device__ __forceinline__ void load(float (&v)[CHUNK], int start) const {
        element raw[CHUNK];
#pragma unroll
        for (int k = 0; k < CHUNK; k++) raw[k] = own[__shfl_sync(ALL, row, k) * step];
        float shares = 1.0f / factor;
#pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            float share = __shfl_sync(ALL, shares, k);
            v[k] = exists && start + k < length ? to_float(raw[k]) * share : 0.0f;
        }
    }
    __device__ __forceinline__ void store(const float (&v)[CHUNK], int start) const {
        float shares = 1.0f / factor;
#pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            i64 at = __shfl_sync(ALL, row, k) * step;
            float scaled = v[k] * __shfl_sync(ALL, shares, k);
            if (exists && start + k < length) own[at] = to_element(scaled);
        }
    }
};
#define TOKENS(name) Tokens(p, unit, p.name, p.name##_b, p.name##_l, p.name##_d, p.name##_ordered, p.name##_divisor)

// The decays between a chunk's tokens: a lane k <= CHUNK knows that from token start + k - 1 to the next.
__device__ __forceinline__ float load_decay(const Args& p, const Unit& unit, int start) {
    const float* placed = (const float*)p.placed + unit.batch * p.length;
    int i = start + unit.lane, last = (int)p.length - 1, here = max(1, min(i, last));
    float k = decay(p, placed[min(here, last)] - placed[here - 1]);
    return i > 0 && i <= last ? k : 0.0f;
}

// What chunks start with: FIELDS numbers a channel.
__device__ __forceinline__ float* starts(const Args& p, const Unit& unit, int fields, int chunk, int field) {
    return (float*)p.starts + ((unit.batch * p.chunks + chunk) * fields + field) * p.parts * 32 + unit.channel;
}

__device__ __forceinline__ void take_over(float (&now)[CHUNK], const float (&next)[CHUNK]) {
#pragma unroll
    for (int k = 0; k < CHUNK; k++) now[k] = next[k];
}

// While a chunk is worked on, the next one is under way, and where the one after it lies.
extern "C" __global__ void __launch_bounds__(THREADS) product(const __grid_constant__ Args p) {
    Unit unit(p);
    if (!unit.exists) return;
    Tokens source = TOKENS(a), out = TOKENS(out);
    int chunks = (int)p.chunks;
    float now[CHUNK], next[CHUNK], k_now, k_next, sum = 0.0f, sum_next;
    source.seek(unit, 0), source.load(next, 0), source.seek(unit, CHUNK), k_next = load_decay(p, unit, 0);
    for (int chunk = 0; chunk < chunks; chunk++) {
        int start = chunk * CHUNK;
        sum_next = sum;
        *starts(p, unit, 1, chunk, 0) = sum;
        k_now = k_next, take_over(now, next);
        if (chunk + 1 < chunks) {
            source.load(next, start + CHUNK), source.seek(unit, start + 2 * CHUNK);
            k_next = load_decay(p, unit, start + CHUNK);
        }
#pragma unroll
        for (int k = 0; k < CHUNK; k++) sum = fmaf(fabsf(__shfl_sync(ALL, k_now, k)), sum, now[k]);
    }
    float after = 0.0f;  // the sum from the end up to and with the next token
    source.seek(unit, (chunks - 2) * CHUNK), out.seek(unit, (chunks - 1) * CHUNK);
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        int start = chunk * CHUNK;
        k_now = k_next, sum = sum_next, take_over(now, next);
        if (chunk > 0) {
            source.load(next, start - CHUNK), source.seek(unit, start - 2 * CHUNK);
            k_next = load_decay(p, unit, start - CHUNK), sum_next = *starts(p, unit, 1, chunk - 1, 0);
        }
        float result[CHUNK];
#pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            result[k] = fabsf(__shfl_sync(ALL, k_now, k)) * sum;
            sum = result[k] + now[k];
        }
#pragma unroll
        for (int k = CHUNK - 1; k >= 0; k--) {
            after = fmaf(fabsf(__shfl_sync(ALL, k_now, k + 1)), after, now[k]);
            result[k] += after;
        }
        out.store(result, start), out.seek(unit, start - CHUNK);
    }
}

// One step of the next: of 2 N numbers that each lane holds, N are left.
template <int N>
__device__ __forceinline__ void halve(float (&v)[CHUNK]) {
    bool upper = threadIdx.x & N;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float sent = upper ? v[i] : v[i + N], kept = upper ? v[i + N] : v[i];
        v[i] = kept + __shfl_xor_sync(ALL, sent, N);
    }
}
// Adds each of CHUNK numbers over the warp: lane k, and k + CHUNK, get the k-th sum.
__device__ __forceinline__ float add_over_channels(float (&v)[CHUNK]) {
    halve<8>(v), halve<4>(v), halve<2>(v), halve<1>(v);
    return v[0] + __shfl_xor_sync(ALL, v[0], CHUNK);
}

// K a, written to `out`, and over a warp's channels the sums, for each token m, of a_m and b_m with the scans of b and a:
// signed and strict, and of K.
extern "C" __global__ void __launch_bounds__(THREADS) gradients(const __grid_constant__ Args p) {
    Unit unit(p);
    if (!unit.exists) return;
    Tokens a = TOKENS(a), b = TOKENS(b), out = TOKENS(out);
    int chunks = (int)p.chunks;
    float a_now[CHUNK], b_now[CHUNK], a_next[CHUNK], b_next[CHUNK], k_now, k_next;
    float sum_a = 0.0f, sum_b = 0.0f, strict_a = 0.0f, strict_b = 0.0f;
    a.seek(unit, 0), b.seek(unit, 0), k_next = load_decay(p, unit, 0);
    a.load(a_next, 0), b.load(b_next, 0), a.seek(unit, CHUNK), b.seek(unit, CHUNK);
    for (int chunk = 0; chunk < chunks; chunk++) {
        int start = chunk * CHUNK;
        *starts(p, unit, 4, chunk, 0) = sum_a, *starts(p, unit, 4, chunk, 1) = sum_b;
        *starts(p, unit, 4, chunk, 2) = strict_a, *starts(p, unit, 4, chunk, 3) = strict_b;
        k_now = k_next, take_over(a_now, a_next), take_over(b_now, b_next);
        if (chunk + 1 < chunks) {
            a.load(a_next, start + CHUNK), b.load(b_next, start + CHUNK), k_next = load_decay(p, unit, start + CHUNK);
            a.seek(unit, start + 2 * CHUNK), b.seek(unit, start + 2 * CHUNK);
        }
#pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            float signed_k = __shfl_sync(ALL, k_now, k), before_a = fabsf(signed_k) * sum_a, before_b = fabsf(signed_k) * sum_b;
            if (signed_k >= 0.0f) strict_a = before_a, strict_b = before_b;
            sum_a = before_a + a_now[k], sum_b = before_b + b_now[k];
        }
    }
    float after_a = 0.0f, after_b = 0.0f, above_a = 0.0f, above_b = 0.0f;
    a.seek(unit, (chunks - 2) * CHUNK), b.seek(unit, (chunks - 2) * CHUNK), out.seek(unit, (chunks - 1) * CHUNK);
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        int start = chunk * CHUNK;
        sum_a = *starts(p, unit, 4, chunk, 0), sum_b = *starts(p, unit, 4, chunk, 1);
        strict_a = *starts(p, unit, 4, chunk, 2), strict_b = *starts(p, unit, 4, chunk, 3);
        k_now = k_next, take_over(a_now, a_next), take_over(b_now, b_next);
        if (chunk > 0) {
            a.load(a_next, start - CHUNK), b.load(b_next, start - CHUNK), k_next = load_decay(p, unit, start - CHUNK);
            a.seek(unit, start - 2 * CHUNK), b.seek(unit, start - 2 * CHUNK);
        }
        float slope[CHUNK], forth[CHUNK], back[CHUNK], result[CHUNK];
#pragma unroll
        for (int k = 0; k < CHUNK; k++) {
            float signed_k = __shfl_sync(ALL, k_now, k), before_a = fabsf(signed_k) * sum_a, before_b = fabsf(signed_k) * sum_b;
            if (signed_k >= 0.0f) strict_a = before_a, strict_b = before_b;
            sum_a = before_a + a_now[k], sum_b = before_b + b_now[k];
            result[k] = before_a;
            slope[k] = -fmaf(a_now[k], strict_b, b_now[k] * strict_a);
            forth[k] = a_now[k] * sum_b, back[k] = b_now[k] * sum_a;
        }
#pragma unroll
        for (int k = CHUNK - 1; k >= 0; k--) {
            float signed_k = __shfl_sync(ALL, k_now, k + 1), before_a = fabsf(signed_k) * after_a, before_b = fabsf(signed_k) * after_b;
            if (signed_k >= 0.0f) above_a = before_a, above_b = before_b;
            after_a = before_a + a_now[k], after_b = before_b + b_now[k];
            result[k] += after_a;
            slope[k] += fmaf(a_now[k], above_b, b_now[k] * above_a);
            forth[k] = fmaf(a_now[k], before_b, forth[k]), back[k] = fmaf(b_now[k], before_a, back[k]);
        }
        if (p.out) out.store(result, start), out.seek(unit, start - CHUNK);
        float added[3] = {add_over_channels(slope), add_over_channels(forth), add_over_channels(back)};
        int i = start + unit.lane;
        if (unit.lane < CHUNK && i < p.length)
#pragma unroll
            for (int which = 0; which < 3; which++)
                ((float*)p.partial)[((which * p.batch + unit.batch) * p.parts + unit.part) * p.length + i] = added[which];
    }
}

// ds from the sums of `gradients`.
extern "C" __global__ void __launch_bounds__(THREADS) finish(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    Carry& carry = ((Shared*)memory)->carry;
    i64 from = (i64)blockIdx.x * p.length;
    int length = (int)p.length;
    const float *placed = (const float*)p.placed + from, *mass = (const float*)p.mass + from;
    const float* total = p.total ? (const float*)p.total + from : nullptr;
    const int* order = (const int*)p.order + from;
    float *slope = (float*)p.work + from, *q = slope + p.batch * p.length, *c = q + p.batch * p.length;
    for (int i = threadIdx.x; i < length; i += THREADS) {
        float sum[3] = {0.0f, 0.0f, 0.0f};
        for (int which = 0; which < 3; which++)
            for (i64 part = 0; part < p.parts; part++)
                sum[which] += ((const float*)p.partial)[((which * p.batch + blockIdx.x) * p.parts + part) * p.length + i];
        slope[i] = sum[0];
        q[i] = (total ? sum[2] : sum[1]) / mass[i];
        if (total) c[i] = sum[1] / total[i];
    }
    __syncthreads();
    if (total) {
        sweep<1>(p, placed, carry, [&](int i, float (&v)[1]) { v[0] = c[i]; },
                 [&](int i, bool after, const float (&strict)[1], const float (&before)[1]) {
                     q[i] -= (after ? before[0] : before[0] + c[i]) / (mass[i] * mass[i]);
                 });
        sweep<4>(p, placed, carry, [&](int i, float (&v)[4]) { v[0] = 1.0f, v[1] = q[i], v[2] = 1.0f / mass[i], v[3] = c[i]; },
                 [&](int i, bool after, const float (&strict)[4], const float (&before)[4]) {
                     float sum = fmaf(q[i], strict[0], strict[1]) + fmaf(c[i], strict[2], strict[3] / mass[i]);
                     slope[i] += after ? -sum : sum;
                 });
    } else {
        sweep<2>(p, placed, carry, [&](int i, float (&v)[2]) { v[0] = 1.0f, v[1] = q[i]; },
                 [&](int i, bool after, const float (&strict)[2], const float (&before)[2]) {
                     float sum = fmaf(q[i], strict[0], strict[1]);
                     slope[i] += after ? -sum : sum;
                 });
    }
    float descending = p.ascending ? 1.0f : -1.0f;
    for (int i = threadIdx.x; i < length; i += THREADS)
        ((float*)p.dscores)[from + order[i]] = slope[i] * descending * __uint_as_float((unsigned)p.factor);
}
