// Tiles of bf16 in shared memory, and their fragments for the tensor cores.
#pragma once
#include "common.cuh"

// Elements from a tile's row of `cols` (a multiple of 16) to the next: an odd number of 16 bytes, so
// that eight rows lie in different banks.
template <int COLS> constexpr int LD = COLS + 8;

// A fragment of a 16×16 piece of a tile, as operand A: rows `row`…, columns `col`….
template <int COLS> DEV void fragment_a(u32 (&a)[4], const bf16* tile, u32 row, u32 col) {
    u32 lane = threadIdx.x & 31;
    ldmatrix_x4(a, tile + (row + (lane & 15)) * LD<COLS> + col + (lane >> 4) * 8);
}
// The same of the tile's transpose: its columns are the rows of A.
template <int COLS> DEV void fragment_a_trans(u32 (&a)[4], const bf16* tile, u32 row, u32 col) {
    u32 lane = threadIdx.x & 31;
    ldmatrix_x4_trans(a, tile + (row + (lane & 7) + (lane >> 4) * 8) * LD<COLS> + col + (lane >> 3 & 1) * 8);
}
// Operand B of two neighbouring tiles of 8: the tile's rows are its columns.
template <int COLS> DEV void fragment_b(u32 (&b)[4], const bf16* tile, u32 row, u32 col) {
    u32 lane = threadIdx.x & 31;
    ldmatrix_x4(b, tile + (row + (lane & 7) + (lane >> 4) * 8) * LD<COLS> + col + (lane >> 3 & 1) * 8);
}
// The same where the tile's rows are the summed dimension.
template <int COLS> DEV void fragment_b_trans(u32 (&b)[4], const bf16* tile, u32 row, u32 col) {
    u32 lane = threadIdx.x & 31;
    ldmatrix_x4_trans(b, tile + (row + (lane & 15)) * LD<COLS> + col + (lane >> 4) * 8);
}

// Four of a row's `len` elements, from `first` on, those that are there; `wide`: all four are, and aligned.
DEV void load_four(u32 (&to)[4], const u32* row, u32 first, u32 len, bool wide) {
    if (first >= len) return;
    if (wide) {
        uint4 v = *reinterpret_cast<const uint4*>(row + first);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (first + e < len) to[e] = row[first + e];
    }
}
DEV void load_four(u32 (&pairs)[2], const bf16* row, u32 first, u32 len, bool wide) {
    if (first >= len) return;
    if (wide) {
        uint2 v = *reinterpret_cast<const uint2*>(row + first);
        pairs[0] = v.x, pairs[1] = v.y;
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (first + e < len) pairs[e >> 1] |= (u32)row[first + e].bits << 16 * (e & 1);
    }
}
DEV void store_four(bf16* row, const float (&from)[4], u32 first, u32 len, bool wide) {
    if (first >= len) return;
    if (wide) {
        *reinterpret_cast<uint2*>(row + first) = uint2{pack_bf16(from[0], from[1]), pack_bf16(from[2], from[3])};
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (first + e < len) row[first + e] = narrow<bf16>(from[e]);
    }
}

template <int N> DEV void clear(float (&acc)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;
}

// Accumulators of 16×16 as operand A of the next product.
DEV void pack_a(u32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack_bf16(left[0], left[1]), a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]), a[3] = pack_bf16(right[2], right[3]);
}

// acc[16 × COLS] += a[16×16] · (rows `row` … `row` + 15 of the tile).
template <int COLS> DEV void add_product(float (&acc)[COLS / 8][4], const u32 (&a)[4], const bf16* tile, u32 row) {
#pragma unroll
    for (int j = 0; j < COLS / 16; j++) {
        u32 b[4];
        fragment_b_trans<COLS>(b, tile, row, j * 16);
        mma_bf16(acc[2 * j], a, b[0], b[1]);
        mma_bf16(acc[2 * j + 1], a, b[2], b[3]);
    }
}

// The reductions over the four lanes that share rows of an accumulator.
DEV float quad_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}
DEV float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}
