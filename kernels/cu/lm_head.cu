// Softmax cross-entropy on rows of logits, the gradient in their place; argmax; rows put back.
// A block per row.
#include "common.cuh"

constexpr int THREADS = 512;
constexpr int LOSS_THREADS = 1024;
constexpr int BATCH = 4;  // 16-byte loads of a thread that are on their way at once

// e^(x − shift), as `exp_for`.
template <class X> DEV float exp_minus(float x, float shift) {
    if constexpr (sizeof(X) == 4) return expf(x - shift);
    return exp2_fast(fmaf(x, LOG2_E, shift * -LOG2_E));
}

// The largest of the values so far, and Σ e^(value − largest): a larger value scales down what was summed before.
template <class X> struct Running {
    float largest, sum;
    template <int N> DEV void add(const float (&values)[N]) {
        float top = values[0];
#pragma unroll
        for (int j = 1; j < N; j++) top = fmaxf(top, values[j]);
        if (top > largest) {
            sum *= exp_for<X>(largest - top);
            largest = top;
        }
#pragma unroll
        for (int j = 0; j < N; j++) sum += exp_minus<X>(values[j], largest);
    }
};

// Calls f(Count<n>, chunk) for the thread's share of `first … end`, n chunks `blockDim.x` apart at a time.
template <class F> DEV void batches(u32 first, u32 end, F f) {
    u32 c = first + threadIdx.x;
    for (; c + (BATCH - 1) * blockDim.x < end; c += BATCH * blockDim.x) f(Count<BATCH>{}, c);
    for (; c < end; c += blockDim.x) f(Count<1>{}, c);
}

// loss = ln Σ e^z − z[target]; z becomes weight · (softmax(z) − onehot(target)) where `gradient`.
//
// A row is read once for the largest and the sum, and once more for the gradient. The first `kept` of its 16-byte
// chunks stay in shared memory in between, each with its thread; with one block on a processor the L2 still has
// the rest. So memory sees each row once in each direction.
template <class X>
DEV void cross_entropy(float* loss, X* logits, const u32* targets, const float* weights, u32* fault, u32 vocab,
                       u32 kept, u32 gradient) {
    constexpr int N = WIDE<X>;
    DYNAMIC_SHARED(memory);
    uint4* kept_chunks = reinterpret_cast<uint4*>(memory);
    u32 target = targets[blockIdx.x];
    if (!expect_below(fault, BAD_TARGET, target, vocab)) return;
    X* z = logits + (u64)blockIdx.x * vocab;
    uint4* z_chunks = reinterpret_cast<uint4*>(z);
    u32 chunks = aligned16(z) ? vocab / N : 0;
    kept = min(kept, chunks);
    float z_target = widen(z[target]);
    Running<X> running{-infinity(), 0.f};
    batches(0, chunks, [&](auto batch, u32 c) {
        constexpr int LOADS = decltype(batch)::value;
        uint4 raw[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) raw[i] = z_chunks[c + i * blockDim.x];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            if (c + i * blockDim.x < kept) kept_chunks[c + i * blockDim.x] = raw[i];
            float values[N];
            unpack(values, raw[i], X{});
            running.add(values);
        }
    });
    for (u32 i = chunks * N + threadIdx.x; i < vocab; i += blockDim.x) {
        float value[1] = {widen(z[i])};
        running.add(value);
    }
    float shift = block_max(running.largest), sum = running.sum;
    sum = block_sum(running.largest == -infinity() ? sum : sum * exp_for<X>(running.largest - shift));
    if (threadIdx.x == 0) loss[blockIdx.x] = shift + logf(sum) - z_target;
    if (!gradient) return;
    float weight = weights[blockIdx.x], scale = weight / sum;
    auto change = [&](uint4 raw, u32 c) {
        float values[N];
        unpack(values, raw, X{});
#pragma unroll
        for (int j = 0; j < N; j++) values[j] = scale * exp_minus<X>(values[j], shift);
        if (c == target / N) {
#pragma unroll
            for (int j = 0; j < N; j++) values[j] -= j == target % N ? weight : 0.f;
        }
        store(z + (u64)c * N, values);
    };
    // What was read last is the likeliest to be in the L2 still.
    batches(kept, chunks, [&](auto batch, u32 c) {
        constexpr int LOADS = decltype(batch)::value;
        uint4 raw[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) raw[i] = z_chunks[c + i * blockDim.x];
#pragma unroll
        for (int i = 0; i < LOADS; i++) change(raw[i], c + i * blockDim.x);
    });
    for (u32 c = threadIdx.x; c < kept; c += blockDim.x) change(kept_chunks[c], c);
    for (u32 i = chunks * N + threadIdx.x; i < vocab; i += blockDim.x) {
        z[i] = narrow<X>(scale * exp_minus<X>(widen(z[i]), shift) - (i == target ? weight : 0.f));
    }
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
    KERNEL LAUNCH_BOUNDS(LOSS_THREADS)                                                                          \
        cross_entropy_##t(float* loss, X* logits, const u32* targets, const float* weights, u32* fault, u32 vocab, \
                          u32 kept, u32 gradient) {                                                             \
        cross_entropy(loss, logits, targets, weights, fault, vocab, kept, gradient);                            \
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
