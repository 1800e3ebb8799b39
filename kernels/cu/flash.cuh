// Tiles of attention through the tensor cores: how they come into shared memory, are multiplied, and leave.
#pragma once
#include "common.cuh"

constexpr int THREADS = 128, FORWARD_ROWS = 128, PAD = 8;
// Rows of a tile that comes in.
constexpr int STEP = 64;

template <int D> constexpr int LD = D + PAD;

// Where a head's part of the rows of a segment lies.
struct Rows {
    const bf16* memory;
    u64 stride;
    u32 start, column;
};
// Copies rows first … first + N of a segment of `len` into shared memory, zeros beyond its end.
template <int N, int D> DEV void load_rows(bf16* tile, const Rows& from, u32 first, u32 len) {
    constexpr int CHUNKS = D / 8, AT_A_TIME = THREADS / CHUNKS;
    u32 r = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS * 8;
    const bf16* source = from.memory + (from.start + first + r) * from.stride + from.column + c;
    bf16* to = tile + r * LD<D> + c;
    int left = len - first - r;
#pragma unroll 4
    for (int i = 0; i < N; i += AT_A_TIME) {
        cp_async16(to, source, i < left);
        to += AT_A_TIME * LD<D>, source += AT_A_TIME * from.stride;
    }
}

// Where a lane finds its row of fragments at the beginning of a tile; other fragments are a constant further.
// Operand A, 16×16; also operand B of two neighbouring tiles of 8 where the tile's rows are the summed dimension.
template <int D> DEV const bf16* lane_of_a(const bf16* tile) {
    int lane = threadIdx.x & 31;
    return tile + (lane & 15) * LD<D> + (lane >> 4) * 8;
}
// Operand B of two neighbouring tiles of 8 where the tile's rows are its columns.
template <int D> DEV const bf16* lane_of_b(const bf16* tile) {
    int lane = threadIdx.x & 31;
    return tile + ((lane & 7) + (lane >> 4) * 8) * LD<D> + (lane >> 3 & 1) * 8;
}

// Which quarter of a block's rows a warp has. On the diagonal the first and the last have different amounts to
// do; as each of a multiprocessor's four schedulers has one warp of every block, the order turns around in every
// second block.
DEV int quarter() { return threadIdx.x >> 5 ^ (__popc(blockIdx.x) & 1 ? 3 : 0); }

template <int M, int N> DEV void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < N; i++) acc[m][i][0] = acc[m][i][1] = acc[m][i][2] = acc[m][i][3] = 0.f;
    }
}

// scores[16·M × 8·N] = (16·M rows of a) · (8·N rows of b)ᵀ, over D columns.
template <int D, int M, int N> DEV void product_nt(float (&scores)[M][N][4], const bf16* a, const bf16* b) {
    const bf16 *lane_a = lane_of_a<D>(a), *lane_b = lane_of_b<D>(b);
    clear(scores);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        u32 af[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(af[m], lane_a + m * 16 * LD<D> + d);
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            u32 bf[4];
            ldmatrix_x4(bf, lane_b + j * 16 * LD<D> + d);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(scores[m][2 * j], af[m], bf[0], bf[1]);
                mma_bf16(scores[m][2 * j + 1], af[m], bf[2], bf[3]);
            }
        }
    }
}

// Weights as operand A: from two neighbouring tiles of accumulators, 8 columns each.
template <int M, int N> DEV void pack(u32 (&packed)[M][N / 2][4], const float (&weights)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int k = 0; k < N / 2; k++) {
            const float(&lo)[4] = weights[m][2 * k], (&hi)[4] = weights[m][2 * k + 1];
            packed[m][k][0] = pack_bf16(lo[0], lo[1]), packed[m][k][1] = pack_bf16(lo[2], lo[3]);
            packed[m][k][2] = pack_bf16(hi[0], hi[1]), packed[m][k][3] = pack_bf16(hi[2], hi[3]);
        }
    }
}

// acc[16·M × D] += weights[16·M × 16·K] · (16·K rows of b).
template <int D, int M, int K>
DEV void product_nn(float (&acc)[M][D / 8][4], const u32 (&weights)[M][K][4], const bf16* b) {
    const bf16* lane_b = lane_of_a<D>(b);
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            u32 bf[4];
            ldmatrix_x4_trans(bf, lane_b + k * 16 * LD<D> + j * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(acc[m][2 * j], weights[m][k], bf[0], bf[1]);
                mma_bf16(acc[m][2 * j + 1], weights[m][k], bf[2], bf[3]);
            }
        }
    }
}

DEV float quad_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}
DEV float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

constexpr float MASKED = -1e30f;

// Masks keys behind a thread's queries; `edge` is how far its first query is behind its first key.
template <int M, int N> DEV void mask(float (&scores)[M][N][4], int edge) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int key = j * 8 + (c & 1), query = m * 16 + (c >> 1) * 8;
                if (key > query + edge) scores[m][j][c] = MASKED;
            }
        }
    }
}

// Of a warp's 16·M rows: the largest score so far, before it is scaled, and the sum of what is left of it.
template <int M> struct Softmax {
    float largest[M][2], total[M][2];
    DEV void begin() {
#pragma unroll
        for (int m = 0; m < M; m++) {
            largest[m][0] = largest[m][1] = MASKED;
            total[m][0] = total[m][1] = 0.f;
        }
    }
};

// Makes exp2(scale2 · (score − largest)) of raw scores; what was summed before shrinks as the largest grows.
template <int M, int N, int D8>
DEV void softmax_step(float (&scores)[M][N][4], float (&acc)[M][D8][4], Softmax<M>& so_far, float scale2) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = so_far.largest[m][h];
#pragma unroll
            for (int j = 0; j < N; j++) top = fmaxf(top, fmaxf(scores[m][j][2 * h], scores[m][j][2 * h + 1]));
            top = quad_max(top);
            float shrink = exp2_fast((so_far.largest[m][h] - top) * scale2), shift = top * scale2, sum = 0.f;
            so_far.largest[m][h] = top;
#pragma unroll
            for (int j = 0; j < D8; j++) acc[m][j][2 * h] *= shrink, acc[m][j][2 * h + 1] *= shrink;
#pragma unroll
            for (int j = 0; j < N; j++) {
#pragma unroll
                for (int c = 2 * h; c < 2 * h + 2; c++) {
                    scores[m][j][c] = exp2_fast(fmaf(scores[m][j][c], scale2, -shift));
                    sum += scores[m][j][c];
                }
            }
            so_far.total[m][h] = fmaf(so_far.total[m][h], shrink, sum);
        }
    }
}

// What gradients are computed from.
struct BackwardInputs {
    const float* delta;
    const bf16* d_o;
    const float* lse;
    const bf16* qkv;
    const u32* offsets;
};

// A warp's 16 rows of an accumulator, to rows first… that are below len; times a factor per half. They go
// through 16 rows of shared memory, so that 16 bytes at a time are written.
template <int D>
DEV void put_rows(bf16* to, u64 stride, u32 first, u32 len, const float (&acc)[D / 8][4], float upper, float lower,
                  bf16* room) {
    int lane = threadIdx.x & 31;
    bf16* mine = room + (lane >> 2) * LD<D> + (lane & 3) * 2;
    __syncwarp();  // no lane reads what was there before
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        *reinterpret_cast<u32*>(mine + j * 8) = pack_bf16(acc[j][0] * upper, acc[j][1] * upper);
        *reinterpret_cast<u32*>(mine + 8 * LD<D> + j * 8) = pack_bf16(acc[j][2] * lower, acc[j][3] * lower);
    }
    __syncwarp();
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < 16; i += 32 / CHUNKS) {
        u32 r = i + lane / CHUNKS, c = lane % CHUNKS * 8;
        if (first + r >= len) continue;
        const uint4* from = reinterpret_cast<const uint4*>(room + r * LD<D> + c);
        *reinterpret_cast<uint4*>(to + (first + r) * stride + c) = *from;
    }
}
