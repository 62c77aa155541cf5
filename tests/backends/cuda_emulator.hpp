// Runs a CUDA kernel on the CPU, block after block or cluster after cluster, every thread of these a fibre: enough of
// CUDA's language for our kernels, so that their logic can be tested where there is no GPU. Included before the kernels'
// source.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#ifndef CLUSTER
#define CLUSTER 1
#endif
#define IN_CLUSTERS

template <typename T>
T max(T a, T b) { return a < b ? b : a; }
template <typename T>
T min(T a, T b) { return b < a ? b : a; }

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static struct { unsigned x; } threadIdx, blockIdx;
constexpr int block_memory = 1 << 14;
float4 memory[CLUSTER * block_memory];

namespace fibres {
constexpr int count = CLUSTER * THREADS, stack_bytes = 1 << 17;
static int self;  // the fibre that runs: a thread of the cluster
static unsigned visit;  // how often the scheduler has come to a block
static bool progress;  // whether any fibre has begun, ended or gone past a barrier
static ucontext_t context;
static jmp_buf scheduler, waiting[count];  // a jump costs no system call, where swapcontext costs two
static char stacks[static_cast<size_t>(count) * stack_bytes];
static enum { NEW, WAITING, DONE } state[count];
static const char* fault;  // what a kernel did that no GPU would bear

static void fail(const char* what) {
    fault = what;
    _longjmp(scheduler, 1);
}

static void wait_turn() {
    if (!_setjmp(waiting[self])) _longjmp(scheduler, 1);
}

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
    void wait(int expected) {
        unsigned mine = generation;
        if (++arrived == expected) arrived = 0, generation++;
        while (generation == mine) wait_turn();
        progress = true;
    }
};
static Barrier cluster, blocks[CLUSTER], warps[count / 32];
static unsigned arrived_in[count];  // generations of the cluster's barrier
static bool arrived[count];         // at it, and has not waited yet
static const unsigned* awaited[count];  // the flag that a thread has waited for last
static float exchanged[6][count];

// Blocks `first` to `first + together - 1` as a cluster, the last one first. Each runs on until all of its threads wait for
// another block, but the first also stops wherever it has arrived at the cluster's barrier, until the others have gone on
// as far as they can: so a wait that is missing and an arrival that comes too early show. What a block has in shared memory
// is lost when it ends.
template <typename F>
void run_cluster(F kernel, int first, int together) {
    static F* running;
    static int block, turn, left, left_in[CLUSTER], idle;
    running = &kernel, left = together, idle = 0;
    cluster = Barrier();
    for (Barrier& barrier : warps) barrier = Barrier();
    for (block = 0; block < together; block++) left_in[block] = THREADS, blocks[block] = Barrier();
    for (turn = 0; turn < together * THREADS; turn++) state[turn] = NEW, arrived[turn] = false, awaited[turn] = nullptr;
    for (block = together - 1; left && !fault; block = (block + together - 1) % together) {
        visit++;
        if (idle++ == together) fault = "no thread can go on: not all have reached a barrier";
        do {
            progress = false;
            for (turn = 0; turn < THREADS && !fault; turn++) {
                self = block * THREADS + turn, threadIdx.x = turn, blockIdx.x = first + block;
                if (state[self] == DONE || _setjmp(scheduler)) continue;
                if (state[self] == WAITING) _longjmp(waiting[self], 1);
                state[self] = WAITING, progress = true;
                getcontext(&context);
                context.uc_stack.ss_sp = stacks + static_cast<size_t>(self) * stack_bytes;
                context.uc_stack.ss_size = stack_bytes;
                makecontext(&context, (void (*)()) + [] {
                    (*running)();
                    state[self] = DONE, progress = true;
                    if (--left_in[block] == 0) left--, memset(memory + block * block_memory, 0xff, sizeof(memory) / CLUSTER);
                    _longjmp(scheduler, 1);
                }, 0);
                setcontext(&context);
            }
            if (progress) idle = 0;
        } while (progress && !fault);
    }
}

// Runs a grid, clusters from the last on: none may wait for one that a GPU might begin later. Returns a fault, or null.
template <typename F>
const char* run(F kernel, int blocks, int together) {
    fault = nullptr;
    for (int i = 0; i < blocks && !fault; i += together) run_cluster(kernel, together > 1 ? blocks - together - i : i, together);
    return fault;
}
}  // namespace fibres

static void __syncthreads() { fibres::blocks[fibres::self / THREADS].wait(THREADS); }
#define SHARED_MEMORY float4* const memory = ::memory + fibres::self / THREADS * block_memory
static int cluster_rank() { return fibres::self / THREADS; }
static void cluster_arrive() {
    fibres::Barrier& barrier = fibres::cluster;
    if (fibres::arrived[fibres::self]) fibres::fail("a thread arrives at a cluster's barrier twice without a wait");
    fibres::arrived[fibres::self] = true, fibres::arrived_in[fibres::self] = barrier.generation;
    if (++barrier.arrived == fibres::count) barrier.arrived = 0, barrier.generation++;
    for (unsigned now = fibres::visit; fibres::self < THREADS && fibres::visit == now;) fibres::wait_turn();
    fibres::progress = true;
}
static void cluster_wait() {
    if (!fibres::arrived[fibres::self]) fibres::fail("a thread waits at a cluster's barrier without an arrival");
    while (fibres::arrived_in[fibres::self] == fibres::cluster.generation) fibres::wait_turn();
    fibres::arrived[fibres::self] = false, fibres::progress = true;
}
template <typename T>
static T load_from(int rank, const T* p) {
    return *(const T*)((const float4*)p + (rank - cluster_rank()) * block_memory);
}
template <typename T>
static T __ldcg(const T* p) { return *p; }
static void wait_warp() { fibres::warps[fibres::self / 32].wait(32); }
static float __shfl_xor_sync(unsigned, float value, int mask) {
    fibres::exchanged[0][fibres::self] = value;
    wait_warp();
    float other = fibres::exchanged[0][fibres::self ^ mask];
    wait_warp();
    return other;
}
static float __shfl_sync(unsigned, float value, int from) {
    fibres::exchanged[0][fibres::self] = value;
    wait_warp();
    float other = fibres::exchanged[0][fibres::self / 32 * 32 + from];
    wait_warp();
    return other;
}
static unsigned __ballot_sync(unsigned, bool value) {
    fibres::exchanged[0][fibres::self] = value;
    wait_warp();
    unsigned all = 0;
    for (int i = 0; i < 32; i++) all |= (unsigned)(fibres::exchanged[0][fibres::self / 32 * 32 + i] != 0) << i;
    wait_warp();
    return all;
}
static bool __any_sync(unsigned, bool value) { return __ballot_sync(~0u, value) != 0; }
static void __syncwarp() { wait_warp(); }
static int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <typename T>
static T __shfl_sync(unsigned, T value, int lane) {
    static_assert(sizeof(T) == 4);
    memcpy(&fibres::exchanged[0][fibres::self], &value, 4);
    wait_warp();
    T other;
    memcpy(&other, &fibres::exchanged[0][fibres::self / 32 * 32 + lane], 4);
    wait_warp();
    return other;
}
static unsigned atomicAdd(unsigned* p, unsigned value) {
    unsigned before = *p;
    *p += value;
    return before;
}
static float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static float reciprocal(float x) { return 1.0f / x; }
static float ex2(float x) { return exp2f(x); }
template <typename T>
static void forget(T&) {}
template <typename T>
static void hold(T*&) {}
static void hold(int&) {}
static uint2 load_two(const void* p) { return *(const uint2*)p; }
static uint4 load_four(const void* p) { return *(const uint4*)p; }
static void await_flag(const unsigned* p, unsigned value) {
    if (*p != value) fibres::fail("a block waits for one that may not have begun, or for what none writes");
    fibres::awaited[fibres::self] = p;
}
static void copies_done() {}
template <int WORDS>
static void copy(unsigned* to, const void* from) { memcpy(to, from, 4 * WORDS); }
static void load_turned(unsigned (&words)[4], const unsigned* row) {
    static const unsigned* rows[fibres::count];
    unsigned self = fibres::self, warp = self / 32 * 32, column = self % 32 / 4, first = self % 4 * 2;
    rows[self] = row;
    wait_warp();
    for (int m = 0; m < 4; m++) {
        auto element = [&](int r) { return (unsigned)((const unsigned short*)rows[warp + 8 * m + r])[column]; };
        words[m] = element(first) | element(first + 1) << 16;
    }
    wait_warp();
}
static unsigned turn_matrix(unsigned word) {
    static unsigned given[fibres::count];
    unsigned self = fibres::self, warp = self / 32 * 32, column = self % 32 / 4, first = self % 4 * 2;
    given[self] = word;
    wait_warp();
    auto element = [&](int row) { return given[warp + 4 * row + column / 2] >> 16 * (column % 2) & 0xffffu; };
    unsigned turned = element(first) | element(first + 1) << 16;
    wait_warp();
    return turned;
}
static void write_flag(unsigned* p, unsigned value) {
    if (*p + 1 != value) fibres::fail("a flag is not the turn after its last: blocks share it that are not of one chain");
    if (value > 1 && fibres::awaited[fibres::self] != p) fibres::fail("a block did not wait for its turn");
    *p = value;
}

static unsigned short to_bfloat16(float x) {
    unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#if ELEMENT == 2
static float narrowed_bits_to_float(unsigned bits) { unsigned short b = bits; _Float16 x; memcpy(&x, &b, 2); return x; }
static unsigned narrow(float value) { _Float16 x = value; unsigned short b; memcpy(&b, &x, 2); return b; }
#else
static float narrowed_bits_to_float(unsigned bits) { return __uint_as_float(bits << 16); }
static unsigned narrow(float x) { return to_bfloat16(x); }
#endif

static unsigned narrow_pair(float first, float second) { return narrow(first) | narrow(second) << 16; }

// mma.m16n8k8 on TF32, whose operands lose their last 13 bits.
static void mma(float& d0, float& d1, float& d2, float& d3, float a0, float a1, float a2, float a3, float b0, float b1) {
    unsigned self = fibres::self, warp = self / 32 * 32, lane = self % 32;
    float given[6] = {a0, a1, a2, a3, b0, b1}, *sums[4] = {&d0, &d1, &d2, &d3};
    for (int i = 0; i < 6; i++) fibres::exchanged[i][self] = __uint_as_float(__float_as_uint(given[i]) & 0xffffe000u);
    wait_warp();
    for (int which = 0; which < 2; which++)  // rows lane / 4 and 8 + lane / 4
        for (int column = 0; column < 2; column++)
            for (int k = 0; k < 8; k++)
                *sums[2 * which + column] += fibres::exchanged[which + k / 4 * 2][warp + lane / 4 * 4 + k % 4] *
                                             fibres::exchanged[4 + k / 4][warp + (lane % 4 * 2 + column) * 4 + k % 4];
    wait_warp();
}
