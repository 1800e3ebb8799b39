// Attention through the tensor cores: bf16, head sizes 64 and 128, causal within segments.
//
// Forward: a block of four warps has 128 queries of one head, 32 per warp so that keys and values are
// read from shared memory once for two products, and goes through the keys they see in tiles of 64.
// Values come in while scores are computed, the next keys while values are summed; the softmax is
// built up on the way.
// Backward computes the probabilities again from lse, once by tiles of keys for dk and dv, which one
// block sums over all queries and over the heads of its group, and once by tiles of queries for dq:
// more products than with atomic additions, but always the same sums. Both are blocks of one launch:
// those of keys are long and go first, those of queries fill the end. A block keeps its own 64 rows as
// fragments in registers, and the other side's come in two stages of 64 rows.
//
// Tiles count from the first token of a segment, so that a segment's bits do not depend on what
// else is in the stream. They go in the order of falling work over all segments.
//
// For heads of 128, a step of 64 rows costs on an H100, in cycles of a multiprocessor: the tensor cores as
// mma.sync reaches them (6.45 for one instruction of each warp), and shared memory at 128 bytes each, for
// ldmatrix (4 for each of four warps) and what cp.async writes.
//
//   block    mma per warp   ldmatrix per warp   tensor cores   shared memory   barriers   registers
//   forward      256              80               1650         1280 + 256        2        254 at most
//   dk, dv       256             128               1650         2048 + 256        1        255
//   dq           192              96               1240         1536 + 256        1        255
//
// Two blocks share a multiprocessor (three of the backward kernel for heads of 64).
#include "packed.cuh"

constexpr int THREADS = 128, FORWARD_ROWS = 128, ROWS = 64, PAD = 8;
// Rows of a tile that comes in.
constexpr int STEP = 64;

template <int D> constexpr int LD = D + PAD;
// Blocks of the backward kernel that a multiprocessor holds: a limit for registers.
template <int D> constexpr int BLOCKS = D == 64 ? 3 : 2;

// Where a head's part of the rows of a segment lies.
struct Rows {
    const bf16* memory;
    u64 stride;
    u32 start, column;
};
// Copies rows first … first + N of a segment of `len` into shared memory, zeros beyond its end.
template <int N, int D> DEV void load_rows(bf16* tile, const Rows& from, u32 first, u32 len) {
    constexpr int CHUNKS = D / 8, AT_A_TIME = THREADS / CHUNKS;
    u32 r = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS * 8;
    const bf16* source = from.memory + (from.start + first + r) * from.stride + from.column + c;
    bf16* to = tile + r * LD<D> + c;
    int left = len - first - r;
#pragma unroll 4
    for (int i = 0; i < N; i += AT_A_TIME) {
        cp_async16(to, source, i < left);
        to += AT_A_TIME * LD<D>, source += AT_A_TIME * from.stride;
    }
}

// Where a lane finds its row of fragments at the beginning of a tile; other fragments are a constant further.
// Operand A, 16×16; also operand B of two neighbouring tiles of 8 where the tile's rows are the summed dimension.
template <int D> DEV const bf16* lane_of_a(const bf16* tile) {
    int lane = threadIdx.x & 31;
    return tile + (lane & 15) * LD<D> + (lane >> 4) * 8;
}
// Operand B of two neighbouring tiles of 8 where the tile's rows are its columns.
template <int D> DEV const bf16* lane_of_b(const bf16* tile) {
    int lane = threadIdx.x & 31;
    return tile + ((lane & 7) + (lane >> 4) * 8) * LD<D> + (lane >> 3 & 1) * 8;
}

// Which quarter of a block's rows a warp has. The last one has the most to do; as each of a multiprocessor's
// four schedulers has one warp of every block, it is another warp in every second block.
DEV int quarter() { return threadIdx.x >> 5 ^ (__popc(blockIdx.x) & 1 ? 3 : 0); }

template <int M, int N> DEV void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < N; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0.f;
    }
}

// scores[16·M × 8·N] = (16·M rows of a) · (8·N rows of b)ᵀ, over D columns.
template <int D, int M, int N> DEV void product_nt(float (&scores)[M][N][4], const bf16* a, const bf16* b) {
    const bf16 *lane_a = lane_of_a<D>(a), *lane_b = lane_of_b<D>(b);
    clear(scores);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        u32 af[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(af[m], lane_a + m * 16 * LD<D> + d);
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            u32 bf[4];
            ldmatrix_x4(bf, lane_b + j * 16 * LD<D> + d);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(scores[m][2 * j], af[m], bf[0], bf[1]);
                mma_bf16(scores[m][2 * j + 1], af[m], bf[2], bf[3]);
            }
        }
    }
}

// Weights as operand A: from two neighbouring tiles of accumulators, 8 columns each.
template <int M, int N> DEV void pack(u32 (&packed)[M][N / 2][4], const float (&weights)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int k = 0; k < N / 2; k++) {
            const float(&lo)[4] = weights[m][2 * k], (&hi)[4] = weights[m][2 * k + 1];
            packed[m][k][0] = pack_bf16(lo[0], lo[1]), packed[m][k][1] = pack_bf16(lo[2], lo[3]);
            packed[m][k][2] = pack_bf16(hi[0], hi[1]), packed[m][k][3] = pack_bf16(hi[2], hi[3]);
        }
    }
}

// acc[16·M × D] += weights[16·M × 16·K] · (16·K rows of b).
template <int D, int M, int K>
DEV void product_nn(float (&acc)[M][D / 8][4], const u32 (&weights)[M][K][4], const bf16* b) {
    const bf16* lane_b = lane_of_a<D>(b);
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            u32 bf[4];
            ldmatrix_x4_trans(bf, lane_b + k * 16 * LD<D> + j * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(acc[m][2 * j], weights[m][k], bf[0], bf[1]);
                mma_bf16(acc[m][2 * j + 1], weights[m][k], bf[2], bf[3]);
            }
        }
    }
}

// A warp's 16 rows of an accumulator, to rows first… that are below len; times a factor per half. They go
// through 16 rows of shared memory, so that 16 bytes at a time are written.
template <int D>
DEV void put_rows(bf16* to, u64 stride, u32 first, u32 len, const float (&acc)[D / 8][4], float upper, float lower,
                  bf16* room) {
    int lane = threadIdx.x & 31;
    bf16* mine = room + (lane >> 2) * LD<D> + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        *reinterpret_cast<u32*>(mine + j * 8) = pack_bf16(acc[j][0] * upper, acc[j][1] * upper);
        *reinterpret_cast<u32*>(mine + 8 * LD<D> + j * 8) = pack_bf16(acc[j][2] * lower, acc[j][3] * lower);
    }
    __syncwarp();
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < 16; i += 32 / CHUNKS) {
        u32 r = i + lane / CHUNKS, c = lane % CHUNKS * 8;
        if (first + r >= len) continue;
        *reinterpret_cast<uint4*>(to + (first + r) * stride + c) = *reinterpret_cast<const uint4*>(room + r * LD<D> + c);
    }
}

DEV float quad_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}
DEV float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

constexpr float MASKED = -1e30f;

// Masks keys behind a thread's queries; `edge` is how far its first query is behind its first key.
template <int N> DEV void mask(float (&scores)[2][N][4], int edge) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int key = j * 8 + (c & 1), query = m * 16 + (c >> 1) * 8;
                if (key > query + edge) scores[m][j][c] = MASKED;
            }
        }
    }
}

// Of a warp's 32 rows: the largest score so far, before it is scaled, and the sum of what is left of it.
struct Softmax {
    float largest[2][2], total[2][2];
};

// Makes exp2(scale2 · (score − largest)) of raw scores; what was summed before shrinks as the largest grows.
template <int N, int D8>
DEV void softmax_step(float (&scores)[2][N][4], float (&acc)[2][D8][4], Softmax& so_far, float scale2) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = so_far.largest[m][h];
#pragma unroll
            for (int j = 0; j < N; j++) top = fmaxf(top, fmaxf(scores[m][j][2 * h], scores[m][j][2 * h + 1]));
            top = quad_max(top);
            float shrink = exp2_fast((so_far.largest[m][h] - top) * scale2), shift = top * scale2, sum = 0.f;
            so_far.largest[m][h] = top;
#pragma unroll
            for (int j = 0; j < D8; j++) acc[m][j][2 * h] *= shrink, acc[m][j][2 * h + 1] *= shrink;
#pragma unroll
            for (int j = 0; j < N; j++) {
#pragma unroll
                for (int c = 2 * h; c < 2 * h + 2; c++) {
                    scores[m][j][c] = exp2_fast(fmaf(scores[m][j][c], scale2, -shift));
                    sum += scores[m][j][c];
                }
            }
            so_far.total[m][h] = fmaf(so_far.total[m][h], shrink, sum);
        }
    }
}

// A block per tile of 128 queries and head; those that see the most keys go first. The scale is positive.
template <int D>
DEV void forward(bf16* o, float* lse, const bf16* qkv, const u32* offsets, u32* fault, u32 tokens, u32 segments,
                 Heads at, u64 o_stride, float scale) {
    constexpr int N = STEP / 8;
    DYNAMIC_SHARED(memory);
    bf16* queries = reinterpret_cast<bf16*>(memory);
    bf16* keys = queries + FORWARD_ROWS * LD<D>;
    bf16* values = keys + STEP * LD<D>;
    RankedTile tile = find_ranked_tile(blockIdx.x / at.heads, FORWARD_ROWS, offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 head = blockIdx.x % at.heads, kv_head = at.kv_of(head), len = tile.segment.len;
    u32 tile_first = (tile.rank - 1) * FORWARD_ROWS;
    u64 row = at.row();
    u32 start = tile.segment.start;
    Rows key_rows = {qkv, row, start, at.k(kv_head)}, value_rows = {qkv, row, start, at.v(kv_head)};
    load_rows<FORWARD_ROWS, D>(queries, {qkv, row, start, at.q(head)}, tile_first, len);
    load_rows<STEP, D>(keys, key_rows, 0, len);
    cp_async_commit();
    int lane = threadIdx.x & 31, warp = quarter(), g = lane >> 2, q = (lane & 3) * 2;
    float acc[2][D / 8][4];
    Softmax so_far;
    clear(acc);
#pragma unroll
    for (int m = 0; m < 2; m++) {
        so_far.largest[m][0] = so_far.largest[m][1] = MASKED;
        so_far.total[m][0] = so_far.total[m][1] = 0.f;
    }
    float scale2 = scale * LOG2_E;
    // Of this warp: its first query, and of this thread: the first of its rows.
    u32 from = tile_first + warp * 32, my_row = from + g;
    u32 steps = (min(tile_first + FORWARD_ROWS, len) + STEP - 1) / STEP;
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<0>();
        __syncthreads();  // these keys are there for all, and nobody reads the values before them
        load_rows<STEP, D>(values, value_rows, step * STEP, len);
        cp_async_commit();
        // The last tiles of a block are beyond what its first warps see.
        bool sees = step * STEP < min(from + 32, len);
        u32 packed[2][N / 2][4];
        if (sees) {
            float scores[2][N][4];
            product_nt<D>(scores, queries + warp * 32 * LD<D>, keys);
            // All queries see all keys, but on the diagonal.
            if ((step + 1) * STEP > from + 1) mask<N>(scores, (int)(my_row - q - step * STEP));
            softmax_step(scores, acc, so_far, scale2);
            pack(packed, scores);
        }
        cp_async_wait<0>();
        __syncthreads();  // the values are there for all, and nobody reads these keys any more
        if (step + 1 < steps) {
            load_rows<STEP, D>(keys, key_rows, (step + 1) * STEP, len);
            cp_async_commit();
        }
        if (sees) product_nn<D>(acc, packed, values);
    }
    bf16* to = o + start * o_stride + at.q(head);
    float* my_lse = lse + (u64)head * tokens + start;
    bf16* room = queries + warp * 32 * LD<D>;  // this warp's queries
#pragma unroll
    for (int m = 0; m < 2; m++) {
        float upper = quad_sum(so_far.total[m][0]), lower = quad_sum(so_far.total[m][1]);
        put_rows<D>(to, o_stride, from + m * 16, len, acc[m], 1.f / upper, 1.f / lower, room + m * 16 * LD<D>);
        u32 mine = my_row + m * 16;
        if ((lane & 3) == 0) {
            if (mine < len) my_lse[mine] = so_far.largest[m][0] * scale + logf(upper);
            if (mine + 8 < len) my_lse[mine + 8] = so_far.largest[m][1] * scale + logf(lower);
        }
    }
}

// ---- backward

struct BackwardInputs {
    const float* delta;
    const bf16* d_o;
    const float* lse;
    const bf16* qkv;
    const u32* offsets;
};

// What comes in at a time: 64 rows of two matrices, and lse and delta where these are queries'.
template <int D> struct Stage {
    bf16 *a, *b;
    float *lse, *delta;
};
template <int D> constexpr int STAGE_BYTES = 2 * STEP * LD<D> * 2 + 2 * STEP * 4;
template <int D> DEV Stage<D> stage_of(unsigned char* memory, u32 step) {
    bf16* a = reinterpret_cast<bf16*>(memory + (step & 1) * STAGE_BYTES<D>);
    float* lse = reinterpret_cast<float*>(a + 2 * STEP * LD<D>);
    return {a, a + STEP * LD<D>, lse, lse + STEP};
}

// A warp's 16 rows of a tile.
template <int D> DEV void keep_rows(u32 (&kept)[D / 16][4], const bf16* tile) {
    const bf16* lane_a = lane_of_a<D>(tile + quarter() * 16 * LD<D>);
#pragma unroll
    for (int d = 0; d < D / 16; d++) ldmatrix_x4(kept[d], lane_a + d * 16);
}

// scores = rows kept in registers · (8·N rows of a)ᵀ, gradients = other rows · (8·N rows of b)ᵀ.
template <int D, int N>
DEV void both_products(float (&scores)[1][N][4], float (&gradients)[1][N][4], const u32 (&kept_a)[D / 16][4],
                       const u32 (&kept_b)[D / 16][4], const bf16* a, const bf16* b) {
    const bf16 *lane_a = lane_of_b<D>(a), *lane_b = lane_of_b<D>(b);
    clear(scores);
    clear(gradients);
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            u32 bf[4];
            ldmatrix_x4(bf, lane_a + j * 16 * LD<D> + d * 16);
            mma_bf16(scores[0][2 * j], kept_a[d], bf[0], bf[1]);
            mma_bf16(scores[0][2 * j + 1], kept_a[d], bf[2], bf[3]);
            ldmatrix_x4(bf, lane_b + j * 16 * LD<D> + d * 16);
            mma_bf16(gradients[0][2 * j], kept_b[d], bf[0], bf[1]);
            mma_bf16(gradients[0][2 * j + 1], kept_b[d], bf[2], bf[3]);
        }
    }
}

// A block per tile of 64 queries and head: dq = scale · Σ ds k.
template <int D>
DEV void backward_q(u32 block, bf16* dqkv, const BackwardInputs& in, u32* fault, u32 tokens, u32 segments, Heads at,
                    u64 o_stride, float scale) {
    constexpr int PART = 32, N = PART / 8;
    DYNAMIC_SHARED(memory);
    RankedTile tile = find_ranked_tile(block / at.heads, ROWS, in.offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 head = block % at.heads, kv_head = at.kv_of(head), len = tile.segment.len;
    u32 tile_first = (tile.rank - 1) * ROWS, steps = tile.rank;
    u32 start = tile.segment.start;
    u64 row = at.row();
    auto load_keys = [&](u32 step) {
        Stage<D> to = stage_of<D>(memory, step);
        load_rows<STEP, D>(to.a, {in.qkv, row, start, at.k(kv_head)}, step * STEP, len);
        load_rows<STEP, D>(to.b, {in.qkv, row, start, at.v(kv_head)}, step * STEP, len);
        cp_async_commit();
    };
    // Queries and gradients of outputs go to registers by way of the second stage.
    Stage<D> own = stage_of<D>(memory, 1);
    load_rows<ROWS, D>(own.a, {in.qkv, row, start, at.q(head)}, tile_first, len);
    load_rows<ROWS, D>(own.b, {in.d_o, o_stride, start, at.q(head)}, tile_first, len);
    cp_async_commit();
    load_keys(0);
    int lane = threadIdx.x & 31, warp = quarter(), g = lane >> 2, q = (lane & 3) * 2;
    float acc[1][D / 8][4], my_lse[2], my_delta[2], scale2 = scale * LOG2_E;
    clear(acc);
    // Of this warp: its first query, and of this thread: the first of its rows.
    u32 from = tile_first + warp * 16, my_row = from + g;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u64 t = (u64)head * tokens + start + my_row + h * 8;
        bool there = my_row + h * 8 < len;
        my_lse[h] = there ? in.lse[t] * LOG2_E : 0.f;
        my_delta[h] = there ? in.delta[t] : 0.f;
    }
    cp_async_wait<1>();
    __syncthreads();
    u32 queries[D / 16][4], d_out[D / 16][4];
    keep_rows<D>(queries, own.a);
    keep_rows<D>(d_out, own.b);
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<0>();
        __syncthreads();  // this stage is there for all, and nobody reads the other one any more
        if (step + 1 < steps) load_keys(step + 1);
        Stage<D> stage = stage_of<D>(memory, step);
#pragma unroll
        for (int part = 0; part < STEP; part += PART) {
            u32 key_first = step * STEP + part;
            if (key_first > from + 15) break;
            float p[1][N][4], ds[1][N][4];
            both_products<D>(p, ds, queries, d_out, stage.a + part * LD<D>, stage.b + part * LD<D>);
            // All queries see all keys, but on the diagonal.
            bool whole = key_first + PART <= from + 1;
            int edge = my_row - q - key_first;
#pragma unroll
            for (int j = 0; j < N; j++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    int key = j * 8 + (c & 1), query = (c >> 1) * 8 + edge;
                    float probability = exp2_fast(fmaf(p[0][j][c], scale2, -my_lse[c >> 1]));
                    ds[0][j][c] = whole || key <= query ? probability * (ds[0][j][c] - my_delta[c >> 1]) : 0.f;
                }
            }
            u32 packed[1][N / 2][4];
            pack(packed, ds);
            product_nn<D>(acc, packed, stage.a + part * LD<D>);
        }
    }
    bf16* room = stage_of<D>(memory, steps).a + warp * 16 * LD<D>;  // not the last step's
    put_rows<D>(dqkv + start * row + at.q(head), row, from, len, acc[0], scale, scale, room);
}

// A block per tile of 64 keys and key/value head: dv = Σ pᵀ do, dk = scale · Σ dsᵀ q, over the queries
// that see the tile, for one head of the group after the other.
template <int D>
DEV void backward_kv(u32 block, bf16* dqkv, const BackwardInputs& in, u32* fault, u32 tokens, u32 segments, Heads at,
                     u64 o_stride, float scale) {
    // Registers hold no more beside keys, values and their gradients.
    constexpr int PART = 16, N = PART / 8;
    DYNAMIC_SHARED(memory);
    RankedTile tile = find_ranked_tile(block / at.kv_heads, ROWS, in.offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 kv_head = block % at.kv_heads, group = at.heads / at.kv_heads;
    // The first tile of a segment is seen by the most queries. From here on its first key is number 0.
    u32 tile_first = (tile.ranks - tile.rank) * ROWS, start = tile.segment.start + tile_first, len = tile.segment.len - tile_first;
    u64 row = at.row();
    auto load_queries = [&](u32 stage, u32 head, u32 first) {
        Stage<D> to = stage_of<D>(memory, stage);
        load_rows<STEP, D>(to.a, {in.qkv, row, start, at.q(head)}, first, len);
        load_rows<STEP, D>(to.b, {in.d_o, o_stride, start, at.q(head)}, first, len);
        // Beyond the segment's end everything is zero, and adds nothing.
        u32 query = first + threadIdx.x;
        u64 sum = (u64)head * tokens + start + query;
        if (threadIdx.x < STEP) {
            cp_async4(to.lse + threadIdx.x, in.lse + sum, query < len);
            cp_async4(to.delta + threadIdx.x, in.delta + sum, query < len);
        }
        cp_async_commit();
    };
    // Steps go through the queries from the tile's first key on, then through the next head's; so many are left.
    u32 left = tile.rank * group, head = kv_head * group;
    // Keys and values go to registers by way of the stage of the second step.
    Stage<D> own = stage_of<D>(memory, left - 1);
    load_rows<ROWS, D>(own.a, {in.qkv, row, start, at.k(kv_head)}, 0, len);
    load_rows<ROWS, D>(own.b, {in.qkv, row, start, at.v(kv_head)}, 0, len);
    cp_async_commit();
    load_queries(left, head, 0);
    int lane = threadIdx.x & 31, from = quarter() * 16, g = lane >> 2, q = (lane & 3) * 2;
    float dk[1][D / 8][4], dv[1][D / 8][4], scale2 = scale * LOG2_E;
    clear(dk);
    clear(dv);
    cp_async_wait<1>();
    __syncthreads();
    u32 keys[D / 16][4], values[D / 16][4];
    keep_rows<D>(keys, own.a);
    keep_rows<D>(values, own.b);
    for (u32 first = 0; left > 0; left--) {
        cp_async_wait<0>();
        __syncthreads();  // as for dq
        u32 next = first + STEP;
        if (next >= len) next = 0, head++;
        if (left > 1) load_queries(left - 1, head, next);
        Stage<D> stage = stage_of<D>(memory, left);
#pragma unroll
        for (int part = 0; part < STEP; part += PART) {
            // How far this part's first query is behind the warp's first key.
            int ahead = first + part - from;
            if (ahead + PART <= 0) continue;
            const bf16 *q_tile = stage.a + part * LD<D>, *d_tile = stage.b + part * LD<D>;
            float p[1][N][4], ds[1][N][4];
            both_products<D>(p, ds, keys, values, q_tile, d_tile);
            // All queries see all keys, but on the diagonal.
            bool whole = ahead >= 15;
            int edge = ahead + q - g;
#pragma unroll
            for (int j = 0; j < N; j++) {
                float2 lse = *reinterpret_cast<const float2*>(stage.lse + part + j * 8 + q);
                float2 delta = *reinterpret_cast<const float2*>(stage.delta + part + j * 8 + q);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    int key = (c >> 1) * 8, query = j * 8 + (c & 1) + edge;
                    float shift = (c & 1 ? lse.y : lse.x) * LOG2_E;
                    float probability = exp2_fast(fmaf(p[0][j][c], scale2, -shift));
                    p[0][j][c] = whole || key <= query ? probability : 0.f;
                    ds[0][j][c] = p[0][j][c] * (ds[0][j][c] - (c & 1 ? delta.y : delta.x));
                }
            }
            u32 packed_p[1][N / 2][4], packed_ds[1][N / 2][4];
            pack(packed_p, p);
            pack(packed_ds, ds);
            product_nn<D>(dv, packed_p, d_tile);
            product_nn<D>(dk, packed_ds, q_tile);
        }
        first = next;
    }
    kv_head = head / group - 1;  // not kept all the time
    bf16* to = dqkv + start * row;
    Stage<D> room = stage_of<D>(memory, 0);  // not the last step's
    put_rows<D>(to + at.k(kv_head), row, from, len, dk[0], scale, scale, room.a + from * LD<D>);
    put_rows<D>(to + at.v(kv_head), row, from, len, dv[0], 1.f, 1.f, room.b + from * LD<D>);
}

// Blocks for dk and dv, then blocks for dq, of as many tiles each.
template <int D>
DEV void backward(bf16* dqkv, const BackwardInputs& in, u32* fault, u32 tokens, u32 segments, Heads at, u64 o_stride,
                  float scale) {
    u32 by_keys = gridDim.x / (at.heads + at.kv_heads) * at.kv_heads;
    if (blockIdx.x < by_keys) {
        backward_kv<D>(blockIdx.x, dqkv, in, fault, tokens, segments, at, o_stride, scale);
    } else {
        backward_q<D>(blockIdx.x - by_keys, dqkv, in, fault, tokens, segments, at, o_stride, scale);
    }
}

#define SHAPE u32 heads, u32 kv_heads, u32 head_dim
#define AT Heads{heads, kv_heads, head_dim}
#define INSTANCES(D)                                                                                                 \
    KERNEL LAUNCH_BOUNDS(THREADS) flash_forward_##D(bf16* o, float* lse, const bf16* qkv, const u32* offsets,          \
                                                    u32* fault, u32 tokens, u32 segments, SHAPE, u64 o_stride,       \
                                                    float scale) {                                                   \
        forward<D>(o, lse, qkv, offsets, fault, tokens, segments, AT, o_stride, scale);                              \
    }                                                                                                                \
    EXPORT(flash_forward_##D)                                                                                        \
    KERNEL LAUNCH_BOUNDS(THREADS, BLOCKS<D>) flash_backward_##D(bf16* dqkv, const float* delta, const bf16* d_o, const float* lse,\
                                                     const bf16* qkv, const u32* offsets, u32* fault, u32 tokens,     \
                                                     u32 segments, SHAPE, u64 o_stride, float scale) {               \
        backward<D>(dqkv, {delta, d_o, lse, qkv, offsets}, fault, tokens, segments, AT, o_stride, scale);            \
    }                                                                                                                \
    EXPORT(flash_backward_##D)
INSTANCES(64)
INSTANCES(128)
