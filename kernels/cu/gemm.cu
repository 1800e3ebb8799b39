// Matrix products of our own: C (=|+=) alpha · op(A) op(B) [+ bias] [+ residual], all row-major.
//
// bf16 goes through the tensor cores (mma.sync), tiles of A and B through shared memory by
// asynchronous copies, several stages ahead; f32 through plain arithmetic, for its precision.
// Every element of C is one sum over k in order, so its bits depend on its row of op(A) and its
// column of op(B) alone, whatever the tile.
#include "common.cuh"

// What becomes of a product.
template <class C> struct Epilogue {
    C* c;
    const C* start;  // added: the residual, or C itself; may be null
    const bf16* bias_bf16;
    const float* bias_f32;
    u64 c_stride, start_stride;
    u32 m, n;
    float alpha;

    // The product's part in an element of this column.
    DEV float scaled(float product, u32 column) const {
        float value = alpha * product;
        if (bias_bf16) value += widen(bias_bf16[column]);
        if (bias_f32) value += bias_f32[column];
        return value;
    }
    // Whether 16 bytes at a time can be read and written at every eighth column.
    DEV bool wide() const {
        bool old = !start || (aligned16(start) && start_stride % WIDE<C> == 0);
        return aligned16(c) && c_stride % WIDE<C> == 0 && old;
    }
    // N neighbours of a row, a multiple of 16 bytes; those beyond the matrix are left out.
    template <int N> DEV void put(u32 row, u32 column, const float (&products)[N], bool wide) const {
        if (row >= m) return;
        C* to = c + row * c_stride + column;
        if (wide && column + N <= n) {
            float values[N], old[N];
#pragma unroll
            for (int j = 0; j < N; j++) values[j] = scaled(products[j], column + j);
            if (start) {
                load(old, start + row * start_stride + column);
#pragma unroll
                for (int j = 0; j < N; j++) values[j] += old[j];
            }
            store(to, values);
            return;
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            if (column + j >= n) return;
            float value = scaled(products[j], column + j);
            if (start) value += widen(start[row * start_stride + column + j]);
            to[j] = narrow<C>(value);
        }
    }
};

// ---- bf16

constexpr int BK = 32;      // columns of op(A) per stage
constexpr int STAGES = 3;
constexpr int PAD = 8;      // keeps rows of a tile in different banks

// Copies a tile of ROWS×COLS from a matrix of `rows`×`cols` values into shared memory, zeros beyond its
// edges. Whole 16 bytes go asynchronously; what is misaligned or cut off goes element by element.
template <int ROWS, int COLS, int THREADS>
DEV void load_tile(bf16* tile, const bf16* from, u64 stride, u32 row0, u32 col0, u32 rows, u32 cols, bool wide) {
    constexpr int CHUNKS = COLS / 8, LD = COLS + PAD;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        int r = i / CHUNKS, c = i % CHUNKS * 8;
        u32 row = row0 + r, col = col0 + c;
        bf16* to = tile + r * LD + c;
        const bf16* src = from + row * stride + col;
        if (wide && row < rows && col + 8 <= cols) {
            cp_async16(to, src, true);
            continue;
        }
        u32 words[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 low = row < rows && col + 2 * j < cols ? src[2 * j].bits : 0;
            u32 high = row < rows && col + 2 * j + 1 < cols ? src[2 * j + 1].bits : 0;
            words[j] = low | high << 16;
        }
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// A block's tile of BM×BN, a warp's of WM×WN.
template <bool TRANS_A, bool TRANS_B, class C, int BM, int BN, int WM, int WN>
DEV void gemm_bf16(const bf16* a, const bf16* b, u64 a_stride, u64 b_stride, u32 k, const Epilogue<C>& out) {
    constexpr int THREADS = (BM / WM) * (BN / WN) * 32, MI = WM / 16, NI = WN / 8;
    constexpr int A_ROWS = TRANS_A ? BK : BM, A_COLS = TRANS_A ? BM : BK, A_LD = A_COLS + PAD;
    constexpr int B_ROWS = TRANS_B ? BN : BK, B_COLS = TRANS_B ? BK : BN, B_LD = B_COLS + PAD;
    DYNAMIC_SHARED(memory);
    bf16* a_tiles = reinterpret_cast<bf16*>(memory);
    bf16* b_tiles = a_tiles + STAGES * A_ROWS * A_LD;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int wm = warp / (BN / WN) * WM, wn = warp % (BN / WN) * WN;
    u32 m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
    bool a_wide = aligned16(a) && a_stride % 8 == 0, b_wide = aligned16(b) && b_stride % 8 == 0;
    auto load_stage = [&](int stage, u32 k0) {
        bf16* a_tile = a_tiles + stage * A_ROWS * A_LD;
        bf16* b_tile = b_tiles + stage * B_ROWS * B_LD;
        if constexpr (TRANS_A) {
            load_tile<A_ROWS, A_COLS, THREADS>(a_tile, a, a_stride, k0, m0, k, out.m, a_wide);
        } else {
            load_tile<A_ROWS, A_COLS, THREADS>(a_tile, a, a_stride, m0, k0, out.m, k, a_wide);
        }
        if constexpr (TRANS_B) {
            load_tile<B_ROWS, B_COLS, THREADS>(b_tile, b, b_stride, n0, k0, out.n, k, b_wide);
        } else {
            load_tile<B_ROWS, B_COLS, THREADS>(b_tile, b, b_stride, k0, n0, k, out.n, b_wide);
        }
    };
    float acc[MI][NI][4];
#pragma unroll
    for (int i = 0; i < MI; i++) {
#pragma unroll
        for (int j = 0; j < NI; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.f;
    }
    int steps = (k + BK - 1) / BK;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) load_stage(s, s * BK);
        cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // this step's tile is there for all, and nobody reads the one refilled next
        int next = step + STAGES - 1;
        if (next < steps) load_stage(next % STAGES, next * BK);
        cp_async_commit();
        const bf16* a_tile = a_tiles + step % STAGES * A_ROWS * A_LD;
        const bf16* b_tile = b_tiles + step % STAGES * B_ROWS * B_LD;
#pragma unroll
        for (int kk = 0; kk < BK; kk += 16) {
            u32 af[MI][4], bf[NI / 2][4];
            // Lanes 0–7, 8–15, … point at the rows of the four matrices: upper and lower half of m,
            // then the same for the second half of k.
#pragma unroll
            for (int i = 0; i < MI; i++) {
                int m = wm + i * 16;
                if constexpr (TRANS_A) {
                    int row = kk + (lane & 7) + (lane >> 4) * 8, col = m + (lane >> 3 & 1) * 8;
                    ldmatrix_x4_trans(af[i], a_tile + row * A_LD + col);
                } else {
                    ldmatrix_x4(af[i], a_tile + (m + (lane & 15)) * A_LD + kk + (lane >> 4) * 8);
                }
            }
            // Both halves of k, for two neighbouring tiles of n.
#pragma unroll
            for (int j = 0; j < NI / 2; j++) {
                int n = wn + j * 16;
                if constexpr (TRANS_B) {
                    int row = n + (lane & 7) + (lane >> 4) * 8, col = kk + (lane >> 3 & 1) * 8;
                    ldmatrix_x4(bf[j], b_tile + row * B_LD + col);
                } else {
                    ldmatrix_x4_trans(bf[j], b_tile + (kk + (lane & 15)) * B_LD + n + (lane >> 4) * 8);
                }
            }
#pragma unroll
            for (int i = 0; i < MI; i++) {
#pragma unroll
                for (int j = 0; j < NI; j++) mma_bf16(acc[i][j], af[i], bf[j / 2][j % 2 * 2], bf[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
    // A warp's rows go through a patch of shared memory of its own, 16 at a time, so that a thread has
    // eight neighbours of a row instead of pairs.
    constexpr int PATCH_LD = WN + 4, CHUNKS = WN / 8;
    cp_async_wait<0>();
    __syncthreads();  // nobody reads the tiles any more
    float* patch = reinterpret_cast<float*>(memory) + warp * 16 * PATCH_LD;
    int g = lane >> 2, q = (lane & 3) * 2;
    bool wide = out.wide();
#pragma unroll
    for (int i = 0; i < MI; i++) {
#pragma unroll
        for (int j = 0; j < NI; j++) {
            float* at = patch + g * PATCH_LD + j * 8 + q;
            at[0] = acc[i][j][0], at[1] = acc[i][j][1];
            at[8 * PATCH_LD] = acc[i][j][2], at[8 * PATCH_LD + 1] = acc[i][j][3];
        }
        __syncwarp();
#pragma unroll
        for (int part = lane; part < 16 * CHUNKS; part += 32) {
            int row = part / CHUNKS, column = part % CHUNKS * 8;
            float products[8];
            load(products, patch + row * PATCH_LD + column);
            out.put(m0 + wm + i * 16 + row, n0 + wn + column, products, wide);
        }
        __syncwarp();  // all have read what the next rows overwrite
    }
}

// ---- f32

constexpr int F_TILE = 64, F_K = 16, F_THREADS = 256, F_PAD = 4;

// Element (r, d) of a tile of 64×16, d along k, for a matrix stored with k along its rows or not.
template <bool K_IN_ROWS> DEV void f_place(int i, int& r, int& d) {
    r = K_IN_ROWS ? i / F_K : i % F_TILE;
    d = K_IN_ROWS ? i % F_K : i / F_TILE;
}
template <bool K_IN_ROWS>
DEV void f_fetch(float (&to)[4], const float* from, u64 stride, u32 r0, u32 k0, u32 rows, u32 k) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int r, d;
        f_place<K_IN_ROWS>(threadIdx.x + j * F_THREADS, r, d);
        u64 row = r0 + r, depth = k0 + d;
        bool there = row < rows && depth < k;
        to[j] = there ? from[K_IN_ROWS ? row * stride + depth : depth * stride + row] : 0.f;
    }
}
template <bool K_IN_ROWS> DEV void f_put(float* tile, const float (&from)[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int r, d;
        f_place<K_IN_ROWS>(threadIdx.x + j * F_THREADS, r, d);
        tile[d * (F_TILE + F_PAD) + r] = from[j];
    }
}

// A thread's 4×4 of a block's 64×64; the next tile is fetched into registers meanwhile.
template <bool TRANS_A, bool TRANS_B>
DEV void gemm_f32(const float* a, const float* b, u64 a_stride, u64 b_stride, u32 k, const Epilogue<float>& out) {
    SHARED(float, a_tile, F_K * (F_TILE + F_PAD));
    SHARED(float, b_tile, F_K * (F_TILE + F_PAD));
    u32 m0 = blockIdx.y * F_TILE, n0 = blockIdx.x * F_TILE;
    int ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;
    float acc[4][4] = {}, a_next[4], b_next[4];
    auto fetch = [&](u32 k0) {
        f_fetch<!TRANS_A>(a_next, a, a_stride, m0, k0, out.m, k);
        f_fetch<TRANS_B>(b_next, b, b_stride, n0, k0, out.n, k);
    };
    fetch(0);
    for (u32 k0 = 0; k0 < k; k0 += F_K) {
        f_put<!TRANS_A>(a_tile, a_next);
        f_put<TRANS_B>(b_tile, b_next);
        __syncthreads();
        if (k0 + F_K < k) fetch(k0 + F_K);
#pragma unroll
        for (int d = 0; d < F_K; d++) {
            float as[4], bs[4];
            load(as, a_tile + d * (F_TILE + F_PAD) + ty);
            load(bs, b_tile + d * (F_TILE + F_PAD) + tx);
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(as[i], bs[j], acc[i][j]);
            }
        }
        __syncthreads();  // all have read the tiles that are refilled next
    }
    bool wide = out.wide();
#pragma unroll
    for (int i = 0; i < 4; i++) out.put(m0 + ty + i, n0 + tx, acc[i], wide);
}

// ---- entry points: gemm_{how A and B are stored: n or t}_{tile}_{types}

#define PARAMETERS(C, X)                                                                                              \
    C *c, const X *a, const X *b, const X *bias, const C *start, u64 a_stride, u64 b_stride, u64 c_stride,            \
        u64 start_stride, u32 m, u32 n, u32 k, float alpha

#define BF16_INSTANCE(how, TA, TB, tile, BM, BN, WM, WN, C, t)                                                        \
    KERNEL LAUNCH_BOUNDS((BM / WM) * (BN / WN) * 32) gemm_##how##_##tile##_##t(PARAMETERS(C, bf16)) {                  \
        gemm_bf16<TA, TB, C, BM, BN, WM, WN>(a, b, a_stride, b_stride, k,                                             \
                                             {c, start, bias, nullptr, c_stride, start_stride, m, n, alpha});         \
    }                                                                                                                 \
    EXPORT(gemm_##how##_##tile##_##t)
#define INSTANCES(how, TA, TB)                                              \
    BF16_INSTANCE(how, TA, TB, 128, 128, 128, 64, 32, bf16, bf16)            \
    BF16_INSTANCE(how, TA, TB, 128, 128, 128, 64, 32, float, bf16_f32)       \
    BF16_INSTANCE(how, TA, TB, 64, 64, 64, 32, 32, bf16, bf16)               \
    BF16_INSTANCE(how, TA, TB, 64, 64, 64, 32, 32, float, bf16_f32)          \
    KERNEL LAUNCH_BOUNDS(F_THREADS) gemm_##how##_64_f32(PARAMETERS(float, float)) {                                    \
        gemm_f32<TA, TB>(a, b, a_stride, b_stride, k,                                                                 \
                         {c, start, nullptr, bias, c_stride, start_stride, m, n, alpha});                             \
    }                                                                                                                 \
    EXPORT(gemm_##how##_64_f32)
INSTANCES(nn, false, false)
INSTANCES(nt, false, true)
INSTANCES(tn, true, false)
INSTANCES(tt, true, true)
