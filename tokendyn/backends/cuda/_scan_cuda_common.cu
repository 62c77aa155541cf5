// What the CUDA kernels of the selective scan share: numbers, one product on tensor cores, and the small kernels around
// the scan. Compiled before a kernel's own text, after `struct Args` and _cuda_numbers.cu, with: ELEMENT 0 float32, 1 bfloat16, 2 float16;
// THREADS of a block; STATE, the N that states are padded to; PACKED (seq_idx is given); GATED (z is given; backward).

#define LOG2E 1.4426950408889634f

#ifndef EMULATED
// Two neighbours in one word, the first in its lower half.
__device__ __forceinline__ unsigned narrow_pair(float first, float second) {
    unsigned y;
#if ELEMENT == 2
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
#endif
    return y;
}
__device__ __forceinline__ unsigned short to_bfloat16(float x) {
    unsigned short y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// d += a b on tensor cores in TF32, which cuts operands after 10 bits, a 16 x 8 and b 8 x 8. Of a lane with g = lane / 4 and q = lane % 4: d holds entries
// (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1); a holds (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); b0 and b1
// are (q, g) and (q + 4, g).
__device__ __forceinline__ void mma(float& d0, float& d1, float& d2, float& d3, float a0, float a1, float a2, float a3, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// Hide from the compiler where a pointer or a number came from, so that it is not made again wherever it is used.
template <typename T>
__device__ __forceinline__ void hold(T*& pointer) { asm("" : "+l"(pointer)); }
__device__ __forceinline__ void hold(int& number) { asm("" : "+r"(number)); }
// Words of an input, whose whole line is brought to the L2 cache: other warps and the next tile want the rest of it.
__device__ __forceinline__ uint2 load_two(const void* p) {
    uint2 v;
    asm("ld.global.nc.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
__device__ __forceinline__ uint4 load_four(const void* p) {
    uint4 v;
    asm("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// Waits until a flag has a value; what its writer wrote before can be read then. Only the last look at it is an acquisition, because
// each of these empties the L1 cache.
__device__ __forceinline__ void await_flag(const unsigned* p, unsigned value) {
    unsigned v;
    do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    while (v != value);
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
}
__device__ __forceinline__ void write_flag(unsigned* p, unsigned v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// Copies words to shared memory, past registers; whole lines to the L2 cache. What nobody else wants passes the L1 cache.
// `copies_done` waits for a thread's own.
template <int WORDS>
__device__ __forceinline__ void copy(unsigned* to, const void* from) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    if (WORDS == 4)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(4 * WORDS) : "memory");
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Four matrices of 8 x 8 elements of 16 bits, turned: lane 8m + r says where row r of matrix m lies, and of m gets from its
// column lane / 4 the rows 2 (lane % 4) and 2 (lane % 4) + 1.
__device__ __forceinline__ void load_turned(unsigned (&words)[4], const unsigned* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}
// One such matrix between lanes, which hold of its row lane / 4 the elements 2 (lane % 4) and 2 (lane % 4) + 1.
__device__ __forceinline__ unsigned turn_matrix(unsigned word) {
    unsigned turned;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(word));
    return turned;
}
#if __CUDA_ARCH__ >= 900
// Four such matrices to shared memory, turned: lane 8m + r says where row r of matrix m is to lie.
#define MATRIX_STORES
__device__ __forceinline__ void store_turned(unsigned* row, const unsigned (&words)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"((unsigned)__cvta_generic_to_shared(row)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}
#endif
#endif

// The bits of a float32 that TF32 keeps.
__device__ __forceinline__ float high_part(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

// ln(1 + e^v) = max(v, 0) + ln(1 + w), w = e^-|v|: a polynomial in w, fitted so that ln(1 + w) is off by at most 1.7e-7 of
// itself in float32, 1.6e-6 in 16 bits.
__device__ __forceinline__ float softplus(float v) {
    float w = ex2(-fabsf(v) * LOG2E);
#if ELEMENT == 0
    float r = fmaf(w, fmaf(w, fmaf(w, fmaf(w, 0.005364811513572931f, -0.030065741389989853f), 0.07920445501804352f),
                           -0.13753795623779297f), 0.19153651595115662f);
    r = fmaf(w, fmaf(w, fmaf(w, r, -0.24857163429260254f), 0.3332132399082184f), -0.49999648332595825f);
#else
    float r = fmaf(w, fmaf(w, 0.014588295482099056f, -0.06785113364458084f), 0.1510276198387146f);
    r = fmaf(w, fmaf(w, fmaf(w, r, -0.23611339926719666f), 0.33140426874160767f), -0.4999074637889862f);
#endif
    return fmaf(w, fmaf(w, r, 1.0f), fmaxf(v, 0.0f));
}
__device__ __forceinline__ float sigmoid(float v) { return reciprocal(1.0f + ex2(-v * LOG2E)); }
__device__ __forceinline__ float step_size(const Args& p, float raw) { return p.softplus ? softplus(raw) : raw; }

// A value that all lanes of a warp have, as one that the compiler knows to be the same in all.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Whether a packed sequence begins at token t, so that the state is reset.
__device__ __forceinline__ bool begins(const Args& p, int batch, int t, int stop) {
    const i64* row = (const i64*)p.seq_idx + batch * p.length;
    return t > 0 && t < stop && t < p.length && row[t] != row[t - 1];
}

// States between segments, slots (b, segments + 1, d, STATE), from the first on (`backwards`: from the last on). The decay
// across a segment is negative where a packed sequence begins in it: what was before does not reach the end, not even as NaN.
extern "C" __global__ void __launch_bounds__(THREADS) join_segments(const __grid_constant__ Args p) {
    i64 size = p.channels * STATE, index = blockIdx.x * (i64)THREADS + threadIdx.x;
    if (index >= p.batch * size) return;
    i64 batch = index / size, at = index % size, n = at % STATE;
    i64 given = p.backwards ? p.last_gradient : p.first_state;
    float h = given && n < p.state ? ((const float*)given)[(batch * p.channels + at / STATE) * p.state + n] : 0.0f;
    float* slots = (float*)p.slots + batch * (p.segments + 1) * size + at;
    slots[p.backwards ? p.segments * size : 0] = h;
    for (i64 k = 0; k + 1 < p.segments; k++) {
        i64 segment = p.backwards ? p.segments - 1 - k : k, part = (batch * p.segments + segment) * size + at;
        float decay = ((const float*)p.decays)[part], end = ((const float*)p.ends)[part];
        h = decay < 0.0f || h == 0.0f ? end : fmaf(decay, h, end);  // growth across a segment may be infinite, which 0 survives
        slots[(p.backwards ? segment : segment + 1) * size] = h;
    }
}

// Adds up what blocks have left of a parameter's gradient: out[o, k] = sum over p of in[o, p, k], `next` floats from one p
// to the next. With `columns`, k numbers (L, columns), of which out[o] has the first N columns as its rows. The sums of all
// parameters are made in one launch; the first blocks work on the first.
#define FEW_PARTS 16
#define WAYS 8
struct Sum {
    i64 in, out, outer, parts, inner, next, columns, element;
};

extern "C" __global__ void __launch_bounds__(THREADS) add_parts(const __grid_constant__ Args p) {
    const Sum* sum = (const Sum*)&p.sums;
    i64 block = blockIdx.x, ways, blocks;
    for (;; block -= blocks, sum++) {
        ways = sum->parts > FEW_PARTS ? WAYS : 1, blocks = (sum->outer * sum->inner * ways + THREADS - 1) / THREADS;
        if (block < blocks) break;
    }
    // Many parts are added by WAYS threads each, a warp's four neighbours side by side in memory.
    i64 thread = block * THREADS + threadIdx.x, index = ways == 1 ? thread : thread / 32 * (32 / WAYS) + thread % (32 / WAYS);
    bool exists = index < sum->outer * sum->inner;
    const float* from = (const float*)sum->in + (exists ? index / sum->inner * sum->parts * sum->next + index % sum->inner : 0);
    i64 next = sum->next, parts = exists ? sum->parts : 0, part = ways == 1 ? 0 : thread % 32 / (32 / WAYS);
    float total = 0.0f;
    for (; part + 3 * ways < parts; part += 4 * ways) {
        const float* at = from + part * next;
        float first = at[0], second = at[ways * next], third = at[2 * ways * next], fourth = at[3 * ways * next];
        total += (first + second) + (third + fourth);
    }
    for (; part < parts; part += ways) total += from[part * next];
    if (ways > 1)
#pragma unroll
        for (int mask = 32 / WAYS; mask < 32; mask *= 2) total += __shfl_xor_sync(~0u, total, mask);
    if (!exists || thread % 32 / (32 / WAYS) * (ways - 1)) return;
    if (sum->columns) {
        i64 row = index % sum->inner % sum->columns, column = index % sum->inner / sum->columns;
        if (row >= p.state) return;
        index = (index / sum->inner * p.state + row) * p.length + column;
    }
#if ELEMENT != 0
    if (sum->element) {
        ((element*)sum->out)[index] = to_element(total);
        return;
    }
#endif
    ((float*)sum->out)[index] = total;
}
