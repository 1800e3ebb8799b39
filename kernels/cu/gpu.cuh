// The machine under the kernels: one file of names for what the language lacks, and the only one
// with inline PTX. No header of NVIDIA is needed, so NVRTC alone compiles a kernel. The emulator
// (../emu) gives the same names on a host.
//
//   KERNEL name(...)          an entry point; LAUNCH_BOUNDS(threads) between the two
//   EXPORT(name)              after each entry point: lets the emulator find it
//   SHARED(T, name, count)    a shared array of the block, 16-byte aligned
//   DYNAMIC_SHARED(name)      the launch's dynamic shared memory, in bytes
#pragma once

#ifdef GRADTX_EMULATE
#include "emu.h"
#else

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEV __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define LAUNCH_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define RESTRICT __restrict__
#define EXPORT(kernel)
#define SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The bits of the nearest bf16, ties to even.
DEV u16 bf16_bits(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
// Two bf16 in one register, the first in the lower half.
DEV u32 pack_bf16(float first, float second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// 2^x to about 2 units in the last place; results below the normal numbers are 0.
DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// a / b to about 2 units in the last place; b below 2^126.
DEV float divide_fast(float a, float b) { return __fdividef(a, b); }

// Copies 16 bytes from global to shared memory, both 16-byte aligned, without waiting; zeros if not valid.
DEV void cp_async16(void* dst, const void* src, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(bytes)
                 : "memory");
}
// The same for 4 bytes, 4-byte aligned.
DEV void cp_async4(void* dst, const void* src, bool valid) {
    int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(bytes)
                 : "memory");
}
// Closes a group of this thread's copies.
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are on their way.
template <int pending> DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Four 8×8 matrices of 16-bit elements from shared memory; lane 8m + i gives row i of matrix m.
DEV void ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// The same, each matrix transposed.
DEV void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d (16×8, f32) += a (16×16, bf16) · b (16×8, bf16), each spread over the lanes of a warp.
DEV void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Hopper's tensor cores: a warpgroup (128 threads) multiplies tiles in shared memory

// Other devices compile these too, but never run them.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define HOPPER_ASM(...) __trap()
#endif

// An operand in shared memory. Its tile is panels of 64 columns (128 bytes a row) that begin at multiples of
// 1,024 bytes; in row r the 16 bytes number c lie at place c ^ r % 8.
struct WgmmaTile {
    u64 bits;
    // The operand that begins this many bytes further.
    DEV WgmmaTile further(u32 bytes) const { return {bits + (bytes >> 4)}; }
};
// `panel` is the number of bytes from a panel to the next, where the tile's rows are the summed dimension.
DEV WgmmaTile wgmma_tile(const void* begin, u32 panel) {
    u64 address = shared_address(begin) >> 4, leading = panel >> 4, eight_rows = 1024 >> 4, swizzle_128 = 1;
    return {address | leading << 16 | eight_rows << 32 | swizzle_128 << 62};
}

// What threads wrote to shared memory before is there for products that come after the next barrier.
DEV void wgmma_fence_memory() { HOPPER_ASM("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers that products read or add to are written.
DEV void wgmma_fence() { HOPPER_ASM("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
DEV void wgmma_commit() { HOPPER_ASM("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` groups are being computed.
template <int pending> DEV void wgmma_wait() { HOPPER_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }
// No use of these registers moves across.
template <int N> DEV void wgmma_hold(float (&d)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

#define WGMMA_FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define WGMMA_SIXTEEN(i) WGMMA_FOUR(i), WGMMA_FOUR(i + 1), WGMMA_FOUR(i + 2), WGMMA_FOUR(i + 3)
// d (64×64, f32) = or += a (64×16) · bᵀ (b: 64×16); each warp has 16 rows, spread as by mma_bf16.
DEV void wgmma_nt(float (&d)[8][4], WgmmaTile a, WgmmaTile b, bool add) {
    HOPPER_ASM(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, add, 1, 1, 0, 0;\n}"
        : WGMMA_SIXTEEN(0), WGMMA_SIXTEEN(4)
        : "l"(a.bits), "l"(b.bits), "r"((int)add));
}
// The same with a in registers, as for mma_bf16.
DEV void wgmma_nt(float (&d)[8][4], const u32 (&a)[4], WgmmaTile b, bool add) {
    HOPPER_ASM(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
        : WGMMA_SIXTEEN(0), WGMMA_SIXTEEN(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"((int)add));
}
// d (64×128, f32) += a (64×16, in registers as for mma_bf16) · b (16×128).
DEV void wgmma_nn(float (&d)[16][4], const u32 (&a)[4], WgmmaTile b) {
    HOPPER_ASM(
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
        "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "
        "%57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"
        : WGMMA_SIXTEEN(0), WGMMA_SIXTEEN(4), WGMMA_SIXTEEN(8), WGMMA_SIXTEEN(12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits));
}
#endif

// The upper half of a float, as 16-bit memory holds it.
struct bf16 { u16 bits; };
