// Layer norm, a block per row; gradients of weight and bias, a block per 32 columns.
#include "common.cuh"

// stats is [2, rows]: means, then 1/σ.
template <class X>
DEV void forward(X* y, float* stats, const X* x, const X* w, const X* b, u32 cols, u64 x_stride, u64 y_stride,
                 float eps) {
    x += blockIdx.x * x_stride;
    y += blockIdx.x * y_stride;
    bool wide = aligned16(x) && aligned16(y) && aligned16(w) && aligned16(b);
    float sum = 0.f;
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N];
        load(xs, x + i);
#pragma unroll
        for (int j = 0; j < N; j++) sum += xs[j];
    });
    float mean = block_sum(sum) / cols, squares = 0.f;
    // The second and third reading of the row come from the cache.
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N];
        load(xs, x + i);
#pragma unroll
        for (int j = 0; j < N; j++) squares = fmaf(xs[j] - mean, xs[j] - mean, squares);
    });
    float inv = 1.f / sqrtf(block_sum(squares) / cols + eps);
    if (threadIdx.x == 0) stats[blockIdx.x] = mean, stats[gridDim.x + blockIdx.x] = inv;
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ws[N], bs[N];
        load(xs, x + i);
        load(ws, w + i);
        load(bs, b + i);
#pragma unroll
        for (int j = 0; j < N; j++) xs[j] = fmaf((xs[j] - mean) * inv, ws[j], bs[j]);
        store(y + i, xs);
    });
}

// dx (=|+=) (g − mean(g) − x̂ · mean(g ⊙ x̂)) / σ, g = w ⊙ dy.
template <class X>
DEV void backward(X* dx, const X* dy, const X* x, const float* stats, const X* w, u32 cols, u64 x_stride,
                  u64 y_stride, u32 add) {
    dx += blockIdx.x * x_stride;
    x += blockIdx.x * x_stride;
    dy += blockIdx.x * y_stride;
    bool wide = aligned16(dx) && aligned16(x) && aligned16(dy) && aligned16(w);
    float mean = stats[blockIdx.x], inv = stats[gridDim.x + blockIdx.x], of_g = 0.f, of_product = 0.f;
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ws[N], ds[N];
        load(xs, x + i);
        load(ws, w + i);
        load(ds, dy + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float g = ws[j] * ds[j];
            of_g += g;
            of_product = fmaf(g, (xs[j] - mean) * inv, of_product);
        }
    });
    of_g = block_sum(of_g) / cols;
    of_product = block_sum(of_product) / cols;
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ws[N], ds[N], old[N];
        load(xs, x + i);
        load(ws, w + i);
        load(ds, dy + i);
        if (add) load(old, dx + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float value = (ws[j] * ds[j] - of_g - (xs[j] - mean) * inv * of_product) * inv;
            xs[j] = add ? old[j] + value : value;
        }
        store(dx + i, xs);
    });
}

// dw += Σ_rows dy ⊙ x̂ and db += Σ_rows dy, for 32 columns.
template <class X>
DEV void backward_weights(float* dw, float* db, const X* dy, const X* x, const float* stats, u32 rows, u32 cols,
                          u64 x_stride, u64 y_stride) {
    column_sums(
        rows, cols,
        [&](u32 r, u32 c) {
            return widen(dy[r * y_stride + c]) * (widen(x[r * x_stride + c]) - stats[r]) * stats[rows + r];
        },
        [&](u32 c, float sum) { dw[c] += sum; });
    // The two sums have arrays of their own: each call of `column_sums` is a function of its own.
    column_sums(
        rows, cols, [&](u32 r, u32 c) { return widen(dy[r * y_stride + c]); },
        [&](u32 c, float sum) { db[c] += sum; });
}

#define INSTANCES(X, t)                                                                                           \
    KERNEL LAUNCH_BOUNDS(512)                                                                                     \
        layernorm_forward_##t(X* y, float* stats, const X* x, const X* w, const X* b, u32 cols, u64 x_stride,     \
                              u64 y_stride, float eps) {                                                          \
        forward(y, stats, x, w, b, cols, x_stride, y_stride, eps);                                                \
    }                                                                                                             \
    EXPORT(layernorm_forward_##t)                                                                                 \
    KERNEL LAUNCH_BOUNDS(512)                                                                                     \
        layernorm_backward_##t(X* dx, const X* dy, const X* x, const float* stats, const X* w, u32 cols,          \
                               u64 x_stride, u64 y_stride, u32 add) {                                             \
        backward(dx, dy, x, stats, w, cols, x_stride, y_stride, add);                                             \
    }                                                                                                             \
    EXPORT(layernorm_backward_##t)                                                                                \
    KERNEL LAUNCH_BOUNDS(1024)                                                                                    \
        layernorm_backward_weights_##t(float* dw, float* db, const X* dy, const X* x, const float* stats,         \
                                       u32 rows, u32 cols, u64 x_stride, u64 y_stride) {                          \
        backward_weights(dw, db, dy, x, stats, rows, cols, x_stride, y_stride);                                   \
    }                                                                                                             \
    EXPORT(layernorm_backward_weights_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
