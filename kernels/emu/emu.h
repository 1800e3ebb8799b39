// What a kernel sees when it is compiled for the host: the CUDA language and the names of
// gpu.cuh, on top of the emulator's services. Included by gpu.cuh under GRADTX_EMULATE.
//
// One fiber per CUDA thread, one block at a time per host thread. Every operation that
// involves several lanes of a warp is a collective: all lanes of the mask must arrive at
// the same one, or the launch fails and says who was where.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emu {

// What kernel code can see of its own thread. `site` is where it last synchronised, for reports.
struct Thread {
    uint3 index;
    int linear, lane, warp;
    const char* site;
};
struct Launch { dim3 grid, block; size_t shared_bytes; };
struct Context { Thread* self; uint3 block; const Launch* launch; };
extern thread_local Context context;

enum class Op { sync_warp, shuffle, vote, ldmatrix, mma, wgmma };
const char* name_of(Op op);

// All threads of the block that have not ended.
void barrier();
// All lanes of `mask`: the last to arrive runs `run` on everybody's slot.
void collective(Op op, u32 mask, void* slot, void (*run)(void** slots, u32 mask));
// Dynamic shared memory of this block; NaN until written, a guard page behind it.
unsigned char* dynamic_shared();
// The shared array that is declared at `site`: the same memory for every thread of the block.
void* shared_array(const void* site, size_t bytes);
// Asynchronous copies: the destination is NaN from here on, the data arrives at the wait.
void cp_async(void* dst, const void* src, int bytes, bool valid);
void cp_commit();
void cp_wait(int pending);
// Tells the race checker of an access that the compiler's instrumentation does not see.
void access(const void* p, size_t bytes, bool write);
// Ends the launch with an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Runs a kernel; 0 when it went well, otherwise `last_error` says why not.
int launch(const char* name, const Launch& launch, void (*body)(void*), void* argument);
const char* last_error();
// Device memory: NaN until written, guard pages around it, its end at the second one.
void* guarded_alloc(size_t bytes);
void guarded_free(void* p);
// Whether these bytes lie in one allocation.
bool is_allocated(const void* p, size_t bytes);

// Calls a kernel with arguments as cuLaunchKernel takes them: one pointer per parameter.
template <class F> struct Thunk;
template <class... A> struct Thunk<void (*)(A...)> {
    struct Call { void (*kernel)(A...); void** arguments; };
    template <size_t... I> static void apply(Call* call, std::index_sequence<I...>) {
        call->kernel(*static_cast<std::remove_cv_t<A>*>(call->arguments[I])...);
    }
    // The sizes of its parameters, and how many there are.
    static unsigned parameters(const size_t** sizes) {
        static const size_t all[] = {sizeof(A)...};
        *sizes = all;
        return sizeof...(A);
    }
    static void body(void* call) { apply(static_cast<Call*>(call), std::index_sequence_for<A...>{}); }
    static int run(const char* name, void (*kernel)(A...), const Launch& how, void** arguments) {
        Call call{kernel, arguments};
        return launch(name, how, body, &call);
    }
};

struct ShuffleSlot { u64 value, result; int source; };
void run_shuffle(void** slots, u32 mask);
template <class T> T shuffle(u32 mask, T value, int source) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a register or two");
    ShuffleSlot slot{0, 0, source};
    memcpy(&slot.value, &value, sizeof(T));
    collective(Op::shuffle, mask, &slot, run_shuffle);
    T result;
    memcpy(&result, &slot.result, sizeof(T));
    return result;
}
struct VoteSlot { u32 predicate, result; };
void run_vote(void** slots, u32 mask);
inline u32 ballot(u32 mask, int predicate) {
    VoteSlot slot{predicate != 0, 0};
    collective(Op::vote, mask, &slot, run_vote);
    return slot.result;
}
struct LdmatrixSlot { const void* row; u32 r[4]; };
void run_ldmatrix(void** slots, u32 mask);
void run_ldmatrix_trans(void** slots, u32 mask);
struct MmaSlot { float* d; const u32* a; u32 b0, b1; };
void run_mma(void** slots, u32 mask);
// A product of a warpgroup, of which a warp computes 16 rows of 64: d (16×n) = or += a · b or a · bᵀ, where b's 16-bit elements
// lie in shared memory and a's there or in registers. The result arrives at the wait, and d is NaN until then.
struct WgmmaTile {
    const unsigned char* begin;
    u32 panel;  // bytes
    WgmmaTile further(u32 bytes) const { return {begin + bytes, panel}; }
};
struct Wgmma {
    float* d;
    int n;
    bool add, a_in_registers, b_transposed;
    u32 a[4];
    WgmmaTile a_tile, b;
};
void wgmma(const Wgmma& product);
void wgmma_commit();
void wgmma_wait(int pending);

template <class D, class S> D bits(S s) {
    static_assert(sizeof(D) == sizeof(S), "same size");
    D d;
    memcpy(&d, &s, sizeof d);
    return d;
}

}  // namespace emu

// ---- the language
#define DEV inline
#define KERNEL extern "C" void
#define LAUNCH_BOUNDS(...)
#define RESTRICT __restrict__
#define EXPORT(kernel)                                                                        \
    extern "C" int emu_launch_##kernel(const unsigned* d, size_t shared_bytes, void** args) { \
        emu::Launch how{{d[0], d[1], d[2]}, {d[3], d[4], d[5]}, shared_bytes};                \
        return emu::Thunk<decltype(&kernel)>::run(#kernel, &kernel, how, args);               \
    }                                                                                         \
    extern "C" unsigned emu_parameters_##kernel(const size_t** sizes) {                       \
        return emu::Thunk<decltype(&kernel)>::parameters(sizes);                              \
    }
#define SHARED(T, name, count)  \
    static char name##_site;    \
    T* name = static_cast<T*>(emu::shared_array(&name##_site, sizeof(T) * (count)))
#define DYNAMIC_SHARED(name) unsigned char* name = emu::dynamic_shared()
#define threadIdx (emu::context.self->index)
#define blockIdx (emu::context.block)
#define blockDim (emu::context.launch->block)
#define gridDim (emu::context.launch->grid)
#define EMU_STRING2(x) #x
#define EMU_STRING(x) EMU_STRING2(x)
#define __syncthreads() \
    (emu::context.self->site = "__syncthreads at " __FILE__ ":" EMU_STRING(__LINE__), emu::barrier())

inline void __syncwarp(u32 mask = 0xffffffffu) {
    char none;
    emu::collective(emu::Op::sync_warp, mask, &none, nullptr);
}
template <class T> T __shfl_sync(u32 mask, T value, int source) {
    return emu::shuffle(mask, value, source & 31);
}
template <class T> T __shfl_xor_sync(u32 mask, T value, int flip) {
    return emu::shuffle(mask, value, emu::context.self->lane ^ flip);
}
template <class T> T __shfl_up_sync(u32 mask, T value, unsigned delta) {
    int lane = emu::context.self->lane;
    return emu::shuffle(mask, value, lane < (int)delta ? lane : lane - (int)delta);
}
inline u32 __ballot_sync(u32 mask, int predicate) { return emu::ballot(mask, predicate); }
inline int __any_sync(u32 mask, int predicate) { return emu::ballot(mask, predicate) != 0; }
inline u32 __reduce_add_sync(u32 mask, u32 value) {
    u32 sum = 0;
    for (int lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) sum += emu::shuffle(mask, value, lane);
    }
    return sum;
}
inline u32 __reduce_max_sync(u32 mask, u32 value) {
    u32 largest = 0;
    for (int lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) {
            u32 other = emu::shuffle(mask, value, lane);
            largest = other > largest ? other : largest;
        }
    }
    return largest;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
inline float __uint_as_float(u32 x) { return emu::bits<float>(x); }
inline u32 __float_as_uint(float x) { return emu::bits<u32>(x); }
template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

// Blocks may run on several host threads, so this must be an atomic; the race checker passes it over.
__attribute__((noinline, no_sanitize("thread"))) inline u32 atomicMax(u32* p, u32 value) {
    u32 old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < value &&
           !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
    }
    return old;
}

// ---- the names that gpu.cuh defines by inline PTX
DEV u16 bf16_bits(float x) {
    u32 u = emu::bits<u32>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
DEV u32 pack_bf16(float first, float second) { return bf16_bits(first) | (u32)bf16_bits(second) << 16; }
DEV float exp2_fast(float x) { return exp2f(x); }
DEV float divide_fast(float a, float b) { return a / b; }
DEV void cp_async16(void* dst, const void* src, bool valid) { emu::cp_async(dst, src, 16, valid); }
DEV void cp_async4(void* dst, const void* src, bool valid) { emu::cp_async(dst, src, 4, valid); }
DEV void cp_async_commit() { emu::cp_commit(); }
template <int pending> DEV void cp_async_wait() { emu::cp_wait(pending); }
template <bool trans> DEV void emu_ldmatrix(u32 (&r)[4], const void* p) {
    if (reinterpret_cast<uintptr_t>(p) & 15) emu::fail("ldmatrix: a row is not 16-byte aligned");
    emu::access(p, 16, false);
    emu::LdmatrixSlot slot{p, {}};
    auto run = trans ? emu::run_ldmatrix_trans : emu::run_ldmatrix;
    emu::collective(emu::Op::ldmatrix, 0xffffffffu, &slot, run);
    memcpy(r, slot.r, 16);
}
DEV void ldmatrix_x4(u32 (&r)[4], const void* p) { emu_ldmatrix<false>(r, p); }
DEV void ldmatrix_x4_trans(u32 (&r)[4], const void* p) { emu_ldmatrix<true>(r, p); }
using emu::WgmmaTile;
DEV WgmmaTile wgmma_tile(const void* begin, u32 panel) { return {static_cast<const unsigned char*>(begin), panel}; }
DEV void wgmma_fence_memory() {}
DEV void wgmma_fence() {}
DEV void wgmma_commit() { emu::wgmma_commit(); }
template <int pending> DEV void wgmma_wait() { emu::wgmma_wait(pending); }
template <int N> DEV void wgmma_hold(float (&)[N][4]) {}
DEV void wgmma_nt(float (&d)[8][4], WgmmaTile a, WgmmaTile b, bool add) { emu::wgmma({d[0], 64, add, false, true, {}, a, b}); }
DEV void wgmma_nt(float (&d)[8][4], const u32 (&a)[4], WgmmaTile b, bool add) {
    emu::wgmma({d[0], 64, add, true, true, {a[0], a[1], a[2], a[3]}, {}, b});
}
DEV void wgmma_nn(float (&d)[16][4], const u32 (&a)[4], WgmmaTile b) {
    emu::wgmma({d[0], 128, true, true, false, {a[0], a[1], a[2], a[3]}, {}, b});
}
DEV void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emu::MmaSlot slot{d, a, b0, b1};
    emu::collective(emu::Op::mma, 0xffffffffu, &slot, emu::run_mma);
}
