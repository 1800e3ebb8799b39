// Attention through Hopper's own tensor-core instructions: bf16, heads of 128, causal within segments.
//
// The same sums as cu/flash.cu in the same order of keys, by wgmma instead of mma.sync: a block of one warpgroup
// multiplies tiles in shared memory, two blocks share a multiprocessor, and one computes probabilities while the other
// multiplies. Within a block products run beside the softmax too: forward, those of one half of the 128
// queries beside the exponentials of the other; backward, gradients of probabilities beside the probabilities.
// A warp has 16 rows of every 64, and keeps them as accumulators in the layout of mma.sync.
//
// A step of 64 keys (or queries) costs on an H100, in cycles of a multiprocessor: the tensor cores (32 for a product
// 64×64×16, 64 for 64×128×16), and shared memory at 128 bytes each, read by wgmma and written by cp.async.
//
//   block        wgmma                        tensor cores   shared memory
//   forward      16 of n = 64, 8 of n = 128       1024        512 + 256 + 256
//   dk, dv       16 of n = 64, 8 of n = 128       1024        512 + 256 + 256
//   dq           16 of n = 64, 4 of n = 128        768        256 + 128 + 256
#include "packed.cuh"
#include "flash.cuh"

constexpr int HEAD = 128, HALF = 64, QUARTER = 16;
// A tile of 64 rows: two panels of 64 columns.
constexpr u32 PANEL = 64 * 128, TILE = 2 * PANEL;
// Of a tile of 64 rows; what comes in at a time backwards is two of them, lse and delta.
constexpr u32 FORWARD_STAGE = 2 * TILE, BACKWARD_STAGE = 2 * TILE + 1024;

// Panels begin at multiples of 1,024 bytes.
DEV unsigned char* align(unsigned char* memory) { return memory + (-(u64)memory & 1023); }

// Copies rows first … first + 63 of a segment of `len` into a tile, zeros beyond its end.
DEV void load_tile(unsigned char* tile, const Rows& from, u32 first, u32 len) {
    constexpr int CHUNKS = HEAD / 8, AT_A_TIME = THREADS / CHUNKS;
    u32 r = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
    const bf16* source = from.memory + (from.start + first + r) * from.stride + from.column + c * 8;
    // Rows of a thread are eight apart, so its place in them is the same.
    unsigned char* to = tile + c / 8 * PANEL + r * 128 + (c % 8 ^ r) * 16;
    int left = len - first - r;
#pragma unroll 4
    for (int i = 0; i < 64; i += AT_A_TIME) {
        cp_async16(to, source, i < left);
        to += AT_A_TIME * 128, source += AT_A_TIME * from.stride;
    }
}
// What was copied is there for all threads' products.
DEV void loaded() {
    cp_async_wait<0>();
    wgmma_fence_memory();
    __syncthreads();
}

// An operand whose columns are the summed dimension, 16 of them from `column` on.
DEV WgmmaTile columns_of(WgmmaTile tile, int column) { return tile.further(column / 64 * PANEL + column % 64 * 2); }
// An operand whose rows are the summed dimension, 16 of them from `row` on.
DEV WgmmaTile rows_of(WgmmaTile tile, int row) { return tile.further(row * 128); }

// scores = a · bᵀ, over the columns of two tiles. Begun, and closed as a group.
DEV void begin_scores(float (&scores)[1][8][4], WgmmaTile a, WgmmaTile b) {
#pragma unroll
    for (int c = 0; c < HEAD; c += 16) wgmma_nt(scores[0], columns_of(a, c), columns_of(b, c), c > 0);
    wgmma_commit();
}
// A warp's 16 rows of a tile, in registers.
using Kept = u32[HEAD / 16][4];
DEV void keep_rows(Kept& kept, const unsigned char* tile) {
    u32 lane = threadIdx.x & 31, r = (threadIdx.x >> 5) * QUARTER + (lane & 15);
#pragma unroll
    for (int i = 0; i < HEAD / 16; i++) {
        u32 c = i % 4 * 2 + (lane >> 4);
        ldmatrix_x4(kept[i], tile + i / 4 * PANEL + r * 128 + (c ^ r % 8) * 16);
    }
}
// scores = kept rows · bᵀ, as above.
DEV void begin_scores(float (&scores)[1][8][4], const Kept& a, WgmmaTile b) {
#pragma unroll
    for (int i = 0; i < HEAD / 16; i++) wgmma_nt(scores[0], a[i], columns_of(b, i * 16), i > 0);
    wgmma_commit();
}
// acc += weights · b, over the rows of a tile. Begun, and closed as a group.
DEV void begin_sums(float (&acc)[1][16][4], const u32 (&weights)[1][4][4], WgmmaTile b) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma_nn(acc[0], weights[0][k], rows_of(b, k * 16));
    wgmma_commit();
}

// ---- forward

// A block per tile of 128 queries and head, as in cu/flash.cu.
DEV void forward(bf16* o, float* lse, const bf16* qkv, const u32* offsets, u32* fault, u32 tokens, u32 segments,
                 Heads at, u64 o_stride, float scale) {
    DYNAMIC_SHARED(unaligned);
    unsigned char *queries = align(unaligned), *stages = queries + 2 * TILE;
    RankedTile tile = find_ranked_tile(blockIdx.x / at.heads, FORWARD_ROWS, offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 head = blockIdx.x % at.heads, kv_head = at.kv_of(head), len = tile.segment.len;
    u32 tile_first = (tile.rank - 1) * FORWARD_ROWS, start = tile.segment.start;
    u64 row = at.row();
    Rows query_rows = {qkv, row, start, at.q(head)};
    auto load = [&](u32 step) {
        unsigned char* to = stages + step % 2 * FORWARD_STAGE;
        load_tile(to, {qkv, row, start, at.k(kv_head)}, step * STEP, len);
        load_tile(to + TILE, {qkv, row, start, at.v(kv_head)}, step * STEP, len);
        cp_async_commit();
    };
    load_tile(queries, query_rows, tile_first, len);
    load_tile(queries + TILE, query_rows, tile_first + HALF, len);
    load(0);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = (lane & 3) * 2;
    float acc[2][1][HEAD / 8][4], scale2 = scale * LOG2_E;
    Softmax<1> so_far[2];
#pragma unroll
    for (int m = 0; m < 2; m++) {
        clear(acc[m]);
        so_far[m].begin();
    }
    // Of this thread: the first of its rows.
    u32 my_row = tile_first + warp * QUARTER + g;
    u32 steps = (min(tile_first + FORWARD_ROWS, len) + STEP - 1) / STEP;
    WgmmaTile query_tile = wgmma_tile(queries, PANEL), stage_tile = wgmma_tile(stages, PANEL);
    // Halves of the queries from number `M` on see these keys.
    auto one_step = [&](auto from, u32 step) {
        constexpr int M = decltype(from)::value;
        WgmmaTile keys = stage_tile.further(step % 2 * FORWARD_STAGE), values = keys.further(TILE);
        loaded();
        float scores[2][1][STEP / 8][4];
        wgmma_fence();
#pragma unroll
        for (int m = M; m < 2; m++) begin_scores(scores[m], query_tile.further(m * TILE), keys);
        wgmma_wait<1 - M>();
        __syncthreads();  // nobody reads the keys and values of the step before
        if (step + 1 < steps) load(step + 1);
#pragma unroll
        for (int m = M; m < 2; m++) {
            wgmma_hold(scores[m][0]);
            wgmma_hold(acc[m][0]);
            // All queries see all keys, but on the diagonal.
            u32 first_query = tile_first + m * HALF;
            if ((step + 1) * STEP > first_query + 1) mask(scores[m], (int)(my_row + m * HALF - q - step * STEP));
            softmax_step(scores[m], acc[m], so_far[m], scale2);
            u32 packed[1][STEP / 16][4];
            pack(packed, scores[m]);
            // Beside the softmax of the first half run the scores of the second; beside that of the second, the first's sums.
            wgmma_wait<0>();
            begin_sums(acc[m], packed, values);
        }
        wgmma_wait<0>();
    };
    // The keys of the second half of the queries come last, and the first half sees none of them.
    u32 seen_by_both = min(steps, tile_first / STEP + 1);
    for (u32 step = 0; step < seen_by_both; step++) one_step(Count<0>{}, step);
    if (seen_by_both < steps) one_step(Count<1>{}, seen_by_both);
    __syncthreads();  // all products are done, so that rows may go out through their memory
    bf16* to = o + start * o_stride + at.q(head);
    float* my_lse = lse + (u64)head * tokens + start;
    bf16* room = reinterpret_cast<bf16*>(queries) + warp * QUARTER * LD<HEAD>;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        wgmma_hold(acc[m][0]);
        Softmax<1>& sums = so_far[m];
        float upper = quad_sum(sums.total[0][0]), lower = quad_sum(sums.total[0][1]);
        put_rows<HEAD>(to, o_stride, tile_first + m * HALF + warp * QUARTER, len, acc[m][0], 1.f / upper, 1.f / lower, room);
        u32 mine = my_row + m * HALF;
        if ((lane & 3) == 0) {
            if (mine < len) my_lse[mine] = sums.largest[0][0] * scale + logf(upper);
            if (mine + 8 < len) my_lse[mine + 8] = sums.largest[0][1] * scale + logf(lower);
        }
    }
}

// ---- backward

// A block per tile of 64 queries and head: dq = scale · Σ ds k.
DEV void backward_q(u32 block, bf16* dqkv, const BackwardInputs& in, u32* fault, u32 tokens, u32 segments, Heads at,
                    u64 o_stride, float scale) {
    DYNAMIC_SHARED(unaligned);
    unsigned char *own = align(unaligned), *stages = own + 2 * TILE;
    RankedTile tile = find_ranked_tile(block / at.heads, HALF, in.offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 head = block % at.heads, kv_head = at.kv_of(head), len = tile.segment.len;
    u32 tile_first = (tile.rank - 1) * HALF, steps = tile.rank, start = tile.segment.start;
    u64 row = at.row();
    auto load = [&](u32 step) {
        unsigned char* to = stages + step % 2 * BACKWARD_STAGE;
        load_tile(to, {in.qkv, row, start, at.k(kv_head)}, step * STEP, len);
        load_tile(to + TILE, {in.qkv, row, start, at.v(kv_head)}, step * STEP, len);
        cp_async_commit();
    };
    load_tile(own, {in.qkv, row, start, at.q(head)}, tile_first, len);
    load_tile(own + TILE, {in.d_o, o_stride, start, at.q(head)}, tile_first, len);
    cp_async_commit();
    load(0);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = (lane & 3) * 2;
    float acc[1][HEAD / 8][4], my_lse[2], my_delta[2], scale2 = scale * LOG2_E;
    clear(acc);
    u32 my_row = tile_first + warp * QUARTER + g;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u64 t = (u64)head * tokens + start + my_row + h * 8;
        bool there = my_row + h * 8 < len;
        my_lse[h] = there ? in.lse[t] * LOG2_E : 0.f;
        my_delta[h] = there ? in.delta[t] : 0.f;
    }
    WgmmaTile stage_tile = wgmma_tile(stages, PANEL);
    cp_async_wait<1>();
    __syncthreads();
    // From registers they cost shared memory nothing.
    Kept queries, d_out;
    keep_rows(queries, own);
    keep_rows(d_out, own + TILE);
    for (u32 step = 0; step < steps; step++) {
        WgmmaTile keys = stage_tile.further(step % 2 * BACKWARD_STAGE), values = keys.further(TILE);
        loaded();
        float p[1][STEP / 8][4], ds[1][STEP / 8][4];
        wgmma_fence();
        begin_scores(p, queries, keys);
        begin_scores(ds, d_out, values);
        wgmma_wait<1>();
        __syncthreads();  // nobody reads the keys of the step before
        if (step + 1 < steps) load(step + 1);
        wgmma_hold(p[0]);
        bool whole = step + 1 < steps;
        int edge = my_row - q - step * STEP;
#pragma unroll
        for (int j = 0; j < STEP / 8; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int key = j * 8 + (c & 1), query = (c >> 1) * 8 + edge;
                float probability = exp2_fast(fmaf(p[0][j][c], scale2, -my_lse[c >> 1]));
                p[0][j][c] = whole || key <= query ? probability : 0.f;
            }
        }
        wgmma_wait<0>();
        wgmma_hold(ds[0]);
#pragma unroll
        for (int j = 0; j < STEP / 8; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) ds[0][j][c] = p[0][j][c] * (ds[0][j][c] - my_delta[c >> 1]);
        }
        u32 packed[1][STEP / 16][4];
        pack(packed, ds);
        begin_sums(acc, packed, keys);
        wgmma_wait<0>();
        wgmma_hold(acc[0]);
    }
    __syncthreads();  // as forward
    bf16 *to = dqkv + start * row + at.q(head), *room = reinterpret_cast<bf16*>(own) + warp * QUARTER * LD<HEAD>;
    put_rows<HEAD>(to, row, tile_first + warp * QUARTER, len, acc[0], scale, scale, room);
}

// A block per tile of 64 keys and key/value head: dv = Σ pᵀ do, dk = scale · Σ dsᵀ q, over the queries
// that see the tile, for one head of the group after the other.
DEV void backward_kv(u32 block, bf16* dqkv, const BackwardInputs& in, u32* fault, u32 tokens, u32 segments, Heads at,
                     u64 o_stride, float scale) {
    DYNAMIC_SHARED(unaligned);
    unsigned char *own = align(unaligned), *stages = own + 2 * TILE;
    RankedTile tile = find_ranked_tile(block / at.kv_heads, HALF, in.offsets, segments, tokens, fault);
    if (!tile.segment.found) return;
    u32 kv_head = block % at.kv_heads, group = at.heads / at.kv_heads;
    // The first tile of a segment is seen by the most queries. From here on its first key is number 0.
    u32 tile_first = (tile.ranks - tile.rank) * HALF;
    u32 start = tile.segment.start + tile_first, len = tile.segment.len - tile_first;
    u64 row = at.row();
    auto sums_of = [&](u32 step) { return reinterpret_cast<float*>(stages + step % 2 * BACKWARD_STAGE + 2 * TILE); };
    auto load = [&](u32 step, u32 head, u32 first) {
        unsigned char* to = stages + step % 2 * BACKWARD_STAGE;
        load_tile(to, {in.qkv, row, start, at.q(head)}, first, len);
        load_tile(to + TILE, {in.d_o, o_stride, start, at.q(head)}, first, len);
        // Beyond the segment's end everything is zero, and adds nothing.
        u32 query = first + threadIdx.x;
        u64 sum = (u64)head * tokens + start + query;
        if (threadIdx.x < STEP) {
            cp_async4(sums_of(step) + threadIdx.x, in.lse + sum, query < len);
            cp_async4(sums_of(step) + STEP + threadIdx.x, in.delta + sum, query < len);
        }
        cp_async_commit();
    };
    // Steps go through the queries from the tile's first key on, then through the next head's.
    u32 steps = tile.rank * group, head = kv_head * group, first = 0;
    load_tile(own, {in.qkv, row, start, at.k(kv_head)}, 0, len);
    load_tile(own + TILE, {in.qkv, row, start, at.v(kv_head)}, 0, len);
    load(0, head, 0);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, q = (lane & 3) * 2;
    float dk[1][HEAD / 8][4], dv[1][HEAD / 8][4], scale2 = scale * LOG2_E;
    clear(dk);
    clear(dv);
    WgmmaTile keys = wgmma_tile(own, PANEL), values = keys.further(TILE), stage_tile = wgmma_tile(stages, PANEL);
    for (u32 step = 0; step < steps; step++) {
        WgmmaTile queries = stage_tile.further(step % 2 * BACKWARD_STAGE), d_out = queries.further(TILE);
        loaded();
        float p[1][STEP / 8][4], ds[1][STEP / 8][4];
        wgmma_fence();
        begin_scores(p, keys, queries);
        begin_scores(ds, values, d_out);
        wgmma_wait<1>();
        __syncthreads();  // nobody reads the queries of the step before
        bool diagonal = first == 0;
        first += STEP;
        if (first >= len) first = 0, head++;
        if (step + 1 < steps) load(step + 1, head, first);
        const float *lse = sums_of(step) + q, *delta = lse + STEP;
        int edge = q - g - warp * QUARTER;
        wgmma_hold(p[0]);
#pragma unroll
        for (int j = 0; j < STEP / 8; j++) {
            float2 shift = *reinterpret_cast<const float2*>(lse + j * 8);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int key = (c >> 1) * 8, query = j * 8 + (c & 1) + edge;
                float probability = exp2_fast(fmaf(p[0][j][c], scale2, (c & 1 ? shift.y : shift.x) * -LOG2_E));
                p[0][j][c] = !diagonal || key <= query ? probability : 0.f;
            }
        }
        u32 packed_p[1][STEP / 16][4], packed_ds[1][STEP / 16][4];
        pack(packed_p, p);
        wgmma_wait<0>();
        wgmma_hold(ds[0]);
#pragma unroll
        for (int j = 0; j < STEP / 8; j++) {
            float2 sum = *reinterpret_cast<const float2*>(delta + j * 8);
#pragma unroll
            for (int c = 0; c < 4; c++) ds[0][j][c] = p[0][j][c] * (ds[0][j][c] - (c & 1 ? sum.y : sum.x));
        }
        pack(packed_ds, ds);
        begin_sums(dv, packed_p, d_out);
        begin_sums(dk, packed_ds, queries);
        wgmma_wait<0>();
        wgmma_hold(dv[0]);
        wgmma_hold(dk[0]);
    }
    __syncthreads();  // as forward
    bf16 *to = dqkv + start * row, *room = reinterpret_cast<bf16*>(own) + warp * QUARTER * LD<HEAD>;
    put_rows<HEAD>(to + at.k(kv_head), row, warp * QUARTER, len, dk[0], scale, scale, room);
    put_rows<HEAD>(to + at.v(kv_head), row, warp * QUARTER, len, dv[0], 1.f, 1.f, room);
}

#define SHAPE u32 heads, u32 kv_heads, u32 head_dim
#define AT Heads{heads, kv_heads, head_dim}

KERNEL LAUNCH_BOUNDS(THREADS, 2)
    flash_hopper_forward(bf16* o, float* lse, const bf16* qkv, const u32* offsets, u32* fault, u32 tokens, u32 segments,
                         SHAPE, u64 o_stride, float scale) {
    forward(o, lse, qkv, offsets, fault, tokens, segments, AT, o_stride, scale);
}
EXPORT(flash_hopper_forward)

// Blocks for dk and dv, then blocks for dq, of as many tiles each.
KERNEL LAUNCH_BOUNDS(THREADS, 2)
    flash_hopper_backward(bf16* dqkv, const float* delta, const bf16* d_o, const float* lse, const bf16* qkv,
                          const u32* offsets, u32* fault, u32 tokens, u32 segments, SHAPE, u64 o_stride, float scale) {
    BackwardInputs in = {delta, d_o, lse, qkv, offsets};
    u32 by_keys = gridDim.x / (heads + kv_heads) * kv_heads;
    if (blockIdx.x < by_keys) {
        backward_kv(blockIdx.x, dqkv, in, fault, tokens, segments, AT, o_stride, scale);
    } else {
        backward_q(blockIdx.x - by_keys, dqkv, in, fault, tokens, segments, AT, o_stride, scale);
    }
}
EXPORT(flash_hopper_backward)
