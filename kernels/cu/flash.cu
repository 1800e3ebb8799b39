// Attention through the tensor cores: bf16, head sizes 64 and 128, causal within segments.
//
// Forward: a block of four warps has 128 queries of one head, 32 per warp so that keys and values are
// read from shared memory once for two products, and goes through the keys they see in tiles of 64
// (of 32 where heads are of 128 values, or registers run out).
// Values come in while scores are computed, the next keys while values are summed; the softmax is
// built up on the way.
// Backward computes the probabilities again from lse, once by tiles of keys for dk and dv, which one
// block sums over all queries and over the heads of its group, and once by tiles of queries for dq:
// more products than with atomic additions, but always the same sums.
//
// Tiles count from the first token of a segment, so that a segment's bits do not depend on what
// else is in the stream.
#include "packed.cuh"

constexpr int THREADS = 128, FORWARD_ROWS = 128, ROWS = 64, PAD = 8;

template <int D> constexpr int LD = D + PAD;

// Copies rows first … first + N of a segment into shared memory, zeros beyond its end.
template <int N, int D> DEV void load_rows(bf16* tile, const bf16* from, u64 stride, u32 first, u32 len) {
    constexpr int CHUNKS = D / 8;
    for (int i = threadIdx.x; i < N * CHUNKS; i += THREADS) {
        u32 r = i / CHUNKS, c = i % CHUNKS * 8;
        bool there = first + r < len;
        cp_async16(tile + r * LD<D> + c, from + (there ? first + r : 0) * stride + c, there);
    }
}

// A fragment of a 16×16 piece of a tile, as operand A: rows `row`…, columns `col`….
template <int D> DEV void fragment_a(u32 (&a)[4], const bf16* tile, int row, int col) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4(a, tile + (row + (lane & 15)) * LD<D> + col + (lane >> 4) * 8);
}
// Operand B of two neighbouring tiles of 8: the tile's rows are its columns.
template <int D> DEV void fragment_b(u32 (&b)[4], const bf16* tile, int row, int col) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4(b, tile + (row + (lane & 7) + (lane >> 4) * 8) * LD<D> + col + (lane >> 3 & 1) * 8);
}
// The same where the tile's rows are the summed dimension.
template <int D> DEV void fragment_b_trans(u32 (&b)[4], const bf16* tile, int row, int col) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4_trans(b, tile + (row + (lane & 15)) * LD<D> + col + (lane >> 4) * 8);
}

template <int M, int N> DEV void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < N; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0.f;
    }
}

// scores[16·M × 8·N] = rows `row`… of a · (8·N rows of b)ᵀ, over D columns.
template <int D, int M, int N> DEV void product_nt(float (&scores)[M][N][4], const bf16* a, int row, const bf16* b) {
    clear(scores);
#pragma unroll 4
    for (int d = 0; d < D; d += 16) {
        u32 af[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) fragment_a<D>(af[m], a, row + m * 16, d);
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            u32 bf[4];
            fragment_b<D>(bf, b, j * 16, d);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(scores[m][2 * j], af[m], bf[0], bf[1]);
                mma_bf16(scores[m][2 * j + 1], af[m], bf[2], bf[3]);
            }
        }
    }
}

// acc[16·M × D] += weights[16·M × 8·N] · (8·N rows of b).
template <int D, int M, int N>
DEV void product_nn(float (&acc)[M][D / 8][4], const float (&weights)[M][N][4], const bf16* b) {
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        u32 af[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            const float(&lo)[4] = weights[m][2 * k], (&hi)[4] = weights[m][2 * k + 1];
            af[m][0] = pack_bf16(lo[0], lo[1]), af[m][1] = pack_bf16(lo[2], lo[3]);
            af[m][2] = pack_bf16(hi[0], hi[1]), af[m][3] = pack_bf16(hi[2], hi[3]);
        }
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            u32 bf[4];
            fragment_b_trans<D>(bf, b, k * 16, j * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(acc[m][2 * j], af[m], bf[0], bf[1]);
                mma_bf16(acc[m][2 * j + 1], af[m], bf[2], bf[3]);
            }
        }
    }
}

// A warp's 16 rows of an accumulator, to rows first… that are below len; times a factor per half.
template <int D>
DEV void put_rows(bf16* to, u64 stride, u32 first, u32 len, const float (&acc)[D / 8][4], float upper, float lower) {
    int lane = threadIdx.x & 31;
    u32 row = first + (lane >> 2), column = (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        u64 at = row * stride + j * 8 + column;
        if (row < len) *reinterpret_cast<u32*>(to + at) = pack_bf16(acc[j][0] * upper, acc[j][1] * upper);
        if (row + 8 < len) {
            *reinterpret_cast<u32*>(to + at + 8 * stride) = pack_bf16(acc[j][2] * lower, acc[j][3] * lower);
        }
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

// A block per tile of 128 queries and head. Later tiles see more keys, so they go first.
template <int D>
DEV void forward(bf16* o, float* lse, const bf16* qkv, const u32* offsets, u32* fault, u32 tokens, u32 segments,
                 Heads at, u64 o_stride, float scale) {
    constexpr int KEYS = D == 128 ? 32 : 64, N = KEYS / 8, M = FORWARD_ROWS / 64;
    DYNAMIC_SHARED(memory);
    bf16* queries = reinterpret_cast<bf16*>(memory);
    bf16* keys = queries + FORWARD_ROWS * LD<D>;
    bf16* values = keys + KEYS * LD<D>;
    SegmentTile tile = find_tile(gridDim.x - 1 - blockIdx.x, FORWARD_ROWS, offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 head = blockIdx.y, kv_head = at.kv_of(head), len = tile.segment.len;
    u64 row = at.row();
    const bf16* first = qkv + tile.segment.start * row;
    load_rows<FORWARD_ROWS, D>(queries, first + at.q(head), row, tile.first, len);
    load_rows<KEYS, D>(keys, first + at.k(kv_head), row, 0, len);
    cp_async_commit();
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = (lane & 3) * 2;
    float acc[M][D / 8][4], largest[M][2], total[M][2];
    clear(acc);
#pragma unroll
    for (int m = 0; m < M; m++) largest[m][0] = largest[m][1] = MASKED, total[m][0] = total[m][1] = 0.f;
    float scale2 = scale * LOG2_E;
    // Of this warp: its first query, and of this thread: the first of its rows.
    u32 from = tile.first + warp * 16 * M, my_row = from + g;
    u32 steps = (min(tile.first + FORWARD_ROWS, len) + KEYS - 1) / KEYS;
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<0>();
        __syncthreads();  // these keys are there for all, and nobody reads the values before them
        load_rows<KEYS, D>(values, first + at.v(kv_head), row, step * KEYS, len);
        cp_async_commit();
        // The last tiles of a block are beyond what its first warps see.
        bool sees = step * KEYS < min(from + 16 * M, len);
        float scores[M][N][4];
        if (sees) {
            product_nt<D>(scores, queries, warp * 16 * M, keys);
            // All queries see all keys, but on the diagonal.
            bool whole = (step + 1) * KEYS <= from + 1;
#pragma unroll
            for (int m = 0; m < M; m++) {
                float top[2] = {largest[m][0], largest[m][1]};
#pragma unroll
                for (int j = 0; j < N; j++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        u32 key = step * KEYS + j * 8 + q + (c & 1), query = my_row + m * 16 + (c >> 1) * 8;
                        scores[m][j][c] = whole || key <= query ? scores[m][j][c] * scale2 : MASKED;
                        top[c >> 1] = fmaxf(top[c >> 1], scores[m][j][c]);
                    }
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    top[h] = quad_max(top[h]);
                    float shrink = exp2_fast(largest[m][h] - top[h]);
                    largest[m][h] = top[h];
                    total[m][h] *= shrink;
#pragma unroll
                    for (int j = 0; j < D / 8; j++) acc[m][j][2 * h] *= shrink, acc[m][j][2 * h + 1] *= shrink;
                }
#pragma unroll
                for (int j = 0; j < N; j++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        scores[m][j][c] = exp2_fast(scores[m][j][c] - largest[m][c >> 1]);
                        total[m][c >> 1] += scores[m][j][c];
                    }
                }
            }
        }
        cp_async_wait<0>();
        __syncthreads();  // the values are there for all, and nobody reads these keys any more
        if (step + 1 < steps) {
            load_rows<KEYS, D>(keys, first + at.k(kv_head), row, (step + 1) * KEYS, len);
            cp_async_commit();
        }
        if (sees) product_nn<D>(acc, scores, values);
    }
    bf16* to = o + tile.segment.start * o_stride + at.q(head);
    float* my_lse = lse + (u64)head * tokens + tile.segment.start;
#pragma unroll
    for (int m = 0; m < M; m++) {
        total[m][0] = quad_sum(total[m][0]);
        total[m][1] = quad_sum(total[m][1]);
        put_rows<D>(to, o_stride, from + m * 16, len, acc[m], 1.f / total[m][0], 1.f / total[m][1]);
        u32 mine = my_row + m * 16;
        if ((lane & 3) == 0) {
            if (mine < len) my_lse[mine] = largest[m][0] * LN_2 + logf(total[m][0]);
            if (mine + 8 < len) my_lse[mine + 8] = largest[m][1] * LN_2 + logf(total[m][1]);
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

// A block per tile of 64 queries and head: dq = scale · Σ ds k.
template <int D>
DEV void backward_q(bf16* dqkv, const BackwardInputs& in, u32* fault, u32 tokens, u32 segments, Heads at, u64 o_stride,
                    float scale) {
    constexpr int KEYS = 32, N = KEYS / 8;
    DYNAMIC_SHARED(memory);
    bf16* queries = reinterpret_cast<bf16*>(memory);
    bf16* d_out = queries + ROWS * LD<D>;
    bf16* keys = d_out + ROWS * LD<D>;       // two stages
    bf16* values = keys + 2 * KEYS * LD<D>;  // two stages
    SegmentTile tile = find_tile(gridDim.x - 1 - blockIdx.x, ROWS, in.offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 head = blockIdx.y, kv_head = at.kv_of(head), len = tile.segment.len;
    u64 row = at.row();
    const bf16* first = in.qkv + tile.segment.start * row;
    auto load_keys = [&](int stage, u32 from) {
        load_rows<KEYS, D>(keys + stage * KEYS * LD<D>, first + at.k(kv_head), row, from, len);
        load_rows<KEYS, D>(values + stage * KEYS * LD<D>, first + at.v(kv_head), row, from, len);
        cp_async_commit();
    };
    load_rows<ROWS, D>(queries, first + at.q(head), row, tile.first, len);
    load_rows<ROWS, D>(d_out, in.d_o + tile.segment.start * o_stride + at.q(head), o_stride, tile.first, len);
    load_keys(0, 0);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = (lane & 3) * 2;
    float acc[1][D / 8][4], my_lse[2], my_delta[2], scale2 = scale * LOG2_E;
    clear(acc);
    u32 my_row = tile.first + warp * 16 + g;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u64 t = (u64)head * tokens + tile.segment.start + my_row + h * 8;
        bool there = my_row + h * 8 < len;
        my_lse[h] = there ? in.lse[t] * LOG2_E : 0.f;
        my_delta[h] = there ? in.delta[t] : 0.f;
    }
    u32 steps = (min(tile.first + ROWS, len) + KEYS - 1) / KEYS;
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<0>();
        __syncthreads();  // as in the forward pass
        if (step + 1 < steps) load_keys((step + 1) & 1, (step + 1) * KEYS);
        const bf16* k_tile = keys + (step & 1) * KEYS * LD<D>;
        float scores[1][N][4], ds[1][N][4];
        product_nt<D>(scores, queries, warp * 16, k_tile);
        product_nt<D>(ds, d_out, warp * 16, values + (step & 1) * KEYS * LD<D>);
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                u32 key = step * KEYS + j * 8 + q + (c & 1), query = my_row + (c >> 1) * 8;
                bool seen = key <= query && query < len;
                float p = seen ? exp2_fast(scores[0][j][c] * scale2 - my_lse[c >> 1]) : 0.f;
                ds[0][j][c] = p * (ds[0][j][c] - my_delta[c >> 1]);
            }
        }
        product_nn<D>(acc, ds, k_tile);
    }
    bf16* to = dqkv + tile.segment.start * row + at.q(head);
    put_rows<D>(to, row, tile.first + warp * 16, len, acc[0], scale, scale);
}

// A block per tile of 64 keys and key/value head: dv = Σ pᵀ do, dk = scale · Σ dsᵀ q, over the queries
// that see the tile, for one head of the group after the other.
template <int D>
DEV void backward_kv(bf16* dqkv, const BackwardInputs& in, u32* fault, u32 tokens, u32 segments, Heads at, u64 o_stride,
                     float scale) {
    constexpr int QUERIES = 32, N = QUERIES / 8;
    DYNAMIC_SHARED(memory);
    bf16* keys = reinterpret_cast<bf16*>(memory);
    bf16* values = keys + ROWS * LD<D>;
    bf16* queries = values + ROWS * LD<D>;        // two stages
    bf16* d_out = queries + 2 * QUERIES * LD<D>;  // two stages
    SegmentTile tile = find_tile(blockIdx.x, ROWS, in.offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 kv_head = blockIdx.y, len = tile.segment.len, group = at.heads / at.kv_heads;
    u64 row = at.row();
    const bf16* first = in.qkv + tile.segment.start * row;
    const bf16* first_d = in.d_o + tile.segment.start * o_stride;
    // Steps go through the queries from the tile's first key on, then through the next head's.
    u32 per_head = (len - tile.first + QUERIES - 1) / QUERIES, steps = per_head * group;
    auto load_queries = [&](u32 step) {
        u32 head = kv_head * group + step / per_head, from = tile.first + step % per_head * QUERIES;
        int stage = step & 1;
        load_rows<QUERIES, D>(queries + stage * QUERIES * LD<D>, first + at.q(head), row, from, len);
        load_rows<QUERIES, D>(d_out + stage * QUERIES * LD<D>, first_d + at.q(head), o_stride, from, len);
        cp_async_commit();
    };
    load_rows<ROWS, D>(keys, first + at.k(kv_head), row, tile.first, len);
    load_rows<ROWS, D>(values, first + at.v(kv_head), row, tile.first, len);
    load_queries(0);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = (lane & 3) * 2;
    float dk[1][D / 8][4], dv[1][D / 8][4], scale2 = scale * LOG2_E;
    clear(dk);
    clear(dv);
    u32 my_key = tile.first + warp * 16 + g;
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<0>();
        __syncthreads();  // as in the forward pass
        if (step + 1 < steps) load_queries(step + 1);
        const bf16* q_tile = queries + (step & 1) * QUERIES * LD<D>;
        const bf16* d_tile = d_out + (step & 1) * QUERIES * LD<D>;
        u32 from = tile.first + step % per_head * QUERIES;
        u64 of_head = (u64)(kv_head * group + step / per_head) * tokens + tile.segment.start;
        // dv before ds: registers do not hold everything at once.
        float p[1][N][4], ds[1][N][4];
        product_nt<D>(p, keys, warp * 16, q_tile);
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                u32 query = from + j * 8 + q + (c & 1), key = my_key + (c >> 1) * 8;
                bool seen = key <= query && query < len;
                p[0][j][c] = seen ? exp2_fast(p[0][j][c] * scale2 - in.lse[of_head + query] * LOG2_E) : 0.f;
            }
        }
        product_nn<D>(dv, p, d_tile);
        product_nt<D>(ds, values, warp * 16, d_tile);
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                u32 query = from + j * 8 + q + (c & 1);
                // Where nothing is seen p is 0.
                ds[0][j][c] = p[0][j][c] * (ds[0][j][c] - (query < len ? in.delta[of_head + query] : 0.f));
            }
        }
        product_nn<D>(dk, ds, q_tile);
    }
    bf16* to = dqkv + tile.segment.start * row;
    put_rows<D>(to + at.k(kv_head), row, tile.first + warp * 16, len, dk[0], scale, scale);
    put_rows<D>(to + at.v(kv_head), row, tile.first + warp * 16, len, dv[0], 1.f, 1.f);
}

#define SHAPE u32 heads, u32 kv_heads, u32 head_dim
#define AT Heads{heads, kv_heads, head_dim}
#define BACKWARD_PARAMETERS                                                                                           \
    bf16 *dqkv, const float *delta, const bf16 *d_o, const float *lse, const bf16 *qkv, const u32 *offsets,           \
        u32 *fault, u32 tokens, u32 segments, SHAPE, u64 o_stride, float scale
#define BACKWARD_ARGUMENTS dqkv, {delta, d_o, lse, qkv, offsets}, fault, tokens, segments, AT, o_stride, scale
#define INSTANCES(D)                                                                                                 \
    KERNEL LAUNCH_BOUNDS(THREADS) flash_forward_##D(bf16* o, float* lse, const bf16* qkv, const u32* offsets,          \
                                                    u32* fault, u32 tokens, u32 segments, SHAPE, u64 o_stride,       \
                                                    float scale) {                                                   \
        forward<D>(o, lse, qkv, offsets, fault, tokens, segments, AT, o_stride, scale);                              \
    }                                                                                                                \
    EXPORT(flash_forward_##D)                                                                                        \
    KERNEL LAUNCH_BOUNDS(THREADS) flash_backward_q_##D(BACKWARD_PARAMETERS) { backward_q<D>(BACKWARD_ARGUMENTS); }    \
    EXPORT(flash_backward_q_##D)                                                                                     \
    KERNEL LAUNCH_BOUNDS(THREADS) flash_backward_kv_##D(BACKWARD_PARAMETERS) { backward_kv<D>(BACKWARD_ARGUMENTS); }  \
    EXPORT(flash_backward_kv_##D)
INSTANCES(64)
INSTANCES(128)
