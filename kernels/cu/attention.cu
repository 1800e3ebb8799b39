// Causal attention within segments, for any type and head size up to 256, and decoding on a cache.
// Head sizes 64 and 128 in bf16 have kernels of their own (flash.cu); these are for the rest.
#include "packed.cuh"

constexpr int MAX_DIM = 256, SLOTS = MAX_DIM / 32;
constexpr int WARPS = 4, THREADS = WARPS * 32;

// One query against `keys` keys, `stride` apart: its output and ln Σ exp. The warps take 32 keys in
// turn; a lane computes a key's score, then the lanes share the columns of v.
template <class X>
DEV void attend(X* o, float* lse, const X* q, const X* k, const X* v, u64 stride, u32 keys, u32 head_dim, float scale) {
    SHARED(float, query, MAX_DIM);
    SHARED(float, outputs, WARPS * MAX_DIM);
    SHARED(float, warp_max_score, WARPS);
    SHARED(float, warp_total, WARPS);
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (u32 d = threadIdx.x; d < head_dim; d += THREADS) query[d] = widen(q[d]);
    __syncthreads();
    float largest = -infinity(), total = 0.f, acc[SLOTS] = {};
    for (u32 base = warp * 32; base < keys; base += THREADS) {
        u32 key = base + lane;
        float score = key < keys ? scale * dot_row(query, k + key * stride, head_dim) : -infinity();
        float top = fmaxf(largest, warp_max(score)), shrink = expf(largest - top), p = expf(score - top);
        largest = top;
        total = total * shrink + warp_sum(p);
#pragma unroll
        for (int s = 0; s < SLOTS; s++) acc[s] *= shrink;
        u32 count = min(32u, keys - base);
        for (u32 j = 0; j < count; j++) {
            float pj = __shfl_sync(ALL, p, j);
            const X* row = v + (base + j) * stride;
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                u32 d = s * 32 + lane;
                if (d < head_dim) acc[s] = fmaf(pj, widen(row[d]), acc[s]);
            }
        }
    }
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        u32 d = s * 32 + lane;
        if (d < head_dim) outputs[warp * MAX_DIM + d] = acc[s];
    }
    if (lane == 0) warp_max_score[warp] = largest, warp_total[warp] = total;
    __syncthreads();
    float top = warp_max_score[0], sum = 0.f, factors[WARPS];
#pragma unroll
    for (int w = 1; w < WARPS; w++) top = fmaxf(top, warp_max_score[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        factors[w] = expf(warp_max_score[w] - top);  // 0 for a warp without keys
        sum += factors[w] * warp_total[w];
    }
    for (u32 d = threadIdx.x; d < head_dim; d += THREADS) {
        float value = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += factors[w] * outputs[w * MAX_DIM + d];
        o[d] = narrow<X>(value / sum);
    }
    if (lse && threadIdx.x == 0) *lse = top + logf(sum);
}

// A block per token and head.
template <class X>
DEV void forward(X* o, float* lse, const X* qkv, const u32* offsets, u32* fault, u32 tokens, u32 segments, Heads at,
                 u64 o_stride, float scale) {
    u32 t = blockIdx.x, head = blockIdx.y, kv_head = at.kv_of(head);
    Segment segment = segment_of(t, offsets, segments, tokens, fault);
    if (!segment.found) return;
    const X* first = qkv + (u64)segment.start * at.row();
    attend(o + t * o_stride + at.q(head), lse + (u64)head * tokens + t, qkv + (u64)t * at.row() + at.q(head),
           first + at.k(kv_head), first + at.v(kv_head), at.row(), t - segment.start + 1, at.head_dim, scale);
}

// ---- backward: delta, then dq by query, then dk and dv by key; a warp each

// delta[head, t] = do[t] · o[t]. `lanes` of a warp, a power of two, share a token and head: 16 bytes each where
// that is all of it and can be read, else one element after the other.
template <class X>
DEV void row_dots(float* delta, const X* d_o, const X* o, u32 tokens, u32 heads, u32 head_dim, u64 o_stride,
                  u32 lanes) {
    constexpr int N = WIDE<X>;
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x, item = thread / lanes, lane = thread % lanes;
    u32 t = item / heads, head = item % heads;
    u64 at = t * o_stride + head * head_dim;
    float sum = 0.f;
    if (t < tokens && lanes * N == head_dim && aligned16(d_o + at) && aligned16(o + at)) {
        float a[N], b[N];
        load(a, d_o + at + lane * N);
        load(b, o + at + lane * N);
#pragma unroll
        for (int i = 0; i < N; i++) sum = fmaf(a[i], b[i], sum);
    } else if (t < tokens) {
        for (u32 d = lane; d < head_dim; d += lanes) sum = fmaf(widen(d_o[at + d]), widen(o[at + d]), sum);
    }
    for (u32 d = lanes / 2; d > 0; d >>= 1) sum += __shfl_xor_sync(ALL, sum, d);
    if (t < tokens && lane == 0) delta[(u64)head * tokens + t] = sum;
}

// Σ_j weight of lane j · row j, columns shared between the lanes, added to acc.
template <class X>
DEV void add_rows(float (&acc)[SLOTS], float weight, const X* rows, u64 stride, u32 count, u32 head_dim) {
    u32 lane = threadIdx.x & 31;
    for (u32 j = 0; j < count; j++) {
        float w = __shfl_sync(ALL, weight, j);
#pragma unroll
        for (int s = 0; s < SLOTS; s++) {
            u32 d = s * 32 + lane;
            if (d < head_dim) acc[s] = fmaf(w, widen(rows[j * stride + d]), acc[s]);
        }
    }
}
template <class X> DEV void put_row(X* to, const float (&acc)[SLOTS], float scale, u32 head_dim) {
    u32 lane = threadIdx.x & 31;
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        u32 d = s * 32 + lane;
        if (d < head_dim) to[d] = narrow<X>(scale * acc[s]);
    }
}

// A block of one warp per token and head.
template <class X>
DEV void backward_q(X* dqkv, const float* delta, const X* d_o, const float* lse, const X* qkv, const u32* offsets,
                    u32* fault, u32 tokens, u32 segments, Heads at, u64 o_stride, float scale) {
    SHARED(float, query, MAX_DIM);
    SHARED(float, d_out, MAX_DIM);
    u32 t = blockIdx.x, head = blockIdx.y, kv_head = at.kv_of(head), lane = threadIdx.x;
    Segment segment = segment_of(t, offsets, segments, tokens, fault);
    if (!segment.found) return;
    u64 row = at.row();
    for (u32 d = lane; d < at.head_dim; d += 32) {
        query[d] = widen(qkv[t * row + at.q(head) + d]);
        d_out[d] = widen(d_o[t * o_stride + at.q(head) + d]);
    }
    __syncthreads();
    const X* k = qkv + segment.start * row + at.k(kv_head);
    const X* v = qkv + segment.start * row + at.v(kv_head);
    float my_lse = lse[(u64)head * tokens + t], my_delta = delta[(u64)head * tokens + t], acc[SLOTS] = {};
    u32 keys = t - segment.start + 1;
    for (u32 base = 0; base < keys; base += 32) {
        u32 key = base + lane;
        float ds = 0.f;
        if (key < keys) {
            float p = expf(scale * dot_row(query, k + key * row, at.head_dim) - my_lse);
            ds = p * (dot_row(d_out, v + key * row, at.head_dim) - my_delta);
        }
        add_rows(acc, ds, k + base * row, row, min(32u, keys - base), at.head_dim);
    }
    put_row(dqkv + t * row + at.q(head), acc, scale, at.head_dim);
}

// A block of one warp per token and key/value head; the queries of the head's group in order.
template <class X>
DEV void backward_kv(X* dqkv, const float* delta, const X* d_o, const float* lse, const X* qkv, const u32* offsets,
                     u32* fault, u32 tokens, u32 segments, Heads at, u64 o_stride, float scale) {
    SHARED(float, key, MAX_DIM);
    SHARED(float, value, MAX_DIM);
    u32 t = blockIdx.x, kv_head = blockIdx.y, lane = threadIdx.x, group = at.heads / at.kv_heads;
    Segment segment = segment_of(t, offsets, segments, tokens, fault);
    if (!segment.found) return;
    u64 row = at.row();
    for (u32 d = lane; d < at.head_dim; d += 32) {
        key[d] = widen(qkv[t * row + at.k(kv_head) + d]);
        value[d] = widen(qkv[t * row + at.v(kv_head) + d]);
    }
    __syncthreads();
    float dk[SLOTS] = {}, dv[SLOTS] = {};
    u32 end = segment.start + segment.len;
    for (u32 g = 0; g < group; g++) {
        u32 head = kv_head * group + g;
        for (u32 base = t; base < end; base += 32) {
            u32 u = base + lane;
            float p = 0.f, ds = 0.f;
            if (u < end) {
                u64 at_u = (u64)head * tokens + u;
                p = expf(scale * dot_row(key, qkv + u * row + at.q(head), at.head_dim) - lse[at_u]);
                ds = p * (dot_row(value, d_o + u * o_stride + at.q(head), at.head_dim) - delta[at_u]);
            }
            u32 count = min(32u, end - base);
            add_rows(dk, ds, qkv + base * row + at.q(head), row, count, at.head_dim);
            add_rows(dv, p, d_o + base * o_stride + at.q(head), o_stride, count, at.head_dim);
        }
    }
    put_row(dqkv + t * row + at.k(kv_head), dk, scale, at.head_dim);
    put_row(dqkv + t * row + at.v(kv_head), dv, 1.f, at.head_dim);
}

// ---- cache: [slots, capacity, kv_heads · head_dim] each for keys and values

// Copies a token's keys and values to a position of a slot; a block per token.
template <class X>
DEV void cache_put(X* k_cache, X* v_cache, const X* qkv_row, u64 position, Heads at) {
    u32 width = at.kv_heads * at.head_dim;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
        k_cache[position * width + c] = qkv_row[at.k(0) + c];
        v_cache[position * width + c] = qkv_row[at.v(0) + c];
    }
}

template <class X>
DEV void cache_store(X* k_cache, X* v_cache, const X* qkv, const u32* offsets, const u32* slot, u32* fault, u32 tokens,
                     u32 segments, Heads at, u32 capacity, u32 slots) {
    u32 t = blockIdx.x;
    Segment segment = segment_of(t, offsets, segments, tokens, fault);
    if (!segment.found) return;
    u32 s = slot[segment.index], position = t - segment.start;
    if (!expect_below(fault, BAD_SLOT, s, slots) || !expect_below(fault, BAD_POSITION, position, capacity)) return;
    cache_put(k_cache, v_cache, qkv + (u64)t * at.row(), (u64)s * capacity + position, at);
}

template <class X>
DEV void cache_append(X* k_cache, X* v_cache, const X* qkv, const u32* slot, const u32* position, u32* fault, Heads at,
                      u32 capacity, u32 slots) {
    u32 i = blockIdx.x, s = slot[i], p = position[i];
    if (!expect_below(fault, BAD_SLOT, s, slots) || !expect_below(fault, BAD_POSITION, p, capacity)) return;
    cache_put(k_cache, v_cache, qkv + (u64)i * at.row(), (u64)s * capacity + p, at);
}

// ---- decoding: every key and value is read once for all query heads of its group

constexpr int GROUP = 8;  // query heads at a time
constexpr int DECODE_WARPS = 8, DECODE_THREADS = DECODE_WARPS * 32;

// The dot products of a row in memory with `heads` rows of `head_dim` floats in shared memory.
template <class X>
DEV void dot_group(float (&sums)[GROUP], const float* queries, const X* row, u32 heads, u32 head_dim) {
    constexpr int N = WIDE<X>;
    u32 d = 0;
    if (aligned16(row)) {
        for (; d + N <= head_dim; d += N) {
            float values[N];
            load(values, row + d);
#pragma unroll
            for (int h = 0; h < GROUP; h++) {
                if (h >= (int)heads) break;
#pragma unroll
                for (int j = 0; j < N; j++) sums[h] = fmaf(queries[h * head_dim + d + j], values[j], sums[h]);
            }
        }
    }
    for (; d < head_dim; d++) {
        float value = widen(row[d]);
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            if (h < (int)heads) sums[h] = fmaf(queries[h * head_dim + d], value, sums[h]);
        }
    }
}

// `heads` queries that share keys and values, a row each in q and o; SLOTS · 32 is at least head_dim.
template <int SLOTS, class X>
DEV void attend_group(X* o, const X* q, const X* k, const X* v, u64 stride, u32 keys, u32 heads, u32 head_dim,
                      float scale) {
    SHARED(float, queries, GROUP * MAX_DIM);
    SHARED(float, outputs, DECODE_WARPS * MAX_DIM);
    SHARED(float, tops, DECODE_WARPS * GROUP);
    SHARED(float, totals, DECODE_WARPS * GROUP);
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (u32 d = threadIdx.x; d < heads * head_dim; d += DECODE_THREADS) queries[d] = widen(q[d]);
    __syncthreads();
    float largest[GROUP], total[GROUP] = {}, acc[GROUP][SLOTS] = {};
#pragma unroll
    for (int h = 0; h < GROUP; h++) largest[h] = -infinity();
    for (u32 base = warp * 32; base < keys; base += DECODE_THREADS) {
        u32 key = base + lane, count = min(32u, keys - base);
        float p[GROUP] = {};
        if (key < keys) dot_group(p, queries, k + key * stride, heads, head_dim);
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
            if (h >= (int)heads) break;
            float score = key < keys ? scale * p[h] : -infinity();
            float top = fmaxf(largest[h], warp_max(score)), shrink = expf(largest[h] - top);
            p[h] = expf(score - top);
            largest[h] = top;
            total[h] = total[h] * shrink + warp_sum(p[h]);
#pragma unroll
            for (int s = 0; s < SLOTS; s++) acc[h][s] *= shrink;
        }
        for (u32 j = 0; j < count; j++) {
            const X* row = v + (base + j) * stride;
            float values[SLOTS];
#pragma unroll
            for (int s = 0; s < SLOTS; s++) {
                u32 d = s * 32 + lane;
                values[s] = d < head_dim ? widen(row[d]) : 0.f;
            }
#pragma unroll
            for (int h = 0; h < GROUP; h++) {
                if (h >= (int)heads) break;
                float pj = __shfl_sync(ALL, p[h], j);
#pragma unroll
                for (int s = 0; s < SLOTS; s++) acc[h][s] = fmaf(pj, values[s], acc[h][s]);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        if (lane == 0) tops[warp * GROUP + h] = largest[h], totals[warp * GROUP + h] = total[h];
    }
    // The warps' parts of one head after the other.
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
        if (h >= (int)heads) break;
#pragma unroll
        for (int s = 0; s < SLOTS; s++) outputs[warp * MAX_DIM + s * 32 + lane] = acc[h][s];
        __syncthreads();
        float top = tops[h], sum = 0.f, factors[DECODE_WARPS];
#pragma unroll
        for (int w = 1; w < DECODE_WARPS; w++) top = fmaxf(top, tops[w * GROUP + h]);
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) {
            factors[w] = expf(tops[w * GROUP + h] - top);  // 0 for a warp without keys
            sum += factors[w] * totals[w * GROUP + h];
        }
        for (u32 d = threadIdx.x; d < head_dim; d += DECODE_THREADS) {
            float value = 0.f;
#pragma unroll
            for (int w = 0; w < DECODE_WARPS; w++) value += factors[w] * outputs[w * MAX_DIM + d];
            o[h * head_dim + d] = narrow<X>(value / sum);
        }
        __syncthreads();  // the next head's parts go to the same place
    }
}

// A block per row, key/value head and eight heads of its group.
template <int SLOTS, class X>
DEV void decode(X* o, const X* k_cache, const X* v_cache, const X* qkv, const u32* slot, const u32* position, Heads at,
                u32 capacity, u32 slots, float scale) {
    u32 i = blockIdx.x, kv_head = blockIdx.y, s = slot[i], p = position[i];
    if (s >= slots || p >= capacity) return;  // reported where it was stored
    u32 group = at.heads / at.kv_heads, before = blockIdx.z * GROUP, head = kv_head * group + before;
    u64 width = at.kv_heads * at.head_dim, first = (u64)s * capacity * width + kv_head * at.head_dim;
    attend_group<SLOTS>(o + (u64)i * at.heads * at.head_dim + at.q(head), qkv + (u64)i * at.row() + at.q(head),
                        k_cache + first, v_cache + first, width, p + 1, min((u32)GROUP, group - before), at.head_dim,
                        scale);
}

#define SHAPE u32 heads, u32 kv_heads, u32 head_dim
#define AT Heads{heads, kv_heads, head_dim}
#define BACKWARD_PARAMETERS(X)                                                                                       \
    X *dqkv, const float *delta, const X *d_o, const float *lse, const X *qkv, const u32 *offsets, u32 *fault,        \
        u32 tokens, u32 segments, SHAPE, u64 o_stride, float scale
#define BACKWARD_ARGUMENTS dqkv, delta, d_o, lse, qkv, offsets, fault, tokens, segments, AT, o_stride, scale
// For heads of up to `most` columns.
#define DECODE(X, t, SLOTS, most)                                                                                    \
    KERNEL LAUNCH_BOUNDS(DECODE_THREADS)                                                                             \
        attention_decode_##most##_##t(X* o, const X* k_cache, const X* v_cache, const X* qkv, const u32* slot,        \
                                      const u32* position, SHAPE, u32 capacity, u32 slots, float scale) {            \
        decode<SLOTS>(o, k_cache, v_cache, qkv, slot, position, AT, capacity, slots, scale);                         \
    }                                                                                                                \
    EXPORT(attention_decode_##most##_##t)
#define INSTANCES(X, t)                                                                                              \
    KERNEL LAUNCH_BOUNDS(THREADS) attention_forward_##t(X* o, float* lse, const X* qkv, const u32* offsets,            \
                                                        u32* fault, u32 tokens, u32 segments, SHAPE, u64 o_stride,   \
                                                        float scale) {                                               \
        forward(o, lse, qkv, offsets, fault, tokens, segments, AT, o_stride, scale);                                 \
    }                                                                                                                \
    EXPORT(attention_forward_##t)                                                                                    \
    KERNEL LAUNCH_BOUNDS(THREADS) attention_delta_##t(float* delta, const X* d_o, const X* o, u32 tokens, u32 heads,   \
                                                      u32 head_dim, u64 o_stride, u32 lanes) {                       \
        row_dots(delta, d_o, o, tokens, heads, head_dim, o_stride, lanes);                                           \
    }                                                                                                                \
    EXPORT(attention_delta_##t)                                                                                      \
    KERNEL LAUNCH_BOUNDS(32) attention_backward_q_##t(BACKWARD_PARAMETERS(X)) { backward_q(BACKWARD_ARGUMENTS); }     \
    EXPORT(attention_backward_q_##t)                                                                                 \
    KERNEL LAUNCH_BOUNDS(32) attention_backward_kv_##t(BACKWARD_PARAMETERS(X)) { backward_kv(BACKWARD_ARGUMENTS); }   \
    EXPORT(attention_backward_kv_##t)                                                                                \
    KERNEL LAUNCH_BOUNDS(256)                                                                                        \
        cache_store_##t(X* k_cache, X* v_cache, const X* qkv, const u32* offsets, const u32* slot, u32* fault,        \
                        u32 tokens, u32 segments, SHAPE, u32 capacity, u32 slots) {                                  \
        cache_store(k_cache, v_cache, qkv, offsets, slot, fault, tokens, segments, AT, capacity, slots);             \
    }                                                                                                                \
    EXPORT(cache_store_##t)                                                                                          \
    KERNEL LAUNCH_BOUNDS(256)                                                                                        \
        cache_append_##t(X* k_cache, X* v_cache, const X* qkv, const u32* slot, const u32* position, u32* fault,      \
                         SHAPE, u32 capacity, u32 slots) {                                                           \
        cache_append(k_cache, v_cache, qkv, slot, position, fault, AT, capacity, slots);                             \
    }                                                                                                                \
    EXPORT(cache_append_##t)                                                                                         \
    DECODE(X, t, 2, 64)                                                                                              \
    DECODE(X, t, 4, 128)                                                                                             \
    DECODE(X, t, 8, 256)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
