// Sums, scaling, gathers, conversion and filling of flat memory.
#include "common.cuh"

// y = a·x + b·y; with b = 0 y is not read.
template <class X> DEV void axpby(X* y, float a, const X* x, float b, u64 n) {
    cover_grid<WIDE<X>>(n, aligned16(y) && aligned16(x), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ys[N];
        load(xs, x + i);
        if (b != 0.f) load(ys, y + i);
#pragma unroll
        for (int j = 0; j < N; j++) ys[j] = b != 0.f ? fmaf(a, xs[j], b * ys[j]) : a * xs[j];
        store(y + i, ys);
    });
}

// out = x − y.
template <class X> DEV void difference(X* out, const X* x, const X* y, u64 n) {
    cover_grid<WIDE<X>>(n, aligned16(out) && aligned16(x) && aligned16(y), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float xs[N], ys[N];
        load(xs, x + i);
        load(ys, y + i);
#pragma unroll
        for (int j = 0; j < N; j++) xs[j] -= ys[j];
        store(out + i, xs);
    });
}

// y[r · cols + c] += row[c]; a block per row.
template <class X> DEV void add_row(X* y, const X* row, u32 cols) {
    y += (u64)blockIdx.x * cols;
    cover_block<WIDE<X>>(cols, aligned16(y) && aligned16(row), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float sums[N], values[N];
        load(sums, y + i);
        load(values, row + i);
#pragma unroll
        for (int j = 0; j < N; j++) sums[j] += values[j];
        store(y + i, sums);
    });
}

// out[i] = x[ids[i]], rows of `cols` values; a block per row.
template <class X> DEV void gather_rows(X* out, const X* x, const u32* ids, u32* fault, u32 cols, u32 limit) {
    u32 id = ids[blockIdx.x];
    if (!expect_below(fault, BAD_ID, id, limit)) return;
    const X* from = x + (u64)id * cols;
    X* to = out + (u64)blockIdx.x * cols;
    cover_block<WIDE<X>>(cols, aligned16(from) && aligned16(to), [&](auto count, u64 i) {
        float values[decltype(count)::value];
        load(values, from + i);
        store(to + i, values);
    });
}

// out[row · out_stride + c] = x[row · x_stride + c] for c below `cols`; blocks of one y share a row.
template <class X> DEV void copy_strided(X* out, const X* x, u64 rows, u64 cols, u64 out_stride, u64 x_stride) {
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
        const X* from = x + row * x_stride;
        X* to = out + row * out_stride;
        cover_grid<WIDE<X>>(cols, aligned16(from) && aligned16(to), [&](auto count, u64 i) {
            float values[decltype(count)::value];
            load(values, from + i);
            store(to + i, values);
        });
    }
}

// dst = src, converted.
DEV void pack(bf16* dst, const float* src, u64 n) {
    cover_grid<WIDE<bf16>>(n, aligned16(dst) && aligned16(src), [&](auto count, u64 i) {
        float values[decltype(count)::value];
        load(values, src + i);
        store(dst + i, values);
    });
}
// Four elements a time, so that a warp writes without gaps; four times that are on their way.
DEV void unpack_all(float* dst, const bf16* src, u64 n) {
    constexpr int EACH = 4, BATCH = 4;
    bool wide = aligned16(dst) && aligned16(src);
    u64 groups = wide ? n / EACH : 0, step = (u64)gridDim.x * blockDim.x;
    u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (u64 g = first; g < groups; g += BATCH * step) {
        uint2 raw[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            if (g + k * step < groups) raw[k] = reinterpret_cast<const uint2*>(src)[g + k * step];
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            if (g + k * step >= groups) continue;
            float values[EACH] = {unpack_first(raw[k].x), unpack_second(raw[k].x), unpack_first(raw[k].y),
                                  unpack_second(raw[k].y)};
            store(dst + (g + k * step) * EACH, values);
        }
    }
    for (u64 i = groups * EACH + first; i < n; i += step) dst[i] = widen(src[i]);
}

// A bell-shaped number of a random word, as the host's rng has it: of the sum of four bytes, never 0.
DEV float bell(u32 word) {
    u32 sum = (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24);
    return (float)(2 * (int)sum - 1019);
}
constexpr u32 BELL_STREAM = 0x62656c6cu;

// out[row · stride + column] = scale · number row · cols + column.
template <class X> DEV void random_rows(X* out, u64 key, float scale, u64 rows, u64 cols, u64 stride) {
    u64 n = rows * cols;
    cover_grid<1>((n + 3) / 4, false, [&](auto, u64 group) {
        uint4 words = philox(key, make_uint4((u32)group, (u32)(group >> 32), 0, BELL_STREAM));
        u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u64 i = 4 * group + j;
            if (i < n) out[i / cols * stride + i % cols] = narrow<X>(bell(word[j]) * scale);
        }
    });
}

#define INSTANCES(X, x)                                                                                       \
    KERNEL LAUNCH_BOUNDS(256) axpby_##x(X* y, float a, const X* src, float b, u64 n) { axpby(y, a, src, b, n); } \
    EXPORT(axpby_##x)                                                                                         \
    KERNEL LAUNCH_BOUNDS(256) difference_##x(X* out, const X* a, const X* b, u64 n) { difference(out, a, b, n); } \
    EXPORT(difference_##x)                                                                                    \
    KERNEL LAUNCH_BOUNDS(256) add_row_##x(X* y, const X* row, u32 cols) { add_row(y, row, cols); }             \
    EXPORT(add_row_##x)                                                                                       \
    KERNEL LAUNCH_BOUNDS(256)                                                                                 \
        gather_rows_##x(X* out, const X* src, const u32* ids, u32* fault, u32 cols, u32 limit) {               \
        gather_rows(out, src, ids, fault, cols, limit);                                                       \
    }                                                                                                         \
    EXPORT(gather_rows_##x)                                                                                   \
    KERNEL LAUNCH_BOUNDS(256)                                                                                 \
        copy_strided_##x(X* out, const X* src, u64 rows, u64 cols, u64 out_stride, u64 x_stride) {              \
        copy_strided(out, src, rows, cols, out_stride, x_stride);                                               \
    }                                                                                                         \
    EXPORT(copy_strided_##x)                                                                                  \
    KERNEL LAUNCH_BOUNDS(256)                                                                                 \
        random_rows_##x(X* out, u64 key, float scale, u64 rows, u64 cols, u64 stride) {                       \
        random_rows(out, key, scale, rows, cols, stride);                                                     \
    }                                                                                                         \
    EXPORT(random_rows_##x)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)

KERNEL LAUNCH_BOUNDS(256) cast_f32_bf16(bf16* dst, const float* src, u64 n) { pack(dst, src, n); }
EXPORT(cast_f32_bf16)
KERNEL LAUNCH_BOUNDS(256) cast_bf16_f32(float* dst, const bf16* src, u64 n) { unpack_all(dst, src, n); }
EXPORT(cast_bf16_f32)

// Elements of 8 and 16 bytes, which the driver cannot set.
KERNEL LAUNCH_BOUNDS(256) fill_8(u64* dst, u64 value, u64 n) {
    cover_grid<1>(n, false, [&](auto, u64 i) { dst[i] = value; });
}
EXPORT(fill_8)
KERNEL LAUNCH_BOUNDS(256) fill_16(u64* dst, u64 low, u64 high, u64 n) {
    cover_grid<1>(n, false, [&](auto, u64 i) {
        dst[2 * i] = low;
        dst[2 * i + 1] = high;
    });
}
EXPORT(fill_16)
