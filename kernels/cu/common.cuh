// What kernels share: conversion, 16-byte loads and stores, reductions, random numbers, and the
// word in which a kernel reports an index that it refuses.
#pragma once
#include "gpu.cuh"

// ---- numbers: f32 or bf16 in memory, f32 in registers

DEV float widen(float x) { return x; }
DEV float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
template <class X> DEV X narrow(float x);
template <> DEV float narrow<float>(float x) { return x; }
template <> DEV bf16 narrow<bf16>(float x) { return {bf16_bits(x)}; }

DEV float unpack_first(u32 pair) { return __uint_as_float(pair << 16); }
DEV float unpack_second(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Elements in 16 bytes.
template <class X> constexpr int WIDE = 16 / sizeof(X);

// The elements of 16 bytes.
DEV void unpack(float (&to)[4], uint4 raw, float) {
    to[0] = __uint_as_float(raw.x), to[1] = __uint_as_float(raw.y);
    to[2] = __uint_as_float(raw.z), to[3] = __uint_as_float(raw.w);
}
DEV void unpack(float (&to)[8], uint4 raw, bf16) {
    u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; j++) to[2 * j] = unpack_first(pairs[j]), to[2 * j + 1] = unpack_second(pairs[j]);
}

DEV bool aligned16(const void* p) { return ((u64)p & 15) == 0; }

// N elements at p, one or whole 16 bytes (p is then aligned).
template <int N> DEV void load(float (&to)[N], const float* p) {
    if constexpr (N == 1) {
        to[0] = *p;
    } else {
        static_assert(N % 4 == 0, "whole 16 bytes");
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            float4 v = *reinterpret_cast<const float4*>(p + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    }
}
template <int N> DEV void load(float (&to)[N], const bf16* p) {
    if constexpr (N == 1) {
        to[0] = widen(*p);
    } else {
        static_assert(N % 8 == 0, "whole 16 bytes");
#pragma unroll
        for (int i = 0; i < N; i += 8) {
            uint4 v = *reinterpret_cast<const uint4*>(p + i);
            u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                to[i + 2 * j] = unpack_first(pairs[j]);
                to[i + 2 * j + 1] = unpack_second(pairs[j]);
            }
        }
    }
}
template <int N> DEV void store(float* p, const float (&from)[N]) {
    if constexpr (N == 1) {
        *p = from[0];
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            *reinterpret_cast<float4*>(p + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
        }
    }
}
template <int N> DEV void store(bf16* p, const float (&from)[N]) {
    if constexpr (N == 1) {
        *p = narrow<bf16>(from[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 8) {
            u32 pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) pairs[j] = pack_bf16(from[i + 2 * j], from[i + 2 * j + 1]);
            *reinterpret_cast<uint4*>(p + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

DEV float infinity() { return __uint_as_float(0x7f800000u); }

// e^x and 1/(1+e^−x): to f32's precision for f32, fast for bf16, whose rounding hides the difference.
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
template <class X> DEV float exp_for(float x) {
    if constexpr (sizeof(X) == 4) return expf(x);
    return exp2_fast(x * LOG2_E);
}
template <class X> DEV float sigmoid_for(float x) {
    if constexpr (sizeof(X) == 4) return 1.f / (1.f + expf(-x));
    // Beyond, e^−x would leave the range of the fast division.
    return divide_fast(1.f, 1.f + exp2_fast(fmaxf(x, -80.f) * -LOG2_E));
}

// ---- who does what

// A number that the compiler knows, handed to a lambda.
template <int N> struct Count { static constexpr int value = N; };

// Calls f(Count<N>, i) or f(Count<1>, i) so that `first`, `first + step`… of N elements each, and
// single ones at the end, cover 0..n once. `wide`: all pointers involved are aligned at 0.
template <int N, class F> DEV void cover(u64 n, bool wide, u64 worker, u64 workers, F f) {
    u64 body = wide ? n / N * N : 0;
    for (u64 i = worker * N; i < body; i += workers * N) f(Count<N>{}, i);
    for (u64 i = body + worker; i < n; i += workers) f(Count<1>{}, i);
}
// Shared between all threads of the grid.
template <int N, class F> DEV void cover_grid(u64 n, bool wide, F f) {
    cover<N>(n, wide, (u64)blockIdx.x * blockDim.x + threadIdx.x, (u64)gridDim.x * blockDim.x, f);
}
// Shared between the threads of a block.
template <int N, class F> DEV void cover_block(u64 n, bool wide, F f) {
    cover<N>(n, wide, threadIdx.x, blockDim.x, f);
}

// ---- reductions, always in the same order

constexpr u32 ALL = 0xffffffffu;

DEV float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(ALL, x, d);
    return x;
}
DEV float warp_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL, x, d));
    return x;
}
// The sum over a one-dimensional block of whole warps, in every thread.
DEV float block_sum(float x) {
    SHARED(float, block_sum_part, 32);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    x = warp_sum(x);
    if (lane == 0) block_sum_part[warp] = x;
    __syncthreads();
    x = warp_sum(lane < (int)(blockDim.x >> 5) ? block_sum_part[lane] : 0.f);
    __syncthreads();  // the next call writes to the same array
    return x;
}

// The largest value over the block, in every thread.
DEV float block_max(float x) {
    SHARED(float, block_max_part, 32);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    x = warp_max(x);
    if (lane == 0) block_max_part[warp] = x;
    __syncthreads();
    x = warp_max(block_max_part[min(lane, (int)(blockDim.x >> 5) - 1)]);
    __syncthreads();
    return x;
}

// Sums f(row, column) over rows, for the 32 columns of a block of 32×32 threads; `finish(column, sum)`.
constexpr int COLUMN_BLOCK = 32;
template <class F, class G> DEV void column_sums(u32 rows, u32 cols, F f, G finish) {
    SHARED(float, column_sums_part, COLUMN_BLOCK * (COLUMN_BLOCK + 1));
    u32 x = threadIdx.x & 31, y = threadIdx.x >> 5, column = blockIdx.x * COLUMN_BLOCK + x;
    float sum = 0.f;
    if (column < cols) {
        for (u32 row = y; row < rows; row += COLUMN_BLOCK) sum += f(row, column);
    }
    column_sums_part[y * (COLUMN_BLOCK + 1) + x] = sum;
    __syncthreads();
    sum = warp_sum(column_sums_part[x * (COLUMN_BLOCK + 1) + y]);
    column = blockIdx.x * COLUMN_BLOCK + y;
    if (x == 0 && column < cols) finish(column, sum);
}

// The dot product of a row in memory with `head_dim` floats in shared memory.
template <class X> DEV float dot_row(const float* shared, const X* row, u32 head_dim) {
    constexpr int N = WIDE<X>;
    float sum = 0.f;
    u32 d = 0;
    if (aligned16(row)) {
        for (; d + N <= head_dim; d += N) {
            float values[N];
            load(values, row + d);
#pragma unroll
            for (int j = 0; j < N; j++) sum = fmaf(shared[d + j], values[j], sum);
        }
    }
    for (; d < head_dim; d++) sum = fmaf(shared[d], widen(row[d]), sum);
    return sum;
}

// ---- random numbers: Philox 4x32-10, as the host's rng

// The factors of its rounds, 64 bits wide as the products are: one instruction gives both halves.
constexpr u64 PHILOX0 = 0xD2511F53u, PHILOX1 = 0xCD9E8D57u;

// The last ROUNDS rounds, the first of them with these keys.
template <int ROUNDS> DEV uint4 philox_rounds(u32 k0, u32 k1, uint4 counter) {
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        u64 first = PHILOX0 * counter.x, second = PHILOX1 * counter.z;
        counter = make_uint4((u32)(second >> 32) ^ counter.y ^ k0, (u32)second, (u32)(first >> 32) ^ counter.w ^ k1, (u32)first);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return counter;
}
DEV uint4 philox(u64 key, uint4 counter) { return philox_rounds<10>((u32)key, (u32)(key >> 32), counter); }

constexpr u32 DROPOUT_STREAM = 0x64726f70u;

// A dropout mask: element c of a row is kept when its random word is at least `threshold`.
struct Mask {
    u64 key;
    u32 site, threshold;
    float keep;  // factor of kept elements
    // Factors of elements 4·group … 4·group + 3 of a row.
    DEV void factors(float (&to)[4], u32 row, u32 group) const {
        uint4 words = philox(key, make_uint4(row, group, site, DROPOUT_STREAM));
        to[0] = words.x >= threshold ? keep : 0.f;
        to[1] = words.y >= threshold ? keep : 0.f;
        to[2] = words.z >= threshold ? keep : 0.f;
        to[3] = words.w >= threshold ? keep : 0.f;
    }
    // Factors of elements c … c + N − 1, for one element or a multiple of four.
    template <int N> DEV void factors_at(float (&to)[N], u32 row, u32 c) const {
        float four[4];
        if constexpr (N == 1) {
            factors(four, row, c / 4);
            u32 i = c % 4;
            to[0] = i == 0 ? four[0] : i == 1 ? four[1] : i == 2 ? four[2] : four[3];
        } else {
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                factors(four, row, (c + i) / 4);
#pragma unroll
                for (int j = 0; j < 4; j++) to[i + j] = four[j];
            }
        }
    }
};

// Dropout of a row whose example has a key: nothing is drawn where the threshold keeps everything.
struct RowMask {
    Mask mask;
    u32 row;
    // values = mask ⊙ values · keep, elements c … c + N − 1. What is dropped becomes 0 even where it was infinite.
    template <int N> DEV void apply(float (&values)[N], u32 c) const {
        if (mask.threshold == 0) return;
        float factors[N];
        mask.factors_at(factors, row, c);
#pragma unroll
        for (int j = 0; j < N; j++) values[j] = factors[j] == 0.f ? 0.f : values[j] * factors[j];
    }
};
// The masks of rows, of which `rows_per_key` share an example's key; without dropout there are no keys.
struct RowMasks {
    const u64* keys;
    u32 rows_per_key, site, threshold;
    float keep;
    DEV RowMask of(u32 row) const {
        if (threshold == 0) return {{0, site, 0, keep}, 0};
        return {{keys[row / rows_per_key], site, threshold, keep}, row % rows_per_key};
    }
};
// No dropout, for kernels that have a form without it.
struct NoMask {
    template <int N> DEV void apply(float (&)[N], u32) const {}
};
struct NoMasks {
    DEV NoMask of(u32) const { return {}; }
};
#define DROP_MASK_PARAMETERS const u64 *drop_keys, u32 drop_rows, u32 drop_site, u32 drop_threshold, float drop_keep
#define DROP_MASK RowMasks{drop_keys, drop_rows, drop_site, drop_threshold, drop_keep}

// ---- indices that come with the data

// What is wrong with one; the host has the sentences (src/cuda/fault.rs).
enum Fault : u32 { NO_FAULT, BAD_ID, BAD_TARGET, BAD_POSITION, BAD_SLOT, BAD_BUCKET, BAD_SEGMENT };

// Whether `index` is below `limit`; reports it if not. The host looks when it next waits for the device.
DEV bool expect_below(u32* fault, Fault what, u64 index, u64 limit) {
    if (index < limit) return true;
    atomicMax(fault, (u32)what);
    return false;
}
