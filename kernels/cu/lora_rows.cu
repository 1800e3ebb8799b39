// The products of adapted layers with A, fused with the norm before them: s = drop(x) Aᵀ on the way
// forward, and its backward with dA.
//
// Forward, a block has a few whole rows: it normalises them, writes them, and multiplies what it has
// in registers. Backward, a block has the tokens of a tile of one segment: it adds (ds A) to the
// rows' gradients, takes them through the norm, and sums dA over its tokens in shared memory; tiles
// are added up in order afterwards (`lora_gradient_rows`). A mask is drawn once for both.
#include "lora.cuh"

constexpr int MOST_THREADS = 256;
constexpr int UNITS = 4;       // units that a block of the forward kernels sums at a time
constexpr int TILE = 32;       // tokens of a tile of the backward kernels
constexpr int TILE_ROWS = 4;   // of which so many are in registers at a time

// The sums over the block of N values of every thread, where all threads can read them until the next call.
template <int N> DEV const float* block_sums(const float (&values)[N]) {
    constexpr int WARPS = MOST_THREADS / 32;
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
        for (int n = 0; n < MOST_TARGETS; n++) all = all && a.of[n] % 4 == 0;
        return all;
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

// ---- forward

// Rows of `input`, s of them, and with NORM before that: rows = x w / rms(x).
template <class X, int COUNT, bool NORM>
DEV void down_forward(X* input, float* inv_rms, const X* x, const X* w, u64 x_stride, float eps, const Factors& f,
                      const Stream& stream, const Rows& to) {
    SHARED(u64, adapter_of, COUNT);
    SHARED(u64, key_of, COUNT);
    SHARED(u32, position_of, COUNT);
    SHARED(u32, refused, COUNT);
    u32 first_token = blockIdx.x * COUNT, rows = min((u32)COUNT, stream.tokens - first_token);
    if (threadIdx.x < COUNT) {
        Segment segment;
        u64 adapter = 0;
        u32 token = min(first_token + threadIdx.x, stream.tokens - 1);
        refused[threadIdx.x] = !stream.find(token, segment, adapter);
        adapter_of[threadIdx.x] = adapter;
        key_of[threadIdx.x] = f.threshold ? stream.keys[segment.index] : 0;
        position_of[threadIdx.x] = token - segment.start;
    }
    __syncthreads();
#pragma unroll
    for (u32 r = 0; r < COUNT; r++) {
        if (refused[r]) return;
    }
    constexpr int WIDTH = WIDE<X>;
    input += first_token * to.stride;
    x += first_token * x_stride;
    u32 in_dim = to.in_dim, units = f.units();
    bool wide = f.aligned(in_dim) && aligned16(input) && to.stride % WIDTH == 0;
    if (NORM) wide = wide && aligned16(x) && aligned16(w) && x_stride % WIDTH == 0;
    float inv[COUNT];
    if constexpr (NORM) {
        float squares[COUNT] = {};
        cover_block<WIDTH>(in_dim, wide, [&](auto count, u64 c) {
            constexpr int N = decltype(count)::value;
#pragma unroll
            for (u32 r = 0; r < COUNT; r++) {
                if (r >= rows) continue;
                float xs[N];
                load(xs, x + r * x_stride + c);
#pragma unroll
                for (int j = 0; j < N; j++) squares[r] = fmaf(xs[j], xs[j], squares[r]);
            }
        });
        const float* totals = block_sums(squares);
#pragma unroll
        for (u32 r = 0; r < COUNT; r++) {
            inv[r] = 1.f / sqrtf(totals[r] / in_dim + eps);
            if (threadIdx.x == 0 && r < rows) inv_rms[first_token + r] = inv[r];
        }
    }
    for (u32 first = 0; first < units; first += UNITS) {
        float sums[COUNT * UNITS] = {};
        cover_block<WIDTH>(in_dim, wide, [&](auto count, u64 c) {
            constexpr int N = decltype(count)::value;
            float xs[COUNT][N], ws[N] = {};
            if (NORM && first == 0) load(ws, w + c);
#pragma unroll
            for (u32 r = 0; r < COUNT; r++) {
                X* row = input + r * to.stride + c;
#pragma unroll
                for (int j = 0; j < N; j++) xs[r][j] = 0.f;
                if (r >= rows) continue;
                if (NORM && first == 0) {
                    // The second reading of the row comes from the cache. Everyone multiplies what is stored.
                    load(xs[r], x + r * x_stride + c);
#pragma unroll
                    for (int j = 0; j < N; j++) xs[r][j] = widen(narrow<X>(xs[r][j] * (inv[r] * ws[j])));
                    store(row, xs[r]);
                } else {
                    load(xs[r], row);
                }
            }
            u32 target = first / f.rank, i = first % f.rank, kept = ~0u;
            bool another = true;
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                if (first + u >= units) continue;
                if (another && f.threshold) {
                    kept = 0;
#pragma unroll 1  // there is a copy for every unit already, and instructions have a cache too
                    for (u32 r = 0; r < COUNT; r++) {
                        Mask mask{key_of[r], f.site[target], f.threshold, 1.f};
                        kept |= kept_bits<N>(mask, position_of[r], (u32)c, r);
                    }
                }
                float as[N] = {};
#pragma unroll
                for (u32 r = 0; r < COUNT; r++) {
                    if (r == 0 || adapter_of[r] != adapter_of[r - 1]) load(as, f.row(adapter_of[r], target, i, in_dim) + c);
#pragma unroll
                    for (int j = 0; j < N; j++) {
                        float x = kept >> (r * N + j) & 1 ? xs[r][j] : 0.f;
                        sums[r * UNITS + u] = fmaf(x, as[j], sums[r * UNITS + u]);
                    }
                }
                another = ++i == f.rank;
                if (another) i = 0, target++;
            }
        });
        const float* totals = block_sums(sums);
        u32 r = threadIdx.x / UNITS, unit = first + threadIdx.x % UNITS;
        if (r < rows && unit < units) {
            input[to.s_of(r, adapter_of[r]) + unit] = narrow<X>(f.scale * f.keep * totals[threadIdx.x]);
        }
    }
    for (u32 e = threadIdx.x; e < rows * to.width; e += blockDim.x) {
        u32 r = e / to.width, column = e % to.width, own = (u32)adapter_of[r] * to.step;
        if (column < own || column >= own + units) input[r * to.stride + in_dim + column] = narrow<X>(0.f);
    }
}

// ---- backward

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

// ---- entry points; in the forward ones with the number of rows of a block

#define FACTORS_PARAMETERS                                                                                      \
    const float *adapters, u64 adapter_stride, PER_TARGET_PARAMETERS(u64, a), PER_TARGET_PARAMETERS(u32, site), \
        u32 targets, u32 rank, float scale, u32 threshold, float keep
#define FACTORS                                                                                                       \
    Factors {                                                                                                         \
        adapters, adapter_stride, PER_TARGET(u64, a), PER_TARGET(u32, site), targets, rank, scale, threshold, keep    \
    }
#define FORWARD(X, t, count)                                                                                          \
    KERNEL LAUNCH_BOUNDS(MOST_THREADS, 2)                                                                             \
        lora_down_forward_##count##_##t(X* input, FACTORS_PARAMETERS, STREAM_PARAMETERS, ROWS_PARAMETERS) {           \
        down_forward<X, count, false>(input, nullptr, nullptr, nullptr, 0, 0.f, FACTORS, STREAM, ROWS);               \
    }                                                                                                                 \
    EXPORT(lora_down_forward_##count##_##t)                                                                           \
    KERNEL LAUNCH_BOUNDS(MOST_THREADS, 2)                                                                             \
        rmsnorm_lora_forward_##count##_##t(X* input, float* inv_rms, const X* x, const X* w, u64 x_stride, float eps, \
                                           FACTORS_PARAMETERS, STREAM_PARAMETERS, ROWS_PARAMETERS) {                  \
        down_forward<X, count, true>(input, inv_rms, x, w, x_stride, eps, FACTORS, STREAM, ROWS);                     \
    }                                                                                                                 \
    EXPORT(rmsnorm_lora_forward_##count##_##t)
// Sums in shared memory, or in scratch memory where a block has too little of that.
#define BACKWARD(X, t, place, in_shared, blocks)                                                                      \
    KERNEL LAUNCH_BOUNDS(MOST_THREADS, blocks)                                                                        \
        lora_down_backward##place##_##t(X* d_input, float* partial, const X* input, FACTORS_PARAMETERS, u32 first,    \
                                        u32 count, u32 rows, STREAM_PARAMETERS, ROWS_PARAMETERS) {                    \
        down_backward<X, false, in_shared>(nullptr, d_input, partial, nullptr, input, nullptr, nullptr, 0, FACTORS,   \
                                           Part{first, count, rows}, STREAM, ROWS);                                   \
    }                                                                                                                 \
    EXPORT(lora_down_backward##place##_##t)                                                                           \
    KERNEL LAUNCH_BOUNDS(MOST_THREADS, blocks)                                                                        \
        rmsnorm_lora_backward##place##_##t(X* dx, X* d_input, float* partial, const X* x, const X* input,             \
                                           const float* inv_rms, const X* w, u64 x_stride, FACTORS_PARAMETERS,        \
                                           u32 first, u32 count, u32 rows, STREAM_PARAMETERS, ROWS_PARAMETERS) {      \
        down_backward<X, true, in_shared>(dx, d_input, partial, x, input, inv_rms, w, x_stride, FACTORS,              \
                                          Part{first, count, rows}, STREAM, ROWS);                                    \
    }                                                                                                                 \
    EXPORT(rmsnorm_lora_backward##place##_##t)
#define INSTANCES(X, t)                                                                                               \
    FORWARD(X, t, 1)                                                                                                  \
    FORWARD(X, t, 4)                                                                                                  \
    BACKWARD(X, t, , true, 2)                                                                                         \
    BACKWARD(X, t, _scratch, false, 1)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
