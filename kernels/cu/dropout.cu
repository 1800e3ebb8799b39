// Dropout in place, a block per row; the mask is drawn from its counter and never stored.
#include "common.cuh"

template <class X> DEV void dropout(X* x, u32 cols, const RowMasks& masks) {
    x += (u64)blockIdx.x * cols;
    RowMask mask = masks.of(blockIdx.x);
    cover_block<WIDE<X>>(cols, aligned16(x), [&](auto count, u64 i) {
        float values[decltype(count)::value];
        load(values, x + i);
        mask.apply(values, (u32)i);
        store(x + i, values);
    });
}

#define INSTANCES(X, t)                                                                                     \
    KERNEL LAUNCH_BOUNDS(256) dropout_##t(X* x, u32 cols, DROP_MASK_PARAMETERS) { dropout(x, cols, DROP_MASK); } \
    EXPORT(dropout_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
