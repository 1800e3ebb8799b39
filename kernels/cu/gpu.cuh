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

#endif

// The upper half of a float, as 16-bit memory holds it.
struct bf16 { u16 bits; };
