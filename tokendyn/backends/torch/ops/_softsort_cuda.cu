// SoftSort and its inverse with the distance |s_i - s_j|: two decayed scans over the tokens in the order of their scores.
//
// With the scores s in order, the matrix K_ij = exp(-|s_i - s_j|/tau) times v is one scan from each end:
//   before_i = k_i (before_{i-1} + v_{i-1}),  k_i = exp(-|s_i - s_{i-1}|/tau),   (K v)_i = before_i + v_i + after_i.
// SoftSort is K x / Z with Z = K 1, read from the tokens' places and written in order; its inverse is K w / M with
// w = y / Z, M = K (1/Z), read in order and written to the tokens' places. `product` is K v; `gradients` and `finish_scores`
// make the gradient of the scores,
//   tau ds_m = sum_j sgn(s_j - s_m) K_mj (<a_m, b_j> + <b_m, a_j> - c_m/Z_j - c_j/Z_m - q_m - q_j),
// where a is the gradient of the output divided by Z (M), b is x (w). SoftSort: c = 0 and q_m = sum_j K_mj <a_m, b_j> / Z_m. Its
// inverse: c_m = sum_j K_mj <a_m, b_j> / M_m, q_m = sum_j K_mj <b_m, a_j> / Z_m - (K c)_m / Z_m^2. Sums over sgn > 0 and
// sgn < 0 are scans too; equal scores take no part in them ("strict"). Nothing of size L x L exists, nothing is added
// atomically but counts: the same input gives the same bits. Everything inside is float32.
//
// A block has a span of RUN * SEGMENTS tokens in order; a warp has a segment of it, RUN tokens, and 32 channels, a lane one of
// them, whose tokens all lie in its registers. So a token is read once: each segment is summed up from both ends, the sums
// of the segments before and after it are taken in, and the scans are made. The block goes through its channels SLABS * 32
// at a time. Where a sequence is one span, its block sorts it first (`product`) and finishes the gradient of its scores
// (`gradients`, if it has all channels): a launch each. Longer ones are arranged first, `ends` sums up whole spans and `join` what there is before each.
//
// Compiled at run time, one kernel at a time: PRODUCT, GRADIENTS, ENDS, JOIN, ARRANGE or FINISH is defined. ELEMENT is 0 float32,
// 1 bfloat16, 2 float16; ORDERED whether `a` is read through the order, where `b` and `out` are not, or the other way; TWO
// whether there is a `b`; LONG whether there are several spans. Stands after `struct Args`, _cuda_numbers.cu and _softsort_cuda_sums.cu.

#define SPAN (RUN * SEGMENTS)

#ifndef EMULATED
// Hides from the compiler what a number is. So addresses are made anew from it, which takes fewer registers than keeping
// them; and what is loaded is there before it is used, so that all loads are under way together.
__device__ __forceinline__ void forget(int& x) { asm volatile("" : "+r"(x)::"memory"); }
__device__ __forceinline__ void forget(unsigned& x) { asm volatile("" : "+r"(x)::"memory"); }
#endif

#if ELEMENT == 0
__device__ __forceinline__ unsigned to_bits(element x) { return __float_as_uint(x); }
__device__ __forceinline__ float to_float(unsigned bits) { return __uint_as_float(bits); }
#else
__device__ __forceinline__ unsigned to_bits(element x) { return x; }
__device__ __forceinline__ float to_float(unsigned bits) { return narrowed_bits_to_float(bits); }
#endif

// A token's place in order: the decay from the one before, the token's number, and what divides values that lie in the
// order of scores and values that lie as the tokens do.
struct Place {
    float k, of_order, of_tokens;
    int token;
};

#define ARRAYS (1 + TWO)

// Sums of a lane's channel over the segments of a block's slabs, from the first token (0) and from the last (1); `fold`
// puts in their place what there is before each.
struct Ends {
    float all[2][ARRAYS][SLABS][SEGMENTS][32];
#if TWO
    float strict[2][ARRAYS][SLABS][SEGMENTS][32];
#endif
    __device__ __forceinline__ void put(float all_sum, float strict_sum, int after, int n, int slab, int segment, int lane) {
        all[after][n][slab][segment][lane] = all_sum;
#if TWO
        strict[after][n][slab][segment][lane] = strict_sum;
#endif
    }
    __device__ __forceinline__ void get(float& all_sum, float& strict_sum, int after, int n, int slab, int segment, int lane) const {
        all_sum = all[after][n][slab][segment][lane];
#if TWO
        strict_sum = strict[after][n][slab][segment][lane];
#else
        strict_sum = 0.0f;
#endif
    }
};

struct Shared {
    Place places[SPAN + 1];
    float k[2][SEGMENTS];  // from the last token of the segment before, and from the first of the one after
    Ends ends;
    Carry carry;
#if defined PRODUCT || defined GRADIENTS
    int order[SPAN];
    float placed[SPAN], mass[SPAN], total[SPAN];
#endif
#ifdef PRODUCT
    Sorting sorting;
#endif
#ifdef GRADIENTS
    float added[3][SLABS][SPAN], work[3][SPAN];
#endif
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch must ask for enough shared memory");

// The tokens and channels of a block, and of a warp in it.
struct Unit {
    i64 batch;
    int part, span, start, count;  // of tokens in order
    int slab, stop;                // of 32 channels
    int lane, segment, beside;     // which of the SLABS it is
    int from, tokens;              // from the warp's first token in the span: its own RUN, and all that are left
    __device__ __forceinline__ explicit Unit(const Args& p) {
        unsigned parts = (unsigned)p.parts, spans = LONG ? (unsigned)p.spans : 1, index = blockIdx.x / parts;
        part = (int)(blockIdx.x % parts), span = (int)(index % spans), batch = index / spans;
        start = span * SPAN, count = min(SPAN, (int)p.length - start);
        slab = part * (int)p.slabs_a_part, stop = min(slab + (int)p.slabs_a_part, (int)p.slabs);
        lane = threadIdx.x % 32;
        int warp = threadIdx.x / 32;
        segment = warp % SEGMENTS, beside = warp / SEGMENTS;
        // Not clamped to [0, RUN]: NVIDIA's compiler 13.0 for sm_90 then takes a later `== RUN` from the clamping instruction, which
        // holds of fewer tokens too, so that what follows the last token was read and written.
        from = segment * RUN, tokens = count - from;
    }
};

// Notes the places of a span, for all threads of a block; `at` is the whole sequence.
__device__ __forceinline__ void take_places(const Args& p, const Unit& unit, const Sequence& at, Shared& shared) {
    int last = (int)p.length - 1;
    for (int i = threadIdx.x; i <= SPAN; i += THREADS) {
        int here = unit.start + i;
        Place place = {0.0f, 0.0f, 0.0f, 0};
        if (here > 0 && here <= last) place.k = decay(p, at.placed[here] - at.placed[here - 1]);
        if (i < unit.count) place.of_tokens = at.total ? 1.0f / at.total[here] : 1.0f, place.of_order = 1.0f / at.mass[here], place.token = at.order[here];
        shared.places[i] = place;
    }
    for (int i = threadIdx.x; i < 2 * SEGMENTS; i += THREADS) {
        int first = min(unit.start + i % SEGMENTS * RUN, last), next = min(unit.start + i % SEGMENTS * RUN + RUN, last + 1);
        shared.k[i / SEGMENTS][i % SEGMENTS] =
            decay(p, i / SEGMENTS ? at.placed[first] - at.placed[min(next, last)] : at.placed[next - 1] - at.placed[max(first - 1, 0)]);
    }
    __syncthreads();
}

// An array (b, L, D) as a lane sees it. WHOLE: all RUN tokens and 32 channels exist; else others are read in their place.
template <bool THROUGH>
struct Tokens {
    char* own;
    int step;  // bytes from token to token
    __device__ __forceinline__ Tokens(const Args& p, const Unit& unit, int channel, i64 base, i64 b, i64 l, i64 d)
        : own((char*)((element*)base + unit.batch * b + min(channel, (int)p.width - 1) * d)), step((int)l) {
        forget(step);
        if (!THROUGH) own += (i64)(unit.start + unit.from) * step;
    }
    __device__ __forceinline__ element& at(const Place* places, int k) const { return *(element*)(own + (i64)(THROUGH ? places[k].token : k) * step); }

    template <bool WHOLE>
    __device__ __forceinline__ void load(float (&v)[RUN], const Place* places, int tokens, bool exists) const {
        unsigned raw[RUN];
        forget(tokens);
#pragma unroll
        for (int k = 0; k < RUN; k++) raw[k] = to_bits(at(places, WHOLE ? k : min(k, tokens - 1)));
#pragma unroll
        for (int k = 0; k < RUN; k++) forget(raw[k]);
#pragma unroll
        for (int k = 0; k < RUN; k++) {
            float share = THROUGH ? places[k].of_tokens : places[k].of_order;
            v[k] = WHOLE || (exists && k < tokens) ? to_float(raw[k]) * share : 0.0f;
        }
    }
    template <bool WHOLE>
    __device__ __forceinline__ void store(const float (&v)[RUN], const Place* places, int tokens, bool exists) const {
#pragma unroll
        for (int k = 0; k < RUN; k++)
            if (WHOLE || (exists && k < tokens)) at(places, k) = to_element(v[k] * (THROUGH ? places[k].of_tokens : places[k].of_order));
    }
};
#define TOKENS(name, channel) (p, unit, channel, p.name, p.name##_b, p.name##_l, p.name##_d)

// What a warp has of its channels: a and maybe b.
struct Values {
    float of[ARRAYS][RUN];
    template <bool WHOLE>
    __device__ __forceinline__ void load(const Args& p, const Unit& unit, int channel, const Place* places) {
        Tokens<ORDERED> a TOKENS(a, channel);
        a.load<WHOLE>(of[0], places, unit.tokens, channel < p.width);
#if TWO
        Tokens<!ORDERED> b TOKENS(b, channel);
        b.load<WHOLE>(of[1], places, unit.tokens, channel < p.width);
#endif
    }
    __device__ __forceinline__ void add_to(Sums<ARRAYS>& sums, int k) const {
#pragma unroll
        for (int n = 0; n < ARRAYS; n++) sums.all[n] += of[n][k];
    }
    // Sums from the first (0) and from the last token (1).
    __device__ __forceinline__ void sum_up(const Place* places, Sums<ARRAYS> (&sums)[2]) const {
        sums[0].clear(), sums[1].clear();
#pragma unroll
        for (int k = 0; k < RUN; k++) sums[0].move(places[k].k), add_to(sums[0], k);
#pragma unroll
        for (int k = RUN - 1; k >= 0; k--) sums[1].move(places[k + 1].k), add_to(sums[1], k);
    }
};

// Where what a span starts or ends with is kept for a channel: all sums or strict ones.
__device__ __forceinline__ float* at_span(const Args& p, i64 batch, int span, int after, int n, bool strict, int channel) {
    int kinds = 1 + TWO, field = (after * ARRAYS + n) * kinds + strict;
    return (float*)p.ends + ((batch * p.spans + span) * 2 * ARRAYS * kinds + field) * p.slabs * 32 + channel;
}

// Loads the warp's values and makes of its sums, and those of the other warps, what there is before and after its tokens;
// or notes the sums of the span. For all threads of a block; true where the warp has tokens and channels.
__device__ __forceinline__ bool begin(const Args& p, const Unit& unit, int base, Shared& shared, Values& values, Sums<ARRAYS> (&sums)[2]) {
    int slab = base + unit.beside;
    bool busy = slab < unit.stop && unit.tokens > 0;
    sums[0].clear(), sums[1].clear();
    if (busy) {
        const Place* places = shared.places + unit.from;
        if (unit.tokens >= RUN && slab * 32 + 32 <= p.width)
            values.load<true>(p, unit, slab * 32 + unit.lane, places);
        else
            values.load<false>(p, unit, slab * 32 + unit.lane, places);
        values.sum_up(places, sums);
    }
    __syncthreads();  // the sums of the slabs before have been read
#pragma unroll
    for (int after = 0; after < 2; after++)
#pragma unroll
        for (int n = 0; n < ARRAYS; n++)
            shared.ends.put(sums[after].all[n], sums[after].strict[n], after, n, unit.beside, unit.segment, unit.lane);
    __syncthreads();
    for (int task = threadIdx.x / 32; task < 2 * ARRAYS * SLABS; task += WARPS) {
        int after = task % 2, n = task / 2 % ARRAYS, beside = task / (2 * ARRAYS), channel = (base + beside) * 32 + unit.lane;
        if (base + beside >= unit.stop) continue;
        Sums<1> before, own[SEGMENTS];
        float k[SEGMENTS];
        before.clear();
#if LONG && !defined ENDS
        before.all[0] = *at_span(p, unit.batch, unit.span, after, n, false, channel);
        if (TWO) before.strict[0] = *at_span(p, unit.batch, unit.span, after, n, true, channel);
#endif
#pragma unroll
        for (int i = 0; i < SEGMENTS; i++) {  // all loads are under way together
            int h = after ? SEGMENTS - 1 - i : i;
            k[i] = shared.k[after][h];
            shared.ends.get(own[i].all[0], own[i].strict[0], after, n, beside, h, unit.lane);
        }
#pragma unroll
        for (int i = 0; i < SEGMENTS; i++) {
            shared.ends.put(before.all[0], before.strict[0], after, n, beside, after ? SEGMENTS - 1 - i : i, unit.lane);
            before.join(k[i], own[i]);
        }
#ifdef ENDS
        *at_span(p, unit.batch, unit.span, after, n, false, channel) = before.all[0];
        if (TWO) *at_span(p, unit.batch, unit.span, after, n, true, channel) = before.strict[0];
#endif
    }
    __syncthreads();
#pragma unroll
    for (int after = 0; after < 2; after++)
#pragma unroll
        for (int n = 0; n < ARRAYS; n++)
            shared.ends.get(sums[after].all[n], sums[after].strict[n], after, n, unit.beside, unit.segment, unit.lane);
    return busy;
}

#ifdef ENDS
// Sums of whole spans from both ends, without those before.
extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) ends(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    Shared& shared = *(Shared*)memory;
    Unit unit(p);
    Sequence at = sequence(p, unit.batch);
    take_places(p, unit, at, shared);
    Values values;
    Sums<ARRAYS> sums[2];
    for (int base = unit.slab; base < unit.stop; base += SLABS) begin(p, unit, base, shared, values, sums);
}
#endif

#ifdef JOIN
#define AHEAD 8
// Puts in the place of spans' sums what there is before (after) each; a thread has an array's channel and an end.
extern "C" __global__ void __launch_bounds__(THREADS) join(const __grid_constant__ Args p) {
    i64 index = (i64)blockIdx.x * THREADS + threadIdx.x, channels = p.slabs * 32, batch = index / (channels * 2 * ARRAYS);
    int channel = (int)(index % channels), which = (int)(index / channels % (2 * ARRAYS)), after = which % 2, n = which / 2;
    if (batch >= p.batch) return;
    int spans = (int)p.spans, last = (int)p.length - 1;
    const float* placed = sequence(p, batch).placed;
    Sums<1> before, own[AHEAD];
    before.clear();
    for (int from = 0; from < spans; from += AHEAD) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            int i = min(from + k, spans - 1), span = after ? spans - 1 - i : i;
            own[k].clear();
            own[k].all[0] = *at_span(p, batch, span, after, n, false, channel);
            if (TWO) own[k].strict[0] = *at_span(p, batch, span, after, n, true, channel);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            int i = from + k, span = after ? spans - 1 - i : i;
            if (i >= spans) break;
            *at_span(p, batch, span, after, n, false, channel) = before.all[0];
            if (TWO) *at_span(p, batch, span, after, n, true, channel) = before.strict[0];
            int first = span * SPAN, stop = min(first + SPAN, last + 1);
            before.join(decay(p, after ? placed[first] - placed[min(stop, last)] : placed[stop - 1] - placed[max(first - 1, 0)]), own[k]);
        }
    }
}
#endif

#if defined PRODUCT || defined GRADIENTS
#ifdef PRODUCT
#define INVERSE !ORDERED  // where it sorts
#else
#define INVERSE ORDERED
#endif

// The tokens of a block's one span, or of the whole sequence, where the block can read them fast.
__device__ __forceinline__ Sequence nearby(const Args& p, Shared& shared) {
    return {shared.order, shared.placed, shared.mass, INVERSE ? shared.total : nullptr};
}
__device__ __forceinline__ void copy(const Args& p, const Sequence& from, const Sequence& to) {
    for (int i = threadIdx.x; i < p.length; i += THREADS) {
        to.order[i] = from.order[i], to.placed[i] = from.placed[i], to.mass[i] = from.mass[i];
        if (INVERSE) to.total[i] = from.total[i];
    }
}
#endif

#ifdef PRODUCT
extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) product(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    Shared& shared = *(Shared*)memory;
    Unit unit(p);
    Sequence at = sequence(p, unit.batch);
    if (!LONG && p.sorts) {
        Sequence near = nearby(p, shared);
        sort_and_sum(p, unit.batch, near, shared.sorting, shared.carry);
        if (unit.part == 0) copy(p, near, at);
        at = near;
    }
    take_places(p, unit, at, shared);
    const Place* places = shared.places + unit.from;
    Values values;
    Sums<1> sums[2];
    for (int base = unit.slab; base < unit.stop; base += SLABS) {
        int slab = base + unit.beside, channel = slab * 32 + unit.lane;
        if (begin(p, unit, base, shared, values, sums)) {
            float result[RUN];
#pragma unroll
            for (int k = 0; k < RUN; k++) sums[0].move(places[k].k), result[k] = sums[0].all[0], values.add_to(sums[0], k);
#pragma unroll
            for (int k = RUN - 1; k >= 0; k--) sums[1].move(places[k + 1].k), values.add_to(sums[1], k), result[k] += sums[1].all[0];
            Tokens<!ORDERED> out TOKENS(out, channel);
            if (unit.tokens >= RUN && slab * 32 + 32 <= p.width)
                out.store<true>(result, places, RUN, true);
            else
                out.store<false>(result, places, unit.tokens, channel < p.width);
        }
    }
}
#endif

#ifdef GRADIENTS
#define WIDE (RUN <= 8 ? 8 : 16)

// One step of the next: of 2 N numbers that each lane holds, N are left.
template <int N>
__device__ __forceinline__ void halve(float (&v)[WIDE]) {
    bool upper = threadIdx.x & N;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float sent = upper ? v[i] : v[i + N], kept = upper ? v[i + N] : v[i];
        v[i] = kept + __shfl_xor_sync(ALL, sent, N);
    }
}
// Adds each of RUN numbers over the warp: the lanes k modulo WIDE get the k-th sum.
__device__ __forceinline__ float add_over_channels(const float (&given)[RUN]) {
    float v[WIDE];
#pragma unroll
    for (int k = 0; k < WIDE; k++) v[k] = k < RUN ? given[min(k, RUN - 1)] : 0.0f;
    if constexpr (WIDE == 16) halve<WIDE / 2>(v);
    halve<4>(v), halve<2>(v), halve<1>(v);
    if (WIDE == 8) v[0] += __shfl_xor_sync(ALL, v[0], 8);
    return v[0] + __shfl_xor_sync(ALL, v[0], 16);
}

// K a, written to `out`, and over the channels the sums, for each token m, of a_m and b_m with the scans of b and a: signed
// and strict, of a with K b, and (for the inverse) of b with K a.
extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) gradients(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    Shared& shared = *(Shared*)memory;
    Unit unit(p);
    bool finishes = !LONG && p.dscores;
    Sequence at = sequence(p, unit.batch), near = nearby(p, shared);
    if (finishes) {
        copy(p, at, near);
        at = near;
        __syncthreads();
    }
    take_places(p, unit, at, shared);
    const Place* places = shared.places + unit.from;
    Values values;
    const float(&a)[RUN] = values.of[0];
    const float(&b)[RUN] = values.of[1];
    Sums<2> sums[2];
    float added[3] = {0.0f, 0.0f, 0.0f};  // a lane's token of the warp, over the warp's channels
    for (int base = unit.slab; base < unit.stop; base += SLABS) {
        int slab = base + unit.beside, channel = slab * 32 + unit.lane;
        if (begin(p, unit, base, shared, values, sums)) {
            float result[RUN], slope[RUN], forth[RUN];
#if ORDERED
            float back[RUN];
#endif
#pragma unroll
            for (int k = 0; k < RUN; k++) {
                sums[0].move(places[k].k);
                slope[k] = -fmaf(a[k], sums[0].strict[1], b[k] * sums[0].strict[0]);
                result[k] = sums[0].all[0];
                values.add_to(sums[0], k);
                forth[k] = a[k] * sums[0].all[1];
#if ORDERED
                back[k] = b[k] * sums[0].all[0];
#endif
            }
#pragma unroll
            for (int k = RUN - 1; k >= 0; k--) {
                sums[1].move(places[k + 1].k);
                slope[k] = fmaf(a[k], sums[1].strict[1], fmaf(b[k], sums[1].strict[0], slope[k]));
                forth[k] = fmaf(a[k], sums[1].all[1], forth[k]);
#if ORDERED
                back[k] = fmaf(b[k], sums[1].all[0], back[k]);
#endif
                values.add_to(sums[1], k);
                result[k] += sums[1].all[0];
            }
            if (p.out) {
                Tokens<!ORDERED> out TOKENS(out, channel);
                if (unit.tokens >= RUN && slab * 32 + 32 <= p.width)
                    out.store<true>(result, places, RUN, true);
                else
                    out.store<false>(result, places, unit.tokens, channel < p.width);
            }
            added[0] += add_over_channels(slope), added[1] += add_over_channels(forth);
#if ORDERED
            added[2] += add_over_channels(back);
#endif
        }
    }
    if (unit.lane < RUN)
#pragma unroll
        for (int which = 0; which < 3; which++) shared.added[which][unit.beside][unit.from + unit.lane] = added[which];
    __syncthreads();
    auto of_block = [&](int which, int i) {
        float sum = 0.0f;
#pragma unroll
        for (int beside = 0; beside < SLABS; beside++) sum += shared.added[which][beside][i];
        return sum;
    };
    if (finishes) {
        finish_scores(p, unit.batch, near, shared.work[0], shared.work[1], shared.work[2], shared.carry, of_block);
        return;
    }
    for (int which = 0; which < 3; which++)
        for (int i = threadIdx.x; i < unit.count; i += THREADS)
            ((float*)p.partial)[((which * p.batch + unit.batch) * p.parts + unit.part) * p.length + unit.start + i] = of_block(which, i);
}
#endif
