// Forward: a block has a few whole rows. It normalises them, writes them, and multiplies what it has in registers.
#pragma once
#include "lora_rows.cuh"

constexpr int FORWARD_THREADS = 64;
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
