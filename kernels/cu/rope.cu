// Bias and rotary position embedding on fused q, k, v rows, a block per token; and the RMS norm of
// every query and key head, a warp per head.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int ROPE_THREADS = 512;

// N pairs of a row's heads, each a value of a head's first half and the one half a head further on: rotates those of
// q and k by the angles or back, and adds the bias before. Everything that does not depend on the position is asked
// for before the position is known.
template <int N, bool BACK, class X>
DEV void rotate(X* row, const X* bias, const float* cos, const float* sin, const u32* position_of, u32* fault,
                u32 rotated_heads, u32 all_heads, u32 half, u32 max_positions) {
    u32 per_head = half / N, items = (BACK || !bias ? rotated_heads : all_heads) * per_head;
    for (u32 item = threadIdx.x; item < items; item += blockDim.x) {
        u32 i = item % per_head * N, head = item / per_head;
        u64 at = (u64)head * 2 * half + i;
        float low[N], high[N], c[N], s[N];
        load(low, row + at);
        load(high, row + at + half);
        if (!BACK && bias) {
            float b[N];
            load(b, bias + at);
#pragma unroll
            for (int j = 0; j < N; j++) low[j] += b[j];
            load(b, bias + at + half);
#pragma unroll
            for (int j = 0; j < N; j++) high[j] += b[j];
        }
        u32 position = *position_of;
        if (!expect_below(fault, BAD_POSITION, position, max_positions)) return;
        if (head < rotated_heads) {
            load(c, cos + (u64)position * half + i);
            load(s, sin + (u64)position * half + i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                float a = low[j], b = high[j], angle = BACK ? -s[j] : s[j];
                low[j] = a * c[j] - b * angle;
                high[j] = b * c[j] + a * angle;
            }
        }
        store(row + at, low);
        store(row + at + half, high);
    }
}

template <class X, bool BACK>
DEV void rope(X* qkv, const X* bias, const float* cos, const float* sin, const u32* positions, u32* fault, u32 heads,
              u32 kv_heads, u32 head_dim, u32 max_positions) {
    u32 half = head_dim / 2, rotated = heads + kv_heads, all = rotated + kv_heads;
    X* row = qkv + (u64)blockIdx.x * all * head_dim;
    const u32* position = positions + blockIdx.x;
    bool wide = half % WIDE<X> == 0 && aligned16(row) && aligned16(cos) && aligned16(sin) && aligned16(bias);
    if (wide) {
        rotate<WIDE<X>, BACK>(row, bias, cos, sin, position, fault, rotated, all, half, max_positions);
    } else {
        rotate<1, BACK>(row, bias, cos, sin, position, fault, rotated, all, half, max_positions);
    }
}

// ---- norm of heads: block per token, warp per head; the last warps' turns copy v

template <class X>
DEV void norm_forward(X* y, float* inv_rms, const X* qkv, const X* w_q, const X* w_k, u32 heads, u32 kv_heads,
                      u32 head_dim, float eps) {
    u32 normed = heads + kv_heads, lane = threadIdx.x & 31;
    u64 row = (u64)blockIdx.x * (normed + kv_heads) * head_dim;
    for (u32 h = threadIdx.x >> 5; h < normed + kv_heads; h += blockDim.x >> 5) {
        const X* x = qkv + row + h * head_dim;
        X* out = y + row + h * head_dim;
        if (h >= normed) {
            for (u32 c = lane; c < head_dim; c += 32) out[c] = x[c];
            continue;
        }
        const X* w = h < heads ? w_q : w_k;
        float sum = 0.f;
        for (u32 c = lane; c < head_dim; c += 32) sum = fmaf(widen(x[c]), widen(x[c]), sum);
        float inv = 1.f / sqrtf(warp_sum(sum) / head_dim + eps);
        if (lane == 0) inv_rms[(u64)blockIdx.x * normed + h] = inv;
        for (u32 c = lane; c < head_dim; c += 32) out[c] = narrow<X>(widen(x[c]) * inv * widen(w[c]));
    }
}

template <class X>
DEV void norm_backward(X* dqkv, const X* dy, const X* qkv, const float* inv_rms, const X* w_q, const X* w_k, u32 heads,
                       u32 kv_heads, u32 head_dim) {
    u32 normed = heads + kv_heads, lane = threadIdx.x & 31;
    u64 row = (u64)blockIdx.x * (normed + kv_heads) * head_dim;
    for (u32 h = threadIdx.x >> 5; h < normed + kv_heads; h += blockDim.x >> 5) {
        u64 at = row + h * head_dim;
        const X *x = qkv + at, *d = dy + at;
        X* out = dqkv + at;
        if (h >= normed) {
            for (u32 c = lane; c < head_dim; c += 32) out[c] = d[c];
            continue;
        }
        const X* w = h < heads ? w_q : w_k;
        float sum = 0.f;
        for (u32 c = lane; c < head_dim; c += 32) sum = fmaf(widen(w[c]) * widen(d[c]), widen(x[c]), sum);
        float inv = inv_rms[(u64)blockIdx.x * normed + h];
        float along = -(warp_sum(sum) * inv * inv * inv / head_dim);
        for (u32 c = lane; c < head_dim; c += 32) {
            out[c] = narrow<X>(fmaf(widen(w[c]) * widen(d[c]), inv, widen(x[c]) * along));
        }
    }
}

// dw += Σ over tokens and `count` heads from `first` of dy ⊙ x · inv; a row per token and head.
template <class X>
DEV void norm_weight(float* dw, const X* dy, const X* qkv, const float* inv_rms, u32 tokens, u32 first, u32 count,
                     u32 normed, u32 width, u32 head_dim) {
    column_sums(
        tokens * count, head_dim,
        [&](u32 r, u32 c) {
            u32 t = r / count, h = first + r % count;
            u64 at = (u64)t * width + h * head_dim + c;
            return widen(dy[at]) * inv_rms[(u64)t * normed + h] * widen(qkv[at]);
        },
        [&](u32 c, float sum) { dw[c] += sum; });
}

#define INSTANCES(X, t)                                                                                              \
    KERNEL LAUNCH_BOUNDS(ROPE_THREADS)                                                                               \
        rope_forward_##t(X* qkv, const X* bias, const float* cos, const float* sin, const u32* positions, u32* fault,  \
                         u32 heads, u32 kv_heads, u32 head_dim, u32 max_positions) {                                 \
        rope<X, false>(qkv, bias, cos, sin, positions, fault, heads, kv_heads, head_dim, max_positions);             \
    }                                                                                                                \
    EXPORT(rope_forward_##t)                                                                                         \
    KERNEL LAUNCH_BOUNDS(ROPE_THREADS)                                                                               \
        rope_backward_##t(X* dqkv, const float* cos, const float* sin, const u32* positions, u32* fault, u32 heads,   \
                          u32 kv_heads, u32 head_dim, u32 max_positions) {                                           \
        rope<X, true>(dqkv, (const X*)nullptr, cos, sin, positions, fault, heads, kv_heads, head_dim, max_positions); \
    }                                                                                                                \
    EXPORT(rope_backward_##t)                                                                                        \
    KERNEL LAUNCH_BOUNDS(1024) bias_backward_##t(float* dbias, const X* d, u32 rows, u32 cols, u32 add) {             \
        column_sums(                                                                                                 \
            rows, cols, [&](u32 r, u32 c) { return widen(d[(u64)r * cols + c]); },                                    \
            [&](u32 c, float sum) { dbias[c] = add ? dbias[c] + sum : sum; });                                       \
    }                                                                                                                \
    EXPORT(bias_backward_##t)                                                                                        \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                    \
        qk_norm_forward_##t(X* y, float* inv_rms, const X* qkv, const X* w_q, const X* w_k, u32 heads, u32 kv_heads,   \
                            u32 head_dim, float eps) {                                                               \
        norm_forward(y, inv_rms, qkv, w_q, w_k, heads, kv_heads, head_dim, eps);                                     \
    }                                                                                                                \
    EXPORT(qk_norm_forward_##t)                                                                                      \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                    \
        qk_norm_backward_##t(X* dqkv, const X* dy, const X* qkv, const float* inv_rms, const X* w_q, const X* w_k,     \
                             u32 heads, u32 kv_heads, u32 head_dim) {                                                \
        norm_backward(dqkv, dy, qkv, inv_rms, w_q, w_k, heads, kv_heads, head_dim);                                  \
    }                                                                                                                \
    EXPORT(qk_norm_backward_##t)                                                                                     \
    KERNEL LAUNCH_BOUNDS(1024)                                                                                       \
        qk_norm_weight_##t(float* dw, const X* dy, const X* qkv, const float* inv_rms, u32 tokens, u32 first,         \
                           u32 count, u32 normed, u32 width, u32 head_dim) {                                         \
        norm_weight(dw, dy, qkv, inv_rms, tokens, first, count, normed, width, head_dim);                            \
    }                                                                                                                \
    EXPORT(qk_norm_weight_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
