// Gated activations, a block per row: h = act(gate) ⊙ up, or h = mask ⊙ act(gate) ⊙ up · keep.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr float GELU_SCALE = 0.7978845608028654f;  // √(2/π)
constexpr float GELU_CUBIC = 0.044715f;

struct Activated { float value, slope; };

template <class X> DEV Activated silu(float x) {
    float s = sigmoid_for<X>(x), value = x * s;
    // s (1 + x (1 − s)) = s + value (1 − s).
    return {value, fmaf(value, 1.f - s, s)};
}

// The tanh form. With the inner function u, the gate (1 + tanh u)/2 is the sigmoid of 2u.
template <class X> DEV Activated gelu(float x) {
    float square = x * x;
    float gate = sigmoid_for<X>(x * fmaf(square, 2.f * GELU_SCALE * GELU_CUBIC, 2.f * GELU_SCALE));
    float value = x * gate, slope_of_2u = fmaf(square, 6.f * GELU_SCALE * GELU_CUBIC, 2.f * GELU_SCALE);
    return {value, fmaf(value * slope_of_2u, 1.f - gate, gate)};
}

template <class X, bool IS_SILU> DEV Activated activate(float x) {
    if constexpr (IS_SILU) return silu<X>(x);
    return gelu<X>(x);
}

template <class X, bool IS_SILU, class Masks>
DEV void forward(X* h, const X* gate_up, u32 cols, u64 h_stride, const Masks& masks) {
    h += blockIdx.x * h_stride;
    auto mask = masks.of(blockIdx.x);
    const X* gate = gate_up + (u64)blockIdx.x * 2 * cols;
    const X* up = gate + cols;
    cover_block<WIDE<X>>(cols, aligned16(h) && aligned16(gate) && aligned16(up), [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float gates[N], ups[N];
        load(gates, gate + i);
        load(ups, up + i);
#pragma unroll
        for (int j = 0; j < N; j++) ups[j] *= activate<X, IS_SILU>(gates[j]).value;
        mask.apply(ups, (u32)i);
        store(h + i, ups);
    });
}

template <class X, bool IS_SILU, class Masks>
DEV void backward(X* d_gate_up, const X* dh, const X* gate_up, u32 cols, u64 h_stride, const Masks& masks) {
    auto mask = masks.of(blockIdx.x);
    dh += blockIdx.x * h_stride;
    u64 row = (u64)blockIdx.x * 2 * cols;
    const X *gate = gate_up + row, *up = gate + cols;
    X *d_gate = d_gate_up + row, *d_up = d_gate + cols;
    bool wide = aligned16(dh) && aligned16(gate) && aligned16(up) && aligned16(d_gate) && aligned16(d_up);
    cover_block<WIDE<X>>(cols, wide, [&](auto count, u64 i) {
        constexpr int N = decltype(count)::value;
        float gates[N], ups[N], ds[N];
        load(gates, gate + i);
        load(ups, up + i);
        load(ds, dh + i);
        mask.apply(ds, (u32)i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            Activated a = activate<X, IS_SILU>(gates[j]);
            gates[j] = ds[j] * ups[j] * a.slope;
            ups[j] = ds[j] * a.value;
        }
        store(d_gate + i, gates);
        store(d_up + i, ups);
    });
}

#define OF_KIND(X, t, kind, is_silu)                                                                               \
    KERNEL LAUNCH_BOUNDS(THREADS) kind##_forward_##t(X* h, const X* gate_up, u32 cols, u64 h_stride) {              \
        forward<X, is_silu>(h, gate_up, cols, h_stride, NoMasks{});                                                \
    }                                                                                                              \
    EXPORT(kind##_forward_##t)                                                                                     \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                  \
        kind##_backward_##t(X* d, const X* dh, const X* gate_up, u32 cols, u64 h_stride) {                         \
        backward<X, is_silu>(d, dh, gate_up, cols, h_stride, NoMasks{});                                           \
    }                                                                                                              \
    EXPORT(kind##_backward_##t)                                                                                    \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                  \
        kind##_dropout_forward_##t(X* h, const X* gate_up, u32 cols, u64 h_stride, DROP_MASK_PARAMETERS) {         \
        forward<X, is_silu>(h, gate_up, cols, h_stride, DROP_MASK);                                                \
    }                                                                                                              \
    EXPORT(kind##_dropout_forward_##t)                                                                             \
    KERNEL LAUNCH_BOUNDS(THREADS)                                                                                  \
        kind##_dropout_backward_##t(X* d, const X* dh, const X* gate_up, u32 cols, u64 h_stride,                   \
                                    DROP_MASK_PARAMETERS) {                                                        \
        backward<X, is_silu>(d, dh, gate_up, cols, h_stride, DROP_MASK);                                           \
    }                                                                                                              \
    EXPORT(kind##_dropout_backward_##t)
#define INSTANCES(X, t)        \
    OF_KIND(X, t, silu, true)  \
    OF_KIND(X, t, gelu, false)
INSTANCES(float, f32)
INSTANCES(bf16, bf16)
