// Attention through the tensor cores: bf16, head sizes 64 and 128, causal within segments.
//
// Forward: a block of four warps has 128 queries of one head, 32 per warp so that keys and values are
// read from shared memory once for two products, and goes through the keys they see in tiles of 64.
// The next keys and values come in meanwhile; where a multiprocessor has not the room for two such blocks, the
// values while scores are computed, the next keys while values are summed. The softmax is built up on the way.
// Backward computes the probabilities again from lse, once by tiles of keys for dk and dv, which one
// block sums over all queries and over the heads of its group, and once by tiles of queries for dq:
// more products than with atomic additions, but always the same sums. Both are blocks of one launch:
// those of keys are long and go first, those of queries fill the end. A block keeps its own rows as
// fragments in registers, and the other side's come in two stages of 64 rows. A warp has 16 own rows of heads
// of 128, and 32 of heads of 64: what is read from shared memory is then used twice.
//
// Tiles count from the first token of a segment, so that a segment's bits do not depend on what
// else is in the stream. They go in the order of falling work over all segments.
//
// A step of 64 rows costs on an H100, in cycles of a multiprocessor: the tensor cores as mma.sync reaches them
// (6.45 for one instruction of each warp), and shared memory at 128 bytes each, for ldmatrix (4 for each of four
// warps) and what cp.async writes. Two blocks share a multiprocessor.
//
//   block          mma per warp   ldmatrix per warp   tensor cores   shared memory   barriers   registers
//   forward, 128       256              80               1650         1280 + 256        1          251
//   dk, dv, 128        256             128               1650         2048 + 256        1          255
//   dq, 128            192              96               1240         1536 + 256        1          255
//   forward, 64        128              40                830          640 + 128        1          212
//   dk, dv, 64         256              96               1650         1536 + 128        1          254
//   dq, 64             192              48               1240          768 + 128        1          254
#include "packed.cuh"
#include "flash.cuh"

// Blocks that a multiprocessor holds: a limit for registers.
constexpr int BLOCKS = 2;

// A block per tile of 128 queries and head; those that see the most keys go first. The scale is positive.
// Keys and values come in a step ahead where there are two stages for both, else in turn.
template <int D, int STAGES>
DEV void forward(bf16* o, float* lse, const bf16* qkv, const u32* offsets, u32* fault, u32 tokens, u32 segments,
                 Heads at, u64 o_stride, float scale) {
    constexpr int N = STEP / 8;
    DYNAMIC_SHARED(memory);
    bf16* queries = reinterpret_cast<bf16*>(memory);
    bf16* stages = queries + FORWARD_ROWS * LD<D>;
    RankedTile tile = find_ranked_tile(blockIdx.x / at.heads, FORWARD_ROWS, offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 head = blockIdx.x % at.heads, kv_head = at.kv_of(head), len = tile.segment.len;
    u32 tile_first = (tile.rank - 1) * FORWARD_ROWS;
    u64 row = at.row();
    u32 start = tile.segment.start;
    Rows key_rows = {qkv, row, start, at.k(kv_head)}, value_rows = {qkv, row, start, at.v(kv_head)};
    load_rows<FORWARD_ROWS, D>(queries, {qkv, row, start, at.q(head)}, tile_first, len);
    load_rows<STEP, D>(stages, key_rows, 0, len);
    if (STAGES == 2) load_rows<STEP, D>(stages + STEP * LD<D>, value_rows, 0, len);
    cp_async_commit();
    int lane = threadIdx.x & 31, warp = quarter(), g = lane >> 2, q = (lane & 3) * 2;
    float acc[2][D / 8][4];
    Softmax<2> so_far;
    clear(acc);
    so_far.begin();
    float scale2 = scale * LOG2_E;
    // Of this warp: its first query, and of this thread: the first of its rows.
    u32 from = tile_first + warp * 32, my_row = from + g;
    u32 steps = (min(tile_first + FORWARD_ROWS, len) + STEP - 1) / STEP;
    for (u32 step = 0; step < steps; step++) {
        bf16 *keys = stages + step % STAGES * 2 * STEP * LD<D>, *values = keys + STEP * LD<D>;
        cp_async_wait<0>();
        __syncthreads();  // these keys are there for all, and nobody reads the values before them
        if (STAGES == 1) {
            load_rows<STEP, D>(values, value_rows, step * STEP, len);
            cp_async_commit();
        } else if (step + 1 < steps) {
            bf16* next = stages + (step + 1) % STAGES * 2 * STEP * LD<D>;
            load_rows<STEP, D>(next, key_rows, (step + 1) * STEP, len);
            load_rows<STEP, D>(next + STEP * LD<D>, value_rows, (step + 1) * STEP, len);
            cp_async_commit();
        }
        // The last tiles of a block are beyond what its first warps see.
        bool sees = step * STEP < min(from + 32, len);
        u32 packed[2][N / 2][4];
        if (sees) {
            float scores[2][N][4];
            product_nt<D>(scores, queries + warp * 32 * LD<D>, keys);
            // All queries see all keys, but on the diagonal.
            if ((step + 1) * STEP > from + 1) mask(scores, (int)(my_row - q - step * STEP));
            softmax_step(scores, acc, so_far, scale2);
            pack(packed, scores);
        }
        if (STAGES == 1) {
            cp_async_wait<0>();
            __syncthreads();  // the values are there for all, and nobody reads these keys any more
            if (step + 1 < steps) load_rows<STEP, D>(keys, key_rows, (step + 1) * STEP, len);
            cp_async_commit();
        }
        // Registers do not hold fragments of values beside all scores.
        if (STAGES == 2) __syncwarp();
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

// Rows of a block's own tile, in pieces of 16 rows per warp: as many as registers hold.
template <int D> constexpr int PIECES = 128 / D;
template <int D> constexpr int ROWS = 64 * PIECES<D>;
// Where a block's own two tiles come in: in a stage, or where that is too small behind both.
template <int D> DEV bf16* own_tiles(unsigned char* memory, u32 stage) {
    return ROWS<D> == STEP ? stage_of<D>(memory, stage).a : reinterpret_cast<bf16*>(memory + 2 * STAGE_BYTES<D>);
}
DEV void copy(u32 (&to)[4], const u32 (&from)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = from[i];
}
template <int D> using Kept = u32[PIECES<D>][D / 16][4];
// A warp's rows of an own tile.
template <int D> DEV void keep_rows(Kept<D>& kept, const bf16* tile) {
    const bf16* lane_a = lane_of_a<D>(tile + quarter() * 16 * PIECES<D> * LD<D>);
#pragma unroll
    for (int m = 0; m < PIECES<D>; m++) {
#pragma unroll
        for (int d = 0; d < D / 16; d++) ldmatrix_x4(kept[m][d], lane_a + m * 16 * LD<D> + d * 16);
    }
}

// scores = rows kept in registers · (8·N rows of a)ᵀ, gradients = other rows · (8·N rows of b)ᵀ; `fragments`
// gives those of the other rows for a piece and 16 columns.
template <int D, int M, int N, class F>
DEV void both_products(float (&scores)[M][N][4], float (&gradients)[M][N][4], const Kept<D>& kept, F fragments,
                       const bf16* a, const bf16* b) {
    const bf16 *lane_a = lane_of_b<D>(a), *lane_b = lane_of_b<D>(b);
    clear(scores);
    clear(gradients);
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
        u32 other[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) fragments(other[m], m, d);
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            u32 bf[4];
            ldmatrix_x4(bf, lane_a + j * 16 * LD<D> + d * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(scores[m][2 * j], kept[m][d], bf[0], bf[1]);
                mma_bf16(scores[m][2 * j + 1], kept[m][d], bf[2], bf[3]);
            }
            ldmatrix_x4(bf, lane_b + j * 16 * LD<D> + d * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(gradients[m][2 * j], other[m], bf[0], bf[1]);
                mma_bf16(gradients[m][2 * j + 1], other[m], bf[2], bf[3]);
            }
        }
    }
}

// A block per tile of queries and head: dq = scale · Σ ds k.
template <int D>
DEV void backward_q(u32 block, bf16* dqkv, const BackwardInputs& in, u32* fault, u32 tokens, u32 segments, Heads at,
                    u64 o_stride, float scale) {
    constexpr int PART = 32, N = PART / 8, M = PIECES<D>;
    DYNAMIC_SHARED(memory);
    RankedTile tile = find_ranked_tile(block / at.heads, ROWS<D>, in.offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 head = block % at.heads, kv_head = at.kv_of(head), len = tile.segment.len;
    u32 tile_first = (tile.rank - 1) * ROWS<D>, steps = (min(tile_first + ROWS<D>, len) + STEP - 1) / STEP;
    u32 start = tile.segment.start;
    u64 row = at.row();
    auto load_keys = [&](u32 step) {
        Stage<D> to = stage_of<D>(memory, step);
        load_rows<STEP, D>(to.a, {in.qkv, row, start, at.k(kv_head)}, step * STEP, len);
        load_rows<STEP, D>(to.b, {in.qkv, row, start, at.v(kv_head)}, step * STEP, len);
        cp_async_commit();
    };
    // Queries and gradients of outputs go to registers.
    bf16* own = own_tiles<D>(memory, 1);
    load_rows<ROWS<D>, D>(own, {in.qkv, row, start, at.q(head)}, tile_first, len);
    load_rows<ROWS<D>, D>(own + ROWS<D> * LD<D>, {in.d_o, o_stride, start, at.q(head)}, tile_first, len);
    cp_async_commit();
    load_keys(0);
    int lane = threadIdx.x & 31, warp = quarter(), g = lane >> 2, q = (lane & 3) * 2;
    float acc[M][D / 8][4], my_lse[M][2], my_delta[M][2], scale2 = scale * LOG2_E;
    clear(acc);
    // Of this warp: its first query, and of this thread: the first of its rows.
    u32 from = tile_first + warp * 16 * M, my_row = from + g;
#pragma unroll
    for (int h = 0; h < 2 * M; h++) {
        u64 t = (u64)head * tokens + start + my_row + h * 8;
        bool there = my_row + h * 8 < len;
        my_lse[h / 2][h % 2] = there ? in.lse[t] * LOG2_E : 0.f;
        my_delta[h / 2][h % 2] = there ? in.delta[t] : 0.f;
    }
    cp_async_wait<1>();
    __syncthreads();
    Kept<D> queries, d_out;
    keep_rows<D>(queries, own);
    keep_rows<D>(d_out, own + ROWS<D> * LD<D>);
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<0>();
        __syncthreads();  // this stage is there for all, and nobody reads the other one any more
        if (step + 1 < steps) load_keys(step + 1);
        Stage<D> stage = stage_of<D>(memory, step);
#pragma unroll
        for (int part = 0; part < STEP; part += PART) {
            u32 key_first = step * STEP + part;
            if (key_first >= from + 16 * M) break;
            float p[M][N][4], ds[M][N][4];
            auto kept = [&](u32 (&to)[4], int m, int d) { copy(to, d_out[m][d]); };
            both_products<D>(p, ds, queries, kept, stage.a + part * LD<D>, stage.b + part * LD<D>);
            // All queries see all keys, but on the diagonal.
            bool whole = key_first + PART <= from + 1;
            int edge = my_row - q - key_first;
#pragma unroll
            for (int i = 0; i < M * N * 4; i++) {
                int m = i / (N * 4), j = i / 4 % N, c = i % 4, h = c >> 1;
                int key = j * 8 + (c & 1), query = m * 16 + h * 8 + edge;
                float probability = exp2_fast(fmaf(p[m][j][c], scale2, -my_lse[m][h]));
                ds[m][j][c] = whole || key <= query ? probability * (ds[m][j][c] - my_delta[m][h]) : 0.f;
            }
            u32 packed[M][N / 2][4];
            pack(packed, ds);
            product_nn<D>(acc, packed, stage.a + part * LD<D>);
        }
    }
    bf16 *to = dqkv + start * row + at.q(head), *room = own_tiles<D>(memory, steps);  // not in the last step's stage
#pragma unroll
    for (int m = 0; m < M; m++) {
        put_rows<D>(to, row, from + m * 16, len, acc[m], scale, scale, room + (warp * M + m) * 16 * LD<D>);
    }
}

// A block per tile of keys and key/value head: dv = Σ pᵀ do, dk = scale · Σ dsᵀ q, over the queries
// that see the tile, for one head of the group after the other.
template <int D>
DEV void backward_kv(u32 block, bf16* dqkv, const BackwardInputs& in, u32* fault, u32 tokens, u32 segments, Heads at,
                     u64 o_stride, float scale) {
    // Registers hold no more beside keys, values and their gradients.
    constexpr int PART = 16, N = PART / 8, M = PIECES<D>;
    DYNAMIC_SHARED(memory);
    RankedTile tile = find_ranked_tile(block / at.kv_heads, ROWS<D>, in.offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 kv_head = block % at.kv_heads, group = at.heads / at.kv_heads;
    // The first tile of a segment is seen by the most queries. From here on its first key is number 0.
    u32 tile_first = (tile.ranks - tile.rank) * ROWS<D>;
    u32 start = tile.segment.start + tile_first, len = tile.segment.len - tile_first;
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
    u32 left = (len + STEP - 1) / STEP * group, head = kv_head * group;
    // Keys and values go to registers, by way of the second step's stage where they fit there.
    bf16* own = own_tiles<D>(memory, left - 1);
    load_rows<ROWS<D>, D>(own, {in.qkv, row, start, at.k(kv_head)}, 0, len);
    load_rows<ROWS<D>, D>(own + ROWS<D> * LD<D>, {in.qkv, row, start, at.v(kv_head)}, 0, len);
    cp_async_commit();
    load_queries(left, head, 0);
    int lane = threadIdx.x & 31, from = quarter() * 16 * M, g = lane >> 2, q = (lane & 3) * 2;
    float dk[M][D / 8][4], dv[M][D / 8][4], scale2 = scale * LOG2_E;
    clear(dk);
    clear(dv);
    cp_async_wait<1>();
    __syncthreads();
    Kept<D> keys, values;
    keep_rows<D>(keys, own);
    // Where they have a place of their own, values stay there.
    constexpr bool KEPT = ROWS<D> == STEP;
    if constexpr (KEPT) keep_rows<D>(values, own + ROWS<D> * LD<D>);
    const bf16* lane_of_values = lane_of_a<D>(own + (ROWS<D> + from) * LD<D>);
    auto fragments = [&](u32 (&to)[4], int m, int d) {
        if constexpr (KEPT) {
            copy(to, values[m][d]);
        } else {
            ldmatrix_x4(to, lane_of_values + m * 16 * LD<D> + d * 16);
        }
    };
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
            float p[M][N][4], ds[M][N][4];
            both_products<D>(p, ds, keys, fragments, q_tile, d_tile);
            // All queries see all keys, but on the diagonal.
            bool whole = ahead >= 16 * M - 1;
            int edge = ahead + q - g;
#pragma unroll
            for (int j = 0; j < N; j++) {
                float2 lse = *reinterpret_cast<const float2*>(stage.lse + part + j * 8 + q);
                float2 delta = *reinterpret_cast<const float2*>(stage.delta + part + j * 8 + q);
#pragma unroll
                for (int i = 0; i < M * 4; i++) {
                    int m = i / 4, c = i % 4, key = m * 16 + (c >> 1) * 8, query = j * 8 + (c & 1) + edge;
                    float shift = (c & 1 ? lse.y : lse.x) * LOG2_E;
                    float probability = exp2_fast(fmaf(p[m][j][c], scale2, -shift));
                    p[m][j][c] = whole || key <= query ? probability : 0.f;
                    ds[m][j][c] = p[m][j][c] * (ds[m][j][c] - (c & 1 ? delta.y : delta.x));
                }
            }
            u32 packed_p[M][N / 2][4], packed_ds[M][N / 2][4];
            pack(packed_p, p);
            pack(packed_ds, ds);
            product_nn<D>(dv, packed_p, d_tile);
            product_nn<D>(dk, packed_ds, q_tile);
        }
        first = next;
    }
    kv_head = head / group - 1;  // not kept all the time
    bf16* to = dqkv + start * row;
    bf16* room = own_tiles<D>(memory, 0) + from * LD<D>;  // not in the last step's stage
#pragma unroll
    for (int m = 0; m < M; m++) {
        bf16 *room_k = room + m * 16 * LD<D>, *room_v = room_k + ROWS<D> * LD<D>;
        put_rows<D>(to + at.k(kv_head), row, from + m * 16, len, dk[m], scale, scale, room_k);
        put_rows<D>(to + at.v(kv_head), row, from + m * 16, len, dv[m], 1.f, 1.f, room_v);
    }
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
#define FORWARD(D, STAGES, name)                                                                                     \
    KERNEL LAUNCH_BOUNDS(THREADS) name(bf16* o, float* lse, const bf16* qkv, const u32* offsets, u32* fault,          \
                                       u32 tokens, u32 segments, SHAPE, u64 o_stride, float scale) {                 \
        forward<D, STAGES>(o, lse, qkv, offsets, fault, tokens, segments, AT, o_stride, scale);                      \
    }                                                                                                                \
    EXPORT(name)
#define BACKWARD(D)                                                                                                  \
    KERNEL LAUNCH_BOUNDS(THREADS, BLOCKS)                                                                            \
        flash_backward_##D(bf16* dqkv, const float* delta, const bf16* d_o, const float* lse, const bf16* qkv,        \
                           const u32* offsets, u32* fault, u32 tokens, u32 segments, SHAPE, u64 o_stride,            \
                           float scale) {                                                                            \
        backward<D>(dqkv, {delta, d_o, lse, qkv, offsets}, fault, tokens, segments, AT, o_stride, scale);            \
    }                                                                                                                \
    EXPORT(flash_backward_##D)
FORWARD(64, 2, flash_forward_64)
FORWARD(128, 1, flash_forward_128)
FORWARD(128, 2, flash_forward_128_ahead)
BACKWARD(64)
BACKWARD(128)
