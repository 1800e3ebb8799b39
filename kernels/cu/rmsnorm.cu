// RMS layer norm, a block per row; the gradient of the weight, a block per 32 columns.
#include "common.cuh"

template <class X>
DEV void forward(X* y, float* inv_rms, const X* x, const X* w, u32 cols, u64 x_stride, u64 y_stride, float eps) {
    x += blockIdx.x * x_stride;
    y += blockIdx.x * y_stride;
    bool wide = aligned16(x) && aligned16(y) && aligned16(w);
    float sum = 0.f;
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N];
        load(xs, x + i);
#pragma unroll
        for (int j = 0; j < N; j++) sum = fmaf(xs[j], xs[j], sum);
    });
    float inv = 1.f / sqrtf(block_sum(sum) / cols + eps);
    if (threadIdx.x == 0) inv_rms[blockIdx.x] = inv;
    // The second reading of the row comes from the cache.
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ws[N];
        load(xs, x + i);
        load(ws, w + i);
#pragma unroll
        for (int j = 0; j < N; j++) xs[j] *= inv * ws[j];
        store(y + i, xs);
    });
}

// dx (=|+=) (w ⊙ dy − x̂ · mean(w ⊙ dy ⊙ x̂)) / rms.
template <class X>
DEV void backward(X* dx, const X* dy, const X* x, const float* inv_rms, const X* w, u32 cols, u64 x_stride,
                  u64 y_stride, u32 add) {
    dx += blockIdx.x * x_stride;
    x += blockIdx.x * x_stride;
    dy += blockIdx.x * y_stride;
    bool wide = aligned16(dx) && aligned16(x) && aligned16(dy) && aligned16(w);
    float sum = 0.f;
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ws[N], ds[N];
        load(xs, x + i);
        load(ws, w + i);
        load(ds, dy + i);
#pragma unroll
        for (int j = 0; j < N; j++) sum = fmaf(ws[j] * ds[j], xs[j], sum);
    });
    float inv = inv_rms[blockIdx.x];
    // x̂ · mean(w dy x̂) / rms = x · (inv³ / cols) Σ w dy x.
    float along = -(block_sum(sum) * inv * inv * inv / cols);
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ws[N], ds[N], old[N];
        load(xs, x + i);
        load(ws, w + i);
        load(ds, dy + i);
        if (add) load(old, dx + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float value = fmaf(ws[j] * ds[j], inv, xs[j] * along);
            xs[j] = add ? old[j] + value : value;
        }
        store(dx + i, xs);
    });
}

// dw (=|+=) Σ_rows dy ⊙ x · inv_rms, for 32 columns. Where rows are aligned, a thread reads 16 bytes of
// a row at a time; the threads that share its columns add up through the block's memory, in order.
template <class X>
DEV void backward_weight(float* dw, const X* dy, const X* x, const float* inv_rms, u32 rows, u32 cols,
                         u64 x_stride, u64 y_stride, u32 add) {
    constexpr int N = WIDE<X>, LANES = COLUMN_BLOCK / N, TOGETHER = 1024 / LANES;
    bool wide = aligned16(dy) && aligned16(x) && cols % COLUMN_BLOCK == 0 && x_stride % N == 0 && y_stride % N == 0;
    auto finish = [&](u32 c, float sum) { dw[c] = add ? dw[c] + sum : sum; };
    if (!wide) {
        column_sums(
            rows, cols,
            [&](u32 r, u32 c) { return widen(dy[r * y_stride + c]) * inv_rms[r] * widen(x[r * x_stride + c]); },
            finish);
        return;
    }
    SHARED(float, parts, COLUMN_BLOCK * (COLUMN_BLOCK + 1));
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 column = blockIdx.x * COLUMN_BLOCK + threadIdx.x % LANES * N;
    float sums[N] = {};
    for (u32 r = threadIdx.x / LANES; r < rows; r += TOGETHER) {
        float ds[N], xs[N], inv = inv_rms[r];
        load(ds, dy + r * y_stride + column);
        load(xs, x + r * x_stride + column);
#pragma unroll
        for (int j = 0; j < N; j++) sums[j] = fmaf(ds[j] * inv, xs[j], sums[j]);
    }
#pragma unroll
    for (int d = LANES; d < 32; d <<= 1) {
#pragma unroll
        for (int j = 0; j < N; j++) sums[j] += __shfl_xor_sync(ALL, sums[j], d);
    }
    if (lane < LANES) {
#pragma unroll
        for (int j = 0; j < N; j++) parts[warp * (COLUMN_BLOCK + 1) + lane * N + j] = sums[j];
    }
    __syncthreads();
    float sum = warp_sum(parts[lane * (COLUMN_BLOCK + 1) + warp]);
    if (lane == 0) finish(blockIdx.x * COLUMN_BLOCK + warp, sum);
}

#define INSTANCES(X, t)                                                                                          \
    KERNEL LAUNCH_BOUNDS(512) rmsnorm_forward_##t(X* y, float* inv_rms, const X* x, const X* w, u32 cols,          \
                                                  u64 x_stride, u64 y_stride, float eps) {                       \
        forward(y, inv_rms, x, w, cols, x_stride, y_stride, eps);                                                \
    }                                                                                                            \
    EXPORT(rmsnorm_forward_##t)                                                                                  \
    KERNEL LAUNCH_BOUNDS(512)                                                                                    \
        rmsnorm_backward_##t(X* dx, const X* dy, const X* x, const float* inv_rms, const X* w, u32 cols,           \
                             u64 x_stride, u64 y_stride, u32 add) {                                              \
        backward(dx, dy, x, inv_rms, w, cols, x_stride, y_stride, add);                                          \
    }                                                                                                            \
    EXPORT(rmsnorm_backward_##t)                                                                                 \
    KERNEL LAUNCH_BOUNDS(1024)                                                                                   \
        rmsnorm_backward_weight_##t(float* dw, const X* dy, const X* x, const float* inv_rms, u32 rows, u32 cols,  \
                                    u64 x_stride, u64 y_stride, u32 add) {                                       \
        backward_weight(dw, dy, x, inv_rms, rows, cols, x_stride, y_stride, add);                                \
    }                                                                                                            \
    EXPORT(rmsnorm_backward_weight_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
