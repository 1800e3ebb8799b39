// Dropout in place, a block per row; the mask is drawn from its counter and never stored.
#include "common.cuh"

template <class X>
DEV void dropout(X* x, const u64* keys, u32 cols, u32 rows_per_key, u32 site, u32 threshold, float keep) {
    u32 row = blockIdx.x;
    Mask mask{keys[row / rows_per_key], site, threshold, keep};
    x += (u64)row * cols;
    cover_block<WIDE<X>>(cols, aligned16(x), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float values[N], factors[N];
        load(values, x + i);
        mask.factors_at(factors, row % rows_per_key, (u32)i);
#pragma unroll
        // Dropped elements become 0 even where they were infinite.
        for (int j = 0; j < N; j++) values[j] = factors[j] == 0.f ? 0.f : values[j] * factors[j];
        store(x + i, values);
    });
}

#define INSTANCES(X, t)                                                                                     \
    KERNEL LAUNCH_BOUNDS(256) dropout_##t(X* x, const u64* keys, u32 cols, u32 rows_per_key, u32 site,       \
                                          u32 threshold, float keep) {                                      \
        dropout(x, keys, cols, rows_per_key, site, threshold, keep);                                        \
    }                                                                                                       \
    EXPORT(dropout_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
