// T5 attention for any type and head size, by plain arithmetic in f32: a block has 16 queries (or keys,
// for dk and dv) of one head of one example, with their scores in shared memory. Bias, mask, softmax
// and dropout are passes over them. bf16 with heads of 64 has kernels of its own (t5_tiles.cu).
#include "common.cuh"

constexpr int THREADS = 128, ROWS = 16;

struct Shape {
    u32 queries, keys, kv_rows, heads, head_dim;
    DEV u32 width() const { return heads * head_dim; }
    // The first row of this block's example and head, in q and in kv (keys; values are `width` later).
    DEV u64 q_start() const { return (u64)blockIdx.z * queries * width() + blockIdx.y * head_dim; }
    DEV u64 k_start() const { return (u64)blockIdx.z * kv_rows * 2 * width() + blockIdx.y * head_dim; }
    // The first of its scores.
    DEV u64 scores_start() const { return ((u64)blockIdx.z * heads + blockIdx.y) * queries * keys; }
};

struct Dropped {
    const u64* keys;
    u32 site, threshold;
    float keep;
    // Of the probabilities of `key`, a multiple of four, and the next three.
    DEV void factors(float (&to)[4], const Shape& shape, u32 query, u32 key) const {
        to[0] = to[1] = to[2] = to[3] = 1.f;
        if (!threshold) return;
        Mask{keys[blockIdx.z], site, threshold, keep}.factors_at(to, blockIdx.y * shape.queries + query, key);
    }
};

// Rows first … of a matrix into shared memory as f32; rows beyond `rows` are left out.
template <class X> DEV void load_rows(float* to, const X* from, u64 stride, u32 first, u32 rows, u32 head_dim) {
    for (u32 i = threadIdx.x; i < ROWS * head_dim; i += THREADS) {
        u32 row = first + i / head_dim;
        if (row < rows) to[i] = widen(from[row * stride + i % head_dim]);
    }
}

// out[first + i, d] = Σ_j weights[i, j] · rows[j, d], for the block's rows that are there.
template <class X>
DEV void weighted_rows(X* out, u64 out_stride, const float* weights, const X* rows, u64 stride, u32 first, u32 limit,
                       u32 count, u32 head_dim) {
    // N columns at a time.
    auto columns = [&](auto n) {
        constexpr int N = decltype(n)::value;
        u32 pieces = head_dim / N;
        for (u32 item = threadIdx.x; item < ROWS * pieces; item += THREADS) {
            u32 i = item / pieces, d = item % pieces * N;
            if (first + i >= limit) continue;
            float sums[N] = {};
            for (u32 j = 0; j < count; j++) {
                float values[N], weight = weights[i * count + j];
                load(values, rows + j * stride + d);
#pragma unroll
                for (int c = 0; c < N; c++) sums[c] = fmaf(weight, values[c], sums[c]);
            }
            store(out + (first + i) * out_stride + d, sums);
        }
    };
    // Strides are multiples of head_dim.
    bool wide = head_dim % WIDE<X> == 0 && aligned16(rows) && aligned16(out);
    if (wide) {
        columns(Count<WIDE<X>>{});
    } else {
        columns(Count<1>{});
    }
}

template <class X>
DEV void forward(X* o, X* probs, const X* q, const X* kv, const X* table, const u32* map, u32* fault, u32 buckets,
                 const Shape& shape, u32 causal, const Dropped& drop) {
    DYNAMIC_SHARED(memory);
    float* queries = reinterpret_cast<float*>(memory);
    float* scores = queries + ROWS * shape.head_dim;  // [ROWS, keys]
    u32 first = blockIdx.x * ROWS, lane = threadIdx.x & 31, width = shape.width();
    const X* k = kv + shape.k_start();
    load_rows(queries, q + shape.q_start(), width, first, shape.queries, shape.head_dim);
    __syncthreads();
    for (u32 item = threadIdx.x; item < ROWS * shape.keys; item += THREADS) {
        u32 i = item / shape.keys, j = item % shape.keys, query = first + i;
        if (query >= shape.queries) break;
        float score = -infinity();
        if (!causal || j <= query) {
            score = dot_row(queries + i * shape.head_dim, k + (u64)j * 2 * width, shape.head_dim);
            if (table) {
                u32 bucket = map[query * shape.keys + j];
                if (expect_below(fault, BAD_BUCKET, bucket, buckets)) {
                    score += widen(table[bucket * shape.heads + blockIdx.y]);
                }
            }
        }
        scores[item] = score;
    }
    __syncthreads();
    // A warp per query.
    for (u32 i = threadIdx.x >> 5; i < ROWS && first + i < shape.queries; i += THREADS / 32) {
        float* row = scores + i * shape.keys;
        float top = -infinity(), sum = 0.f;
        for (u32 j = lane; j < shape.keys; j += 32) top = fmaxf(top, row[j]);
        top = warp_max(top);
        for (u32 j = lane; j < shape.keys; j += 32) sum += row[j] = expf(row[j] - top);
        float inverse = 1.f / warp_sum(sum);
        X* to = probs + shape.scores_start() + (u64)(first + i) * shape.keys;
        __syncwarp();  // each lane goes on with other keys
        for (u32 key = 4 * lane; key < shape.keys; key += 128) {
            float factors[4];
            drop.factors(factors, shape, first + i, key);
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                if (key + e >= shape.keys) break;
                float p = row[key + e] * inverse;
                to[key + e] = narrow<X>(p);
                row[key + e] = p * factors[e];
            }
        }
    }
    __syncthreads();
    weighted_rows(o + shape.q_start(), width, scores, k + width, 2ull * width, first, shape.queries, shape.keys,
                  shape.head_dim);
}

// d_scores and dq of a block of queries.
template <class X>
DEV void backward_q(X* dq, X* d_scores, const X* d_o, const X* probs, const X* kv, const Shape& shape,
                    const Dropped& drop) {
    DYNAMIC_SHARED(memory);
    float* d_out = reinterpret_cast<float*>(memory);
    float* ds = d_out + ROWS * shape.head_dim;  // [ROWS, keys]
    u32 first = blockIdx.x * ROWS, lane = threadIdx.x & 31, width = shape.width();
    const X* k = kv + shape.k_start();
    load_rows(d_out, d_o + shape.q_start(), width, first, shape.queries, shape.head_dim);
    __syncthreads();
    for (u32 item = threadIdx.x; item < ROWS * shape.keys; item += THREADS) {
        u32 i = item / shape.keys, j = item % shape.keys;
        if (first + i >= shape.queries) break;
        ds[item] = dot_row(d_out + i * shape.head_dim, k + width + (u64)j * 2 * width, shape.head_dim);
    }
    __syncthreads();
    for (u32 i = threadIdx.x >> 5; i < ROWS && first + i < shape.queries; i += THREADS / 32) {
        float* row = ds + i * shape.keys;
        u64 at = shape.scores_start() + (u64)(first + i) * shape.keys;
        float delta = 0.f;
        for (u32 key = 4 * lane; key < shape.keys; key += 128) {
            float factors[4];
            drop.factors(factors, shape, first + i, key);
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                if (key + e >= shape.keys) break;
                row[key + e] *= factors[e];
                delta = fmaf(row[key + e], widen(probs[at + key + e]), delta);
            }
        }
        delta = warp_sum(delta);
        __syncwarp();  // each lane goes on with other keys
        for (u32 j = lane; j < shape.keys; j += 32) {
            row[j] = widen(probs[at + j]) * (row[j] - delta);
            d_scores[at + j] = narrow<X>(row[j]);
        }
    }
    __syncthreads();
    weighted_rows(dq + shape.q_start(), width, ds, k, 2ull * width, first, shape.queries, shape.keys, shape.head_dim);
}

// dk and dv of a block of keys.
template <class X>
DEV void backward_kv(X* dkv, const X* d_scores, const X* d_o, const X* probs, const X* q, const Shape& shape,
                     const Dropped& drop) {
    DYNAMIC_SHARED(memory);
    float* weights = reinterpret_cast<float*>(memory);  // [ROWS, queries]: dropped probabilities
    float* ds = weights + ROWS * shape.queries;          // [ROWS, queries]
    u32 first = blockIdx.x * ROWS, width = shape.width();
    for (u32 item = threadIdx.x; item < ROWS / 4 * shape.queries; item += THREADS) {
        u32 query = item / (ROWS / 4), j = item % (ROWS / 4) * 4;
        if (first + j >= shape.keys) continue;
        u64 at = shape.scores_start() + (u64)query * shape.keys + first + j;
        float factors[4];
        drop.factors(factors, shape, query, first + j);
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            if (first + j + e >= shape.keys) break;
            weights[(j + e) * shape.queries + query] = widen(probs[at + e]) * factors[e];
            ds[(j + e) * shape.queries + query] = widen(d_scores[at + e]);
        }
    }
    __syncthreads();
    X* dk = dkv + shape.k_start();
    weighted_rows(dk, 2ull * width, ds, q + shape.q_start(), width, first, shape.keys, shape.queries, shape.head_dim);
    weighted_rows(dk + width, 2ull * width, weights, d_o + shape.q_start(), width, first, shape.keys, shape.queries,
                  shape.head_dim);
}

// d_table[bucket, head] += Σ of the gradients of its scores; a block each.
template <class X>
DEV void table_gradient(float* d_table, const X* d_scores, const u32* map, u32 batch, u32 heads, u32 pairs) {
    u32 bucket = blockIdx.x, head = blockIdx.y;
    float sum = 0.f;
    for (u32 pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        if (map[pair] != bucket) continue;
        for (u32 b = 0; b < batch; b++) sum += widen(d_scores[((u64)b * heads + head) * pairs + pair]);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) d_table[bucket * heads + head] += sum;
}

#define SHAPE_PARAMETERS u32 queries, u32 keys, u32 kv_rows, u32 heads, u32 head_dim
#define SHAPE Shape{queries, keys, kv_rows, heads, head_dim}
#define DROP_PARAMETERS const u64 *drop_keys, u32 site, u32 threshold, float keep
#define DROP Dropped{drop_keys, site, threshold, keep}
#define INSTANCES(X, t)                                                                                              \
    KERNEL LAUNCH_BOUNDS(THREADS, 8)                                                                                    \
        t5_attention_forward_##t(X* o, X* probs, const X* q, const X* kv, const X* table, const u32* map, u32* fault,  \
                                 u32 buckets, SHAPE_PARAMETERS, u32 causal, DROP_PARAMETERS) {                       \
        forward(o, probs, q, kv, table, map, fault, buckets, SHAPE, causal, DROP);                                   \
    }                                                                                                                \
    EXPORT(t5_attention_forward_##t)                                                                                 \
    KERNEL LAUNCH_BOUNDS(THREADS, 8)                                                                                    \
        t5_attention_backward_q_##t(X* dq, X* d_scores, const X* d_o, const X* probs, const X* kv, SHAPE_PARAMETERS,   \
                                    DROP_PARAMETERS) {                                                               \
        backward_q(dq, d_scores, d_o, probs, kv, SHAPE, DROP);                                                       \
    }                                                                                                                \
    EXPORT(t5_attention_backward_q_##t)                                                                              \
    KERNEL LAUNCH_BOUNDS(THREADS, 8)                                                                                    \
        t5_attention_backward_kv_##t(X* dkv, const X* d_scores, const X* d_o, const X* probs, const X* q,             \
                                     SHAPE_PARAMETERS, DROP_PARAMETERS) {                                            \
        backward_kv(dkv, d_scores, d_o, probs, q, SHAPE, DROP);                                                      \
    }                                                                                                                \
    EXPORT(t5_attention_backward_kv_##t)                                                                             \
    KERNEL LAUNCH_BOUNDS(256) t5_table_gradient_##t(float* d_table, const X* d_scores, const u32* map, u32 batch,      \
                                                    u32 heads, u32 pairs) {                                          \
        table_gradient(d_table, d_scores, map, batch, heads, pairs);                                                 \
    }                                                                                                                \
    EXPORT(t5_table_gradient_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
