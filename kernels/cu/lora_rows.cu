// The products of adapted layers with A, fused with the norm before them: s = drop(x) Aᵀ on the way
// forward, and its backward with dA. A mask is drawn once for both.
#include "lora_rows_forward.cuh"
#include "lora_rows_backward.cuh"
#include "lora_rows_pair.cuh"

// Entry points; in the forward ones with the number of rows of a block.

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
