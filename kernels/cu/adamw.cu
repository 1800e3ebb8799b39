// AdamW and gradient norms: one pass over flat memory, f32; the values that a model computes with, in
// the type it computes in, are written in the same pass.
#include "common.cuh"

constexpr int THREADS = 256;

DEV bool is_finite(float x) { return fabsf(x) < infinity(); }

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
    float sum = sums[i], factor = max_norm / (sqrtf(sum) + 1e-6f);
    // A norm that is no number must stay visible, in the factor too: infinity less itself is none.
    scale[i] = is_finite(sum) ? fminf(factor, 1.f) : sum - sum;
}
EXPORT(clip_scale)

// One step; the factors are the host's (src/cuda/adamw.rs). A row per blockIdx.y. With y, also
// y = p, rounded. If one of the rows has no finite scale, nothing happens to any.
template <class X>
DEV void step(X* y, float* p, float* m, float* v, const float* g, const float* scale, u64 len, float beta1,
              float one_minus_beta1, float beta2, float one_minus_beta2, float decay, float rate, float root_correction,
              float eps) {
    for (u32 i = 0; i < gridDim.y; i++) {
        if (!is_finite(scale[i])) return;
    }
    u64 row = blockIdx.y * len;
    p += row, m += row, v += row, g += row;
    if (y) y += row;
    float clip = scale[blockIdx.y];
    bool wide = aligned16(p) && aligned16(m) && aligned16(v) && aligned16(g) && aligned16(y);
    cover_grid<WIDE<X>>(len, wide, [&](auto count, u64 i) {
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
        if (y) store(y + i, ps);
    });
}

// Four blocks to a multiprocessor: more registers than the compiler would take, and none spilled.
#define INSTANCE(X, x)                                                                                             \
    KERNEL LAUNCH_BOUNDS(THREADS, 4)                                                                               \
        adamw_##x(X* y, float* p, float* m, float* v, const float* g, const float* scale, u64 len, float beta1,    \
                  float one_minus_beta1, float beta2, float one_minus_beta2, float decay, float rate,              \
                  float root_correction, float eps) {                                                              \
        step(y, p, m, v, g, scale, len, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, rate,               \
             root_correction, eps);                                                                                \
    }                                                                                                              \
    EXPORT(adamw_##x)
INSTANCE(float, f32)
INSTANCE(bf16, bf16)
