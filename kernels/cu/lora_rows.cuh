// What the products of adapted layers with A share: its rows, and masks of the rows of x.
#pragma once
#include "lora.cuh"

constexpr int MAX_THREADS = 256;
constexpr int TILE = 32;       // tokens of a tile of the backward kernels
constexpr int TILE_ROWS = 4;   // of which so many are in registers at a time
constexpr int PAIR = 2;        // targets that a pass over the rows takes

// What is multiplied: A `[rank, in_dim]` of every target at its offset of an adapter's row.
struct Factors {
    const float* adapters;
    u64 stride;
    PerTarget<u64> a;
    PerTarget<u32> site;
    u32 targets, rank;
    float scale;
    u32 threshold;
    float keep;

    DEV u32 units() const { return targets * rank; }
    DEV const float* row(u64 adapter, u32 target, u32 i, u32 in_dim) const {
        return adapters + adapter * stride + a[target] + (u64)i * in_dim;
    }
    // Whether all rows of A are aligned where x is.
    DEV bool aligned(u32 in_dim) const {
        bool all = aligned16(adapters) && stride % 4 == 0 && in_dim % 4 == 0;
#pragma unroll
        for (int n = 0; n < MAX_TARGETS; n++) all = all && a.of[n] % 4 == 0;
        return all;
    }
};

// Masks of a row of one target: Philox of the counter (row, group, site, DROPOUT_STREAM) as `Mask` has it,
// with all that is the same for the groups of a row worked out once: 16 products of the 20 are left.
struct MaskRow {
    u32 k0, k1;                      // keys of the fourth round
    u32 x1, z2, x3, z3, w3;          // what the words of the first three rounds are made of

    static DEV MaskRow of(u64 key, u32 row, u32 site) {
        constexpr u32 STEP0 = 0x9E3779B9u, STEP1 = 0xBB67AE85u;
        u32 k0 = (u32)key, k1 = (u32)(key >> 32);
        u64 of_row = PHILOX0 * row, of_site = PHILOX1 * site;
        u64 second = PHILOX1 * ((u32)(of_row >> 32) ^ DROPOUT_STREAM ^ k1);
        u64 third = PHILOX0 * ((u32)(second >> 32) ^ (u32)of_site ^ (k0 + STEP0));
        MaskRow mask;
        mask.x1 = (u32)(of_site >> 32) ^ k0;
        mask.z2 = (u32)of_row ^ (k1 + STEP1);
        mask.x3 = (u32)second ^ (k0 + 2 * STEP0);
        mask.z3 = (u32)(third >> 32) ^ (k1 + 2 * STEP1);
        mask.w3 = (u32)third;
        mask.k0 = k0 + 3 * STEP0, mask.k1 = k1 + 3 * STEP1;
        return mask;
    }
    // The words of elements 4·group … 4·group + 3.
    DEV uint4 words(u32 group) const {
        u64 second = PHILOX0 * (x1 ^ group), third = PHILOX1 * ((u32)(second >> 32) ^ z2);
        uint4 counter = make_uint4((u32)(third >> 32) ^ x3, (u32)third, (u32)second ^ z3, w3);
        return philox_rounds<7>(k0, k1, counter);
    }
    // kept = values where the mask keeps them, else 0; elements c … c + N − 1.
    template <int N> DEV void keep(float (&kept)[N], const float (&values)[N], u32 c, u32 threshold) const {
        if (threshold == 0) {
#pragma unroll
            for (int j = 0; j < N; j++) kept[j] = values[j];
        } else if constexpr (N == 1) {
            uint4 w = words(c / 4);
            u32 i = c % 4, word = i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
            kept[0] = word >= threshold ? values[0] : 0.f;
        } else {
#pragma unroll
            for (int j = 0; j < N; j += 4) {
                uint4 w = words((c + j) / 4);
                kept[j] = w.x >= threshold ? values[j] : 0.f;
                kept[j + 1] = w.y >= threshold ? values[j + 1] : 0.f;
                kept[j + 2] = w.z >= threshold ? values[j + 2] : 0.f;
                kept[j + 3] = w.w >= threshold ? values[j + 3] : 0.f;
            }
        }
    }
};

// A word for N elements of each of several rows: bit r·N + j is set where element c + j of row r is kept.
template <int N> DEV u32 kept_bits(const Mask& mask, u32 row, u32 c, u32 r) {
    float factors[N];
    mask.factors_at(factors, row, c);
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < N; j++) bits |= factors[j] != 0.f ? 1u << (r * N + j) : 0u;
    return bits;
}
