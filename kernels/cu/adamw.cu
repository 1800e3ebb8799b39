// AdamW and gradient norms: one pass over flat memory, f32.
#include "common.cuh"

constexpr int THREADS = 256;

// partial[row, block] = Σ g² of a block's share of the row; the shares depend on the grid alone.
KERNEL LAUNCH_BOUNDS(THREADS) sum_squares_partial(float* partial, const float* g, u64 len) {
    const float* row = g + blockIdx.y * len;
    float sum = 0.f;
    cover_grid<4>(len, aligned16(row), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float values[N];
        load(values, row + i);
#pragma unroll
        for (int j = 0; j < N; j++) sum = fmaf(values[j], values[j], sum);
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[(u64)blockIdx.y * gridDim.x + blockIdx.x] = sum;
}
EXPORT(sum_squares_partial)

// sums[row] = Σ partial[row, ·]; a block per row.
KERNEL LAUNCH_BOUNDS(THREADS) sum_squares_final(float* sums, const float* partial, u32 parts) {
    float sum = 0.f;
    for (u32 i = threadIdx.x; i < parts; i += THREADS) sum += partial[(u64)blockIdx.x * parts + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
EXPORT(sum_squares_final)

KERNEL LAUNCH_BOUNDS(THREADS) clip_scale(float* scale, const float* sums, u32 rows, float max_norm) {
    u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= rows) return;
    float factor = max_norm / (sqrtf(sums[i]) + 1e-6f);
    // A NaN norm must stay visible: only a factor known to be above 1 becomes 1.
    scale[i] = factor > 1.f ? 1.f : factor;
}
EXPORT(clip_scale)

// One step; the factors are the host's (src/cuda/adamw.rs). A row per blockIdx.y.
KERNEL LAUNCH_BOUNDS(THREADS)
    adamw(float* p, float* m, float* v, const float* g, const float* scale, u64 len, float beta1, float one_minus_beta1,
          float beta2, float one_minus_beta2, float decay, float rate, float root_correction, float eps) {
    u64 row = blockIdx.y * len;
    p += row, m += row, v += row, g += row;
    float clip = scale[blockIdx.y];
    cover_grid<4>(len, aligned16(p) && aligned16(m) && aligned16(v) && aligned16(g), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float ps[N], ms[N], vs[N], gs[N];
        load(ps, p + i);
        load(ms, m + i);
        load(vs, v + i);
        load(gs, g + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float grad = clip * gs[j];
            ms[j] = fmaf(beta1, ms[j], one_minus_beta1 * grad);
            vs[j] = fmaf(beta2, vs[j], one_minus_beta2 * grad * grad);
            float denominator = fmaf(sqrtf(vs[j]), root_correction, eps);
            ps[j] = ps[j] * decay - rate * ms[j] / denominator;
        }
        store(p + i, ps);
        store(m + i, ms);
        store(v + i, vs);
    });
}
EXPORT(adamw)
