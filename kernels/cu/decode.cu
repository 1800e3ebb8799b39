// Decoding on a cache through the tensor cores: bf16, head sizes 64 and 128.
//
// A block has one row, a key/value head with up to 16 query heads of its group, and a part of the row's
// keys: the first 512, the next 512 and so on, so that where a row is cut depends on its own length
// alone. Each warp takes every fourth 16 keys and loads the next ones while it computes, without a word
// from the others; their sums are put together at the end. A row of one part is finished here, others
// by `attention_decode_combine`.
//
// The newest key and value come from qkv; the block of their part stores them in the cache.
#include "packed.cuh"
#include "tiles.cuh"

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr u32 TILE = 16, STEP = WARPS * TILE, PART = 512;
// Of scores that do not count, and of a warp without keys.
constexpr float MASKED = -1e30f;

// Floats of a part's results: D sums, the largest score and the sum of the weights, then nothing.
template <int D> constexpr int PARTIAL = D + 4;

struct Cache {
    u32 capacity, slots;
    // Whether a row's place is there; reports it if not.
    DEV bool holds(u32* fault, u32 slot, u32 position) const {
        return expect_below(fault, BAD_SLOT, slot, slots) && expect_below(fault, BAD_POSITION, position, capacity);
    }
};

// A row's keys or values of one head.
struct Rows {
    const bf16 *cached, *newest;
    u64 stride;
    u32 position;
    DEV const bf16* at(u32 key) const { return key < position ? cached + key * stride : newest; }
};

// Copies 16 of them into shared memory, zeros beyond the newest; a warp.
template <int D> DEV void load_tile(bf16* tile, const Rows& from, u32 first) {
#pragma unroll
    for (u32 i = threadIdx.x & 31; i < TILE * (D / 8); i += 32) {
        u32 r = i / (D / 8), c = i % (D / 8) * 8, key = first + r;
        cp_async16(tile + r * LD<D> + c, from.at(key) + c, key <= from.position);
    }
}

// What a warp has found so far, for the two rows (heads) of each lane: largest score and sum of weights
// (of this lane's keys), and weighted sums of values.
template <int D> struct Found {
    float top[2], total[2], acc[D / 8][4];
};

// Adds 16 keys, of which those from `end` on do not count. Scores are to the base 2.
template <int D>
DEV void add_tile(Found<D>& to, const u32 (&queries)[D / 16][4], const bf16* keys, const bf16* values, u32 first, u32 end,
                  float scale2) {
    float scores[2][4];
    clear(scores);
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
        u32 b[4];
        fragment_b<D>(b, keys, 0, d * 16);
        mma_bf16(scores[0], queries[d], b[0], b[1]);
        mma_bf16(scores[1], queries[d], b[2], b[3]);
    }
    u32 key = first + (threadIdx.x & 3) * 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = to.top[h];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float& score = scores[c >> 1][2 * h + (c & 1)];
            score = key + (c >> 1) * 8 + (c & 1) < end ? score * scale2 : MASKED;
            top = fmaxf(top, score);
        }
        top = quad_max(top);
        float shrink = exp2_fast(to.top[h] - top);
        to.top[h] = top;
        to.total[h] *= shrink;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float& score = scores[c >> 1][2 * h + (c & 1)];
            to.total[h] += score = exp2_fast(score - top);
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++) to.acc[j][2 * h] *= shrink, to.acc[j][2 * h + 1] *= shrink;
    }
    u32 a[4];
    pack_a(a, scores[0], scores[1]);
    add_product<D>(to.acc, a, values, 0);
}

// Puts the warps' results together: per head weighted sums, the largest score and the sum of weights.
template <int D> struct Together {
    static constexpr int WIDTH = D + 8;  // in floats: rows of eight lanes in different banks
    float* sums;                         // [WARPS, TILE, WIDTH]
    float *tops, *totals;                // [WARPS, TILE] each
    DEV Together(unsigned char* memory) {
        sums = reinterpret_cast<float*>(memory);
        tops = sums + WARPS * TILE * WIDTH;
        totals = tops + WARPS * TILE;
    }
    DEV void put(const Found<D>& found, u32 count) {
        u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, q = (lane & 3) * 2;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = quad_sum(found.total[h]);
            u32 row = warp * TILE + (lane >> 2) + 8 * h;
            if ((lane >> 2) + 8 * h >= count) continue;
            if (q == 0) tops[row] = found.top[h], totals[row] = total;
#pragma unroll
            for (int j = 0; j < D / 8; j++) {
                float2 pair{found.acc[j][2 * h], found.acc[j][2 * h + 1]};
                *reinterpret_cast<float2*>(sums + row * WIDTH + j * 8 + q) = pair;
            }
        }
    }
    // Eight sums of head r from column d on.
    DEV void get(float (&values)[8], float& top, float& total, u32 r, u32 d) const {
        top = tops[r];
#pragma unroll
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, tops[w * TILE + r]);
        total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float factor = exp2_fast(tops[w * TILE + r] - top), of_warp[8];  // 0 for a warp without keys
            total = fmaf(factor, totals[w * TILE + r], total);
            load(of_warp, sums + (w * TILE + r) * WIDTH + d);
#pragma unroll
            for (int c = 0; c < 8; c++) values[c] = fmaf(factor, of_warp[c], values[c]);
        }
    }
};

template <int D>
DEV void decode(bf16* o, float* partial, bf16* k_cache, bf16* v_cache, const bf16* qkv, const u32* slot,
                const u32* position, u32* fault, Heads at, Cache cache, float scale) {
    DYNAMIC_SHARED(memory);
    u32 row = blockIdx.x, part = blockIdx.z, pieces = gridDim.y / at.kv_heads;
    u32 kv_head = blockIdx.y / pieces, before = blockIdx.y % pieces * TILE;
    u32 s = slot[row], newest = position[row];
    if (!cache.holds(fault, s, newest) || part > newest / PART) return;
    u32 group = at.heads / at.kv_heads, head = kv_head * group + before, count = min(TILE, group - before);
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, end = min((part + 1) * PART, newest + 1);
    u64 width = at.kv_heads * D, place = (u64)s * cache.capacity * width + kv_head * D;
    const bf16* mine = qkv + row * (u64)at.row();
    Rows keys{k_cache + place, mine + at.k(kv_head), width, newest};
    Rows values{v_cache + place, mine + at.v(kv_head), width, newest};
    if (part == newest / PART && before == 0 && threadIdx.x < D / 4) {
        bool of_values = threadIdx.x >= D / 8;
        u32 c = threadIdx.x % (D / 8) * 8;
        const bf16* from = of_values ? values.newest : keys.newest;
        bf16* to = (of_values ? v_cache : k_cache) + place + newest * width;
        *reinterpret_cast<uint4*>(to + c) = *reinterpret_cast<const uint4*>(from + c);
    }
    // Two stages of keys and values.
    bf16* tiles = reinterpret_cast<bf16*>(memory) + warp * 4 * TILE * LD<D>;
    auto stage = [&](u32 first) { return tiles + (first / STEP & 1) * 2 * TILE * LD<D>; };
    auto load_both = [&](u32 first) {
        if (first < end) {
            load_tile<D>(stage(first), keys, first);
            load_tile<D>(stage(first) + TILE * LD<D>, values, first);
        }
        cp_async_commit();
    };
    u32 first = part * PART + warp * TILE;
    load_both(first);
    // Operand A: heads beyond `count` are zeros.
    u32 queries[D / 16][4];
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 r = (lane >> 2) + (i & 1) * 8, column = d * 16 + (i >> 1) * 8 + (lane & 3) * 2;
            queries[d][i] = r < count ? *reinterpret_cast<const u32*>(mine + at.q(head + r) + column) : 0;
        }
    }
    Found<D> found{{MASKED, MASKED}, {0.f, 0.f}, {}};
    for (; first < end; first += STEP) {
        load_both(first + STEP);
        cp_async_wait<1>();
        __syncwarp();
        add_tile<D>(found, queries, stage(first), stage(first) + TILE * LD<D>, first, end, scale * LOG2_E);
        __syncwarp();  // nobody reads this stage any more
    }
    cp_async_wait<0>();
    __syncthreads();  // nor the other warps theirs
    Together<D> together(memory);
    together.put(found, count);
    __syncthreads();
    for (u32 item = threadIdx.x; item < count * (D / 8); item += THREADS) {
        u32 r = item / (D / 8), d = item % (D / 8) * 8;
        float sums[8] = {}, top, total;
        together.get(sums, top, total, r, d);
        u64 result = (u64)row * at.heads + head + r;
        if (newest < PART) {
#pragma unroll
            for (int c = 0; c < 8; c++) sums[c] /= total;
            store(o + result * D + d, sums);
        } else {
            float* to = partial + (result * gridDim.z + part) * PARTIAL<D>;
            store(to + d, sums);
            if (d == 0) to[D] = top, to[D + 1] = total;
        }
    }
}

// Rows of several parts: a warp per row and head, the parts in order.
template <int D>
DEV void combine(bf16* o, const float* partial, const u32* slot, const u32* position, u32 rows, u32 heads, u32 most_parts,
                 Cache cache) {
    u32 item = blockIdx.x * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31, row = item / heads;
    if (row >= rows || slot[row] >= cache.slots) return;  // reported where it was stored
    u32 newest = position[row], parts = newest / PART + 1;
    if (newest >= cache.capacity || parts == 1) return;
    const float* from = partial + (u64)item * most_parts * PARTIAL<D>;
    float top = MASKED, total = 0.f, sums[D / 32] = {};
    for (u32 part = 0; part < parts; part++) top = fmaxf(top, from[part * PARTIAL<D> + D]);
    for (u32 part = 0; part < parts; part++, from += PARTIAL<D>) {
        float factor = exp2_fast(from[D] - top);
        total = fmaf(factor, from[D + 1], total);
#pragma unroll
        for (int c = 0; c < D / 32; c++) sums[c] = fmaf(factor, from[c * 32 + lane], sums[c]);
    }
#pragma unroll
    for (int c = 0; c < D / 32; c++) o[(u64)item * D + c * 32 + lane] = narrow<bf16>(sums[c] / total);
}

#define INSTANCES(D)                                                                                                 \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                    \
        attention_decode_tiles_##D(bf16* o, float* partial, bf16* k_cache, bf16* v_cache, const bf16* qkv,           \
                                   const u32* slot, const u32* position, u32* fault, u32 heads, u32 kv_heads,        \
                                   u32 head_dim, u32 capacity, u32 slots, float scale) {                             \
        decode<D>(o, partial, k_cache, v_cache, qkv, slot, position, fault, Heads{heads, kv_heads, head_dim},        \
                  Cache{capacity, slots}, scale);                                                                    \
    }                                                                                                                \
    EXPORT(attention_decode_tiles_##D)                                                                               \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                    \
        attention_decode_combine_##D(bf16* o, const float* partial, const u32* slot, const u32* position, u32 rows,  \
                                     u32 heads, u32 parts, u32 capacity, u32 slots) {                                \
        combine<D>(o, partial, slot, position, rows, heads, parts, Cache{capacity, slots});                          \
    }                                                                                                                \
    EXPORT(attention_decode_combine_##D)
INSTANCES(64)
INSTANCES(128)
