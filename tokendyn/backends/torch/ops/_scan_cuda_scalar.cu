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
// Everything is channels x tokens or channels x n. In the operand layouts of `mma`, with g = lane / 4 and q = lane % 4, a
// lane holds of channels 2g and 2g + 1 the tokens 4q to 4q + 3: as a left operand and as a result alike, because the order
// of the summed index is free. So no result is moved between lanes before it enters the next product.
//
// Compiled at run time with the common text's options and OWNER, how a lane's eight elements are loaded: by runs of tokens,
// by pairs of channels, or SINGLE ones.

#define WARPS (THREADS / 32)
#define CHUNK 16
#define SPAN (CHUNK * WARPS)
#define ROWS 16
#define MOST_TILES 6
#define NT (STATE / 8)
#define ENTRIES (ROWS * STATE)  // of a tile's state
#define LIMIT (ELEMENT == 0 ? 32.0f : 60.0f)
#define TOKEN_RUNS 0
#define SINGLE 1
#define CHANNEL_RUNS 2
#define WORDS (ELEMENT == 0 || OWNER == SINGLE ? 8 : 4)
#define MATRIX_WORDS (ELEMENT == 0 ? 4 : 2)
#define TURN_PITCH (STATE > 16 ? STATE : 16)
#define TURNED (ROWS * TURN_PITCH + 16)
#define MATRIX_PITCH (CHUNK + 4)
#define SQUARE (CHUNK * CHUNK)

// The number nearest to a float32 that TF32 holds. (What is not a number may lose that here, but not in x - nearest(x).)
__device__ __forceinline__ float nearest(float x) { return high_part(__uint_as_float(__float_as_uint(x) + 0x1000u)); }

// An operand of a product. In 16-bit elements it enters as TF32: cut after 10 bits, so made larger by the mean of what is
// cut (values that TF32 holds are unchanged). In float32 see `product`.
__device__ __forceinline__ float operand(float x) { return ELEMENT == 0 ? x : x * (1.0f + 0.7213f / 2048); }
// The same where other arithmetic needs the very number that the product sees.
__device__ __forceinline__ float exact_operand(float x) { return ELEMENT == 0 ? x : high_part(operand(x)); }

// In float32 operands enter as sums of two numbers that TF32 holds. The product of the second ones is left out where it is
// no more than rounding: but not in C_t . B_s, whose terms may cancel.
template <bool WHOLE = false>
__device__ __forceinline__ void product(float& d0, float& d1, float& d2, float& d3, float a0, float a1, float a2, float a3, float b0, float b1) {
#if ELEMENT == 0
    float c0 = nearest(a0), c1 = nearest(a1), c2 = nearest(a2), c3 = nearest(a3), e0 = nearest(b0), e1 = nearest(b1);
    if (WHOLE) mma(d0, d1, d2, d3, a0 - c0, a1 - c1, a2 - c2, a3 - c3, b0 - e0, b1 - e1);
    mma(d0, d1, d2, d3, a0 - c0, a1 - c1, a2 - c2, a3 - c3, e0, e1);
    mma(d0, d1, d2, d3, c0, c1, c2, c3, b0 - e0, b1 - e1);
    mma(d0, d1, d2, d3, c0, c1, c2, c3, e0, e1);
#else
    mma(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1);
#endif
}

// Column g of the j-th eight columns of a matrix of 8T: of a lane's 2T neighbouring columns, eights have two each.
template <int T>
__device__ __forceinline__ int column(int g, int j) { return g / 2 * 2 * T + 2 * j + g % 2; }

// A lane's share of a 16 x 8T matrix: rows g and g + 8, columns 2T q to 2T q + 2T - 1.
template <int T>
struct Tile {
    float v[2][2 * T];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 2 * T; i++) v[h][i] = 0.0f;
    }
    template <typename F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 2 * T; i++) f(v[h][i], h, i);
    }
    // Row-major, `pitch` floats a row.
    __device__ __forceinline__ void read(const float* from, int pitch) {
        int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 2 * T; i += T > 1 ? 4 : 2) {
                const float* at = from + (g + 8 * h) * pitch + 2 * T * q + i;
                if (T > 1) {
                    float4 four = *(const float4*)at;
                    v[h][i] = four.x, v[h][i + 1] = four.y, v[h][(i + 2) % (2 * T)] = four.z, v[h][(i + 3) % (2 * T)] = four.w;
                } else {
                    float2 two = *(const float2*)at;
                    v[h][i] = two.x, v[h][i + 1] = two.y;
                }
            }
    }
    __device__ __forceinline__ void write(float* to, int pitch) const {
        int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 2 * T; i += T > 1 ? 4 : 2) {
                float* at = to + (g + 8 * h) * pitch + 2 * T * q + i;
                if (T > 1)
                    *(float4*)at = make_float4(v[h][i], v[h][i + 1], v[h][(i + 2) % (2 * T)], v[h][(i + 3) % (2 * T)]);
                else
                    *(float2*)at = make_float2(v[h][i], v[h][i + 1]);
            }
    }
};
typedef Tile<2> Tokens;
typedef Tile<NT> State;

// A lane's share of a right operand, 8K x 8T: rows 2K q + 2k + c, columns column<T>(g, j).
template <int K, int T>
struct Right {
    float v[K][T][2];
    __device__ __forceinline__ float& at(int i) { return v[i / (2 * T)][i / 2 % T][i % 2]; }
    // In shared memory: all lanes' first four numbers, then their next four...
    __device__ __forceinline__ void read(const float* from) {
#pragma unroll
        for (int i = 0; i < 2 * K * T; i += 4) {
            float4 four = *(const float4*)(from + i * 32 + threadIdx.x % 32 * 4);
            at(i) = four.x, at(i + 1) = four.y, at(i + 2) = four.z, at(i + 3) = four.w;
        }
    }
    __device__ __forceinline__ void write(float* to) {
#pragma unroll
        for (int i = 0; i < 2 * K * T; i += 4)
            *(float4*)(to + i * 32 + threadIdx.x % 32 * 4) = make_float4(at(i), at(i + 1), at(i + 2), at(i + 3));
    }
};

template <int K, int T>
__device__ __forceinline__ void multiply(Tile<T>& sum, const Tile<K>& a, const Right<K, T>& b) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int j = 0; j < T; j++)
            product(sum.v[0][2 * j], sum.v[0][2 * j + 1], sum.v[1][2 * j], sum.v[1][2 * j + 1], a.v[0][2 * k], a.v[1][2 * k],
                    a.v[0][2 * k + 1], a.v[1][2 * k + 1], b.v[k][j][0], b.v[k][j][1]);
}
// The same with a left operand that lies as a right one: rows column<2>(g, 0) and column<2>(g, 1) of the product.
template <bool WHOLE = false, int K, int T>
__device__ __forceinline__ void multiply(Tile<T>& sum, const Right<K, 2>& a, const Right<K, T>& b) {
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int j = 0; j < T; j++)
            product<WHOLE>(sum.v[0][2 * j], sum.v[0][2 * j + 1], sum.v[1][2 * j], sum.v[1][2 * j + 1], a.v[k][0][0], a.v[k][1][0],
                           a.v[k][0][1], a.v[k][1][1], b.v[k][j][0], b.v[k][j][1]);
}

// Turns a matrix of channels x columns so that channels are summed over: rows q, q + 4, q + 8, q + 12 of those in memory.
// Rows lie so that neither way two lanes meet in a bank.
template <int T>
__device__ __forceinline__ Right<2, T> turned(const Tile<T>& tile, float* scratch) {
    constexpr int pitch = T > 2 ? 8 * T : 16;
    int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 2 * T; i += 2) {
            int row = g + 8 * h;
            *(float2*)(scratch + row * pitch + row / 2 * 2 + 2 * T * q + i) = make_float2(tile.v[h][i], tile.v[h][i + 1]);
        }
    __syncwarp();
    Right<2, T> right;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int j = 0; j < T; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                int row = 8 * k + 4 * c + q;
                right.v[k][j][c] = scratch[row * pitch + row / 2 * 2 + column<T>(g, j)];
            }
    return right;
}

// What a block works on: tiles of 16 channels, and tokens from `first` to `last`.
struct Block {
    int batch, group, tile, segment, rows, tiles, first, last;
    i64 channel;
    int stop;  // the sequence's length
    __device__ __forceinline__ Block(const Args& p, int index) {
        tile = index % (int)p.tiles, index /= (int)p.tiles;
        segment = index % (int)p.segments, index /= (int)p.segments;
        group = index % (int)p.groups, batch = index / (int)p.groups;
        int most = (int)p.block_rows;
        channel = group * p.group_size + (i64)tile * most;
        rows = min((int)p.group_size - tile * most, most);
        tiles = (rows + ROWS - 1) / ROWS;
        first = segment * (int)p.segment_tokens;
        last = min(first + (int)p.segment_tokens, (int)p.length);
        stop = p.lengths ? (int)((const i64*)p.lengths)[batch] : (int)p.length;
    }
    // Where the first channel lies in an array (b, slots, d, STATE).
    __device__ __forceinline__ float* slot(const Args& p, i64 array, i64 slots, i64 index) const {
        return (float*)array + ((batch * slots + index) * p.channels + channel) * STATE;
    }
};

// An entry of tiles' states that a thread passes from warp to warp: of row g + 8h, which is channel 2g + h of its tile.
struct Entry {
    int number, channel, n;
    bool exists;  // some tiles have fewer entries than the block has threads
    __device__ __forceinline__ explicit Entry(int k) {
        number = threadIdx.x + k * THREADS;
        exists = ENTRIES % THREADS == 0 || number < ENTRIES;
        channel = number / STATE % 8 * 2 + number / STATE / 8, n = number % STATE;
    }
    __device__ __forceinline__ bool within(const Block& block, int tile) const { return exists && tile * ROWS + channel < block.rows; }
    // Where it lies from a slot's first channel on, and in a user's (b, d, N) array.
    __device__ __forceinline__ int offset(int tile) const { return (tile * ROWS + channel) * STATE + n; }
    __device__ __forceinline__ float* given(const Args& p, const Block& block, i64 array, int tile) const {
        return array && within(block, tile) && n < p.state ? (float*)array + (block.batch * p.channels + block.channel + tile * ROWS + channel) * p.state + n : nullptr;
    }
};
#define OWN_ENTRIES ((ENTRIES + THREADS - 1) / THREADS)

// A lane's eight elements as they are loaded.
struct Eight {
    unsigned words[WORDS];
    __device__ __forceinline__ float get(int h, int i) const {
#if ELEMENT == 0
        return __uint_as_float(words[4 * h + i]);
#else
        unsigned word = OWNER == SINGLE ? words[4 * h + i] : OWNER == TOKEN_RUNS ? words[2 * h + i / 2] : words[i];
        bool upper = OWNER == SINGLE ? false : OWNER == TOKEN_RUNS ? i % 2 : h;
#if ELEMENT == 1
        return __uint_as_float(upper ? word & 0xffff0000u : word << 16);
#else
        return narrowed_bits_to_float(upper ? word >> 16 : word & 0xffffu);
#endif
#endif
    }
    __device__ __forceinline__ void set_bits(int h, int i, element x) {
#if ELEMENT == 0
        words[4 * h + i] = __float_as_uint(x);
#else
        if (OWNER == SINGLE) {
            words[4 * h + i] = x;
        } else {
            unsigned& word = words[OWNER == TOKEN_RUNS ? 2 * h + i / 2 : i];
            word = (OWNER == TOKEN_RUNS ? i % 2 : h) ? (word & 0xffffu) | (unsigned)x << 16 : (unsigned)x;
        }
#endif
    }
    __device__ __forceinline__ element bits(int h, int i) const {
#if ELEMENT == 0
        return __uint_as_float(words[4 * h + i]);
#else
        if (OWNER == SINGLE) return (element)words[4 * h + i];
        unsigned word = words[OWNER == TOKEN_RUNS ? 2 * h + i / 2 : i];
        return (element)((OWNER == TOKEN_RUNS ? i % 2 : h) ? word >> 16 : word & 0xffffu);
#endif
    }
    __device__ __forceinline__ void forget() {
#pragma unroll
        for (int i = 0; i < WORDS; i++) ::forget(words[i]);
    }
    __device__ __forceinline__ explicit Eight() {}
    __device__ __forceinline__ explicit Eight(const Tokens& x) {
#if ELEMENT == 0
#pragma unroll
        for (int i = 0; i < 8; i++) words[i] = __float_as_uint(x.v[i / 4][i % 4]);
#else
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            words[i] = OWNER == SINGLE       ? narrow(x.v[i / 4 % 2][i % 4])
                       : OWNER == TOKEN_RUNS ? narrow_pair(x.v[i / 2 % 2][i % 2 * 2], x.v[i / 2 % 2][i % 2 * 2 + 1])
                                             : narrow_pair(x.v[0][i % 4], x.v[1][i % 4]);
#endif
    }
};

// A (b, d, L) array as a lane sees it.
struct View {
    element* base;  // the block's first channel
    unsigned lane;  // from there to the lane's first element; the launch sees to it that this is enough
    i64 row, token;
    bool runs;
    __device__ __forceinline__ View(i64 address, i64 batch_stride, i64 row_stride, i64 token_stride, i64 runs_, const Block& block)
        : row(row_stride), token(token_stride), runs(OWNER != SINGLE && runs_ != 0) {
        base = (element*)address + block.batch * batch_stride + block.channel * row_stride;
        lane = threadIdx.x % 32 / 4 * 2 * (unsigned)row_stride + (threadIdx.x / 32 * CHUNK + threadIdx.x % 4 * 4) * (unsigned)token_stride;
    }
    __device__ __forceinline__ element* at(int tile, int span) const { return base + (tile * (ROWS * row) + span * token) + lane; }
    __device__ __forceinline__ Eight load(const Block& block, int tile, int span) const {
        const element* from = at(tile, span);
        int start = span + threadIdx.x / 32 * CHUNK, rows = block.rows - tile * ROWS - threadIdx.x % 32 / 4 * 2, tokens = block.last - start - threadIdx.x % 4 * 4;
        Eight got;
        if (runs && rows >= 2 && tokens >= 4) {
#if ELEMENT == 0 && OWNER == TOKEN_RUNS
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint4 v = *(const uint4*)(from + h * row);
                got.words[4 * h] = v.x, got.words[4 * h + 1] = v.y, got.words[4 * h + 2] = v.z, got.words[4 * h + 3] = v.w;
            }
#elif OWNER == TOKEN_RUNS
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint2 v = *(const uint2*)(from + h * row);
                got.words[2 * h] = v.x, got.words[2 * h + 1] = v.y;
            }
#elif ELEMENT == 0 && OWNER == CHANNEL_RUNS
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint2 v = *(const uint2*)(from + i * token);
                got.words[i] = v.x, got.words[4 + i] = v.y;
            }
#elif OWNER == CHANNEL_RUNS
#pragma unroll
            for (int i = 0; i < 4; i++) got.words[i] = *(const unsigned*)(from + i * token);
#endif
        } else {
            element single[8];
#pragma unroll
            for (int i = 0; i < 8; i++) single[i] = i / 4 < rows && i % 4 < tokens ? from[i / 4 * row + i % 4 * token] : (element)0;
#pragma unroll
            for (int i = 0; i < 8; i++) got.set_bits(i / 4, i % 4, single[i]);
        }
        return got;
    }
    __device__ __forceinline__ void store(const Tokens& values, const Block& block, int tile, int span) const {
        element* to = at(tile, span);
        int start = span + threadIdx.x / 32 * CHUNK, rows = block.rows - tile * ROWS - threadIdx.x % 32 / 4 * 2, tokens = block.last - start - threadIdx.x % 4 * 4;
        Eight out(values);
        if (runs && rows >= 2 && tokens >= 4) {
#if ELEMENT == 0 && OWNER == TOKEN_RUNS
#pragma unroll
            for (int h = 0; h < 2; h++)
                *(uint4*)(to + h * row) = make_uint4(out.words[4 * h], out.words[4 * h + 1], out.words[4 * h + 2], out.words[4 * h + 3]);
#elif OWNER == TOKEN_RUNS
#pragma unroll
            for (int h = 0; h < 2; h++) *(uint2*)(to + h * row) = make_uint2(out.words[2 * h], out.words[2 * h + 1]);
#elif ELEMENT == 0 && OWNER == CHANNEL_RUNS
#pragma unroll
            for (int i = 0; i < 4; i++) *(uint2*)(to + i * token) = make_uint2(out.words[i], out.words[4 + i]);
#elif OWNER == CHANNEL_RUNS
#pragma unroll
            for (int i = 0; i < 4; i++) *(unsigned*)(to + i * token) = out.words[i];
#endif
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i / 4 < rows && i % 4 < tokens) to[i / 4 * row + i % 4 * token] = out.bits(i / 4, i % 4);
        }
    }
};
#define VIEW(name) View(p.name, p.name##_b, p.name##_d, p.name##_l, p.name##_runs, block)

// B or C of a warp's 16 tokens: a lane's four tokens of n = column<NT>(g, j).
struct Matrix {
    const element* base;
    i64 row, token;
    unsigned lane;  // as in a View
    unsigned words[NT][MATRIX_WORDS];
    __device__ __forceinline__ Matrix(i64 address, i64 stride_b, i64 stride_g, i64 stride_n, i64 stride_l, const Block& block)
        : row(stride_n), token(stride_l) {
        base = (const element*)address + block.batch * stride_b + block.group * stride_g;
        lane = column<NT>(threadIdx.x % 32 / 4, 0) * (unsigned)stride_n + (threadIdx.x / 32 * CHUNK + threadIdx.x % 4 * 4) * (unsigned)stride_l;
    }
    __device__ __forceinline__ void load(const Args& p, int span) {
        int tokens = (int)p.length - span - (int)(threadIdx.x / 32 * CHUNK + threadIdx.x % 4 * 4);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            int n = column<NT>(threadIdx.x % 32 / 4, j);
            const element* from = base + (span * token + 2 * j * row) + lane;
            if (p.matrix_runs && tokens >= 4 && n < p.state) {
#if ELEMENT == 0
                uint4 v = *(const uint4*)from;
                words[j][0] = v.x, words[j][1] = v.y, words[j][2] = v.z, words[j][3] = v.w;
#else
                uint2 v = *(const uint2*)from;
                words[j][0] = v.x, words[j][1] = v.y;
#endif
            } else {
                element single[4];
#pragma unroll
                for (int i = 0; i < 4; i++) single[i] = i < tokens && n < p.state ? from[i * token] : (element)0;
#if ELEMENT == 0
#pragma unroll
                for (int i = 0; i < 4; i++) words[j][i] = __float_as_uint(single[i]);
#else
                words[j][0] = single[0] | (unsigned)single[1] << 16, words[j][1] = single[2] | (unsigned)single[3] << 16;
#endif
            }
        }
    }
    __device__ __forceinline__ float get(int j, int i) const {
#if ELEMENT == 0
        return __uint_as_float(words[j][i]);
#elif ELEMENT == 1
        return __uint_as_float(i % 2 ? words[j][i / 2] & 0xffff0000u : words[j][i / 2] << 16);
#else
        return narrowed_bits_to_float(i % 2 ? words[j][i / 2] >> 16 : words[j][i / 2] & 0xffffu);
#endif
    }
    // As operands: tokens x n, and n x tokens by way of shared memory; 0 past the sequence's end.
    __device__ __forceinline__ void turn(Right<2, NT>& by_token, Right<NT, 2>& by_n, float* scratch, int tokens) const {
        int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
        __syncwarp();
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) by_token.v[i / 2][j][i % 2] = get(j, i);
            if (tokens < CHUNK)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (4 * q + i >= tokens) by_token.v[i / 2][j][i % 2] = 0.0f;
            *(float4*)(scratch + column<NT>(g, j) * MATRIX_PITCH + 4 * q) =
                make_float4(by_token.v[0][j][0], by_token.v[0][j][1], by_token.v[1][j][0], by_token.v[1][j][1]);
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < NT; k++)
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) by_n.v[k][j][c] = scratch[(2 * NT * q + 2 * k + c) * MATRIX_PITCH + column<2>(g, j)];
    }
};
#define MATRIX(name) Matrix(p.name, p.name##_b, p.name##_g, p.name##_n, p.name##_l, block)

// What a block knows of its channels.
struct Rows {
    float bias[MOST_TILES * ROWS], rate[MOST_TILES * ROWS], A[MOST_TILES * ROWS], D[MOST_TILES * ROWS];
};
__device__ __forceinline__ void load_rows(Rows& rows, const Args& p, const Block& block) {
    for (int row = threadIdx.x; row < MOST_TILES * ROWS; row += THREADS) {
        bool exists = row < block.rows;
        i64 at = block.channel + row;
        rows.bias[row] = exists && p.bias ? ((const float*)p.bias)[at] : 0.0f;
        rows.A[row] = exists ? ((const float*)p.A)[at] : 0.0f;
        rows.rate[row] = -rows.A[row] * LOG2E;
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
        int g = threadIdx.x % 32 / 4, lane_q = threadIdx.x % 4, valid = min(block.stop, block.last) - start - 4 * lane_q;
        float2 bias = *(const float2*)(rows.bias + tile * ROWS + 2 * g), rate = *(const float2*)(rows.rate + tile * ROWS + 2 * g);
        step.each([&](float& v, int h, int i) { v = raw.get(h, i) + (h ? bias.y : bias.x); });
        if (p.softplus) step.each([&](float& v, int h, int i) { v = softplus(v); });
        if (min(block.stop, block.last) - start < CHUNK)
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
    // M: as an operand (s x t) in shared memory. In `scratch`, afterwards: y, dx and F (see `gradients`), sums over pairs
    // s < t of the chunk (forward: y alone, s <= t). G gets the sums over channels of dy_t x_s times the weight.
    template <bool GRADIENTS>
    __device__ __forceinline__ void run(const Tokens& s, const Tokens& x, const Tokens& dy, const float* M, unsigned resets, float* scratch, Tokens& G) {
        int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
        float *decays = scratch, *douts = scratch + SQUARE, *weighted = scratch + 2 * SQUARE;
        Tokens y, dx, crossing, &weight = to_end;
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
            const float* from = M + ((t / 4 * 2 + t % 2) * 4 + q) * 4 + t % 4 / 2 * 2;
            float m[4] = {from[0], from[1], from[128], from[129]}, sum_G = 0.0f;
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
        if (GRADIENTS) dx.write(scratch + SQUARE, CHUNK), crossing.write(scratch + 2 * SQUARE, CHUNK);
    }
};

// Loads two values of a lane's rows.
__device__ __forceinline__ float2 of_rows(const float* array, int tile) {
    return *(const float2*)(array + tile * ROWS + threadIdx.x % 32 / 4 * 2);
}

#define FORWARD_SCRATCH (STATE * MATRIX_PITCH > SQUARE ? STATE * MATRIX_PITCH : SQUARE)
struct ForwardShared {
    struct {
        float states[ENTRIES], scratch[FORWARD_SCRATCH], M[SQUARE];
    } of[WARPS];  // each warp's own; states are joined by all threads
    float carry[MOST_TILES][ENTRIES], across[MOST_TILES][ENTRIES];
    float decays[ROWS][WARPS];
    Rows rows;
};
static_assert(sizeof(ForwardShared) == FORWARD_BYTES, "the launch must know how much shared memory to ask for");

// Joins the states of a tile's chunks, PITCH floats apart: every slot gets the state before its chunk (backwards: after it). The decay
// across a chunk is negative where a packed sequence begins in it.
template <bool BACKWARDS, int PITCH>
__device__ __forceinline__ float join_chunks(float* states, const float (&decays)[ROWS][WARPS], int entry, float h, float* across) {
    float over[WARPS];
#pragma unroll
    for (int warp = 0; warp < WARPS; warp += 4) {
        float4 four = *(const float4*)&decays[entry / STATE][warp];
        over[warp] = four.x, over[warp + 1] = four.y, over[warp + 2] = four.z, over[warp + 3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        int warp = BACKWARDS ? WARPS - 1 - i : i;
        float local = states[warp * PITCH + entry], decay = over[warp];
        states[warp * PITCH + entry] = h;
#if PACKED
        h = decay < 0.0f ? local : fmaf(decay, h, local);
        if (across) *across = decay < 0.0f ? 0.0f : *across * decay;
#else
        h = fmaf(decay, h, local);
        if (across) *across *= decay;
#endif
    }
    return h;
}

// The states that a segment's blocks begin with: what another segment has left, or the user's.
__device__ __forceinline__ void begin_states(float (&carry)[MOST_TILES][ENTRIES], const Args& p, const Block& block, i64 given, int slot) {
    const float* slots = block.slot(p, p.slots, p.segments + 1, slot);
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; tile++)
#pragma unroll
        for (int k = 0; k < OWN_ENTRIES; k++) {
            Entry entry(k);
            const float* from = p.segments == 1 ? entry.given(p, block, given, tile) : entry.within(block, tile) ? slots + entry.offset(tile) : nullptr;
            if (entry.exists) carry[tile][entry.number] = from ? *from : 0.0f;
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
__device__ __forceinline__ void end_states(const float (&carry)[MOST_TILES][ENTRIES], const Args& p, const Block& block, i64 given) {
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; tile++)
#pragma unroll
        for (int k = 0; k < OWN_ENTRIES; k++) {
            Entry entry(k);
            float* to = entry.given(p, block, given, tile);
            if (to) *to = carry[tile][entry.number];
        }
}

// The scan of a block's segment. With OUTPUTS: y, states before every SPAN and the last state, from the true first state.
// Without: the state at the segment's end from zero, and the decay across it.
template <bool OUTPUTS>
__device__ __forceinline__ void forward(const Args& p) {
    extern __shared__ float4 memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
    Block block(p, blockIdx.x);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    auto& own = shared.of[warp];
    float* scratch = own.scratch;
    load_rows(shared.rows, p, block);
    if (OUTPUTS)
        begin_states(shared.carry, p, block, p.first_state, block.segment);
    else
        begin_segment(shared.carry, shared.across, block);
    View view_u = VIEW(u), view_delta = VIEW(delta), view_z = VIEW(z), view_y = VIEW(y);
    int start = block.first + warp * CHUNK;
    Eight next_u = view_u.load(block, 0, block.first), next_delta = view_delta.load(block, 0, block.first);
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
        float* kept = block.slot(p, p.states, p.chunks, span / SPAN);
        if (span + SPAN < block.last) {
            B.load(p, span + SPAN);
            if (OUTPUTS) C.load(p, span + SPAN);
        }
        for (int tile = 0; tile < block.tiles; tile++) {
            Tokens u, z;
            u.each([&](float& v, int h, int i) { v = next_u.get(h, i); });
            Steps steps(p, block, shared.rows, next_delta, u, tile, start);
            bool more = tile + 1 < block.tiles;
            if (more || span + SPAN < block.last) {  // the next tile's loads are under way while this one is worked on
                int next_tile = more ? tile + 1 : 0, next_span = more ? span : span + SPAN;
                next_u = view_u.load(block, next_tile, next_span), next_delta = view_delta.load(block, next_tile, next_span);
            }
            Eight own_z;
            if (OUTPUTS && p.z) own_z = view_z.load(block, tile, span);
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
                M.write(own.M);
                walk.run<false>(steps.s, steps.x, steps.x, own.M, resets, scratch, factor);
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
                if (OUTPUTS && p.keep && entry.within(block, tile)) kept[entry.offset(tile)] = carry;
                carry = join_chunks<false, sizeof(shared.of[0]) / 4>(shared.of[0].states, shared.decays, entry.number, carry, OUTPUTS ? nullptr : &shared.across[tile][entry.number]);
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
            out.each([&](float& v, int h, int i) { v = fmaf(h ? D.y : D.x, u.v[h][i], v); });
            if (p.z) out.each([&](float& v, int h, int i) { v *= own_z.get(h, i) * sigmoid(own_z.get(h, i)); });
            if (block.stop - start < CHUNK)
                out.each([&](float& v, int h, int i) {
                    if (4 * q + i >= block.stop - start) v = 0.0f;
                });
            view_y.store(out, block, tile, span);
        }
    }
    if (!OUTPUTS)
        end_segment(shared.carry, shared.across, p, block);
    else if (block.last == p.length)
        end_states(shared.carry, p, block, p.last_state);
}

#define BLOCKS (STATE > 16 ? 1 : 512 / THREADS)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) outputs(const __grid_constant__ Args p) { forward<true>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) segment_ends(const __grid_constant__ Args p) { forward<false>(p); }

// The gradient that reaches y before the gate.
__device__ __forceinline__ void load_gradient(Tokens& dout, const Block& block, const Eight& dy, const Eight& z, int start) {
    int valid = min(block.stop, block.last) - start - threadIdx.x % 4 * 4;
    dout.each([&](float& v, int h, int i) {
        v = dy.get(h, i);
#if GATED
        v *= z.get(h, i) * sigmoid(z.get(h, i));
#endif
    });
    if (min(block.stop, block.last) - start < CHUNK)
        dout.each([&](float& v, int h, int i) {
            if (i >= valid) v = 0.0f;
        });
}

// Gradient of the state before a segment if that of the state after it were 0, and the decay across the segment.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) segment_coends(const __grid_constant__ Args p) {
    extern __shared__ float4 memory[];
    ForwardShared& shared = *(ForwardShared*)memory;
    Block block(p, blockIdx.x);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    auto& own = shared.of[warp];
    float* scratch = own.scratch;
    load_rows(shared.rows, p, block);
    begin_segment(shared.carry, shared.across, block);
    View view_dy = VIEW(dy), view_delta = VIEW(delta), view_z = VIEW(z);
    int span = block.first + (block.last - 1 - block.first) / SPAN * SPAN, start = span + warp * CHUNK;
    Eight next_dy = view_dy.load(block, 0, span), next_delta = view_delta.load(block, 0, span), own_z;
    Matrix C = MATRIX(C);
    C.load(p, span);
    __syncthreads();
    for (; span >= block.first; span -= SPAN, start -= SPAN) {
        Right<2, NT> C_by_token;
        Right<NT, 2> C_by_n;
        C.turn(C_by_token, C_by_n, scratch, block.stop - start);
        unsigned resets = find_resets(p, block, start);
        if (span > block.first) C.load(p, span - SPAN);
        for (int tile = 0; tile < block.tiles; tile++) {
            Tokens dout;
#if GATED
            own_z = view_z.load(block, tile, span);
#endif
            load_gradient(dout, block, next_dy, own_z, start);
            Steps steps(p, block, shared.rows, next_delta, dout, tile, start);
            bool more = tile + 1 < block.tiles;
            if (more || span > block.first) {
                int next_tile = more ? tile + 1 : 0, next_span = more ? span : span - SPAN;
                next_dy = view_dy.load(block, next_tile, next_span), next_delta = view_delta.load(block, next_tile, next_span);
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
                carry = join_chunks<true, sizeof(shared.of[0]) / 4>(shared.of[0].states, shared.decays, entry.number, carry, &shared.across[tile][entry.number]);
            }
            __syncthreads();
        }
    }
    end_segment(shared.carry, shared.across, p, block);
}

#define BACKWARD_SCRATCH 768  // floats a warp: a walk's, B or C (n x tokens), or a tile that is turned
static_assert(BACKWARD_SCRATCH >= 3 * SQUARE && BACKWARD_SCRATCH >= STATE * MATRIX_PITCH && BACKWARD_SCRATCH >= TURNED, "");
#define OPERAND (CHUNK * STATE)
struct BackwardShared {
    struct {
        float states[ENTRIES], costates[ENTRIES], scratch[BACKWARD_SCRATCH];
        float M[2][SQUARE];                    // s x t and t x s
        float B[2][OPERAND], C[2][OPERAND];    // by token and by n
        float diagonal[CHUNK];
    } of[WARPS];  // each warp's own; states and costates are joined by all threads
    float carry[MOST_TILES][ENTRIES];
    float decays[ROWS][WARPS];
    float sums[MOST_TILES][3][WARPS][ROWS];
    Rows rows;
    int index;
};
static_assert((sizeof(BackwardShared) + 15) / 16 * 16 == BACKWARD_BYTES, "the launch must know how much shared memory to ask for");

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
        if (threadIdx.x == 0) shared.index = (int)atomicAdd((unsigned*)p.counters, 1u);
        __syncthreads();
        index = shared.index;
    }
    Block block(p, index);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    auto& own = shared.of[warp];
    float* scratch = own.scratch;
    load_rows(shared.rows, p, block);
    begin_states(shared.carry, p, block, p.last_gradient, block.segment + 1);
    for (int i = threadIdx.x; i < MOST_TILES * 3 * WARPS * ROWS; i += THREADS) (&shared.sums[0][0][0][0])[i] = 0.0f;
    int chained = block.tile % (int)p.chain;
    i64 part_index = ((i64)block.batch * p.groups + block.group) * p.parts + block.tile / (int)p.chain;
    float* part = (float*)p.parts_out + part_index * 2 * STATE * p.length;
    unsigned* flags = (unsigned*)p.counters + 1 + part_index * p.chunks;
    View view_u = VIEW(u), view_delta = VIEW(delta), view_z = VIEW(z), view_dy = VIEW(dy);
    View view_du = VIEW(du), view_ddelta = VIEW(ddelta), view_dz = VIEW(dz);
    int span = block.first + (block.last - 1 - block.first) / SPAN * SPAN, start = span + warp * CHUNK;
    Eight next_u = view_u.load(block, 0, span), next_delta = view_delta.load(block, 0, span), next_dy = view_dy.load(block, 0, span);
    Matrix B = MATRIX(B), C = MATRIX(C);
    B.load(p, span), C.load(p, span);
    __syncthreads();
    for (; span >= block.first; span -= SPAN, start -= SPAN) {
        {
            Right<2, NT> by_token;
            Right<NT, 2> B_by_n, C_by_n;
            B.turn(by_token, B_by_n, scratch, block.stop - start);
            by_token.write(own.B[0]), B_by_n.write(own.B[1]);
            C.turn(by_token, C_by_n, scratch, block.stop - start);
            by_token.write(own.C[0]), C_by_n.write(own.C[1]);
            Tokens products;
            Right<2, 2> M;
            products.clear();
            multiply<true>(products, C_by_n, B_by_n);
            products.each([&](float& v, int h, int i) {
                int t = column<2>(g, h), s = 4 * q + i;
                if (s == t) own.diagonal[t] = v;
                M.v[i / 2][h][i % 2] = s < t ? operand(v) : 0.0f;
            });
            M.write(own.M[0]);
            products.clear();
            multiply<true>(products, B_by_n, C_by_n);
            products.each([&](float& v, int h, int i) { M.v[i / 2][h][i % 2] = column<2>(g, h) < 4 * q + i ? operand(v) : 0.0f; });
            M.write(own.M[1]);
        }
        unsigned resets = find_resets(p, block, start);
        const float* kept_states = block.slot(p, p.states, p.chunks, span / SPAN);
        if (span > block.first) {
            B.load(p, span - SPAN), C.load(p, span - SPAN);
        }
        __syncwarp();
        Tokens G;  // t x s: sums over channels of dy_t x_s times the weight
        State dB, dC;
        G.clear(), dB.clear(), dC.clear();
        for (int tile = 0; tile < block.tiles; tile++) {
            float kept[OWN_ENTRIES];
#pragma unroll
            for (int k = 0; k < OWN_ENTRIES; k++) {
                Entry entry(k);
                kept[k] = entry.within(block, tile) ? kept_states[entry.offset(tile)] : 0.0f;
            }
            Eight own_u = next_u, own_delta = next_delta, own_dy = next_dy, own_z;
#if GATED
            own_z = view_z.load(block, tile, span);
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
#pragma unroll
            for (int h = 0; h < 2; h++) scale[h] = whole[h] = ex2(-steps.total[h]);
            if (walks) {
                Walk walk;
                walk.run<true>(steps.s, steps.x, dout, own.M[0], resets, scratch, G);
                out_factor = walk.to_end, in_factor = walk.from_start;
                sent.each([&](float& v, int h, int i) { v = together(resets, 4 * q + i, CHUNK - 1) ? exact_operand(steps.x.v[h][i] * out_factor.v[h][i]) : 0.0f; });
                received.each([&](float& v, int h, int i) { v = together(resets, -1, 4 * q + i) ? exact_operand(dout.v[h][i] * in_factor.v[h][i]) : 0.0f; });
#pragma unroll
                for (int h = 0; h < 2; h++) scale[h] = 1.0f, whole[h] = resets ? -1.0f : walk.whole[h];
            }
            {
                State local;
                Right<2, NT> by_token;
                local.clear();
                by_token.read(own.B[0]);
                multiply(local, sent, by_token);
                local.each([&](float& v, int h, int i) { v *= scale[h]; });
                local.write(own.states, STATE);
                local.clear();
                by_token.read(own.C[0]);
                multiply(local, received, by_token);
                local.write(own.costates, STATE);
            }
            if (q == 0) shared.decays[g][warp] = whole[0], shared.decays[g + 8][warp] = whole[1];
            __syncthreads();
#pragma unroll
            for (int k = 0; k < OWN_ENTRIES; k++) {
                Entry entry(k);
                if (!entry.exists) break;
                float& carry = shared.carry[tile][entry.number];
                join_chunks<false, sizeof(shared.of[0]) / 4>(shared.of[0].states, shared.decays, entry.number, kept[k], nullptr);
                carry = join_chunks<true, sizeof(shared.of[0]) / 4>(shared.of[0].costates, shared.decays, entry.number, carry, nullptr);
            }
            __syncthreads();
            State before, after;  // the state before the chunk; the gradient of the state after it
            before.read(own.states, STATE);
            after.read(own.costates, STATE);
            before.each([&](float& v, int h, int i) { v = exact_operand(v); });
            after.each([&](float& v, int h, int i) { v = exact_operand(v * scale[h]); });
            Tokens y, dx;
            y.clear(), dx.clear();
            {
                Right<NT, 2> by_n;
                by_n.read(own.C[1]);
                multiply(y, before, by_n);
                by_n.read(own.B[1]);
                multiply(dx, after, by_n);
            }
            Tokens F;
            if (!walks) {
                float through[2] = {0.0f, 0.0f};  // what flows across the chunk's end
                before.each([&](float& v, int h, int i) { through[h] = fmaf(v, after.v[h][i], through[h]); });
                sent.each([&](float& v, int h, int i) { through[h] = fmaf(v, dx.v[h][i], through[h]); });
                Right<2, 2> M;
                M.read(own.M[0]);
                multiply(y, sent, M);
                M.read(own.M[1]);
                multiply(dx, received, M);
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
                y_inside.read(scratch, CHUNK), dx_inside.read(scratch + SQUARE, CHUNK), F.read(scratch + 2 * SQUARE, CHUNK);
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
                    float carried = 0.0f;
#pragma unroll
                    for (int i = 0; i < 2 * NT; i++) carried += resets ? 0.0f : whole[h] * before.v[h][i] * after.v[h][i];
                    carried = add_over_quad(carried);
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
                multiply(dB, sent_turned, turned(after, scratch));
                multiply(dC, received_turned, turned(before, scratch));
                if (!walks) multiply(G, received_turned, sent_turned);
            }

            bool more = tile + 1 < block.tiles;
            if (more || span > block.first) {  // the next tile's loads are under way while this one's gradients are made
                int next_tile = more ? tile + 1 : 0, next_span = more ? span : span - SPAN;
                next_u = view_u.load(block, next_tile, next_span), next_delta = view_delta.load(block, next_tile, next_span);
                next_dy = view_dy.load(block, next_tile, next_span);
            }

            float2 D = of_rows(shared.rows.D, tile), A = of_rows(shared.rows.A, tile), bias = of_rows(shared.rows.bias, tile);
            float4 four = *(const float4*)(own.diagonal + 4 * q);
            float diagonal[4] = {four.x, four.y, four.z, four.w};
            own_u.forget(), own_dy.forget();
            u.each([&](float& v, int h, int i) { v = own_u.get(h, i); });
            load_gradient(dout, block, own_dy, own_z, start);
            int valid = min(block.stop, block.last) - start - 4 * q;
            if (min(block.stop, block.last) - start < CHUNK)
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
            if (min(block.stop, block.last) - start < CHUNK)
                F.each([&](float& v, int h, int i) {
                    if (i >= valid) v = dx.v[h][i] = y.v[h][i] = 0.0f;
                });
            F.each([&](float& v, int h, int i) { sums[h][2] += v; });
            view_du.store(dx, block, tile, span);
            view_ddelta.store(F, block, tile, span);
#if GATED
            view_dz.store(y, block, tile, span);
#endif
#pragma unroll
            for (int which = 0; which < 3; which++) {  // lanes with odd q take the second channel
                float sum = (q & 1 ? sums[1][which] : sums[0][which]) + __shfl_xor_sync(~0u, q & 1 ? sums[0][which] : sums[1][which], 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (q < 2) shared.sums[tile][which][warp][2 * g + q] += sum;
            }
        }

        // dC_t += sum_{s <= t} G_ts B_s, dB_s += sum_{t >= s} G_ts C_t.
        G.each([&](float& v, int h, int i) {
            v = 4 * q + i <= column<2>(g, h) ? operand(v) : 0.0f;
        });
        Right<2, NT> by_token;
        by_token.read(own.B[0]);
        multiply(dC, G, by_token);
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; h++) *(float4*)(scratch + column<2>(g, h) * MATRIX_PITCH + 4 * q) = make_float4(G.v[h][0], G.v[h][1], G.v[h][2], G.v[h][3]);
        __syncwarp();
        G.each([&](float& v, int h, int i) { v = scratch[(4 * q + i) * MATRIX_PITCH + column<2>(g, h)]; });
        by_token.read(own.C[0]);
        multiply(dB, G, by_token);
        if (block.stop - start < CHUNK) {
            dB.each([&](float& v, int h, int i) { v = column<2>(g, h) < block.stop - start ? v : 0.0f; });
            dC.each([&](float& v, int h, int i) { v = column<2>(g, h) < block.stop - start ? v : 0.0f; });
        }
        int chunk = span / SPAN;
        if (chained) {  // last, so that a block waits for its neighbour's sums alone, not for its work
            if (threadIdx.x == 0)
                while (read_flag(flags + chunk) != (unsigned)chained) {}
            __syncthreads();
        }
        float *part_B = part + (i64)start * STATE, *part_C = part_B + p.length * STATE;
        int tokens = (int)p.length - start;
        if (chained) add_part(dB, part_B, tokens), add_part(dC, part_C, tokens);
        store_part(dB, part_B, tokens), store_part(dC, part_C, tokens);
        if (p.chain > 1) {
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) write_flag(flags + chunk, chained + 1);
        }
    }
    if (block.segment == 0) end_states(shared.carry, p, block, p.dfirst);
    __syncthreads();
    i64 at = ((i64)block.batch * p.segments + block.segment) * p.channels + block.channel;
    for (int i = threadIdx.x; i < 3 * block.rows; i += THREADS) {
        int which = i / block.rows, row = i % block.rows;
        i64 target = which == 0 ? p.dA : which == 1 ? p.dD : p.dbias;
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += shared.sums[row / ROWS][which][w][row % ROWS];
        if (target) ((float*)target)[at + row] = sum;
    }
}
