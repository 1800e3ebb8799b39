// Segments of a packed stream, for kernels of attention and adapters.
#pragma once
#include "common.cuh"

// Tokens `start … start + len` of a segment.
struct Segment {
    u32 index, start, len;
    bool found;
};

// The segment of a token: the last offset that is not beyond it. A stream whose offsets do not
// enclose the token is refused.
DEV Segment segment_of(u32 token, const u32* offsets, u32 segments, u32 tokens, u32* fault) {
    u32 low = 0, high = segments;  // the answer is in low … high − 1
    while (low + 1 < high) {
        u32 middle = (low + high) / 2;
        if (offsets[middle] <= token) {
            low = middle;
        } else {
            high = middle;
        }
    }
    u32 start = offsets[low], end = offsets[low + 1];
    bool found = start <= token && token < end && end <= tokens;
    if (!found) expect_below(fault, BAD_SEGMENT, 1, 0);
    return {low, start, end - start, found};
}

// Tile number `tile` when every segment is cut into tiles of `size` tokens of its own; `first` is
// the tile's first token, counted from the segment's. Whole warps call it together.
struct SegmentTile {
    Segment segment;
    u32 first;
};
DEV SegmentTile find_tile(u32 tile, u32 size, const u32* offsets, u32 segments, u32 tokens, u32* fault) {
    u32 lane = threadIdx.x & 31;
    for (u32 base = 0; base < segments; base += 32) {
        u32 s = base + lane, start = 0, len = 0;
        if (s < segments) {
            start = offsets[s];
            len = offsets[s + 1] - start;
        }
        // Offsets that decrease give lengths beyond all tokens.
        bool valid = start <= tokens && len <= tokens - start;
        if (!valid) expect_below(fault, BAD_SEGMENT, 1, 0);
        if (__any_sync(ALL, !valid)) return {{0, 0, 0, false}, 0};
        u32 mine = (len + size - 1) / size, sum = mine;
#pragma unroll
        for (u32 d = 1; d < 32; d <<= 1) {
            u32 below = __shfl_up_sync(ALL, sum, d);
            if (lane >= d) sum += below;
        }
        u32 total = __shfl_sync(ALL, sum, 31);
        if (tile < total) {
            int owner = __ffs(__ballot_sync(ALL, sum > tile)) - 1;
            u32 first = (tile - __shfl_sync(ALL, sum - mine, owner)) * size;
            return {{base + owner, __shfl_sync(ALL, start, owner), __shfl_sync(ALL, len, owner), true}, first};
        }
        tile -= total;
    }
    return {{0, 0, 0, false}, 0};
}

// Where the heads of fused q, k, v rows lie.
struct Heads {
    u32 heads, kv_heads, head_dim;
    DEV u32 row() const { return (heads + 2 * kv_heads) * head_dim; }
    DEV u32 kv_of(u32 head) const { return head / (heads / kv_heads); }
    DEV u32 q(u32 head) const { return head * head_dim; }
    DEV u32 k(u32 kv_head) const { return (heads + kv_head) * head_dim; }
    DEV u32 v(u32 kv_head) const { return (heads + kv_heads + kv_head) * head_dim; }
};
