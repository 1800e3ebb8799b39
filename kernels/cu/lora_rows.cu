// The products of adapted layers with A, fused with the norm before them: s = drop(x) Aᵀ on the way
// forward, and its backward with dA.
//
// Forward, a block has a few whole rows: it normalises them, writes them, and multiplies what it has
// in registers. Backward, a block has the tokens of a tile of one segment: it adds (ds A) to the
// rows' gradients, takes them through the norm, and sums dA over its tokens in shared memory; tiles
// are added up in order afterwards (`lora_gradient_rows`). A mask is drawn once for both.
#include "lora.cuh"

constexpr int MAX_THREADS = 256;
constexpr int TILE = 32;       // tokens of a tile of the backward kernels
constexpr int TILE_ROWS = 4;   // of which so many are in registers at a time

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

// ---- forward

constexpr int FORWARD_THREADS = 64;
constexpr int PAIR = 2;   // targets that a pass over the rows takes
constexpr int RANKS = 4;  // ranks of each

// values = values as X holds them, and p = values.
template <int N> DEV void store_rounded(float* p, float (&values)[N]) { store(p, values); }
template <int N> DEV void store_rounded(bf16* p, float (&values)[N]) {
    if constexpr (N == 1) {
        *p = narrow<bf16>(values[0]);
        values[0] = widen(*p);
    } else {
        u32 pairs[N / 2];
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            pairs[j] = pack_bf16(values[2 * j], values[2 * j + 1]);
            values[2 * j] = unpack_first(pairs[j]);
            values[2 * j + 1] = unpack_second(pairs[j]);
        }
#pragma unroll
        for (int i = 0; i < N / 8; i++) {
            reinterpret_cast<uint4*>(p)[i] = make_uint4(pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]);
        }
    }
}

// A row before the norm.
template <class X> struct Norm {
    const X *x, *w;
    u64 x_stride;
    float eps;
    float* inv_rms;
};

// 1 / rms of COUNT rows from `token`; a warp's.
template <class X, int COUNT> DEV void inverse_rms(float (&inv)[COUNT], const Norm<X>& norm, u32 token, u32 cols, bool wide) {
    u32 lane = threadIdx.x & 31;
    const X* x = norm.x + token * norm.x_stride;
    constexpr int N = WIDE<X>, BATCH = 4;  // so many loads of every row are on their way at once
    float squares[COUNT] = {};
    auto add = [&](auto batch, auto count, u32 c) {
        constexpr int LOADS = decltype(batch)::value, EACH = decltype(count)::value;
        float xs[LOADS][COUNT][EACH];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
#pragma unroll
            for (int r = 0; r < COUNT; r++) load(xs[i][r], x + r * norm.x_stride + c + i * 32 * EACH);
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
#pragma unroll
            for (int r = 0; r < COUNT; r++) {
#pragma unroll
                for (int j = 0; j < EACH; j++) squares[r] = fmaf(xs[i][r][j], xs[i][r][j], squares[r]);
            }
        }
    };
    u32 body = wide ? cols / N * N : 0, c = lane * N;
    for (; c + (BATCH - 1) * 32 * N < body; c += BATCH * 32 * N) add(Count<BATCH>{}, Count<N>{}, c);
    for (; c < body; c += 32 * N) add(Count<1>{}, Count<N>{}, c);
    for (c = body + lane; c < cols; c += 32) add(Count<1>{}, Count<1>{}, c);
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
        inv[r] = 1.f / sqrtf(warp_sum(squares[r]) / cols + norm.eps);
        if (lane == 0) norm.inv_rms[token + r] = inv[r];
    }
}

// COUNT rows of one segment from `token`, by a warp.
template <class X, bool NORM, int COUNT>
DEV void forward_rows(X* input, const Norm<X>& norm, const Factors& f, const Rows& to, const Segment& segment,
                      u64 adapter, u64 key, u32 token, bool wide) {
    u32 lane = threadIdx.x & 31, in_dim = to.in_dim, units = f.units(), position = token - segment.start;
    const X* x = norm.x + token * norm.x_stride;
    X* rows = input + token * to.stride;
    float inv[COUNT];
    if constexpr (NORM) inverse_rms(inv, norm, token, in_dim, wide);
    for (u32 target = 0; target < f.targets; target += PAIR) {
        MaskRow mask[COUNT][PAIR];
#pragma unroll
        for (int r = 0; r < COUNT; r++) {
#pragma unroll
            for (int n = 0; n < PAIR; n++) mask[r][n] = MaskRow::of(key, position + r, f.site[target + n]);
        }
        for (u32 first = 0; first < f.rank; first += RANKS) {
            float sums[COUNT][PAIR][RANKS] = {};
            cover<WIDE<X>>(in_dim, wide, lane, 32, [&](auto count, u64 c) {
                constexpr int N = decltype(count)::value;
                float xs[COUNT][N], ws[N];
                bool norming = NORM && target == 0 && first == 0;
                if (norming) load(ws, norm.w + c);
#pragma unroll
                for (int r = 0; r < COUNT; r++) {
                    if (norming) {
                        // The second reading of the row comes from the cache. Everyone multiplies what is stored.
                        load(xs[r], x + r * norm.x_stride + c);
#pragma unroll
                        for (int j = 0; j < N; j++) xs[r][j] *= inv[r] * ws[j];
                        store_rounded(rows + r * to.stride + c, xs[r]);
                    } else {
                        load(xs[r], rows + r * to.stride + c);
                    }
                }
#pragma unroll
                for (int n = 0; n < PAIR; n++) {
                    if (target + n >= f.targets) continue;
                    // The first ranks of A are on their way while the masks are drawn.
                    constexpr int AHEAD = 2;
                    const float* a = f.row(adapter, target + n, first, in_dim) + c;
                    float ahead[AHEAD][N], kept[COUNT][N];
#pragma unroll
                    for (int i = 0; i < AHEAD; i++) {
                        if (first + i < f.rank) load(ahead[i], a + (u64)i * in_dim);
                    }
#pragma unroll
                    for (int r = 0; r < COUNT; r++) mask[r][n].keep(kept[r], xs[r], (u32)c, f.threshold);
#pragma unroll
                    for (int i = 0; i < RANKS; i++) {
                        if (first + i >= f.rank) continue;
                        float as[N];
                        if (i < AHEAD) {
#pragma unroll
                            for (int j = 0; j < N; j++) as[j] = ahead[i < AHEAD ? i : 0][j];
                        } else {
                            load(as, a + (u64)i * in_dim);
                        }
#pragma unroll
                        for (int r = 0; r < COUNT; r++) {
#pragma unroll
                            for (int j = 0; j < N; j++) sums[r][n][i] = fmaf(kept[r][j], as[j], sums[r][n][i]);
                        }
                    }
                }
            });
#pragma unroll
            for (int r = 0; r < COUNT; r++) {
                float mine = 0.f;
#pragma unroll
                for (int n = 0; n < PAIR; n++) {
#pragma unroll
                    for (int i = 0; i < RANKS; i++) {
                        if (target + n >= f.targets || first + i >= f.rank) continue;
                        float sum = warp_sum(sums[r][n][i]);
                        if (lane == n * RANKS + i) mine = sum;
                    }
                }
                u32 n = lane / RANKS, i = lane % RANKS;
                if (n < PAIR && target + n < f.targets && first + i < f.rank) {
                    u64 at = r * to.stride + in_dim + adapter * to.step + (target + n) * f.rank + first + i;
                    rows[at] = narrow<X>(f.scale * f.keep * mine);
                }
            }
        }
    }
    u32 own = (u32)adapter * to.step;
    for (u32 column = lane; column < to.width; column += 32) {
        if (column >= own && column < own + units) continue;
#pragma unroll
        for (int r = 0; r < COUNT; r++) rows[r * to.stride + in_dim + column] = narrow<X>(0.f);
    }
}

// Rows of `input`, s of them, and with NORM before that: rows = x w / rms(x). A warp takes
// `rows_per_warp` rows, those of one segment two at a time.
template <class X, bool NORM>
DEV void down_forward(X* input, const Norm<X>& norm, const Factors& f, const Stream& stream, const Rows& to,
                      u32 rows_per_warp) {
    constexpr int WIDTH = WIDE<X>;
    bool wide = f.aligned(to.in_dim) && aligned16(input) && to.stride % WIDTH == 0;
    if (NORM) wide = wide && aligned16(norm.x) && aligned16(norm.w) && norm.x_stride % WIDTH == 0;
    u32 warp = blockIdx.x * (FORWARD_THREADS / 32) + (threadIdx.x >> 5);
    u32 token = warp * rows_per_warp, end = min(token + rows_per_warp, stream.tokens);
    while (token < end) {
        Segment segment;
        u64 adapter;
        if (!stream.find(token, segment, adapter)) return;
        u64 key = f.threshold ? stream.keys[segment.index] : 0;
        if (token + 1 < min(end, segment.start + segment.len)) {
            forward_rows<X, NORM, 2>(input, norm, f, to, segment, adapter, key, token, wide);
            token += 2;
        } else {
            forward_rows<X, NORM, 1>(input, norm, f, to, segment, adapter, key, token, wide);
            token += 1;
        }
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

// ---- backward of up to two targets of rank 1 or 2, with the norm

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

// ---- entry points; in the forward ones with the number of rows of a block

#define FACTORS_PARAMETERS                                                                                      \
    const float *adapters, u64 adapter_stride, PER_TARGET_PARAMETERS(u64, a), PER_TARGET_PARAMETERS(u32, site), \
        u32 targets, u32 rank, float scale, u32 threshold, float keep
#define FACTORS                                                                                                       \
    Factors {                                                                                                         \
        adapters, adapter_stride, PER_TARGET(u64, a), PER_TARGET(u32, site), targets, rank, scale, threshold, keep    \
    }
#define FORWARD(X, t)                                                                                                 \
    KERNEL LAUNCH_BOUNDS(FORWARD_THREADS, 8)                                                                          \
        lora_down_forward_##t(X* input, FACTORS_PARAMETERS, STREAM_PARAMETERS, ROWS_PARAMETERS, u32 rows_per_warp) {  \
        down_forward<X, false>(input, Norm<X>{}, FACTORS, STREAM, ROWS, rows_per_warp);                               \
    }                                                                                                                 \
    EXPORT(lora_down_forward_##t)                                                                                     \
    KERNEL LAUNCH_BOUNDS(FORWARD_THREADS, 8)                                                                          \
        rmsnorm_lora_forward_##t(X* input, float* inv_rms, const X* x, const X* w, u64 x_stride, float eps,           \
                                 FACTORS_PARAMETERS, STREAM_PARAMETERS, ROWS_PARAMETERS, u32 rows_per_warp) {         \
        down_forward<X, true>(input, Norm<X>{x, w, x_stride, eps, inv_rms}, FACTORS, STREAM, ROWS, rows_per_warp);    \
    }                                                                                                                 \
    EXPORT(rmsnorm_lora_forward_##t)
// Sums in shared memory, or in scratch memory where a block has too little of that.
#define BACKWARD(X, t, place, in_shared, blocks)                                                                      \
    KERNEL LAUNCH_BOUNDS(MAX_THREADS, blocks)                                                                        \
        lora_down_backward##place##_##t(X* d_input, float* partial, const X* input, FACTORS_PARAMETERS, u32 first,    \
                                        u32 count, u32 rows, STREAM_PARAMETERS, ROWS_PARAMETERS) {                    \
        down_backward<X, false, in_shared>(nullptr, d_input, partial, nullptr, input, nullptr, nullptr, 0, FACTORS,   \
                                           Part{first, count, rows}, STREAM, ROWS);                                   \
    }                                                                                                                 \
    EXPORT(lora_down_backward##place##_##t)                                                                           \
    KERNEL LAUNCH_BOUNDS(MAX_THREADS, blocks)                                                                        \
        rmsnorm_lora_backward##place##_##t(X* dx, X* d_input, float* partial, const X* x, const X* input,             \
                                           const float* inv_rms, const X* w, u64 x_stride, FACTORS_PARAMETERS,        \
                                           u32 first, u32 count, u32 rows, STREAM_PARAMETERS, ROWS_PARAMETERS) {      \
        down_backward<X, true, in_shared>(dx, d_input, partial, x, input, inv_rms, w, x_stride, FACTORS,              \
                                          Part{first, count, rows}, STREAM, ROWS);                                    \
    }                                                                                                                 \
    EXPORT(rmsnorm_lora_backward##place##_##t)
#define PAIR_BACKWARD(X, t)                                                                                           \
    KERNEL LAUNCH_BOUNDS(PAIR_THREADS)                                                                                \
        rmsnorm_lora_backward_pair_##t(X* dx, const X* d_input, float* partial, const X* x, const X* input,           \
                                       const float* inv_rms, const X* w, u32 x_stride, u32 stages,                    \
                                       FACTORS_PARAMETERS, STREAM_PARAMETERS, ROWS_PARAMETERS) {                      \
        pair_backward(dx, d_input, partial, x, input, inv_rms, w, x_stride, stages, FACTORS, STREAM, ROWS);           \
    }                                                                                                                 \
    EXPORT(rmsnorm_lora_backward_pair_##t)
#define INSTANCES(X, t)                                                                                               \
    FORWARD(X, t)                                                                                                     \
    PAIR_BACKWARD(X, t)                                                                                                   \
    BACKWARD(X, t, , true, 2)                                                                                         \
    BACKWARD(X, t, _scratch, false, 1)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
