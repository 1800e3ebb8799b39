// ReLU, a block per row: h = max(x, 0), and dx = dh where x > 0.
#include "common.cuh"

constexpr int THREADS = 256;

template <class X> DEV void forward(X* h, const X* x, u32 cols, u64 h_stride) {
    h += blockIdx.x * h_stride;
    x += (u64)blockIdx.x * cols;
    cover_block<WIDE<X>>(cols, aligned16(h) && aligned16(x), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N];
        load(xs, x + i);
#pragma unroll
        for (int j = 0; j < N; j++) xs[j] = xs[j] < 0.f ? 0.f : xs[j];  // NaN stays
        store(h + i, xs);
    });
}

template <class X> DEV void backward(X* dx, const X* dh, const X* x, u32 cols, u64 h_stride) {
    dh += blockIdx.x * h_stride;
    x += (u64)blockIdx.x * cols;
    dx += (u64)blockIdx.x * cols;
    cover_block<WIDE<X>>(cols, aligned16(dx) && aligned16(dh) && aligned16(x), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ds[N];
        load(xs, x + i);
        load(ds, dh + i);
#pragma unroll
        for (int j = 0; j < N; j++) ds[j] = xs[j] > 0.f ? ds[j] : 0.f;
        store(dx + i, ds);
    });
}

#define INSTANCES(X, t)                                                                            \
    KERNEL LAUNCH_BOUNDS(THREADS) relu_forward_##t(X* h, const X* x, u32 cols, u64 h_stride) {      \
        forward(h, x, cols, h_stride);                                                             \
    }                                                                                              \
    EXPORT(relu_forward_##t)                                                                       \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                  \
        relu_backward_##t(X* dx, const X* dh, const X* x, u32 cols, u64 h_stride) {                \
        backward(dx, dh, x, cols, h_stride);                                                       \
    }                                                                                              \
    EXPORT(relu_backward_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
