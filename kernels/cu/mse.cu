// Squared error of rows and its gradient, a block per row.
#include "common.cuh"

template <class X> DEV void mse(float* sums, X* d_pred, const X* pred, const X* target, u32 cols, float scale) {
    u64 row = (u64)blockIdx.x * cols;
    pred += row, target += row;
    if (d_pred) d_pred += row;
    float sum = 0.f;
    // No pointer at all counts as aligned.
    cover_block<WIDE<X>>(cols, aligned16(pred) && aligned16(target) && aligned16(d_pred), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float ps[N], ts[N];
        load(ps, pred + i);
        load(ts, target + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float error = ps[j] - ts[j];
            sum = fmaf(error, error, sum);
            ps[j] = scale * error;
        }
        if (d_pred) store(d_pred + i, ps);
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

#define INSTANCES(X, t)                                                                                        \
    KERNEL LAUNCH_BOUNDS(512) mse_##t(float* sums, X* d_pred, const X* pred, const X* target, u32 cols, float s) { \
        mse(sums, d_pred, pred, target, cols, s);                                                              \
    }                                                                                                          \
    EXPORT(mse_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
