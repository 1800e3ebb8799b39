// What the kernels of adapted layers share.
//
// An adapter input has rows of `stride` elements: x, then the columns of s, targets × rank of them
// (*units*; unit n·rank + i is rank i of target n). Where adapters are few, each has columns of its
// own, and a token has its s in those of its segment's adapter and zeros in the others: a product
// over x and these columns then is xWᵀ + sBᵀ for all adapters at once. Otherwise they share them.
#pragma once
#include "packed.cuh"

// The most targets of a layer; the host refuses more.
constexpr int MAX_TARGETS = 4;

// A value for each target.
template <class T> struct PerTarget {
    T of[MAX_TARGETS];
    // Selected, not indexed: an array that is indexed by a variable has no place in registers.
    DEV T operator[](u32 n) const { return n == 0 ? of[0] : n == 1 ? of[1] : n == 2 ? of[2] : of[3]; }
};

// Where the tokens and adapters of a stream are.
struct Stream {
    const u32* offsets;
    const u32* adapter;
    const u64* keys;
    u32* fault;
    u32 segments, tokens, adapters;

    // The row of a segment's adapter.
    DEV bool adapter_of(const Segment& segment, u64& row) const {
        if (!segment.found) return false;
        row = adapter[segment.index];
        return expect_below(fault, BAD_SEGMENT, row, adapters);
    }
    // The segment of a token, and the row of its adapter.
    DEV bool find(u32 token, Segment& segment, u64& row) const {
        segment = segment_of(token, offsets, segments, tokens, fault);
        return adapter_of(segment, row);
    }
};

// Rows of an adapter input, and the adapters' columns behind x.
struct Rows {
    u64 stride;
    u32 in_dim;
    u32 step;   // columns from one adapter's to the next one's; 0 where all share them
    u32 width;  // columns that are written: all that a product over them reads

    // The first element of a token's s.
    DEV u64 s_of(u32 token, u64 adapter) const { return token * stride + in_dim + adapter * step; }
};

#define STREAM_PARAMETERS                                                                                             \
    const u32 *offsets, const u32 *adapter, const u64 *keys, u32 *fault, u32 segments, u32 tokens, u32 n_adapters
#define STREAM Stream{offsets, adapter, keys, fault, segments, tokens, n_adapters}
#define ROWS_PARAMETERS u64 row_stride, u32 in_dim, u32 step, u32 width
#define ROWS Rows{row_stride, in_dim, step, width}
#define PER_TARGET_PARAMETERS(T, name) T name##0, T name##1, T name##2, T name##3
#define PER_TARGET(T, name)         \
    PerTarget<T> {                  \
        { name##0, name##1, name##2, name##3 } \
    }
