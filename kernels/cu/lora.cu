// The rank-r products of adapted layers, one target at a time.
//
// An adapter input has rows of `stride` elements: x, then s. Products with a row per token have a
// block per token. Sums over tokens are taken in two passes without atomics: over the tokens of
// each segment into scratch memory, then over segments in order into their gradient rows. So a
// gradient row's bits do not depend on what else is in the stream.
#include "packed.cuh"

constexpr int THREADS = 128;
constexpr int RANKS = 8;  // sums that a thread keeps at a time

// Where the tokens and adapters of a stream are.
struct Stream {
    const u32* offsets;
    const u32* adapter;
    const u64* keys;
    u32* fault;
    u32 segments, tokens, adapters;

    // The segment of a token, and the row of its adapter.
    DEV bool find(u32 token, Segment& segment, u64& row) const {
        segment = segment_of(token, offsets, segments, tokens, fault);
        if (!segment.found) return false;
        row = adapter[segment.index];
        return expect_below(fault, BAD_SEGMENT, row, adapters);
    }
};

// The sums over the block of N values of every thread; in thread 0 … N − 1 the one of its number.
template <int N> DEV float block_sums(const float (&values)[N]) {
    SHARED(float, block_sums_part, N * (THREADS / 32));
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float sum = warp_sum(values[i]);
        if (lane == 0) block_sums_part[i * (THREADS / 32) + warp] = sum;
    }
    __syncthreads();
    float sum = 0.f;
    if (threadIdx.x < N) {
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) sum += block_sums_part[threadIdx.x * (THREADS / 32) + w];
    }
    __syncthreads();  // the next call writes to the same array
    return sum;
}

// s[t, i] = scale · drop(x[t]) · A[i]; A is [rank, in_dim] at `a_offset` of the adapter's row.
template <class X>
DEV void down_forward(X* input, const float* adapters, const Stream& stream, u64 adapter_stride, u64 a_offset,
                      u64 row_stride, u32 in_dim, u32 rank, u32 column, float scale, u32 site, u32 threshold,
                      float keep) {
    Segment segment;
    u64 adapter;
    if (!stream.find(blockIdx.x, segment, adapter)) return;
    X* x = input + blockIdx.x * row_stride;
    const float* a = adapters + adapter * adapter_stride + a_offset;
    bool wide = aligned16(x) && aligned16(a) && in_dim % 4 == 0;
    Mask mask{threshold ? stream.keys[segment.index] : 0, site, threshold, keep};
    for (u32 first = 0; first < rank; first += RANKS) {
        float sums[RANKS] = {};
        cover_block<WIDE<X>>(in_dim, wide, [&](auto count, u64 c) {
            constexpr int N = decltype(count)::value;
            float xs[N], as[N];
            load(xs, x + c);
            if (threshold) {
                mask.factors_at(as, blockIdx.x - segment.start, (u32)c);
#pragma unroll
                for (int j = 0; j < N; j++) xs[j] *= as[j];
            }
#pragma unroll
            for (int i = 0; i < RANKS; i++) {
                if (first + i >= rank) continue;
                load(as, a + (u64)(first + i) * in_dim + c);
#pragma unroll
                for (int j = 0; j < N; j++) sums[i] = fmaf(xs[j], as[j], sums[i]);
            }
        });
        float sum = block_sums(sums);
        if (threadIdx.x < RANKS && first + threadIdx.x < rank) {
            x[in_dim + column + first + threadIdx.x] = narrow<X>(scale * sum);
        }
    }
}

// y[t, o] += s[t] · B[o]; B is [out_len, rank] at `b_offset`. y begins at the target's first column.
template <class X>
DEV void up_forward(X* y, const X* input, const float* adapters, const Stream& stream, u64 adapter_stride,
                    u64 b_offset, u64 row_stride, u32 in_dim, u32 out_dim, u32 out_len, u32 rank, u32 column) {
    Segment segment;
    u64 adapter;
    if (!stream.find(blockIdx.x, segment, adapter)) return;
    const X* s = input + blockIdx.x * row_stride + in_dim + column;
    const float* b = adapters + adapter * adapter_stride + b_offset;
    y += (u64)blockIdx.x * out_dim;
    cover_block<WIDE<X>>(out_len, aligned16(y), [&](auto count, u64 o) {
        constexpr int N = decltype(count)::value;
        float values[N];
        load(values, y + o);
        for (u32 i = 0; i < rank; i++) {
            float factor = widen(s[i]);
#pragma unroll
            for (int j = 0; j < N; j++) values[j] = fmaf(factor, b[(o + j) * rank + i], values[j]);
        }
        store(y + o, values);
    });
}

// ds[t, i] = dy[t] · B[·, i]. dy begins at the target's first column.
template <class X>
DEV void up_backward(X* d_input, const X* dy, const float* adapters, const Stream& stream, u64 adapter_stride,
                     u64 b_offset, u64 row_stride, u32 in_dim, u32 out_dim, u32 out_len, u32 rank, u32 column) {
    Segment segment;
    u64 adapter;
    if (!stream.find(blockIdx.x, segment, adapter)) return;
    X* ds = d_input + blockIdx.x * row_stride + in_dim + column;
    const float* b = adapters + adapter * adapter_stride + b_offset;
    dy += (u64)blockIdx.x * out_dim;
    for (u32 first = 0; first < rank; first += RANKS) {
        float sums[RANKS] = {};
        cover_block<WIDE<X>>(out_len, aligned16(dy), [&](auto count, u64 o) {
            constexpr int N = decltype(count)::value;
            float values[N];
            load(values, dy + o);
#pragma unroll
            for (int i = 0; i < RANKS; i++) {
                if (first + i >= rank) continue;
#pragma unroll
                for (int j = 0; j < N; j++) sums[i] = fmaf(values[j], b[(o + j) * rank + first + i], sums[i]);
            }
        });
        float sum = block_sums(sums);
        if (threadIdx.x < RANKS && first + threadIdx.x < rank) ds[first + threadIdx.x] = narrow<X>(sum);
    }
}

// dx[t] += scale · mask ⊙ (ds[t] A).
template <class X>
DEV void down_backward(X* d_input, const float* adapters, const Stream& stream, u64 adapter_stride, u64 a_offset,
                       u64 row_stride, u32 in_dim, u32 rank, u32 column, float scale, u32 site, u32 threshold,
                       float keep) {
    Segment segment;
    u64 adapter;
    if (!stream.find(blockIdx.x, segment, adapter)) return;
    X* dx = d_input + blockIdx.x * row_stride;
    const X* ds = dx + in_dim + column;
    const float* a = adapters + adapter * adapter_stride + a_offset;
    bool wide = aligned16(dx) && aligned16(a) && in_dim % 4 == 0;
    Mask mask{threshold ? stream.keys[segment.index] : 0, site, threshold, keep};
    cover_block<WIDE<X>>(in_dim, wide, [&](auto count, u64 c) {
        constexpr int N = decltype(count)::value;
        float sums[N] = {}, values[N];
        for (u32 i = 0; i < rank; i++) {
            float factor = scale * widen(ds[i]);
            load(values, a + (u64)i * in_dim + c);
#pragma unroll
            for (int j = 0; j < N; j++) sums[j] = fmaf(factor, values[j], sums[j]);
        }
        if (threshold) {
            mask.factors_at(values, blockIdx.x - segment.start, (u32)c);
#pragma unroll
            for (int j = 0; j < N; j++) sums[j] *= values[j];
        }
        load(values, dx + c);
#pragma unroll
        for (int j = 0; j < N; j++) values[j] += sums[j];
        store(dx + c, values);
    });
}

// ---- gradients: blocks of 32 columns, a segment and a rank each

// The segment of this block, refused if it does not fit the stream.
DEV bool block_segment(const Stream& stream, u32& start, u32& len) {
    start = stream.offsets[blockIdx.y];
    u32 end = stream.offsets[blockIdx.y + 1];
    len = end - start;
    return expect_below(stream.fault, BAD_SEGMENT, start, end) && expect_below(stream.fault, BAD_SEGMENT, end, stream.tokens + 1ull);
}

// partial[segment, i, c] = scale · Σ_t ds[t, i] drop(x[t, c]).
template <class X>
DEV void gradient_a(float* partial, const X* input, const X* d_input, const Stream& stream, u64 row_stride, u32 in_dim,
                    u32 rank, u32 column, float scale, u32 site, u32 threshold, float keep) {
    u32 start, len, i = blockIdx.z;
    if (!block_segment(stream, start, len)) return;
    const X* x = input + start * row_stride;
    const X* ds = d_input + start * row_stride + in_dim + column + i;
    Mask mask{threshold ? stream.keys[blockIdx.y] : 0, site, threshold, keep};
    float* to = partial + ((u64)blockIdx.y * rank + i) * in_dim;
    column_sums(
        len, in_dim,
        [&](u32 t, u32 c) {
            float value = widen(ds[t * row_stride]) * widen(x[t * row_stride + c]);
            if (!threshold) return value;
            float factor[1];
            mask.factors_at(factor, t, c);
            return value * factor[0];
        },
        [&](u32 c, float sum) { to[c] = scale * sum; });
}

// partial[segment, o, i] = Σ_t dy[t, o] s[t, i]. dy begins at the target's first column.
template <class X>
DEV void gradient_b(float* partial, const X* dy, const X* input, const Stream& stream, u64 row_stride, u32 in_dim,
                    u32 out_dim, u32 out_len, u32 rank, u32 column) {
    u32 start, len, i = blockIdx.z;
    if (!block_segment(stream, start, len)) return;
    const X* s = input + start * row_stride + in_dim + column + i;
    const X* d = dy + (u64)start * out_dim;
    float* to = partial + (u64)blockIdx.y * rank * out_len;
    column_sums(
        len, out_len, [&](u32 t, u32 o) { return widen(d[(u64)t * out_dim + o]) * widen(s[t * row_stride]); },
        [&](u32 o, float sum) { to[(u64)o * rank + i] = sum; });
}

// grads[grad_row[segment], offset + e] += partial[segment, e], segments in order; a thread per e.
KERNEL LAUNCH_BOUNDS(256) lora_gradient_rows(float* grads, const float* partial, const u32* grad_row, u32* fault,
                                             u32 segments, u32 rows, u64 stride, u64 offset, u64 size) {
    u64 e = (u64)blockIdx.x * 256 + threadIdx.x;
    if (e >= size) return;
    for (u32 s = 0; s < segments; s++) {
        u32 row = grad_row[s];
        if (!expect_below(fault, BAD_SEGMENT, row, rows)) continue;
        grads[row * stride + offset + e] += partial[s * size + e];
    }
}
EXPORT(lora_gradient_rows)

#define STREAM_PARAMETERS                                                                                             \
    const u32 *offsets, const u32 *adapter, const u64 *keys, u32 *fault, u32 segments, u32 tokens, u32 n_adapters
#define STREAM Stream{offsets, adapter, keys, fault, segments, tokens, n_adapters}
#define DROP_PARAMETERS float scale, u32 site, u32 threshold, float keep
#define INSTANCES(X, t)                                                                                              \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                    \
        lora_down_forward_##t(X* input, const float* adapters, STREAM_PARAMETERS, u64 adapter_stride, u64 a_offset,    \
                              u64 row_stride, u32 in_dim, u32 rank, u32 column, DROP_PARAMETERS) {                   \
        down_forward(input, adapters, STREAM, adapter_stride, a_offset, row_stride, in_dim, rank, column, scale,     \
                     site, threshold, keep);                                                                         \
    }                                                                                                                \
    EXPORT(lora_down_forward_##t)                                                                                    \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                    \
        lora_up_forward_##t(X* y, const X* input, const float* adapters, STREAM_PARAMETERS, u64 adapter_stride,       \
                            u64 b_offset, u64 row_stride, u32 in_dim, u32 out_dim, u32 out_len, u32 rank,            \
                            u32 column) {                                                                            \
        up_forward(y, input, adapters, STREAM, adapter_stride, b_offset, row_stride, in_dim, out_dim, out_len, rank, \
                   column);                                                                                          \
    }                                                                                                                \
    EXPORT(lora_up_forward_##t)                                                                                      \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                    \
        lora_up_backward_##t(X* d_input, const X* dy, const float* adapters, STREAM_PARAMETERS, u64 adapter_stride,   \
                             u64 b_offset, u64 row_stride, u32 in_dim, u32 out_dim, u32 out_len, u32 rank,           \
                             u32 column) {                                                                           \
        up_backward(d_input, dy, adapters, STREAM, adapter_stride, b_offset, row_stride, in_dim, out_dim, out_len,   \
                    rank, column);                                                                                   \
    }                                                                                                                \
    EXPORT(lora_up_backward_##t)                                                                                     \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                    \
        lora_down_backward_##t(X* d_input, const float* adapters, STREAM_PARAMETERS, u64 adapter_stride,              \
                               u64 a_offset, u64 row_stride, u32 in_dim, u32 rank, u32 column, DROP_PARAMETERS) {    \
        down_backward(d_input, adapters, STREAM, adapter_stride, a_offset, row_stride, in_dim, rank, column, scale,  \
                      site, threshold, keep);                                                                        \
    }                                                                                                                \
    EXPORT(lora_down_backward_##t)                                                                                   \
    KERNEL LAUNCH_BOUNDS(1024)                                                                                       \
        lora_gradient_a_##t(float* partial, const X* input, const X* d_input, STREAM_PARAMETERS, u64 row_stride,      \
                            u32 in_dim, u32 rank, u32 column, DROP_PARAMETERS) {                                     \
        gradient_a(partial, input, d_input, STREAM, row_stride, in_dim, rank, column, scale, site, threshold, keep); \
    }                                                                                                                \
    EXPORT(lora_gradient_a_##t)                                                                                      \
    KERNEL LAUNCH_BOUNDS(1024)                                                                                       \
        lora_gradient_b_##t(float* partial, const X* dy, const X* input, STREAM_PARAMETERS, u64 row_stride,           \
                            u32 in_dim, u32 out_dim, u32 out_len, u32 rank, u32 column) {                            \
        gradient_b(partial, dy, input, STREAM, row_stride, in_dim, out_dim, out_len, rank, column);                  \
    }                                                                                                                \
    EXPORT(lora_gradient_b_##t)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
