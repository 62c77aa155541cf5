// Sums over a sequence's tokens in the order of their scores, one number or a few a token: what sorts them, the masses Z and
// M, and the last part of the scores' gradient. All threads of a block work on one sequence; see _softsort_cuda.cu.

#define WARPS (THREADS / 32)
#define ALL 0xffffffffu
#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)

// Weight of two tokens whose scores differ by `gap`, by its sign: negative (and 1) where they are equal.
__device__ __forceinline__ float decay(const Args& p, float gap) {
    return gap == 0.0f ? -1.0f : ex2(-fabsf(gap) * __uint_as_float((unsigned)p.scale));
}

// Decayed sums of N numbers a token up to a token, from the first or from the last: all, and those of another score alone.
template <int N>
struct Sums {
    float all[N], strict[N];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < N; n++) all[n] = strict[n] = 0.0f;
    }
    // On to the next token, which lies a decay of k further and is yet to be added.
    __device__ __forceinline__ void move(float k) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            all[n] *= fabsf(k);
            if (k >= 0.0f) strict[n] = all[n];
        }
    }
    // On by a run of tokens, whose last lies a decay of k further, and whose own sums these are.
    __device__ __forceinline__ void join(float k, const Sums& run) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            strict[n] = k < 0.0f ? strict[n] : fmaf(k, all[n], run.strict[n]);
            all[n] = fmaf(fabsf(k), all[n], run.all[n]);
        }
    }
    __device__ __forceinline__ Sums of_lane(int lane) const {
        Sums other;
#pragma unroll
        for (int n = 0; n < N; n++) other.all[n] = __shfl_sync(ALL, all[n], lane), other.strict[n] = __shfl_sync(ALL, strict[n], lane);
        return other;
    }
};

#define MOST 4
// What the warps of a block hand on, from the first token (0) and from the last (1).
struct Carry {
    float k[2][WARPS], all[2][MOST][WARPS], strict[2][MOST][WARPS];
};

// A thread's run of tokens, in order or (`after`) from the last: `use(i, after, sums)` for every token i, with the sums
// before it, of which `sums` are the last. Before the first token they are 0, whatever it is said to be further.
template <int N, typename Value, typename Use>
__device__ __forceinline__ void walk(const Args& p, const float* placed, int length, bool after, Sums<N>& sums, Value value, Use use) {
    int run = (length + THREADS - 1) / THREADS, first = threadIdx.x * run, stop = min(first + run, length);
#pragma unroll 1
    for (int j = 0; j < stop - first; j++) {
        int i = after ? stop - 1 - j : first + j;
        sums.move(decay(p, placed[i] - placed[after ? min(i + 1, length - 1) : max(i - 1, 0)]));
        use(i, after, sums);
        float own[N];
        value(i, own);
#pragma unroll
        for (int n = 0; n < N; n++) sums.all[n] += own[n];
    }
}

// For every token i of a sequence, and for N values a token: the decayed sums over the tokens before it in order, then
// (`after`) over those after it. The same thread is given both.
template <int N, typename Value, typename Use>
__device__ __forceinline__ void sweep(const Args& p, const float* placed, int length, Carry& carry, Value value, Use use) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int run = (length + THREADS - 1) / THREADS, first = threadIdx.x * run, stop = min(first + run, length);
    Sums<N> before[2];
    float before_k[2];
#pragma unroll
    for (int after = 0; after < 2; after++) {
        Sums<N> sums;
        sums.clear();
        walk(p, placed, length, after, sums, value, [](int i, bool after, const Sums<N>& before) {});
        float k = -1.0f;  // of a run without tokens
        if (first < stop) k = decay(p, after ? placed[first] - placed[min(stop, length - 1)] : placed[stop - 1] - placed[max(first - 1, 0)]);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            int from = after ? lane + distance : lane - distance;
            Sums<N> other = sums.of_lane(from & 31);
            float other_k = __shfl_sync(ALL, k, from & 31);
            if (from == (from & 31)) {
                other.join(k, sums);
                sums = other, k = k < 0.0f && other_k < 0.0f ? -1.0f : fabsf(k * other_k);
            }
        }
        if (lane == (after ? 0 : 31)) {
            carry.k[after][warp] = k;
#pragma unroll
            for (int n = 0; n < N; n++) carry.all[after][n][warp] = sums.all[n], carry.strict[after][n][warp] = sums.strict[n];
        }
        int from = after ? lane + 1 : lane - 1;
        before[after] = sums.of_lane(from & 31), before_k[after] = __shfl_sync(ALL, k, from & 31);
        if (from != (from & 31)) before[after].clear(), before_k[after] = -1.0f;
    }
    __syncthreads();
#pragma unroll
    for (int after = 0; after < 2; after++) {
        Sums<N> sums, other;
        sums.clear();
#pragma unroll 1
        for (int w = after ? WARPS - 1 : 0; w != warp; w += after ? -1 : 1) {
#pragma unroll
            for (int n = 0; n < N; n++) other.all[n] = carry.all[after][n][w], other.strict[n] = carry.strict[after][n][w];
            sums.join(carry.k[after][w], other);
        }
        sums.join(before_k[after], before[after]);
        walk(p, placed, length, after, sums, value, use);
    }
    __syncthreads();
}

// out = K value.
template <typename Value>
__device__ __forceinline__ void sums(const Args& p, const float* placed, int length, Carry& carry, float* out, Value value) {
    sweep<1>(p, placed, length, carry, [&](int i, float (&v)[1]) { v[0] = value(i); },
             [&](int i, bool after, const Sums<1>& before) { out[i] = after ? out[i] + before.all[0] + value(i) : before.all[0]; });
}

// What is known of a sequence's tokens in order: where they lie, their scores, Z, and M or null.
struct Sequence {
    int* order;
    float *placed, *mass, *total;
};

struct Sorting {
    float scores[SORTED];
    unsigned before[SORTED];
    int finite;
};

// Fills in `to`, for all threads of a block; NaN where a score is not finite. A token's place is the number of tokens that
// come before it, unless the order is given.
__device__ __forceinline__ void sort_and_sum(const Args& p, i64 batch, const Sequence& to, Sorting& sorting, Carry& carry) {
    int length = (int)p.length;
    const float* scores = (const float*)p.scores + batch * p.scores_b;
    if (threadIdx.x == 0) sorting.finite = 1;
    __syncthreads();
    for (int i = threadIdx.x; i < length; i += THREADS) {
        float score = scores[i * p.scores_l];
        if (!(score * 0.0f == 0.0f)) sorting.finite = 0;
        if (!p.given_order) sorting.scores[i] = p.ascending ? score : -score, sorting.before[i] = 0;
    }
    __syncthreads();
    if (!sorting.finite) {
        for (int i = threadIdx.x; i < length; i += THREADS) {
            to.placed[i] = 0.0f, to.order[i] = i, to.mass[i] = NOT_A_NUMBER;
            if (to.total) to.total[i] = NOT_A_NUMBER;
        }
        __syncthreads();
        return;
    }
    if (p.given_order) {
        const i64* given = (const i64*)p.given_order + batch * p.length;
        for (int i = threadIdx.x; i < length; i += THREADS) {
            to.order[i] = (int)given[i];
            to.placed[i] = scores[given[i] * p.scores_l];
        }
    } else {
        int helpers = max(1, THREADS / length), share = (length + helpers - 1) / helpers;  // threads a token, tokens a thread
        for (int t = threadIdx.x; t < length * helpers; t += THREADS) {
            int i = t % length, from = t / length * share, stop = min(from + share, length);
            float own = sorting.scores[i];
            unsigned before = 0;
#pragma unroll 4
            for (int j = from; j < min(i, stop); j++) before += sorting.scores[j] <= own;
#pragma unroll 4
            for (int j = max(i + 1, from); j < stop; j++) before += sorting.scores[j] < own;
            atomicAdd(&sorting.before[i], before);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < length; i += THREADS) {
            unsigned place = sorting.before[i];
            float own = sorting.scores[i];
            to.order[place] = i, to.placed[place] = p.ascending ? own : -own;
        }
    }
    __syncthreads();
    sums(p, to.placed, length, carry, to.mass, [](int i) { return 1.0f; });
    if (to.total) sums(p, to.placed, length, carry, to.total, [&](int i) { return 1.0f / to.mass[i]; });
}

// The gradient of a sequence's scores from `added(which, i)`, the sums over channels that `gradients` makes; `work` holds
// three numbers a token.
template <typename Added>
__device__ __forceinline__ void finish_scores(const Args& p, i64 batch, const Sequence& at, float* slope, float* q, float* c, Carry& carry, Added added) {
    int length = (int)p.length;
    for (int i = threadIdx.x; i < length; i += THREADS) {
        slope[i] = added(0, i);
        q[i] = added(at.total ? 2 : 1, i) / at.mass[i];
        if (at.total) c[i] = added(1, i) / at.total[i];
    }
    __syncthreads();
    if (at.total) {
        sweep<1>(p, at.placed, length, carry, [&](int i, float (&v)[1]) { v[0] = c[i]; },
                 [&](int i, bool after, const Sums<1>& before) {
                     q[i] -= (after ? before.all[0] : before.all[0] + c[i]) / (at.mass[i] * at.mass[i]);
                 });
        sweep<4>(p, at.placed, length, carry, [&](int i, float (&v)[4]) { v[0] = 1.0f, v[1] = q[i], v[2] = 1.0f / at.mass[i], v[3] = c[i]; },
                 [&](int i, bool after, const Sums<4>& before) {
                     const float* strict = before.strict;
                     float sum = fmaf(q[i], strict[0], strict[1]) + fmaf(c[i], strict[2], strict[3] / at.mass[i]);
                     slope[i] += after ? -sum : sum;
                 });
    } else {
        sweep<2>(p, at.placed, length, carry, [&](int i, float (&v)[2]) { v[0] = 1.0f, v[1] = q[i]; },
                 [&](int i, bool after, const Sums<2>& before) {
                     float sum = fmaf(q[i], before.strict[0], before.strict[1]);
                     slope[i] += after ? -sum : sum;
                 });
    }
    float factor = p.ascending ? __uint_as_float((unsigned)p.factor) : -__uint_as_float((unsigned)p.factor);
    for (int i = threadIdx.x; i < length; i += THREADS) ((float*)p.dscores)[batch * p.length + at.order[i]] = slope[i] * factor;
}

// A sequence's own part of what is kept for all of them.
__device__ __forceinline__ Sequence sequence(const Args& p, i64 batch) {
    i64 from = batch * p.length;
    return {(int*)p.order + from, (float*)p.placed + from, (float*)p.mass + from, p.total ? (float*)p.total + from : nullptr};
}

#ifdef ARRANGE
struct Shared {
    Carry carry;
    Sorting sorting;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch must ask for enough shared memory");

extern "C" __global__ void __launch_bounds__(THREADS) arrange(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    Shared& shared = *(Shared*)memory;
    sort_and_sum(p, blockIdx.x, sequence(p, blockIdx.x), shared.sorting, shared.carry);
}
#endif

#ifdef FINISH
static_assert(sizeof(Carry) <= SHARED_BYTES, "the launch must ask for enough shared memory");

extern "C" __global__ void __launch_bounds__(THREADS) finish(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    i64 batch = blockIdx.x, all = p.batch * p.length;
    float* work = (float*)p.work + batch * p.length;
    finish_scores(p, batch, sequence(p, batch), work, work + all, work + 2 * all, *(Carry*)memory, [&](int which, int i) {
        float sum = 0.0f;
        for (i64 part = 0; part < p.parts; part++)
            sum += ((const float*)p.partial)[((which * p.batch + batch) * p.parts + part) * p.length + i];
        return sum;
    });
}
#endif
