// T5 attention over short sequences through the tensor cores: bf16, heads of 64, all keys at once.
//
// A block has one head of one example, a warp 16 of its queries; scores and probabilities never leave
// the registers of a warp but for the outputs. Keys and values lie in shared memory in an order in
// which the accumulators of a lane belong to four neighbouring keys of every 16: those are one call of
// the random numbers, and 8 bytes of probabilities.
//
// Backward is one kernel. What the table's gradient needs of the scores' gradients is summed by bucket
// within the block, and over the examples by `t5_table_sum`.
#include "tiles.cuh"

constexpr int D = 64, MAX_THREADS = 192;

struct Shape {
    u32 queries, keys, kv_rows, heads, causal;
    DEV u32 width() const { return heads * D; }
    // The first row of this block's example and head, in q and in kv (keys; values are `width` later).
    DEV u64 q_start() const { return (u64)blockIdx.z * queries * width() + blockIdx.y * D; }
    DEV u64 k_start() const { return (u64)blockIdx.z * kv_rows * 2 * width() + blockIdx.y * D; }
    // Where the block's probabilities of a query begin.
    DEV u64 scores_of(u32 query) const { return (((u64)blockIdx.z * heads + blockIdx.y) * queries + query) * keys; }
    // Keys that a query sees.
    DEV u32 seen(u32 query) const { return causal ? min(query + 1, keys) : keys; }
};

struct Dropped {
    const u64* keys;
    u32 site, threshold;
    float keep;
    // Of this block's example.
    DEV u64 key() const { return threshold ? keys[blockIdx.z] : 0; }
};

// The row of a tile for a key: within 16, keys 4q, 4q + 1 are in columns 2q, 2q + 1 of the first
// accumulator of a lane, and keys 4q + 2, 4q + 3 in those of the second.
DEV u32 place_of(u32 key) { return (key & ~15u) | (key & 2) << 2 | (key >> 1 & 6) | (key & 1); }

// Copies `rows` rows into shared memory, zeros in the place of those from `there` on.
template <bool KEYS> DEV void load_rows(bf16* tile, const bf16* from, u64 stride, u32 rows, u32 there) {
    for (u32 i = threadIdx.x; i < rows * (D / 8); i += blockDim.x) {
        u32 r = i / (D / 8), c = i % (D / 8) * 8;
        bool valid = r < there;
        cp_async16(tile + (KEYS ? place_of(r) : r) * LD<D> + c, from + (valid ? r : 0) * stride + c, valid);
    }
}

// A lane's keys of tile t of 16 are 16·t + 4·(lane % 4) and the next three, its queries `query` and 8 after it.
DEV u32 first_key(u32 t) { return t * 16 + (threadIdx.x & 3) * 4; }

// The accumulator of element e of a lane's keys of tile t, of its first or second query.
template <int N> DEV float& at(float (&acc)[N][4], int t, int e, int half) {
    return acc[2 * t + (e >> 1)][2 * half + (e & 1)];
}

// Buckets of a lane's keys, for both its queries; 0 where there are none.
template <int KT> DEV void load_buckets(u32 (&to)[2][KT][4], const u32* map, const Shape& shape, u32 query) {
    bool wide = shape.keys % 4 == 0 && aligned16(map);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 row = query + 8 * h;
#pragma unroll
        for (int t = 0; t < KT; t++) {
            to[h][t][0] = to[h][t][1] = to[h][t][2] = to[h][t][3] = 0;
            if (row < shape.queries) load_four(to[h][t], map + row * shape.keys, first_key(t), shape.keys, wide);
        }
    }
}

// Which probabilities are kept: bits 4·t … 4·t + 3 for a lane's keys of tile t.
template <int KT> DEV void load_kept(u32 (&kept)[2], const Shape& shape, const Dropped& drop, u64 key, u32 query) {
    kept[0] = kept[1] = ALL;
    if (!drop.threshold) return;
    kept[0] = kept[1] = 0;
#pragma unroll 1  // instructions have a cache too
    for (u32 t = 0; t < KT; t++) {
        u32 first = first_key(t);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 row = query + 8 * h;
            if (row >= shape.queries || first >= shape.seen(row)) continue;
            uint4 counter = make_uint4(blockIdx.y * shape.queries + row, first / 4, drop.site, DROPOUT_STREAM);
            uint4 words = philox(key, counter);
            u32 bits = (u32)(words.x >= drop.threshold) | (u32)(words.y >= drop.threshold) << 1;
            bits |= (u32)(words.z >= drop.threshold) << 2 | (u32)(words.w >= drop.threshold) << 3;
            kept[h] |= bits << 4 * t;
        }
    }
}

// acc[16 × 16·KT] = rows `row`… of a · (16·KT rows of b)ᵀ.
template <int KT> DEV void product_nt(float (&acc)[2 * KT][4], const bf16* a, u32 row, const bf16* b) {
    clear(acc);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        u32 af[4];
        fragment_a<D>(af, a, row, d);
#pragma unroll
        for (int t = 0; t < KT; t++) {
            u32 bf[4];
            fragment_b<D>(bf, b, t * 16, d);
            mma_bf16(acc[2 * t], af, bf[0], bf[1]);
            mma_bf16(acc[2 * t + 1], af, bf[2], bf[3]);
        }
    }
}

// A warp's 16 rows, those below `there`, to memory in whole 16 bytes, by way of 16 rows of shared memory of its own.
DEV void put_tile(bf16* to, u64 stride, u32 there, bf16* stage, const float (&acc)[D / 8][4]) {
    u32 lane = threadIdx.x & 31, g = lane >> 2, q = (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        *reinterpret_cast<u32*>(stage + g * LD<D> + j * 8 + q) = pack_bf16(acc[j][0], acc[j][1]);
        *reinterpret_cast<u32*>(stage + (g + 8) * LD<D> + j * 8 + q) = pack_bf16(acc[j][2], acc[j][3]);
    }
    __syncwarp();
#pragma unroll
    for (u32 i = lane; i < 16 * (D / 8); i += 32) {
        u32 r = i / (D / 8), c = i % (D / 8) * 8;
        if (r < there) *reinterpret_cast<uint4*>(to + r * stride + c) = *reinterpret_cast<uint4*>(stage + r * LD<D> + c);
    }
    __syncwarp();  // the next rows go to the same place
}

// ---- forward

// Bias and mask, then the softmax over a lane's two rows, in place.
template <int KT>
DEV void softmax(float (&scores)[2 * KT][4], const float* biases, const u32 (&buckets)[2][KT][4], u32 most,
                 const Shape& shape, u32 query) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 seen = shape.seen(query + 8 * h);
        float top = -infinity(), sum = 0.f;
#pragma unroll
        for (int t = 0; t < KT; t++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float& score = at(scores, t, e, h);
                if (biases) score += biases[min(buckets[h][t][e], most)];
                if (first_key(t) + e >= seen) score = -infinity();
                top = fmaxf(top, score);
            }
        }
        top = quad_max(top);
#pragma unroll
        for (int t = 0; t < KT; t++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float& score = at(scores, t, e, h);
                sum += score = exp2_fast((score - top) * LOG2_E);
            }
        }
        float inverse = 1.f / quad_sum(sum);
#pragma unroll
        for (int t = 0; t < KT; t++) {
#pragma unroll
            for (int e = 0; e < 4; e++) at(scores, t, e, h) *= inverse;
        }
    }
}

// Refuses buckets beyond the table, of pairs that are seen.
template <int KT>
DEV void check_buckets(u32* fault, const u32 (&found)[2][KT][4], u32 buckets, const Shape& shape, u32 query) {
    u32 worst = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int t = 0; t < KT; t++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (first_key(t) + e < shape.seen(query + 8 * h)) worst = max(worst, found[h][t][e]);
            }
        }
    }
    expect_below(fault, BAD_BUCKET, worst, buckets);
}

// Probabilities to memory, then those that are dropped set to zero and the others scaled.
template <int KT>
DEV void put_probs(bf16* probs, float (&p)[2 * KT][4], const u32 (&kept)[2], const Shape& shape, u32 query, float keep) {
    bool wide = shape.keys % 4 == 0 && ((u64)probs & 7) == 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 row = query + 8 * h;
#pragma unroll
        for (int t = 0; t < KT; t++) {
            float four[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float& value = at(p, t, e, h);
                four[e] = value;
                value = kept[h] >> (4 * t + e) & 1 ? value * keep : 0.f;
            }
            if (row < shape.queries) store_four(probs + shape.scores_of(row), four, first_key(t), shape.keys, wide);
        }
    }
}

// A block per head, example and as many queries as its warps have.
template <int KT>
DEV void forward(bf16* o, bf16* probs, const bf16* q, const bf16* kv, const bf16* table, const u32* map, u32* fault,
                 u32 buckets, const Shape& shape, const Dropped& drop) {
    DYNAMIC_SHARED(memory);
    u32 rows = blockDim.x / 2, first = blockIdx.x * rows, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    bf16* queries = reinterpret_cast<bf16*>(memory);
    bf16* keys = queries + rows * LD<D>;
    bf16* values = keys + KT * 16 * LD<D>;
    float* biases = reinterpret_cast<float*>(values + KT * 16 * LD<D>);  // of this head, by bucket
    u64 width = shape.width(), key = drop.key();
    const bf16* k = kv + shape.k_start();
    load_rows<false>(queries, q + shape.q_start() + first * width, width, rows, shape.queries - first);
    load_rows<true>(keys, k, 2 * width, KT * 16, shape.keys);
    cp_async_commit();
    load_rows<true>(values, k + width, 2 * width, KT * 16, shape.keys);
    cp_async_commit();
    u32 mine = first + warp * 16, query = mine + (lane >> 2), found[2][KT][4] = {}, kept[2];
    // What is loaded here is on its way while the mask is drawn.
    auto bias = [&](u32 b) { return b < buckets ? widen(table[b * shape.heads + blockIdx.y]) : 0.f; };
    float first_bias = 0.f;
    if (table) {
        load_buckets<KT>(found, map, shape, query);
        first_bias = bias(threadIdx.x);
    }
    load_kept<KT>(kept, shape, drop, key, query);
    if (table) {
        if (threadIdx.x < buckets) biases[threadIdx.x] = first_bias;
        for (u32 b = threadIdx.x + blockDim.x; b < buckets; b += blockDim.x) biases[b] = bias(b);
        check_buckets<KT>(fault, found, buckets, shape, query);
    }
    cp_async_wait<1>();
    __syncthreads();
    float p[2 * KT][4], acc[D / 8][4];
    product_nt<KT>(p, queries, warp * 16, keys);
    softmax<KT>(p, table ? biases : nullptr, found, buckets - 1, shape, query);
    put_probs<KT>(probs, p, kept, shape, query, drop.threshold ? drop.keep : 1.f);
    cp_async_wait<0>();
    __syncthreads();
    clear(acc);
#pragma unroll
    for (int t = 0; t < KT; t++) {
        u32 a[4];
        pack_a(a, p[2 * t], p[2 * t + 1]);
        add_product<D>(acc, a, values, t * 16);
    }
    // Of the queries in shared memory a warp reads its own only.
    if (mine < shape.queries) {
        put_tile(o + shape.q_start() + mine * width, width, shape.queries - mine, queries + warp * 16 * LD<D>, acc);
    }
}

// ---- backward

// Probabilities of a lane's keys, for both its queries; 0 where there are none.
template <int KT> DEV void load_probs(u32 (&to)[2][KT][2], const bf16* probs, const Shape& shape, u32 query) {
    bool wide = shape.keys % 4 == 0 && ((u64)probs & 7) == 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 row = query + 8 * h;
#pragma unroll
        for (int t = 0; t < KT; t++) {
            to[h][t][0] = to[h][t][1] = 0;
            if (row < shape.queries) load_four(to[h][t], probs + shape.scores_of(row), first_key(t), shape.keys, wide);
        }
    }
}

// The gradient of the scores, from that of the dropped probabilities, in place; and the dropped
// probabilities. Both also to shared memory, [queries, keys].
template <int KT>
DEV void score_gradient(float (&ds)[2 * KT][4], bf16* weights, bf16* gradients, const u32 (&probs)[2][KT][2],
                        const u32 (&kept)[2], float keep, u32 row) {
    constexpr int WIDTH = LD<KT * 16>;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float delta = 0.f;
#pragma unroll
        for (int t = 0; t < KT; t++) {
            float dropped[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                u32 pair = probs[h][t][e >> 1];
                float p = e & 1 ? unpack_second(pair) : unpack_first(pair);
                float factor = kept[h] >> (4 * t + e) & 1 ? keep : 0.f;
                float& d = at(ds, t, e, h);
                d *= factor;
                delta = fmaf(d, p, delta);
                dropped[e] = p * factor;
            }
            store_four(weights + (row + 8 * h) * WIDTH, dropped, first_key(t), KT * 16, true);
        }
        delta = quad_sum(delta);
#pragma unroll
        for (int t = 0; t < KT; t++) {
            float four[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                u32 pair = probs[h][t][e >> 1];
                float& d = at(ds, t, e, h);
                four[e] = d = (e & 1 ? unpack_second(pair) : unpack_first(pair)) * (d - delta);
            }
            store_four(gradients + (row + 8 * h) * WIDTH, four, first_key(t), KT * 16, true);
        }
    }
}

// Adds the gradients of a thread's scores to its own column of sums by bucket.
template <int KT>
DEV void add_to_buckets(float* column, u32 columns, float (&ds)[2 * KT][4], const u32 (&found)[2][KT][4], u32 buckets,
                        const Shape& shape, u32 query) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 row = query + 8 * h;
        u32 seen = row < shape.queries ? shape.seen(row) : 0;
#pragma unroll
        for (int t = 0; t < KT; t++) {
            // Four at once: those of the same bucket are added up first, so that none waits for another.
            bool counts[4];
            float values[4], sums[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                counts[e] = first_key(t) + e < seen && found[h][t][e] < buckets;
                values[e] = at(ds, t, e, h);
#pragma unroll
                for (int before = 0; before < e; before++) {
                    if (counts[e] && counts[before] && found[h][t][e] == found[h][t][before]) {
                        values[before] += values[e];
                        counts[e] = false;
                    }
                }
            }
#pragma unroll
            for (int e = 0; e < 4; e++) sums[e] = counts[e] ? column[found[h][t][e] * columns] : 0.f;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (counts[e]) column[found[h][t][e] * columns] = sums[e] + values[e];
            }
        }
    }
}

// Sums the columns of a warp's threads into its first one, a lane per bucket.
DEV void sum_columns(float* columns_of_warp, u32 columns, u32 buckets) {
    u32 lane = threadIdx.x & 31;
    __syncwarp();
    for (u32 base = 0; base < buckets; base += 32) {
        float* row = columns_of_warp + (base + lane) * columns;
        float sum = 0.f;
        if (base + lane < buckets) {
#pragma unroll 8
            for (u32 k = 0; k < 32; k++) sum += row[(k + lane) & 31];  // each lane another bank
            row[0] = sum;
        }
    }
}

// dk = dsᵀ q and dv = (dropped p)ᵀ do; a warp takes one of them for 16 keys at a time.
template <int KT>
DEV void key_gradients(bf16* dk, bf16* stage, const bf16* weights, const bf16* gradients, const bf16* d_out,
                       const bf16* queries, const Shape& shape) {
    u64 width = shape.width();
    for (u32 item = threadIdx.x / 32; item < 2 * ((shape.keys + 15) / 16); item += blockDim.x / 32) {
        bool of_values = item & 1;
        u32 first = item / 2 * 16;
        float acc[D / 8][4];
        clear(acc);
        for (u32 row = 0; row < shape.queries; row += 16) {
            u32 a[4];
            fragment_a_trans<KT * 16>(a, of_values ? weights : gradients, row, first);
            add_product<D>(acc, a, of_values ? d_out : queries, row);
        }
        bf16* to = dk + first * 2 * width + (of_values ? width : 0);
        put_tile(to, 2 * width, shape.keys - first, stage, acc);
    }
}

// A block per head and example, with a warp for every 16 queries and for every 16 keys. `partial`, where
// there is one, takes the sums of the scores' gradients by bucket: [examples, buckets, heads].
template <int KT>
DEV void backward(bf16* dq, bf16* dkv, float* partial, const bf16* d_o, const bf16* probs, const bf16* q, const bf16* kv,
                  const u32* map, u32 buckets, const Shape& shape, const Dropped& drop) {
    DYNAMIC_SHARED(memory);
    constexpr int KEYS = KT * 16;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 tiles = (shape.queries + 15) / 16, rows = tiles * 16, columns = tiles * 32;
    bf16* queries = reinterpret_cast<bf16*>(memory);
    bf16* d_out = queries + rows * LD<D>;
    bf16* keys = d_out + rows * LD<D>;
    bf16* values = keys + KEYS * LD<D>;  // later the warps' stages
    bf16* weights = values + max((u32)KEYS, rows) * LD<D>;
    bf16* gradients = weights + rows * LD<KEYS>;
    float* sums = reinterpret_cast<float*>(gradients + rows * LD<KEYS>);  // [buckets, columns]
    u64 width = shape.width(), key = drop.key();
    const bf16* k = kv + shape.k_start();
    load_rows<false>(d_out, d_o + shape.q_start(), width, rows, shape.queries);
    load_rows<true>(values, k + width, 2 * width, KEYS, shape.keys);
    cp_async_commit();
    load_rows<false>(queries, q + shape.q_start(), width, rows, shape.queries);
    load_rows<true>(keys, k, 2 * width, KEYS, shape.keys);
    cp_async_commit();
    u32 query = warp * 16 + (lane >> 2), p[2][KT][2], kept[2], a[KT][4], found[2][KT][4];
    if (warp < tiles) {
        load_probs<KT>(p, probs, shape, query);
        if (partial) {
            load_buckets<KT>(found, map, shape, query);
#pragma unroll 4
            for (u32 b = 0; b < buckets; b++) sums[b * columns + threadIdx.x] = 0.f;
        }
        load_kept<KT>(kept, shape, drop, key, query);
    }
    cp_async_wait<1>();
    __syncthreads();
    if (warp < tiles) {
        float ds[2 * KT][4];
        product_nt<KT>(ds, d_out, warp * 16, values);
        score_gradient<KT>(ds, weights, gradients, p, kept, drop.threshold ? drop.keep : 1.f, query);
        if (partial) {
            add_to_buckets<KT>(sums + threadIdx.x, columns, ds, found, buckets, shape, query);
            sum_columns(sums + warp * 32, columns, buckets);
        }
#pragma unroll
        for (int t = 0; t < KT; t++) pack_a(a[t], ds[2 * t], ds[2 * t + 1]);
    }
    cp_async_wait<0>();
    __syncthreads();  // queries and keys are there, and nobody reads the values any more
    bf16* stage = values + warp * 16 * LD<D>;
    if (warp < tiles) {
        float acc[D / 8][4];
        clear(acc);
#pragma unroll
        for (int t = 0; t < KT; t++) add_product<D>(acc, a[t], keys, t * 16);
        put_tile(dq + shape.q_start() + warp * 16 * width, width, shape.queries - warp * 16, stage, acc);
    }
    key_gradients<KT>(dkv + shape.k_start(), stage, weights, gradients, d_out, queries, shape);
    if (!partial) return;
    for (u32 bucket = threadIdx.x; bucket < buckets; bucket += blockDim.x) {
        float sum = 0.f;
        for (u32 tile = 0; tile < tiles; tile++) sum += sums[bucket * columns + tile * 32];
        partial[((u64)blockIdx.z * buckets + bucket) * shape.heads + blockIdx.y] = sum;
    }
}

// d_table += Σ over the examples of their sums; `size` is buckets · heads.
KERNEL LAUNCH_BOUNDS(COLUMN_BLOCK* COLUMN_BLOCK)
    t5_table_sum(float* d_table, const float* partial, u32 batch, u32 size) {
    column_sums(
        batch, size, [&](u32 row, u32 column) { return partial[(u64)row * size + column]; },
        [&](u32 column, float sum) { d_table[column] += sum; });
}
EXPORT(t5_table_sum)

#define SHAPE_PARAMETERS u32 queries, u32 keys, u32 kv_rows, u32 heads, u32 causal
#define SHAPE Shape{queries, keys, kv_rows, heads, causal}
#define DROP_PARAMETERS const u64 *drop_keys, u32 site, u32 threshold, float keep
#define DROP Dropped{drop_keys, site, threshold, keep}
#define INSTANCES(KT, most)                                                                                          \
    KERNEL LAUNCH_BOUNDS(MAX_THREADS, 1)                                                                               \
        t5_attention_forward_##most(bf16* o, bf16* probs, const bf16* q, const bf16* kv, const bf16* table,          \
                                    const u32* map, u32* fault, u32 buckets, SHAPE_PARAMETERS, DROP_PARAMETERS) {    \
        forward<KT>(o, probs, q, kv, table, map, fault, buckets, SHAPE, DROP);                                       \
    }                                                                                                                \
    EXPORT(t5_attention_forward_##most)                                                                              \
    KERNEL LAUNCH_BOUNDS(MAX_THREADS, 1)                                                                               \
        t5_attention_backward_##most(bf16* dq, bf16* dkv, float* partial, const bf16* d_o, const bf16* probs,        \
                                     const bf16* q, const bf16* kv, const u32* map, u32 buckets, SHAPE_PARAMETERS,   \
                                     DROP_PARAMETERS) {                                                              \
        backward<KT>(dq, dkv, partial, d_o, probs, q, kv, map, buckets, SHAPE, DROP);                                \
    }                                                                                                                \
    EXPORT(t5_attention_backward_##most)
INSTANCES(2, 32)
INSTANCES(3, 48)
INSTANCES(4, 64)
INSTANCES(6, 96)
