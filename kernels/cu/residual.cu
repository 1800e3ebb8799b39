// The joint of two pre-norm sublayers, a block per row: residual sum with dropout and the norm after
// it; backward the norm's gradient and the dropout of the branch before.
#include "common.cuh"

// The first 16 bytes that a thread covers stay in registers: for rows of up to 16 bytes per thread
// nothing is read twice.
template <int N> DEV bool is_first(u64 i) { return N > 1 && i == (u64)threadIdx.x * N; }

// sum = residual + mask ⊙ sum · keep; inv_rms = 1 / rms(sum); y = sum · inv_rms ⊙ w.
template <class X>
DEV void forward(X* sum, X* y, float* inv_rms, const X* residual, const X* w, u32 cols, float eps,
                 const RowMasks& masks) {
    u64 start = (u64)blockIdx.x * cols;
    sum += start, y += start, residual += start;
    bool wide = aligned16(sum) && aligned16(y) && aligned16(residual) && aligned16(w);
    RowMask mask = masks.of(blockIdx.x);
    float kept[WIDE<X>], squares = 0.f;
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float values[N], rs[N];
        load(values, sum + i);
        load(rs, residual + i);
        mask.apply(values, (u32)i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            // The norm is that of the stored sum.
            values[j] = widen(narrow<X>(rs[j] + values[j]));
            squares = fmaf(values[j], values[j], squares);
            if constexpr (N > 1) {
                if (is_first<N>(i)) kept[j] = values[j];
            }
        }
        store(sum + i, values);
    });
    float inv = 1.f / sqrtf(block_sum(squares) / cols + eps);
    if (threadIdx.x == 0) inv_rms[blockIdx.x] = inv;
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float values[N], ws[N];
        load(ws, w + i);
        if constexpr (N > 1) {
            if (is_first<N>(i)) {
#pragma unroll
                for (int j = 0; j < N; j++) values[j] = kept[j];
            } else {
                load(values, sum + i);
            }
        } else {
            load(values, sum + i);
        }
#pragma unroll
        for (int j = 0; j < N; j++) values[j] *= inv * ws[j];
        store(y + i, values);
    });
}

// dx (=|+=) (w ⊙ dy − x̂ · mean(w ⊙ dy ⊙ x̂)) / rms; d_branch = mask ⊙ dx · keep.
template <class X>
DEV void backward(X* dx, X* d_branch, const X* dy, const X* x, const float* inv_rms, const X* w, u32 cols,
                  u32 add, const RowMasks& masks) {
    u64 start = (u64)blockIdx.x * cols;
    dx += start, d_branch += start, dy += start, x += start;
    bool wide = aligned16(dx) && aligned16(d_branch) && aligned16(dy) && aligned16(x) && aligned16(w);
    float first_x[WIDE<X>], first_d[WIDE<X>], sum = 0.f;
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ws[N], ds[N];
        load(xs, x + i);
        load(ws, w + i);
        load(ds, dy + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            ds[j] *= ws[j];
            sum = fmaf(ds[j], xs[j], sum);
            if constexpr (N > 1) {
                if (is_first<N>(i)) first_x[j] = xs[j], first_d[j] = ds[j];
            }
        }
    });
    float inv = inv_rms[blockIdx.x];
    // x̂ · mean(w dy x̂) / rms = x · (inv³ / cols) Σ w dy x.
    float along = -(block_sum(sum) * inv * inv * inv / cols);
    RowMask mask = masks.of(blockIdx.x);
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ds[N], old[N];
        bool held = false;
        if constexpr (N > 1) {
            held = is_first<N>(i);
            if (held) {
#pragma unroll
                for (int j = 0; j < N; j++) xs[j] = first_x[j], ds[j] = first_d[j];
            }
        }
        if (!held) {
            float ws[N];
            load(xs, x + i);
            load(ws, w + i);
            load(ds, dy + i);
#pragma unroll
            for (int j = 0; j < N; j++) ds[j] *= ws[j];
        }
        if (add) load(old, dx + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float value = fmaf(ds[j], inv, xs[j] * along);
            xs[j] = widen(narrow<X>(add ? old[j] + value : value));
        }
        store(dx + i, xs);
        mask.apply(xs, (u32)i);
        store(d_branch + i, xs);
    });
}

#define INSTANCES(X, t)                                                                                         \
    KERNEL LAUNCH_BOUNDS(512)                                                                                   \
        residual_norm_forward_##t(X* sum, X* y, float* inv_rms, const X* residual, const X* w, u32 cols,          \
                                  float eps, DROP_MASK_PARAMETERS) {                                            \
        forward(sum, y, inv_rms, residual, w, cols, eps, DROP_MASK);                                            \
    }                                                                                                           \
    EXPORT(residual_norm_forward_##t)                                                                           \
    KERNEL LAUNCH_BOUNDS(512)                                                                                   \
        residual_norm_backward_##t(X* dx, X* d_branch, const X* dy, const X* x, const float* inv_rms, const X* w, \
                                   u32 cols, u32 add, DROP_MASK_PARAMETERS) {                                   \
        backward(dx, d_branch, dy, x, inv_rms, w, cols, add, DROP_MASK);                                        \
    }                                                                                                           \
    EXPORT(residual_norm_backward_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
