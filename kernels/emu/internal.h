// What the parts of the emulator share: fibers, warps, and the worker that runs a block.
#pragma once
#include "emu.h"
#undef __syncthreads
#include <csetjmp>
#include <string>
#include <vector>

namespace emu {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t ARENA_BYTES = 48 * 1024;  // what a kernel may declare
constexpr size_t MAX_SHARED = 227 * 1024;

// In which order the threads of a block get their turn.
enum class Order { forward, reverse, random };

// Set per host thread by emu_configure; the environment gives the first values.
struct Config {
    Order order;
    u64 seed;
    bool race;
};
Config& config();

// A fiber's saved stack pointer; everything else of it lies on its stack.
struct Coroutine { void* stack_pointer; };

// A copy that has been issued and has not arrived.
struct PendingCopy {
    void* dst;
    const void* src;
    int bytes;
    bool valid;
    int group;
};

// A product that has been begun, with what its accumulators were.
struct PendingProduct {
    Wgmma product;
    std::vector<float> before;
    int group;
};

struct Fiber : Thread {
    Coroutine coroutine;
    bool done;
    u32 warp_syncs;  // whole-warp __syncwarp's passed
    int group;       // copy groups committed
    std::vector<PendingCopy> copies;
    int product_group;  // product groups committed
    std::vector<PendingProduct> products;
};

// Lanes of a warp that wait in a collective, and what for.
struct Warp {
    u32 alive, arrived;
    u32 mask[32];
    Op op[32];
    void* slot[32];
};

struct SharedArray { const void* site; size_t offset, bytes; };

// One host thread's means of running a block.
struct Worker {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<int> ready;  // a ring: head, count
    size_t head = 0, count = 0;
    std::vector<int> at_barrier;
    char* stacks = nullptr;
    size_t capacity = 0;
    unsigned char* dynamic = nullptr;
    size_t dynamic_bytes = 0;
    unsigned char* arena = nullptr;  // declared shared arrays
    size_t arena_used = 0, declared = 0, most_declared = 0;  // with gaps; without, now and at most
    size_t most_shared = MAX_SHARED;
    std::vector<SharedArray> arrays;
    char* signal_stack = nullptr;
    Coroutine main;
    sigjmp_buf on_failure;
    bool failed = false;
    std::string error;
    const char* kernel = "";
    int current = -1, threads = 0, alive = 0;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    Order order = Order::forward;
    bool race = false;
    u64 random = 1, priority = 0;
    // For the race checker: barriers passed in this block; the block's and its launch's first number.
    u32 epoch = 0, serial = 0, first_serial = 0;
};
extern thread_local Worker* worker;

// For this host thread's next launch: bytes of shared memory, declared and dynamic, that a block may have.
void limit_shared(size_t bytes);
// Bytes that a block of its last launch has declared.
size_t declared_shared();

inline u64 step(u64 x) {
    x ^= x << 13;
    x ^= x >> 7;
    return x ^ x << 17;
}

// Forgets what the race checker knows of this memory.
void forget(const void* p, size_t bytes);

}  // namespace emu
