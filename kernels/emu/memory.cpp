// Memory of the emulated device, and the race checker that watches it.
//
// Kernels compiled with -fsanitize=thread call the __tsan_* functions below for every access.
// For each byte the checker remembers the last writer and two readers, and asks whether a
// barrier (or, within a warp, a __syncwarp) lies between them and the access at hand.
#include "internal.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#include <unordered_map>

namespace emu {

static std::mutex allocations_lock;
static std::map<void*, std::pair<void*, size_t>> allocations;  // start → mapping

void* guarded_alloc(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (bytes + page - 1) / page * page;
    if (body == 0) body = page;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* mapped = mmap(nullptr, body + 2 * page, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* start = static_cast<char*>(mapped);
    mprotect(start, page, PROT_NONE);
    mprotect(start + page + body, page, PROT_NONE);
    // Its end at the guard page, its start as aligned as vector loads need.
    char* p = start + page + body - (bytes + 15) / 16 * 16;
    memset(p, 0xff, bytes);
    std::lock_guard<std::mutex> held(allocations_lock);
    allocations[p] = {mapped, body + 2 * page};
    return p;
}

void guarded_free(void* p) {
    std::lock_guard<std::mutex> held(allocations_lock);
    auto found = allocations.find(p);
    if (found == allocations.end()) return;
    forget(found->second.first, found->second.second);
    munmap(found->second.first, found->second.second);
    allocations.erase(found);
}

bool is_allocated(const void* p, size_t bytes) {
    std::lock_guard<std::mutex> held(allocations_lock);
    auto after = allocations.upper_bound(const_cast<void*>(p));
    if (after == allocations.begin()) return bytes == 0;
    auto& [mapped, size] = std::prev(after)->second;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const char *start = static_cast<const char*>(p), *end = static_cast<const char*>(mapped) + size - page;
    return bytes <= (size_t)(end - start) && start <= end;
}

// One access: block (0: none), thread, barriers and warp barriers passed.
struct Access { u32 serial, thread, epoch, warp_syncs; };
struct Cell { Access write, read[2]; };
constexpr uintptr_t PAGE = 4096;

static std::mutex shadow_lock;
static std::unordered_map<uintptr_t, Cell*> shadow;  // by page number

static Cell* cells_of(uintptr_t address) {
    std::lock_guard<std::mutex> held(shadow_lock);
    Cell*& cells = shadow[address / PAGE];
    if (!cells) cells = static_cast<Cell*>(calloc(PAGE, sizeof(Cell)));
    if (!cells) abort();
    return cells;
}

void forget(const void* p, size_t bytes) {
    std::lock_guard<std::mutex> held(shadow_lock);
    if (shadow.empty()) return;
    uintptr_t first = reinterpret_cast<uintptr_t>(p) / PAGE;
    for (uintptr_t page = first; page <= first + bytes / PAGE; page++) {
        auto found = shadow.find(page);
        if (found == shadow.end()) continue;
        free(found->second);
        shadow.erase(found);
    }
}

// Whether `p` lies in declared or dynamic shared memory; fails in the gaps between arrays.
static bool is_shared(const Worker& w, uintptr_t p, size_t bytes) {
    if (p - reinterpret_cast<uintptr_t>(w.dynamic) < w.dynamic_bytes) return true;
    size_t offset = p - reinterpret_cast<uintptr_t>(w.arena);
    if (offset >= ARENA_BYTES) return false;
    for (const SharedArray& array : w.arrays) {
        if (offset >= array.offset && offset + bytes <= array.offset + array.bytes) return true;
    }
    fail("an access of %zu bytes outside of every shared array", bytes);
}

// Whether the earlier access `o` and one of fiber `f` now are not ordered.
static bool unordered(const Worker& w, const Fiber& f, const Access& o, bool shared) {
    if (o.serial == 0) return false;
    if (o.serial != w.serial) return !shared && o.serial >= w.first_serial;  // another block of this launch
    if (o.thread == (u32)f.linear || o.epoch != w.epoch) return false;
    return (int)(o.thread >> 5) != f.warp || o.warp_syncs >= f.warp_syncs;
}

void access(const void* p, size_t bytes, bool write) {
    if (!worker || worker->current < 0 || !worker->race) return;
    Worker& w = *worker;
    uintptr_t start = reinterpret_cast<uintptr_t>(p);
    Fiber& f = w.fibers[w.current];
    auto within = [start](const void* from, size_t size) { return start - reinterpret_cast<uintptr_t>(from) < size; };
    if (within(w.stacks, STACK_BYTES * w.capacity) || within(w.fibers.data(), w.fibers.size() * sizeof(Fiber)) ||
        within(&context, sizeof context)) {
        return;
    }
    bool shared = is_shared(w, start, bytes);
    Access me{w.serial, (u32)f.linear, w.epoch, f.warp_syncs};
    Cell* cells = cells_of(start);
    for (uintptr_t a = start; a < start + bytes; a++) {
        if (a % PAGE == 0) cells = cells_of(a);
        Cell& cell = cells[a % PAGE];
        const char* what = nullptr;
        const Access* other = nullptr;
        if (unordered(w, f, cell.write, shared)) {
            what = write ? "write after write" : "read after write";
            other = &cell.write;
        } else if (write) {
            for (const Access& read : cell.read) {
                if (unordered(w, f, read, shared)) what = "write after read", other = &read;
            }
        } else if (shared && cell.write.serial != w.serial) {
            fail("reads shared memory that nobody has written, at %p", (void*)a);
        }
        if (what) {
            fail("data race, %s of %s memory at %p; the other is thread %u of %s block", what,
                 shared ? "shared" : "global", (void*)a, other->thread,
                 other->serial == w.serial ? "the same" : "another");
        }
        if (write) {
            cell.write = me;
        } else {
            const Access& first = cell.read[0];
            bool replace = first.serial != w.serial || first.thread == me.thread || first.epoch != w.epoch;
            cell.read[replace ? 0 : 1] = me;
        }
    }
}

}  // namespace emu

#define HOOKS(n)                                                              \
    void __tsan_read##n(void* p) { emu::access(p, n, false); }                \
    void __tsan_write##n(void* p) { emu::access(p, n, true); }                \
    void __tsan_unaligned_read##n(void* p) { emu::access(p, n, false); }      \
    void __tsan_unaligned_write##n(void* p) { emu::access(p, n, true); }
extern "C" {
// For other stand-ins.
int emu_is_allocated(const void* p, size_t bytes) { return emu::is_allocated(p, bytes); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) { emu::access(p, n, false); }
void __tsan_write_range(void* p, size_t n) { emu::access(p, n, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
}
