// Backward: a block has the tokens of a tile of one segment. It adds (ds A) to the rows' gradients, takes them
// through the norm, and sums dA over its tokens in shared memory; tiles are added up in order afterwards
// (`lora_gradient_rows`).
#pragma once
#include "lora_rows.cuh"

// The sums over the block of N values of every thread, where all threads can read them until the next call.
template <int N> DEV const float* block_sums(const float (&values)[N]) {
    constexpr int WARPS = MAX_THREADS / 32;
    SHARED(float, block_sums_part, N * WARPS);
    SHARED(float, block_sums_total, N);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float sum = warp_sum(values[i]);
        if (lane == 0) block_sums_part[i * WARPS + warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x < N) {
        float sum = 0.f;
        for (u32 w = 0; w < blockDim.x >> 5; w++) sum += block_sums_part[threadIdx.x * WARPS + w];
        block_sums_total[threadIdx.x] = sum;
    }
    __syncthreads();
    return block_sums_total;
}

// What a launch does: sums of dA for `count` units from `first`, and the rows' gradients or not.
struct Part {
    u32 first, count, rows;
};

// With d the gradient of the layer's input x̃ = x w / rms(x), or of x̃ = x itself:
//
//   d += scale · Σ mask ⊙ (ds A);   partial[tile, unit] = scale · Σ_t ds[t, unit] (mask ⊙ x̃[t])
//
// and with NORM  dx += (w ⊙ d − x̂ · mean(w ⊙ d ⊙ x̂)) / rms. The mean needs no second pass over the
// rows, for Σ w (mask ⊙ ds A) x / rms = Σ ds s / scale, of which s is known. The rows of x̃ are not
// read: x is needed anyway, and w, the same for all tokens, is multiplied into dA at the end.
template <class X, bool NORM, bool IN_SHARED>
DEV void down_backward(X* dx, X* d_input, float* partial, const X* x, const X* input, const float* inv_rms,
                       const X* w, u64 x_stride, const Factors& f, const Part& part, const Stream& stream,
                       const Rows& from) {
    DYNAMIC_SHARED(memory);
    SHARED(float, ds_dot_s, TILE);
    SHARED(float, inv, TILE);
    u32 in_dim = from.in_dim, units = f.units();
    float* ds = reinterpret_cast<float*>(memory);     // [TILE, units], scaled
    // [part.count, in_dim], a thread's columns its own: behind ds, or where the sums go in the end.
    float* scratch = partial + (u64)blockIdx.x * part.count * in_dim;
    float* sums;
    if constexpr (IN_SHARED) {
        sums = ds + (u64)TILE * units;
    } else {
        sums = scratch;
    }
    SegmentTile tile = find_tile(blockIdx.x, TILE, stream.offsets, stream.segments, stream.tokens, stream.fault);
    u64 adapter;
    if (!stream.adapter_of(tile.segment, adapter)) return;
    u32 tokens = min((u32)TILE, tile.segment.len - tile.first), first_token = tile.segment.start + tile.first;
    float per_column = 1.f / in_dim;
    u64 key = f.threshold ? stream.keys[tile.segment.index] : 0;
    constexpr int WIDTH = WIDE<X>;
    bool wide = f.aligned(in_dim) && aligned16(d_input) && aligned16(input) && from.stride % WIDTH == 0;
    if (NORM) wide = wide && aligned16(dx) && aligned16(x) && aligned16(w) && x_stride % WIDTH == 0;
    for (u32 e = threadIdx.x; e < TILE * units; e += blockDim.x) {
        u32 t = e / units, unit = e % units;
        ds[e] = t < tokens ? f.scale * widen(d_input[from.s_of(first_token + t, adapter) + unit]) : 0.f;
    }
    if (threadIdx.x < TILE) {
        float sum = 0.f;
        if (NORM && threadIdx.x < tokens) {
            u64 at = from.s_of(first_token + threadIdx.x, adapter);
            for (u32 unit = 0; unit < units; unit++) sum = fmaf(widen(d_input[at + unit]), widen(input[at + unit]), sum);
        }
        ds_dot_s[threadIdx.x] = sum;
        if (NORM) inv[threadIdx.x] = threadIdx.x < tokens ? inv_rms[first_token + threadIdx.x] : 0.f;
    }
    cover_block<WIDTH>(in_dim, wide, [&](auto count, u64 c) {
        constexpr int N = decltype(count)::value;
        float zeros[N] = {};
        for (u32 unit = 0; unit < part.count; unit++) store(sums + (u64)unit * in_dim + c, zeros);
    });
    __syncthreads();
    for (u32 t = 0; t < tokens; t += TILE_ROWS) {
        u32 rows = min((u32)TILE_ROWS, tokens - t), token = first_token + t;
        const float* w_d_x = nullptr;  // Σ w d x of each row, without what is added to d
        if constexpr (NORM) {
            float dots[TILE_ROWS] = {};
            cover_block<WIDTH>(part.rows ? in_dim : 0, wide, [&](auto count, u64 c) {
                constexpr int N = decltype(count)::value;
                float ws[N], xs[N], d[N];
                load(ws, w + c);
#pragma unroll
                for (u32 r = 0; r < TILE_ROWS; r++) {
                    if (r >= rows) continue;
                    load(xs, x + (token + r) * x_stride + c);
                    load(d, d_input + (token + r) * from.stride + c);
#pragma unroll
                    for (int j = 0; j < N; j++) dots[r] = fmaf(ws[j] * d[j], xs[j], dots[r]);
                }
            });
            w_d_x = block_sums(dots);
        }
        cover_block<WIDTH>(in_dim, wide, [&](auto count, u64 c) {
            constexpr int N = decltype(count)::value;
            float xs[TILE_ROWS][N], added[TILE_ROWS][N];
#pragma unroll
            for (u32 r = 0; r < TILE_ROWS; r++) {
#pragma unroll
                for (int j = 0; j < N; j++) xs[r][j] = added[r][j] = 0.f;
                if (r >= rows) continue;
                if constexpr (NORM) {
                    load(xs[r], x + (token + r) * x_stride + c);
#pragma unroll
                    for (int j = 0; j < N; j++) xs[r][j] *= inv[t + r];
                } else {
                    load(xs[r], input + (token + r) * from.stride + c);
                }
            }
            for (u32 target = 0; target < f.targets; target++) {
                u32 unit = target * f.rank;
                if (!part.rows && (unit + f.rank <= part.first || unit >= part.first + part.count)) continue;
                u32 kept = f.threshold ? 0 : ~0u;
#pragma unroll
                for (u32 r = 0; r < TILE_ROWS; r++) {
                    Mask mask{key, f.site[target], f.threshold, 1.f};
                    if (f.threshold) kept |= kept_bits<N>(mask, tile.first + t + r, (u32)c, r);
                }
                for (u32 i = 0; i < f.rank; i++, unit++) {
                    bool summed = unit - part.first < part.count;
                    if (!part.rows && !summed) continue;
                    float as[N], da[N] = {};
                    load(as, f.row(adapter, target, i, in_dim) + c);
#pragma unroll
                    for (u32 r = 0; r < TILE_ROWS; r++) {
                        float factor = ds[(t + r) * units + unit];
#pragma unroll
                        for (int j = 0; j < N; j++) {
                            float masked = kept >> (r * N + j) & 1 ? factor : 0.f;
                            added[r][j] = fmaf(masked, as[j], added[r][j]);
                            da[j] = fmaf(masked, xs[r][j], da[j]);
                        }
                    }
                    if (!summed) continue;
                    float* sum = sums + (u64)(unit - part.first) * in_dim + c;
                    load(as, sum);
#pragma unroll
                    for (int j = 0; j < N; j++) as[j] = fmaf(f.keep, da[j], as[j]);
                    store(sum, as);
                }
            }
            if (!part.rows) return;
            float ws[N] = {};
            if (NORM) load(ws, w + c);
#pragma unroll
            for (u32 r = 0; r < TILE_ROWS; r++) {
                if (r >= rows) continue;
                X* d_row = d_input + (token + r) * from.stride + c;
                float d[N];
                load(d, d_row);
#pragma unroll
                for (int j = 0; j < N; j++) d[j] = fmaf(f.keep, added[r][j], d[j]);
                if constexpr (NORM) {
                    float old[N], scale = inv[t + r];
                    float along = -((w_d_x[r] * scale + ds_dot_s[t + r]) * scale * per_column);
                    X* row = dx + (token + r) * x_stride + c;
                    load(old, row);
#pragma unroll
                    for (int j = 0; j < N; j++) old[j] += fmaf(ws[j] * d[j], scale, xs[r][j] * along);
                    store(row, old);
                } else {
                    store(d_row, d);
                }
            }
        });
    }
    cover_block<WIDTH>(in_dim, wide, [&](auto count, u64 c) {
        constexpr int N = decltype(count)::value;
        float ws[N] = {};
        if (NORM) load(ws, w + c);
        for (u32 unit = 0; unit < part.count; unit++) {
            float values[N];
            load(values, sums + (u64)unit * in_dim + c);
#pragma unroll
            for (int j = 0; j < N; j++) values[j] *= NORM ? ws[j] : 1.f;
            store(scratch + (u64)unit * in_dim + c, values);
        }
    });
}
