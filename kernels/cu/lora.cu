// The products of adapted layers with B, and the sums of both factors' gradients.
//
// Where an adapter input has columns for every adapter, B is written behind the rows of the frozen
// weight, and the product over x and these columns does the rest: y = xWᵀ + sBᵀ forward, d_input and
// ds backward. Otherwise a pass over y adds s Bᵀ, and one over dy gives ds.
//
// Sums over tokens are taken in two steps without atomics: over the tokens of each tile of a segment
// into scratch memory, then over the tiles of a segment and over segments, in order, into their
// gradient rows. So a gradient row's bits do not depend on what else is in the stream.
#include "lora.cuh"

constexpr int THREADS = 128;
constexpr int RANKS = 4;  // ranks that a thread sums at a time
constexpr int TILE = 64;  // tokens of a tile of dB
constexpr int BATCH = 8;  // of which so many are on their way at once

// Where the B `[out_len, rank]` of every target is, and the outputs that it belongs to.
struct Outputs {
    PerTarget<u64> b;
    PerTarget<u32> start, len;
    u32 targets, rank;
};

// The sums over the block of N values of every thread; in thread 0 … N − 1 the one of its number.
template <int N> DEV float block_sums(const float (&values)[N]) {
    SHARED(float, block_sums_part, N * (THREADS / 32));
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float sum = warp_sum(values[i]);
        if (lane == 0) block_sums_part[i * (THREADS / 32) + warp] = sum;
    }
    __syncthreads();
    float sum = 0.f;
    if (threadIdx.x < N) {
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) sum += block_sums_part[threadIdx.x * (THREADS / 32) + w];
    }
    __syncthreads();  // the next call writes to the same array
    return sum;
}

// ---- B behind the rows of the weight

// w[o, in_dim + j·units + n·rank + i] = B of adapter j and target n at [o, i]; zeros in other targets' rows.
template <class X>
DEV void weight_tail(X* w, const float* adapters, u64 adapter_stride, u64 w_stride, u32 out_dim, u32 in_dim, u32 width,
                     u32 n_adapters, const Outputs& outputs) {
    u32 units = outputs.targets * outputs.rank;
    auto write = [&](auto count, u32 e) {
        constexpr int N = decltype(count)::value;
        u32 row = e / (width / N), column = e % (width / N) * N;
        u32 adapter = column / units, target = column % units / outputs.rank, i = column % outputs.rank;
        float values[N];
#pragma unroll
        for (int j = 0; j < N; j++) {
            u32 o = row - outputs.start[target];  // beyond all lengths if the row is before
            bool there = adapter < n_adapters && row >= outputs.start[target] && o < outputs.len[target];
            const float* b = adapters + adapter * adapter_stride + outputs.b[target];
            values[j] = there ? b[(u64)o * outputs.rank + i] : 0.f;
            if (++i < outputs.rank) continue;
            i = 0;
            if (++target == outputs.targets) target = 0, adapter++;
        }
        store(w + row * w_stride + in_dim + column, values);
    };
    constexpr u32 N = WIDE<X>;
    bool wide = aligned16(w) && w_stride % N == 0 && in_dim % N == 0 && width % N == 0;
    u32 first = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
    if (wide) {
        for (u32 e = first; e < out_dim * (width / N); e += step) write(Count<N>{}, e);
    } else {
        for (u32 e = first; e < out_dim * width; e += step) write(Count<1>{}, e);
    }
}

// ---- passes of their own, one target at a time

// y[t, o] += s[t] · B[o]; B is [out_len, rank] at `b_offset`. y begins at the target's first column.
template <class X>
DEV void up_forward(X* y, const X* input, const float* adapters, const Stream& stream, u64 adapter_stride,
                    u64 b_offset, const Rows& from, u32 out_dim, u32 out_len, u32 rank, u32 unit) {
    Segment segment;
    u64 adapter;
    if (!stream.find(blockIdx.x, segment, adapter)) return;
    const X* s = input + from.s_of(blockIdx.x, adapter) + unit;
    const float* b = adapters + adapter * adapter_stride + b_offset;
    y += (u64)blockIdx.x * out_dim;
    cover_block<WIDE<X>>(out_len, aligned16(y), [&](auto count, u64 o) {
        constexpr int N = decltype(count)::value;
        float values[N];
        load(values, y + o);
        for (u32 i = 0; i < rank; i++) {
            float factor = widen(s[i]);
#pragma unroll
            for (int j = 0; j < N; j++) values[j] = fmaf(factor, b[(o + j) * rank + i], values[j]);
        }
        store(y + o, values);
    });
}

// ds[t, i] = dy[t] · B[·, i]. dy begins at the target's first column.
template <class X>
DEV void up_backward(X* d_input, const X* dy, const float* adapters, const Stream& stream, u64 adapter_stride,
                     u64 b_offset, const Rows& to, u32 out_dim, u32 out_len, u32 rank, u32 unit) {
    Segment segment;
    u64 adapter;
    if (!stream.find(blockIdx.x, segment, adapter)) return;
    X* ds = d_input + to.s_of(blockIdx.x, adapter) + unit;
    const float* b = adapters + adapter * adapter_stride + b_offset;
    dy += (u64)blockIdx.x * out_dim;
    for (u32 first = 0; first < rank; first += RANKS) {
        float sums[RANKS] = {};
        cover_block<WIDE<X>>(out_len, aligned16(dy), [&](auto count, u64 o) {
            constexpr int N = decltype(count)::value;
            float values[N];
            load(values, dy + o);
#pragma unroll
            for (int i = 0; i < RANKS; i++) {
                if (first + i >= rank) continue;
#pragma unroll
                for (int j = 0; j < N; j++) sums[i] = fmaf(values[j], b[(o + j) * rank + first + i], sums[i]);
            }
        });
        float sum = block_sums(sums);
        if (threadIdx.x < RANKS && first + threadIdx.x < rank) ds[first + threadIdx.x] = narrow<X>(sum);
    }
}

// ---- gradients

// partial[tile, B of target n] = Σ_t dy[t, o] s[t, i], for one tile, some columns of target blockIdx.z each
// block. `partial` has `size` elements a tile.
template <class X>
DEV void gradient_b(float* partial, const X* dy, const X* input, const Stream& stream, const Rows& from, u32 out_dim,
                    u64 size, const Outputs& outputs) {
    constexpr int N = WIDE<X>;
    SHARED(float, s, TILE * RANKS);
    u32 target = blockIdx.z, start = outputs.start[target], len = outputs.len[target], rank = outputs.rank;
    if ((u64)blockIdx.y * THREADS * N >= len) return;
    SegmentTile tile = find_tile(blockIdx.x, TILE, stream.offsets, stream.segments, stream.tokens, stream.fault);
    u64 adapter;
    if (!stream.adapter_of(tile.segment, adapter)) return;
    u32 tokens = min((u32)TILE, tile.segment.len - tile.first), first_token = tile.segment.start + tile.first;
    u32 o = (blockIdx.y * THREADS + threadIdx.x) * N, valid = o < len ? min((u32)N, len - o) : 0;
    dy += (u64)first_token * out_dim + start + o;
    bool wide = valid == N && aligned16(dy) && out_dim % N == 0;
    for (u32 n = 0; n < target; n++) partial += (u64)outputs.len[n] * rank;
    partial += blockIdx.x * size + (u64)o * rank;
    for (u32 first = 0; first < rank; first += RANKS) {
        __syncthreads();  // all are done with the columns before
        for (u32 e = threadIdx.x; e < tokens * RANKS; e += THREADS) {
            u32 t = e / RANKS, i = first + e % RANKS;
            s[e] = i < rank ? widen(input[from.s_of(first_token + t, adapter) + target * rank + i]) : 0.f;
        }
        __syncthreads();
        float sums[RANKS][N] = {};
        auto add = [&](const float (&d)[N], u32 t) {
            float factors[RANKS];
            load(factors, s + t * RANKS);
#pragma unroll
            for (int i = 0; i < RANKS; i++) {
#pragma unroll
                for (int j = 0; j < N; j++) sums[i][j] = fmaf(factors[i], d[j], sums[i][j]);
            }
        };
        u32 t = 0;
        for (; wide && t + BATCH <= tokens; t += BATCH) {
            uint4 raw[BATCH];
#pragma unroll
            for (u32 k = 0; k < BATCH; k++) raw[k] = *reinterpret_cast<const uint4*>(dy + (u64)(t + k) * out_dim);
#pragma unroll
            for (u32 k = 0; k < BATCH; k++) {
                float d[N];
                unpack(d, raw[k], X{});
                add(d, t + k);
            }
        }
        for (; t < tokens; t++) {
            float d[N];
#pragma unroll
            for (u32 j = 0; j < N; j++) d[j] = j < valid ? widen(dy[(u64)t * out_dim + j]) : 0.f;
            add(d, t);
        }
#pragma unroll
        for (u32 j = 0; j < N; j++) {
#pragma unroll
            for (int i = 0; i < RANKS; i++) {
                if (j < valid && first + i < rank) partial[j * rank + first + i] = sums[i][j];
            }
        }
    }
}

// grads[grad_row[segment], …] += Σ partial[tile, e] over the segment's tiles, segments and tiles in order.
// Elements up to `end` of a target, counted from `first`, go to its offset of a row. A block has 32 elements
// e of a tile's `size`; its warps sum up a segment each, and the first of them adds the sums in order.
constexpr int SUM_WARPS = 8;
KERNEL LAUNCH_BOUNDS(32 * SUM_WARPS)
    lora_gradient_rows(float* grads, const float* partial, const u32* offsets, const u32* grad_row, u32* fault,
                       u32 segments, u32 tokens, u32 rows, u32 tile_tokens, u64 stride, u64 first, u64 size,
                       PER_TARGET_PARAMETERS(u64, offset), PER_TARGET_PARAMETERS(u64, end)) {
    SHARED(float, sums, 32 * SUM_WARPS);
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 e = (u64)blockIdx.x * 32 + lane, element = first + e, before = 0;
    PerTarget<u64> offset = PER_TARGET(u64, offset), end = PER_TARGET(u64, end);
    u32 target = 0;
    while (target + 1 < MAX_TARGETS && element >= end[target]) target++;
    grads += offset[target] + element - (target ? end[target - 1] : 0);
    partial += e;
    float value = 0.f;  // of the row that is added to, by the first warp
    u32 held = ~0u;     // its number
    for (u32 base = 0; base < segments; base += 32) {
        u32 s = base + lane, from = 0, to = 1, row = 0;
        if (s < segments) from = offsets[s], to = offsets[s + 1], row = grad_row[s];
        bool valid = from < to && to <= tokens;
        if (s < segments && !valid) expect_below(fault, BAD_SEGMENT, 1, 0);
        if (__any_sync(ALL, s < segments && !valid)) return;
        u32 mine = s < segments ? (to - from + tile_tokens - 1) / tile_tokens : 0, scan = mine;
#pragma unroll
        for (u32 d = 1; d < 32; d <<= 1) {
            u32 below = __shfl_up_sync(ALL, scan, d);
            if (lane >= d) scan += below;
        }
        for (u32 group = 0; group < min(32u, segments - base); group += SUM_WARPS) {
            u32 tiles = __shfl_sync(ALL, mine, group + warp);
            const float* of_segment = partial + (before + __shfl_sync(ALL, scan - mine, group + warp)) * size;
            float sum = 0.f;
            if (e < size) {
#pragma unroll 8
                for (u32 tile = 0; tile < tiles; tile++) sum += of_segment[tile * size];
            }
            sums[threadIdx.x] = sum;
            __syncthreads();
            for (u32 k = 0; k < SUM_WARPS && base + group + k < segments; k++) {
                u32 to_row = __shfl_sync(ALL, row, group + k);
                if (warp > 0 || e >= size || !expect_below(fault, BAD_SEGMENT, to_row, rows)) continue;
                if (to_row != held) {
                    if (held < rows) grads[held * stride] = value;
                    value = grads[to_row * stride], held = to_row;
                }
                value += sums[k * 32 + lane];
            }
            __syncthreads();
        }
        before += __shfl_sync(ALL, scan, 31);
    }
    if (held < rows) grads[held * stride] = value;
}
EXPORT(lora_gradient_rows)

#define OUTPUTS_PARAMETERS                                                                                     \
    PER_TARGET_PARAMETERS(u64, b), PER_TARGET_PARAMETERS(u32, start), PER_TARGET_PARAMETERS(u32, len), \
        u32 targets, u32 rank
#define OUTPUTS                                                                                  \
    Outputs {                                                                                    \
        PER_TARGET(u64, b), PER_TARGET(u32, start), PER_TARGET(u32, len), targets, rank          \
    }
#define INSTANCES(X, t)                                                                                               \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                     \
        lora_weight_tail_##t(X* w, const float* adapters, u64 adapter_stride, u64 w_stride, u32 out_dim, u32 in_dim,   \
                             u32 width, u32 n_adapters, OUTPUTS_PARAMETERS) {                                         \
        weight_tail(w, adapters, adapter_stride, w_stride, out_dim, in_dim, width, n_adapters, OUTPUTS);              \
    }                                                                                                                 \
    EXPORT(lora_weight_tail_##t)                                                                                      \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                     \
        lora_up_forward_##t(X* y, const X* input, const float* adapters, STREAM_PARAMETERS, u64 adapter_stride,        \
                            u64 b_offset, ROWS_PARAMETERS, u32 out_dim, u32 out_len, u32 rank, u32 unit) {            \
        up_forward(y, input, adapters, STREAM, adapter_stride, b_offset, ROWS, out_dim, out_len, rank, unit);         \
    }                                                                                                                 \
    EXPORT(lora_up_forward_##t)                                                                                       \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                     \
        lora_up_backward_##t(X* d_input, const X* dy, const float* adapters, STREAM_PARAMETERS, u64 adapter_stride,    \
                             u64 b_offset, ROWS_PARAMETERS, u32 out_dim, u32 out_len, u32 rank, u32 unit) {           \
        up_backward(d_input, dy, adapters, STREAM, adapter_stride, b_offset, ROWS, out_dim, out_len, rank, unit);     \
    }                                                                                                                 \
    EXPORT(lora_up_backward_##t)                                                                                      \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                     \
        lora_gradient_b_##t(float* partial, const X* dy, const X* input, STREAM_PARAMETERS, ROWS_PARAMETERS,          \
                            u32 out_dim, u64 size, OUTPUTS_PARAMETERS) {                                              \
        gradient_b(partial, dy, input, STREAM, ROWS, out_dim, size, OUTPUTS);                                         \
    }                                                                                                                 \
    EXPORT(lora_gradient_b_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
