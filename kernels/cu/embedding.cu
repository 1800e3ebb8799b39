// Rows of a second table added to embeddings, and the gradient of a table (the first one is a gather, in elementwise.cu).
#include "common.cuh"

constexpr int THREADS = 128;

// x[i] += table[ids[i]]; a block per i.
template <class X> DEV void add(X* x, const X* table, const u32* ids, u32* fault, u32 dim, u32 limit) {
    u32 id = ids[blockIdx.x];
    if (!expect_below(fault, BAD_ID, id, limit)) return;
    const X* from = table + (u64)id * dim;
    X* to = x + (u64)blockIdx.x * dim;
    cover_block<WIDE<X>>(dim, aligned16(to) && aligned16(from), [&](auto count, u64 c) {
        constexpr int N = decltype(count)::value;
        float sums[N], values[N];
        load(sums, to + c);
        load(values, from + c);
#pragma unroll
        for (int j = 0; j < N; j++) sums[j] += values[j];
        store(to + c, sums);
    });
}

// d_table[ids[i]] += dx[i] in the order of i, without atomics: a block per i. The block of an id's
// first occurrence adds all its rows; the others have nothing to do.
template <class X> DEV void backward(float* d_table, const X* dx, const u32* ids, u32* fault, u32 rows, u32 dim, u32 vocab) {
    u32 first = blockIdx.x, id = ids[first];
    if (!expect_below(fault, BAD_ID, id, vocab)) return;
    SHARED(u32, earlier, THREADS / 32);
    u32 seen = 0;
    for (u32 i = threadIdx.x; i < first; i += THREADS) seen |= ids[i] == id;
    seen = __ballot_sync(ALL, seen != 0);
    if ((threadIdx.x & 31) == 0) earlier[threadIdx.x >> 5] = seen;
    __syncthreads();
    for (int warp = 0; warp < THREADS / 32; warp++) {
        if (earlier[warp]) return;
    }
    float* to = d_table + (u64)id * dim;
    for (u32 i = first; i < rows; i++) {
        if (ids[i] != id) continue;
        const X* from = dx + (u64)i * dim;
        cover_block<WIDE<X>>(dim, aligned16(to) && aligned16(from), [&](auto count, u64 c) {
            constexpr int N = decltype(count)::value;
            float sums[N], values[N];
            load(sums, to + c);
            load(values, from + c);
#pragma unroll
            for (int j = 0; j < N; j++) sums[j] += values[j];
            store(to + c, sums);
        });
    }
}

#define INSTANCES(X, t)                                                                                       \
    KERNEL LAUNCH_BOUNDS(THREADS) embedding_backward_##t(float* d_table, const X* dx, const u32* ids, u32* fault, \
                                                         u32 rows, u32 dim, u32 vocab) {                      \
        backward(d_table, dx, ids, fault, rows, dim, vocab);                                                  \
    }                                                                                                         \
    EXPORT(embedding_backward_##t)                                                                            \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                             \
        embedding_add_##t(X* x, const X* table, const u32* ids, u32* fault, u32 dim, u32 limit) {             \
        add(x, table, ids, fault, dim, limit);                                                                \
    }                                                                                                         \
    EXPORT(embedding_add_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
