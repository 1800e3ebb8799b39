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

// A tile when every segment is cut into tiles of `size` tokens of its own: the segment's tile number
// `rank` of `ranks`, counted from 1.
struct RankedTile {
    Segment segment;
    u32 rank, ranks;
};
// Tile number `tile` of all segments' in the order of falling ranks, so that tiles whose work grows with
// their rank go first. Whole warps call it together.
DEV RankedTile find_ranked_tile(u32 tile, u32 size, const u32* offsets, u32 segments, u32 tokens, u32* fault) {
    const RankedTile none = {{0, 0, 0, false}, 0, 0};
    u32 lane = threadIdx.x & 31, most = 0;
    auto tiles_of = [&](u32 s) { return (offsets[s + 1] - offsets[s] + size - 1) / size; };
    bool valid = true;
    for (u32 s = lane; s < segments; s += 32) {
        u32 start = offsets[s];
        // Offsets that decrease give lengths beyond all tokens.
        valid = valid && start <= tokens && offsets[s + 1] - start <= tokens - start;
        most = max(most, tiles_of(s));
    }
    if (!valid) expect_below(fault, BAD_SEGMENT, 1, 0);
    if (__any_sync(ALL, !valid)) return none;
    // How many tiles have a higher rank.
    auto above = [&](u32 rank) {
        u32 sum = 0;
        for (u32 s = lane; s < segments; s += 32) {
            u32 tiles = tiles_of(s);
            sum += tiles > rank ? tiles - rank : 0;
        }
        return __reduce_add_sync(ALL, sum);
    };
    if (tile >= above(0)) return none;
    u32 low = 0, rank = __reduce_max_sync(ALL, most);  // the answer is in low + 1 … rank
    u32 before = 0;                                    // tiles above `rank`
    while (low + 1 < rank) {
        u32 middle = (low + rank) / 2, count = above(middle);
        if (count > tile) {
            low = middle;
        } else {
            rank = middle;
            before = count;
        }
    }
    // Every segment of that many tiles has one of this rank.
    tile -= before;
    for (u32 base = 0; base < segments; base += 32) {
        u32 s = base + lane;
        bool has = s < segments && tiles_of(s) >= rank;
        u32 votes = __ballot_sync(ALL, has), count = __popc(votes);
        if (tile < count) {
            bool mine = has && (u32)__popc(votes & ((1u << lane) - 1)) == tile;
            u32 owner = base + __ffs(__ballot_sync(ALL, mine)) - 1;
            u32 start = offsets[owner], len = offsets[owner + 1] - start;
            return {{owner, start, len, true}, rank, (len + size - 1) / size};
        }
        tile -= count;
    }
    return none;
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
