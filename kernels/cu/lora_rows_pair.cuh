// The backward pass of up to two targets of rank 1 or 2, with the norm.
#pragma once
#include "lora_rows.cuh"

constexpr int PAIR_THREADS = 512;
constexpr int PAIR_ROWS = 2;    // rows that a block works on at a time
constexpr int PAIR_STAGES = 3;  // steps of so many rows that are on their way at most

// What `down_backward` does with NORM, for rows of whole 16-byte chunks of which every thread has one. Chunks of
// x, d and dx come into shared memory steps ahead, each for the thread that asked for it; sums of dA over the tile
// stay in registers. Σ w d x of the next step is summed up after this one, so a step has one barrier.
template <class X> struct Pair {
    static constexpr int N = WIDE<X>, UNITS = PAIR * PAIR, HALF = 16;
    static_assert(PAIR_ROWS == 2 && PAIR_THREADS == 32 * HALF, "half a warp adds up a row's sums of all warps");
    enum Kind { OF_X, OF_D, OF_DX, KINDS };
    struct Shared {
        uint4 masks[TILE][PAIR];  // of `MaskRow`: x1, z2, x3, z3
        u32 w3[TILE][PAIR];
        float factors[TILE][UNITS];  // scale · keep · ds
        float ds_dot_s[TILE], inv[TILE];
        float dots[2][PAIR_ROWS][HALF];  // Σ w d x of every warp, for this step and the next
    };

    Shared* shared;
    uint4* chunks;  // the thread's, of [stages][PAIR_ROWS][KINDS][threads]
    const X *x, *d, *dx;
    u32 x_stride, d_stride, first_token, tokens, c;
    bool active;
    uint4 w;

    DEV uint4& chunk(u32 stage, u32 r, u32 kind) const {
        return chunks[((stage * PAIR_ROWS + r) * KINDS + kind) * blockDim.x];
    }
    DEV void get(float (&values)[N], u32 stage, u32 r, u32 kind) const {
        unpack(values, chunk(stage, r, kind), X{});
    }
    // Asks for the rows of the step that begins with row t; zeros for what is not there.
    DEV void ask(u32 t, u32 stage) const {
#pragma unroll
        for (u32 r = 0; r < PAIR_ROWS; r++) {
            bool there = active && t + r < tokens;
            u32 row = first_token + (there ? t + r : 0);
            cp_async16(&chunk(stage, r, OF_X), x + ((u64)row * x_stride + c), there);
            cp_async16(&chunk(stage, r, OF_D), d + ((u64)row * d_stride + c), there);
            cp_async16(&chunk(stage, r, OF_DX), dx + ((u64)row * x_stride + c), there);
        }
        cp_async_commit();
    }
    // Sums of 16 lanes each: of `first` in the lower ones of a warp, of `second` in the upper ones.
    DEV static float half_sums(float sum) {
#pragma unroll
        for (int d = HALF / 2; d > 0; d >>= 1) sum += __shfl_xor_sync(ALL, sum, d);
        return sum;
    }
    // Waits for the step that was asked for first, and adds up w d x of its rows for all threads to see after
    // the next barrier.
    DEV void dot(u32 stage, u32 stages, u32 step) const {
        if (stages == PAIR_STAGES) {
            cp_async_wait<PAIR_STAGES - 1>();
        } else {
            cp_async_wait<PAIR_STAGES - 2>();
        }
        float ws[N], sums[PAIR_ROWS] = {};
        unpack(ws, w, X{});
#pragma unroll
        for (u32 r = 0; r < PAIR_ROWS; r++) {
            float xs[N], d[N];
            get(xs, stage, r, OF_X);
            get(d, stage, r, OF_D);
#pragma unroll
            for (int j = 0; j < N; j++) sums[r] = fmaf(ws[j] * d[j], xs[j], sums[r]);
        }
        u32 lane = threadIdx.x & 31;
        bool upper = lane >= HALF;
        float other = __shfl_xor_sync(ALL, upper ? sums[0] : sums[1], HALF);
        float sum = half_sums((upper ? sums[1] : sums[0]) + other);
        if (lane % HALF == 0) shared->dots[step % 2][lane / HALF][threadIdx.x >> 5] = sum;
    }
    // Σ w d x of the step's rows, without what is added to d: of the first row in the lower lanes.
    DEV float totals(u32 step) const {
        u32 lane = threadIdx.x & 31;
        return half_sums(lane % HALF < blockDim.x >> 5 ? shared->dots[step % 2][lane / HALF][lane % HALF] : 0.f);
    }
};

template <class X>
DEV void pair_backward(X* dx, const X* d_input, float* partial, const X* x, const X* input, const float* inv_rms,
                       const X* w, u32 x_stride, u32 stages, const Factors& f, const Stream& stream, const Rows& from) {
    constexpr int N = Pair<X>::N, UNITS = Pair<X>::UNITS;
    SHARED(typename Pair<X>::Shared, shared, 1);
    DYNAMIC_SHARED(memory);
    SegmentTile tile = find_tile(blockIdx.x, TILE, stream.offsets, stream.segments, stream.tokens, stream.fault);
    u64 adapter;
    if (!stream.adapter_of(tile.segment, adapter)) return;
    u32 in_dim = from.in_dim, tokens = min((u32)TILE, tile.segment.len - tile.first);
    u32 first_token = tile.segment.start + tile.first, c = threadIdx.x * N;
    bool active = c < in_dim;
    if (!active) c = 0;
    Pair<X> pair{shared,
                 reinterpret_cast<uint4*>(memory) + threadIdx.x,
                 x,
                 d_input,
                 dx,
                 x_stride,
                 (u32)from.stride,
                 first_token,
                 tokens,
                 c,
                 active,
                 *reinterpret_cast<const uint4*>(w + c)};
    for (u32 stage = 0; stage < stages; stage++) pair.ask(stage * PAIR_ROWS, stage);
    u64 key = f.threshold ? stream.keys[tile.segment.index] : 0;
    for (u32 e = threadIdx.x; e < TILE * UNITS; e += blockDim.x) {
        u32 t = e / UNITS, n = e % UNITS / PAIR, i = e % PAIR;
        bool there = t < tokens && n < f.targets && i < f.rank;
        u64 at = from.s_of(first_token + t, adapter) + n * f.rank + i;
        shared->factors[t][e % UNITS] = there ? f.scale * f.keep * widen(d_input[at]) : 0.f;
    }
    for (u32 e = threadIdx.x; e < TILE * PAIR; e += blockDim.x) {
        u32 t = e / PAIR, n = e % PAIR;
        MaskRow mask = MaskRow::of(key, tile.first + t, f.site[n]);
        shared->masks[t][n] = make_uint4(mask.x1, mask.z2, mask.x3, mask.z3);
        shared->w3[t][n] = mask.w3;
    }
    for (u32 t = threadIdx.x; t < TILE; t += blockDim.x) {
        float sum = 0.f;
        u64 at = from.s_of(first_token + t, adapter);
        for (u32 unit = 0; t < tokens && unit < f.units(); unit++) {
            sum = fmaf(widen(d_input[at + unit]), widen(input[at + unit]), sum);
        }
        shared->ds_dot_s[t] = sum;
        shared->inv[t] = t < tokens ? inv_rms[first_token + t] : 0.f;
    }
    // Where there is no second rank, the first is read again: its factors are zeros.
    const float* a[PAIR];
#pragma unroll
    for (u32 n = 0; n < PAIR; n++) a[n] = f.row(adapter, n < f.targets ? n : 0, 0, in_dim) + c;
    u32 second_rank = f.rank > 1 ? in_dim : 0;
    MaskRow keys = MaskRow::of(key, 0, 0);
    float da[PAIR][PAIR][N] = {}, per_column = 1.f / in_dim;
    pair.dot(0, stages, 0);
    __syncthreads();
    auto all_steps = [&](auto drop) {
        constexpr bool DROP = decltype(drop)::value;
        for (u32 t = 0, stage = 0; t < tokens; t += PAIR_ROWS) {
            u32 step = t / PAIR_ROWS, next = stage + 1 == stages ? 0 : stage + 1;
            float totals = pair.totals(step), inv[PAIR_ROWS], along[PAIR_ROWS], d[PAIR_ROWS][N];
#pragma unroll
            for (u32 r = 0; r < PAIR_ROWS; r++) {
                inv[r] = shared->inv[t + r];
                float total = __shfl_sync(ALL, totals, r * Pair<X>::HALF);
                along[r] = -((total * inv[r] + shared->ds_dot_s[t + r]) * inv[r] * inv[r] * per_column);
                pair.get(d[r], stage, r, Pair<X>::OF_D);
            }
#pragma unroll
            for (u32 n = 0; n < PAIR; n++) {
                if (n >= f.targets) continue;
                float as[PAIR][N];
                load(as[0], a[n]);
                load(as[1], a[n] + second_rank);
#pragma unroll
                for (u32 r = 0; r < PAIR_ROWS; r++) {
                    uint4 words[N / 4] = {};
                    if (DROP) {
                        uint4 of_row = shared->masks[t + r][n];
                        MaskRow mask{keys.k0, keys.k1, of_row.x, of_row.y, of_row.z, of_row.w, shared->w3[t + r][n]};
#pragma unroll
                        for (u32 g = 0; g < N / 4; g++) words[g] = mask.words(c / 4 + g);
                    }
                    float xs[N], first = shared->factors[t + r][n * PAIR], second = shared->factors[t + r][n * PAIR + 1];
                    pair.get(xs, stage, r, Pair<X>::OF_X);
#pragma unroll
                    for (int j = 0; j < N; j++) {
                        uint4 four = words[j / 4];
                        u32 word = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
                        bool keep = !DROP || word >= f.threshold;
                        float added = fmaf(first, as[0][j], second * as[1][j]), kept = keep ? xs[j] : 0.f;
                        if (keep) d[r][j] += added;
                        da[n][0][j] = fmaf(first * inv[r], kept, da[n][0][j]);
                        da[n][1][j] = fmaf(second * inv[r], kept, da[n][1][j]);
                    }
                }
            }
            float ws[N];
            unpack(ws, pair.w, X{});
#pragma unroll
            for (u32 r = 0; r < PAIR_ROWS; r++) {
                if (!active || t + r >= tokens) continue;
                float values[N], xs[N];
                pair.get(values, stage, r, Pair<X>::OF_DX);
                pair.get(xs, stage, r, Pair<X>::OF_X);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    values[j] = fmaf(xs[j], along[r], fmaf(ws[j] * d[r][j], inv[r], values[j]));
                }
                store(dx + ((u64)(first_token + t + r) * x_stride + c), values);
            }
            pair.ask(t + stages * PAIR_ROWS, stage);
            pair.dot(next, stages, step + 1);
            stage = next;
            __syncthreads();
        }
    };
    if (f.threshold) {
        all_steps(Count<1>{});
    } else {
        all_steps(Count<0>{});
    }
    cp_async_wait<0>();  // of the steps beyond the last
    if (!active) return;
    float ws[N];
    unpack(ws, pair.w, X{});
    partial += (u64)blockIdx.x * f.units() * in_dim + c;
#pragma unroll
    for (u32 n = 0; n < PAIR; n++) {
#pragma unroll
        for (u32 i = 0; i < PAIR; i++) {
            if (n >= f.targets || i >= f.rank) continue;
#pragma unroll
            for (int j = 0; j < N; j++) da[n][i][j] *= ws[j];
            store(partial + (u64)(n * f.rank + i) * in_dim, da[n][i]);
        }
    }
}
