// Softmax cross-entropy on rows of logits, the gradient in their place; argmax; rows put back.
// A block per row.
#include "common.cuh"

constexpr int THREADS = 512;

// loss = ln Σ e^z − z[target]; z becomes weight · (softmax(z) − onehot(target)) where `gradient`.
template <class X>
DEV void cross_entropy(float* loss, X* logits, const u32* targets, const float* weights, u32* fault, u32 vocab,
                       u32 gradient) {
    u32 target = targets[blockIdx.x];
    if (!expect_below(fault, BAD_TARGET, target, vocab)) return;
    X* z = logits + (u64)blockIdx.x * vocab;
    bool wide = aligned16(z);
    float z_target = widen(z[target]);
    // One pass for the largest and for the sum: a larger value scales down what was summed before.
    float largest = -infinity(), sum = 0.f;
    cover_block<WIDE<X>>(vocab, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float values[N];
        load(values, z + i);
        float top = values[0];
#pragma unroll
        for (int j = 1; j < N; j++) top = fmaxf(top, values[j]);
        if (top > largest) {
            sum *= exp_for<X>(largest - top);
            largest = top;
        }
#pragma unroll
        for (int j = 0; j < N; j++) sum += exp_for<X>(values[j] - largest);
    });
    float shift = block_max(largest);
    sum = block_sum(largest == -infinity() ? sum : sum * exp_for<X>(largest - shift));
    if (threadIdx.x == 0) loss[blockIdx.x] = shift + logf(sum) - z_target;
    if (!gradient) return;
    float weight = weights[blockIdx.x], scale = weight / sum;
    cover_block<WIDE<X>>(vocab, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float values[N];
        load(values, z + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            values[j] = scale * exp_for<X>(values[j] - shift) - (i + j == target ? weight : 0.f);
        }
        store(z + i, values);
    });
}

// Of two candidates the larger value, the smaller column among equals; NaN is no candidate.
struct Best { float value; u32 column; };
DEV Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.column < a.column) ? b : a;
}
DEV Best warp_best(Best best) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) {
        best = better(best, {__shfl_xor_sync(ALL, best.value, d), __shfl_xor_sync(ALL, best.column, d)});
    }
    return best;
}

template <class X> DEV void argmax(u32* ids, const X* logits, u32 cols) {
    SHARED(float, values, THREADS / 32);
    SHARED(u32, columns, THREADS / 32);
    const X* row = logits + (u64)blockIdx.x * cols;
    Best best{-infinity(), 0xffffffffu};
    cover_block<WIDE<X>>(cols, aligned16(row), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float z[N];
        load(z, row + i);
#pragma unroll
        for (int j = 0; j < N; j++) best = better(best, {z[j], (u32)i + j});
    });
    best = warp_best(best);
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    if (lane == 0) values[warp] = best.value, columns[warp] = best.column;
    __syncthreads();
    if (warp > 0) return;
    best = warp_best(lane < warps ? Best{values[lane], columns[lane]} : Best{-infinity(), 0xffffffffu});
    // A row of nothing but NaN has no largest value.
    if (lane == 0) ids[blockIdx.x] = best.column == 0xffffffffu ? 0 : best.column;
}

// out[rows[i]] = x[i].
template <class X> DEV void scatter_rows(X* out, const X* x, const u32* rows, u32* fault, u32 cols, u32 limit) {
    u32 row = rows[blockIdx.x];
    if (!expect_below(fault, BAD_ID, row, limit)) return;
    X* to = out + (u64)row * cols;
    const X* from = x + (u64)blockIdx.x * cols;
    cover_block<WIDE<X>>(cols, aligned16(to) && aligned16(from), [&](auto count, u64 i) {
        float values[decltype(count)::value];
        load(values, from + i);
        store(to + i, values);
    });
}

#define INSTANCES(X, t)                                                                                         \
    KERNEL LAUNCH_BOUNDS(THREADS) cross_entropy_##t(float* loss, X* logits, const u32* targets, const float* weights, \
                                                    u32* fault, u32 vocab, u32 gradient) {                      \
        cross_entropy(loss, logits, targets, weights, fault, vocab, gradient);                                  \
    }                                                                                                           \
    EXPORT(cross_entropy_##t)                                                                                   \
    KERNEL LAUNCH_BOUNDS(THREADS) argmax_##t(u32* ids, const X* logits, u32 cols) { argmax(ids, logits, cols); }  \
    EXPORT(argmax_##t)                                                                                          \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                               \
        scatter_rows_##t(X* out, const X* x, const u32* rows, u32* fault, u32 cols, u32 limit) {                 \
        scatter_rows(out, x, rows, fault, cols, limit);                                                         \
    }                                                                                                           \
    EXPORT(scatter_rows_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
