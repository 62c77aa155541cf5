// Tiles of 16 channels x 16 tokens, or x n, as `mma` has them in a warp's lanes: products, and loads that bring elements to the
// lanes that need them.
//
// Everything is channels x tokens or channels x n. In the operand layouts of `mma`, with g = lane / 4 and q = lane % 4, a
// lane holds of channels 2g and 2g + 1 (rows g and g + 8) the tokens 4q to 4q + 3: as a left operand and as a result alike,
// because the order of the summed index is free. So no result is moved between lanes before it enters the next product.
//
// Compiled at run time with the common text's options, NARROW (states are kept in bfloat16) and OWNER, how a lane's eight elements are loaded: by runs of tokens,
// by runs of channels, or SINGLE ones. Runs of channels in 16 bits are PIECES: a lane loads eight channels of one token, and
// the warp turns the tile by way of shared memory. Channels g and g + 8 are then a lane's own.

#define WARPS (THREADS / 32)
#define CHUNK 16
#define ROWS 16
#define NT (STATE / 8)
#define ENTRIES (ROWS * STATE)  // of a tile's state
#define TOKEN_RUNS 0
#define SINGLE 1
#define CHANNEL_RUNS 2
#define PIECES (OWNER == CHANNEL_RUNS && ELEMENT != 0)
#define WORDS (ELEMENT == 0 ? 8 : 4)  // of a lane's eight elements
#define TILE_WORDS (32 * WORDS)
#define PIECE (PIECES ? 4 : OWNER == CHANNEL_RUNS ? WORDS / 4 : WORDS / 2)  // words that lie side by side
#define MATRIX_WORDS (ELEMENT == 0 ? 4 : 2)
#define TURNED (ROWS * CHUNK + 16)
#define MATRIX_PITCH (CHUNK + 4)
#define STATE_PITCH (STATE + 4)

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
// What a lane sets aside for itself, in the order in which products give it.
template <int T>
__device__ __forceinline__ void set_aside(float* to, const Tile<T>& x) {
#pragma unroll
    for (int j = 0; j < T; j++)
        *(float4*)(to + j * 128 + threadIdx.x % 32 * 4) = make_float4(x.v[0][2 * j], x.v[0][2 * j + 1], x.v[1][2 * j], x.v[1][2 * j + 1]);
}
template <int T>
__device__ __forceinline__ void take_back(Tile<T>& x, const float* from) {
#pragma unroll
    for (int j = 0; j < T; j++) {
        float4 four = *(const float4*)(from + j * 128 + threadIdx.x % 32 * 4);
        x.v[0][2 * j] = four.x, x.v[0][2 * j + 1] = four.y, x.v[1][2 * j] = four.z, x.v[1][2 * j + 1] = four.w;
    }
}
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

// Turns a matrix of channels x tokens so that channels are summed over: rows q, q + 4, q + 8, q + 12 of those in memory.
// Rows lie so that neither way two lanes meet in a bank.
__device__ __forceinline__ Right<2, 2> turned(const Tokens& tile, float* scratch) {
    int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    float* to = scratch + g * CHUNK + g / 2 * 2 + 4 * q;
    const float* from = scratch + q * CHUNK + q / 2 * 2 + column<2>(g, 0);
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) *(float2*)(to + h * 8 * (CHUNK + 1) + i) = make_float2(tile.v[h][i], tile.v[h][i + 1]);
    __syncwarp();
    Right<2, 2> right;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) right.v[k][j][c] = from[(8 * k + 4 * c) * (CHUNK + 1) + 2 * j];
    return right;
}
// The same of a matrix that lies in shared memory, row by row.
template <int T>
__device__ __forceinline__ Right<2, T> turned(const float* matrix) {
    const float* from = matrix + threadIdx.x % 4 * (8 * T) + column<T>(threadIdx.x % 32 / 4, 0);
    Right<2, T> right;
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int j = 0; j < T; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) right.v[k][j][c] = from[(8 * k + 4 * c) * (8 * T) + 2 * j];
    return right;
}

// The states that are kept for the backward pass, as many a channel as elsewhere.
#if NARROW
typedef unsigned short Kept;
__device__ __forceinline__ Kept to_kept(float x) { return to_bfloat16(x); }
__device__ __forceinline__ float from_kept(Kept x) { return __uint_as_float((unsigned)x << 16); }
#else
typedef float Kept;
__device__ __forceinline__ Kept to_kept(float x) { return x; }
__device__ __forceinline__ float from_kept(Kept x) { return x; }
#endif

// Where the number of a channel stands among those of its tile: a lane's two at 2g and 2g + 1; and which channel's stands there.
__device__ __forceinline__ int place_of(int channel) { return PIECES ? channel % 8 * 2 + channel / 8 : channel; }
__device__ __forceinline__ int channel_at(int place) { return PIECES ? place / 2 + place % 2 * 8 : place; }

// In shared memory a tile of pieces is four matrices of 8 tokens x 8 channels, a token of 16 bytes after the other, so that
// neither a quarter of a warp with its pieces nor the eight rows of a matrix meet in a bank: places of such rows. Token 4k + 2a + c
// of 8-channel half b is row 2k + c of matrix 2b + a.
__device__ __forceinline__ int matrix_row(int matrix, int row) { return matrix * 8 + (row ^ matrix * 2); }
// In words from a tile's first one: where a lane puts what it has loaded, in PIECES channels 8 (lane % 2) and on of token
// lane / 2, and where it reads what it owns, or names a row of a matrix.
struct Places {
    int loaded, owned;
    __device__ __forceinline__ Places() {
        int lane = threadIdx.x % 32;
        loaded = owned = lane * PIECE;
#if PIECES
        loaded = 4 * matrix_row(lane % 2 * 2 + lane / 4 % 2, lane / 8 * 2 + lane / 2 % 2);
        owned = 4 * matrix_row(lane / 8, lane % 8);
        hold(loaded), hold(owned);
#endif
    }
};

// What a block works on: tiles of 16 channels, and tokens from `first` to `last`.
struct Block {
    int batch, group, tile, segment, rows, tiles, first, last;
    i64 channel;
    int stop, end;  // the sequence's length, and the first token that this block has nothing to do with
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
        end = min(stop, last);
    }
    // Whether all lanes of a warp have eight elements, of a tile and the 16 tokens from `start` on.
    __device__ __forceinline__ bool whole(int tile, int start) const { return (tile + 1) * ROWS <= rows && start + CHUNK <= last; }
    // Of a tile's channels and of 16 tokens, the first that a lane loads.
    static __device__ __forceinline__ int lane_row() { return PIECES ? threadIdx.x % 2 * 8 : threadIdx.x % 32 / 4 * 2; }
    static __device__ __forceinline__ int lane_token() { return PIECES ? threadIdx.x % 32 / 2 : threadIdx.x % 4 * 4; }
    __device__ __forceinline__ int rows_left(int tile) const { return rows - tile * ROWS - lane_row(); }
    __device__ __forceinline__ int tokens_left(int start) const { return last - start - lane_token(); }
    // Whether this lane has eight elements.
    __device__ __forceinline__ bool whole_lane(int tile, int start) const {
        return rows_left(tile) >= (PIECES ? 8 : 2) && tokens_left(start) >= (PIECES ? 1 : 4);
    }
    // Where the first channel lies in an array (b, slots, d, STATE).
    template <typename T = float>
    __device__ __forceinline__ T* slot(const Args& p, i64 array, i64 slots, i64 index) const {
        return (T*)array + ((batch * slots + index) * p.channels + channel) * STATE;
    }
};

// An entry of tiles' states that a thread passes from warp to warp: of row g + 8h, whose channel has the place 2g + h.
struct Entry {
    int number, channel, n;
    bool exists;  // some tiles have fewer entries than the block has threads
    __device__ __forceinline__ explicit Entry(int k) {
        number = threadIdx.x + k * THREADS;
        exists = ENTRIES % THREADS == 0 || number < ENTRIES;
        channel = channel_at(number / STATE % 8 * 2 + number / STATE / 8), n = number % STATE;
    }
    __device__ __forceinline__ bool within(const Block& block, int tile) const { return exists && tile * ROWS + channel < block.rows; }
    // Where it lies from a slot's first channel on, and in a user's (b, d, N) array.
    __device__ __forceinline__ int offset(int tile) const { return (tile * ROWS + channel) * STATE + n; }
    __device__ __forceinline__ float* given(const Args& p, const Block& block, i64 array, int tile) const {
        return array && within(block, tile) && n < p.state ? (float*)array + (block.batch * p.channels + block.channel + tile * ROWS + channel) * p.state + n : nullptr;
    }
};
#define OWN_ENTRIES ((ENTRIES + THREADS - 1) / THREADS)

// A lane's eight elements: its own, or as it has loaded them.
struct Eight {
    unsigned words[WORDS];
    __device__ __forceinline__ float get(int h, int i) const {
#if ELEMENT == 0
        return __uint_as_float(words[4 * h + i]);
#else
        unsigned word = words[2 * h + i / 2];
#if ELEMENT == 1
        return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
#else
        return narrowed_bits_to_float(i % 2 ? word >> 16 : word & 0xffffu);
#endif
#endif
    }
    __device__ __forceinline__ void set_bits(int h, int i, element x) {
#if ELEMENT == 0
        words[4 * h + i] = __float_as_uint(x);
#else
        unsigned& word = words[2 * h + i / 2];
        word = i % 2 ? (word & 0xffffu) | (unsigned)x << 16 : (unsigned)x;
#endif
    }
    __device__ __forceinline__ element bits(int h, int i) const {
#if ELEMENT == 0
        return __uint_as_float(words[4 * h + i]);
#else
        unsigned word = words[2 * h + i / 2];
        return (element)(i % 2 ? word >> 16 : word & 0xffffu);
#endif
    }
    // In shared memory: all lanes' first piece, then their next... PIECES are written by one lane and read by others.
#if PIECES
    __device__ __forceinline__ void read(const unsigned* from, const Places& places) { load_turned(words, from + places.owned); }
    __device__ __forceinline__ void write(unsigned* to, const Places& places) const {
        *(uint4*)(to + places.loaded) = make_uint4(words[0], words[1], words[2], words[3]);
    }
#else
    __device__ __forceinline__ void read(const unsigned* from, const Places& places) {
        from += places.owned;
#pragma unroll
        for (int i = 0; i < WORDS / PIECE; i++) {
            const unsigned* at = from + i * 32 * PIECE;
#if ELEMENT == 0 && OWNER == CHANNEL_RUNS
            uint2 v = *(const uint2*)at;
            words[i] = v.x, words[4 + i] = v.y;
#elif ELEMENT == 0
            uint4 v = *(const uint4*)at;
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
#else
            uint2 v = *(const uint2*)at;
            words[2 * i] = v.x, words[2 * i + 1] = v.y;
#endif
        }
    }
    __device__ __forceinline__ void write(unsigned* to, const Places& places) const {
        to += places.loaded;
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            int piece = i / PIECE, word = i % PIECE;
            to[piece * 32 * PIECE + word] = words[OWNER == CHANNEL_RUNS ? 4 * word + piece : i];
        }
    }
#endif
    // What the warp has loaded, as each lane owns it; by way of `scratch`, TILE_WORDS that nobody else uses.
    __device__ __forceinline__ void deal(unsigned* scratch, const Places& places) {
#if PIECES
        __syncwarp();
        write(scratch, places);
        __syncwarp();
        read(scratch, places);
#endif
    }
    // The way back, for what is to be stored.
    __device__ __forceinline__ void collect(unsigned* scratch, const Places& places) {
#if PIECES
        __syncwarp();
#ifdef MATRIX_STORES
        store_turned(scratch + places.owned, words);
#else
#pragma unroll
        for (int m = 0; m < 4; m++) scratch[matrix_row(m, threadIdx.x % 32 / 4) * 4 + threadIdx.x % 4] = turn_matrix(words[m]);
#endif
        __syncwarp();
        set(*(const uint4*)(scratch + places.loaded));
#endif
    }
    __device__ __forceinline__ void set(uint4 v) { words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w; }
    __device__ __forceinline__ explicit Eight() {}
    __device__ __forceinline__ explicit Eight(const Tokens& x) {
#if ELEMENT == 0
#pragma unroll
        for (int i = 0; i < 8; i++) words[i] = __float_as_uint(x.v[i / 4][i % 4]);
#else
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = narrow_pair(x.v[i / 2][i % 2 * 2], x.v[i / 2][i % 2 * 2 + 1]);
#endif
    }
};

// From a tile to the next, and from a block's last tile to its first one of the next span, in bytes: of each array. The
// launch sees to it that they are within 32 bits.
struct Ways {
    int by[2][8];
};

// A (b, d, L) array as a lane sees it: where its eight elements of the tile and span at hand lie. A block's arrays have numbers.
template <int NUMBER>
struct View {
    element* at;
    i64 row, token;
    bool runs;
    __device__ __forceinline__ View(i64 address, i64 batch_stride, i64 row_stride, i64 token_stride, i64 runs_, const Block& block, Ways& ways, int span, int step)
        : row(row_stride), token(token_stride), runs(OWNER != SINGLE && runs_ != 0) {
        at = (element*)address + block.batch * batch_stride + (block.channel + Block::lane_row()) * row_stride +
             (span + (i64)(threadIdx.x / 32 * CHUNK + Block::lane_token())) * token_stride;
        if (threadIdx.x == 0) {
            ways.by[0][NUMBER] = (int)(ROWS * row) * (int)sizeof(element);
            ways.by[1][NUMBER] = ((int)(step * token) - (block.tiles - 1) * (int)(ROWS * row)) * (int)sizeof(element);
        }
    }
    __device__ __forceinline__ void advance(const int (&ways)[8]) { at = (element*)((char*)at + ways[NUMBER]); }
    // In PIECES, not a lane's own before `deal`.
    __device__ __forceinline__ Eight load(const Block& block, int tile, int start) const {
        Eight got;
        if (runs && block.whole(tile, start)) {
#if ELEMENT == 0 && OWNER == TOKEN_RUNS
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint4 v = load_four(at + h * row);
                got.words[4 * h] = v.x, got.words[4 * h + 1] = v.y, got.words[4 * h + 2] = v.z, got.words[4 * h + 3] = v.w;
            }
#elif OWNER == TOKEN_RUNS
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint2 v = load_two(at + h * row);
                got.words[2 * h] = v.x, got.words[2 * h + 1] = v.y;
            }
#elif ELEMENT == 0 && OWNER == CHANNEL_RUNS
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint2 v = load_two(at + i * token);
                got.words[i] = v.x, got.words[4 + i] = v.y;
            }
#elif PIECES
            got.set(load_four(at));
        } else if (runs && block.whole_lane(tile, start)) {
            got.set(load_four(at));
#endif
        } else {
            got = load_singly(block, tile, start);
        }
        return got;
    }
    __device__ __forceinline__ Eight load_singly(const Block& block, int tile, int start) const {
        int rows = block.rows_left(tile), tokens = block.tokens_left(start);
        Eight got;
        element single[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            single[i] = row_of(i) < rows && token_of(i) < tokens ? at[row_of(i) * row + token_of(i) * token] : (element)0;
#pragma unroll
        for (int i = 0; i < 8; i++) got.set_bits(i / 4, i % 4, single[i]);
        return got;
    }
    static __device__ __forceinline__ int row_of(int i) { return PIECES ? i : i / 4; }
    static __device__ __forceinline__ int token_of(int i) { return PIECES ? 0 : i % 4; }
    // Begins to bring them to shared memory, where they are read after `fetched`.
    __device__ __forceinline__ void fetch(unsigned* to, const Places& places, const Block& block, int tile, int start) const {
        if (runs && block.whole(tile, start))
            copy_all(to + places.loaded);
        else if (runs && block.whole_lane(tile, start))
            copy_all(to + places.loaded);
        else
            load_singly(block, tile, start).write(to, places);
    }
    __device__ __forceinline__ void copy_all(unsigned* to) const {
#pragma unroll
        for (int i = 0; i < WORDS / PIECE; i++) copy<PIECE>(to + i * 32 * PIECE, at + i * (OWNER == CHANNEL_RUNS ? token : row));
    }
    __device__ __forceinline__ void store(const Tokens& values, const Block& block, int tile, int start, unsigned* scratch, const Places& places) const {
        Eight out(values);
        out.collect(scratch, places);
        if (runs && block.whole(tile, start)) {
#if ELEMENT == 0 && OWNER == TOKEN_RUNS
#pragma unroll
            for (int h = 0; h < 2; h++)
                *(uint4*)(at + h * row) = make_uint4(out.words[4 * h], out.words[4 * h + 1], out.words[4 * h + 2], out.words[4 * h + 3]);
#elif OWNER == TOKEN_RUNS
#pragma unroll
            for (int h = 0; h < 2; h++) *(uint2*)(at + h * row) = make_uint2(out.words[2 * h], out.words[2 * h + 1]);
#elif ELEMENT == 0 && OWNER == CHANNEL_RUNS
#pragma unroll
            for (int i = 0; i < 4; i++) *(uint2*)(at + i * token) = make_uint2(out.words[i], out.words[4 + i]);
#elif PIECES
            *(uint4*)at = make_uint4(out.words[0], out.words[1], out.words[2], out.words[3]);
        } else if (runs && block.whole_lane(tile, start)) {
            *(uint4*)at = make_uint4(out.words[0], out.words[1], out.words[2], out.words[3]);
#endif
        } else {
            int rows = block.rows_left(tile), tokens = block.tokens_left(start);
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (row_of(i) < rows && token_of(i) < tokens) at[row_of(i) * row + token_of(i) * token] = out.bits(i / 4, i % 4);
        }
    }
};
// Waits for what was fetched.
__device__ __forceinline__ void fetched() {
    copies_done();
#if PIECES
    __syncwarp();
#endif
}
#define VIEW(number, name, span, step) \
    View<number> view_##name(p.name, p.name##_b, p.name##_d, p.name##_l, p.name##_runs, block, shared.ways, span, step)

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
    // To shared memory, token by token; 0 past the sequence's end.
    __device__ __forceinline__ void deal(float* to, int tokens) const {
        int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) to[(4 * q + i) * STATE_PITCH + column<NT>(g, j)] = 4 * q + i < tokens ? get(j, i) : 0.0f;
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
// A matrix of tokens x columns in shared memory as an operand, and turned, columns x tokens.
template <int T>
__device__ __forceinline__ Right<2, T> by_token(const float* from, int pitch) {
    from += threadIdx.x % 4 * 4 * pitch + column<T>(threadIdx.x % 32 / 4, 0);
    Right<2, T> right;
#pragma unroll
    for (int j = 0; j < T; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) right.v[i / 2][j][i % 2] = from[i * pitch + 2 * j];
    return right;
}
template <int K>
__device__ __forceinline__ Right<K, 2> by_column(const float* from, int pitch) {
    from += column<2>(threadIdx.x % 32 / 4, 0) * pitch + threadIdx.x % 4 * (2 * K);
    Right<K, 2> right;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int k = 0; k < K; k++) {
            float2 two = *(const float2*)(from + 2 * j * pitch + 2 * k);
            right.v[k][j][0] = two.x, right.v[k][j][1] = two.y;
        }
    return right;
}

#define MATRIX(name) Matrix(p.name, p.name##_b, p.name##_g, p.name##_n, p.name##_l, block)
