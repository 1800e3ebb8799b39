// Fibers, barriers, warp collectives and launches. Compiled without instrumentation.
#include "internal.h"

#include <atomic>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

#if !defined(__x86_64__)
#error "the emulator switches fibers with x86-64 instructions"
#endif

// Saves the callee-saved registers on the old stack and takes them from the new one.
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

namespace emu {

thread_local Context context;
thread_local Worker* worker;
static thread_local std::string last_message;

const char* last_error() { return last_message.c_str(); }

static thread_local size_t shared_limit = MAX_SHARED, shared_declared;
void limit_shared(size_t bytes) { shared_limit = bytes; }
size_t declared_shared() { return shared_declared; }

static Config from_environment() {
    auto get = [](const char* name) {
        const char* value = getenv(name);
        return std::string(value ? value : "");
    };
    std::string order = get("EMU_ORDER"), seed = get("EMU_SEED");
    Config c{Order::forward, 1, get("EMU_RACE") == "1"};
    if (order == "reverse") c.order = Order::reverse;
    if (order == "random") c.order = Order::random;
    if (!seed.empty()) c.seed = strtoull(seed.c_str(), nullptr, 10);
    return c;
}

Config& config() {
    static thread_local Config c = from_environment();
    return c;
}

const char* name_of(Op op) {
    static const char* names[] = {"__syncwarp", "a shuffle", "a vote", "ldmatrix", "mma.sync", "wgmma"};
    return names[(int)op];
}

void fail(const char* format, ...) {
    char text[700], where[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (!worker || worker->current < 0) {
        fprintf(stderr, "emulator: %s\n", text);
        abort();
    }
    Worker& w = *worker;
    Fiber& f = w.fibers[w.current];
    snprintf(where, sizeof where, "%s, block (%u, %u, %u), thread (%u, %u, %u), after %s: ", w.kernel,
             context.block.x, context.block.y, context.block.z, f.index.x, f.index.y, f.index.z,
             f.site ? f.site : "its start");
    if (!w.failed) w.error = std::string(where) + text;
    w.failed = true;
    siglongjmp(w.on_failure, 1);
}

static void on_fault(int signal_number, siginfo_t* info, void*) {
    if (!worker || worker->current < 0) {
        signal(signal_number, SIG_DFL);
        raise(signal_number);
        return;
    }
    fail("illegal memory access at %p", info->si_addr);
}

// ---- whose turn it is

static void make_ready(int i) {
    Worker& w = *worker;
    w.ready[(w.head + w.count++) % w.ready.size()] = i;
}

// Random order runs the warp of the highest random priority as far as it goes, and draws
// priorities again at every barrier: far apart warps find missing barriers, shuffled threads do not.
static void bring_forward_random(Worker& w) {
    size_t size = w.ready.size(), best = 0;
    u32 highest = 0;
    for (size_t k = 0; k < w.count; k++) {
        u32 p = (u32)(w.ready[(w.head + k) % size] >> 5) * 2654435761u + (u32)w.priority;
        p = (p ^ p >> 15) * 2246822519u;
        p ^= p >> 13;
        if (k == 0 || p > highest) highest = p, best = k;
    }
    std::swap(w.ready[w.head], w.ready[(w.head + best) % size]);
}

static int take_ready() {
    Worker& w = *worker;
    size_t size = w.ready.size();
    if (w.order == Order::reverse) return w.ready[(w.head + --w.count) % size];
    if (w.order == Order::random) bring_forward_random(w);
    int i = w.ready[w.head];
    w.head = (w.head + 1) % size;
    w.count--;
    return i;
}

static void deadlock() {
    Worker& w = *worker;
    char waiting[400] = "";
    size_t at = 0;
    int shown = 0;
    for (Fiber& f : w.fibers) {
        if (f.linear >= w.threads || f.done || shown++ >= 4) continue;
        at += snprintf(waiting + at, sizeof waiting - at, " thread %d after %s;", f.linear, f.site ? f.site : "its start");
        if (at >= sizeof waiting) break;
    }
    fail("deadlock, a barrier or collective that not all threads reach:%s", waiting);
}

// Leaves the current fiber, which waits or has ended.
static void next() {
    Worker& w = *worker;
    Fiber& me = w.fibers[w.current];
    if (w.count == 0) {
        if (w.alive > 0) deadlock();
        emu_switch(&me.coroutine.stack_pointer, w.main.stack_pointer);
        return;
    }
    int i = take_ready();
    if (i == w.current) return;
    w.current = i;
    context.self = &w.fibers[i];
    emu_switch(&me.coroutine.stack_pointer, w.fibers[i].coroutine.stack_pointer);
}

static void yield() {
    make_ready(worker->current);
    next();
}

static void release_barrier() {
    Worker& w = *worker;
    w.epoch++;
    w.random = step(w.random);
    w.priority = w.random >> 20;
    for (int i : w.at_barrier) make_ready(i);
    w.at_barrier.clear();
}

void barrier() {
    Worker& w = *worker;
    if ((int)w.at_barrier.size() + 1 == w.alive) {
        release_barrier();
        if (w.order != Order::forward) yield();
        return;
    }
    w.at_barrier.push_back(w.current);
    next();
}

static void fiber_main() {
    Worker& w = *worker;
    w.body(w.argument);
    Fiber& f = w.fibers[w.current];
    if (!f.copies.empty()) fail("ends with %zu asynchronous copies that nobody waited for", f.copies.size());
    if (!f.products.empty()) fail("ends with %zu products that nobody waited for", f.products.size());
    f.done = true;
    w.alive--;
    w.warps[f.warp].alive &= ~(1u << f.lane);
    if (!w.at_barrier.empty() && (int)w.at_barrier.size() == w.alive) release_barrier();
    next();
    abort();
}

// Lanes that the warp has, ended ones included.
static u32 lanes_of(const Worker& w, int warp) {
    int n = w.threads - warp * 32;
    return n >= 32 ? ~0u : (1u << n) - 1;
}

void collective(Op op, u32 mask, void* slot, void (*run)(void**, u32)) {
    Worker& w = *worker;
    Fiber& me = w.fibers[w.current];
    Warp& warp = w.warps[me.warp];
    int lane = me.lane;
    me.site = name_of(op);
    if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask %08x", name_of(op), lane, mask);
    u32 existing = lanes_of(w, me.warp), wanted = mask & existing;
    if ((warp.alive & wanted) != wanted) fail("%s: mask %08x names lanes that have ended", name_of(op), mask);
    warp.arrived |= 1u << lane;
    warp.mask[lane] = mask;
    warp.op[lane] = op;
    warp.slot[lane] = slot;
    if ((warp.arrived & wanted) != wanted) {
        next();
        return;
    }
    for (int i = 0; i < 32; i++) {
        if ((wanted >> i & 1) && (warp.mask[i] != mask || warp.op[i] != op)) {
            fail("a warp diverged: lane %d is in %s (mask %08x), lane %d in %s (mask %08x)", lane, name_of(op), mask, i,
                 name_of(warp.op[i]), warp.mask[i]);
        }
    }
    warp.arrived &= ~wanted;
    if (run) run(warp.slot, wanted);
    for (int i = 0; i < 32; i++) {
        if (!(wanted >> i & 1)) continue;
        int other = me.warp * 32 + i;
        if (op == Op::sync_warp && wanted == existing) w.fibers[other].warp_syncs++;
        if (i != lane) make_ready(other);
    }
    if (w.order != Order::forward) yield();
}

// ---- blocks and launches

static void prepare_fiber(Worker& w, int i, const Launch& launch) {
    Fiber& f = w.fibers[i];
    f.linear = i;
    f.lane = i & 31;
    f.warp = i >> 5;
    f.done = false;
    f.site = nullptr;
    f.warp_syncs = 0;
    f.group = 0;
    f.copies.clear();
    f.product_group = 0;
    f.products.clear();
    unsigned n = (unsigned)i;
    f.index = {n % launch.block.x, n / launch.block.x % launch.block.y, n / (launch.block.x * launch.block.y)};
    // Room so that the stack pointer is 8 modulo 16 at entry, as after a call; six registers below.
    void** top = reinterpret_cast<void**>(w.stacks + STACK_BYTES * (size_t)(i + 1)) - 2;
    *top = reinterpret_cast<void*>(fiber_main);
    top -= 6;
    memset(top, 0, 6 * sizeof(void*));
    f.coroutine.stack_pointer = top;
}

static void run_block(Worker& w, uint3 block, const Launch& launch) {
    context.block = block;
    context.launch = &launch;
    worker = &w;
    w.alive = w.threads;
    w.head = w.count = 0;
    w.epoch = 0;
    w.at_barrier.clear();
    for (int i = 0; i < (w.threads + 31) / 32; i++) {
        w.warps[i].arrived = 0;
        w.warps[i].alive = lanes_of(w, i);
    }
    if (w.dynamic_bytes) memset(w.dynamic, 0xff, w.dynamic_bytes);
    memset(w.arena, 0xff, w.arena_used);
    w.arena_used = w.declared = 0;
    w.arrays.clear();
    for (int i = 0; i < w.threads; i++) {
        prepare_fiber(w, i, launch);
        make_ready(i);
    }
    if (sigsetjmp(w.on_failure, 1) == 0) {
        int i = take_ready();
        w.current = i;
        context.self = &w.fibers[i];
        emu_switch(&w.main.stack_pointer, w.fibers[i].coroutine.stack_pointer);
    }
    w.current = -1;
}

static void catch_faults() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, nullptr);
        sigaction(SIGBUS, &action, nullptr);
    });
}

static std::mutex pool_lock;
static std::vector<Worker*> pool;

constexpr size_t SIGNAL_STACK_BYTES = 64 * 1024;

static Worker* take_worker(const Launch& launch, const char* name) {
    Worker* w = nullptr;
    {
        std::lock_guard<std::mutex> held(pool_lock);
        if (!pool.empty()) {
            w = pool.back();
            pool.pop_back();
        }
    }
    if (!w) {
        w = new Worker;
        w->signal_stack = static_cast<char*>(malloc(SIGNAL_STACK_BYTES));
        w->arena = static_cast<unsigned char*>(guarded_alloc(ARENA_BYTES));
    }
    size_t threads = (size_t)launch.block.x * launch.block.y * launch.block.z;
    if (w->capacity < threads) {
        if (w->stacks) munmap(w->stacks, w->capacity * STACK_BYTES);
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* stacks = mmap(nullptr, threads * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (stacks == MAP_FAILED) abort();
        w->stacks = static_cast<char*>(stacks);
        w->capacity = threads;
        w->fibers.resize(threads);
        w->warps.resize((threads + 31) / 32);
        w->ready.resize(threads + 1);
    }
    if (launch.shared_bytes != w->dynamic_bytes) {
        if (w->dynamic) guarded_free(w->dynamic);
        w->dynamic = launch.shared_bytes ? static_cast<unsigned char*>(guarded_alloc(launch.shared_bytes)) : nullptr;
        w->dynamic_bytes = launch.shared_bytes;
    }
    w->threads = (int)threads;
    w->kernel = name;
    w->failed = false;
    w->error.clear();
    w->most_declared = 0;
    w->order = config().order;
    w->race = config().race;
    return w;
}

// Everything that the host threads of one launch share.
struct Job {
    const char* name;
    const Launch& launch;
    void (*body)(void*);
    void* argument;
    Config how;
    std::vector<size_t> order;  // of blocks; empty: as they are numbered
    size_t blocks;
    u32 first_serial;
    std::atomic<size_t> next{0};
    size_t most_shared;         // declared and dynamic
    std::atomic<bool> failed{false};
    std::mutex lock;
    std::string error;
    size_t declared = 0;        // the most of any block
};

static void work(Job& job) {
    config() = job.how;
    Worker* w = take_worker(job.launch, job.name);
    stack_t mine{}, before{};
    mine.ss_sp = w->signal_stack;
    mine.ss_size = SIGNAL_STACK_BYTES;
    sigaltstack(&mine, &before);
    w->body = job.body;
    w->argument = job.argument;
    w->first_serial = job.first_serial;
    w->most_shared = job.most_shared;
    dim3 grid = job.launch.grid;
    for (size_t i; !job.failed && (i = job.next++) < job.blocks;) {
        size_t k = job.order.empty() ? i : job.order[i];
        w->random = (job.how.seed * 1000003 + k + 1) * 0x9E3779B97F4A7C15ull | 1;
        w->priority = w->random >> 20;
        w->serial = job.first_serial + (u32)k;
        unsigned x = (unsigned)(k % grid.x), y = (unsigned)(k / grid.x % grid.y);
        run_block(*w, {x, y, (unsigned)(k / ((size_t)grid.x * grid.y))}, job.launch);
        if (w->failed) {
            job.failed = true;
            std::lock_guard<std::mutex> held(job.lock);
            job.error = w->error;
        }
    }
    before.ss_flags &= ~SS_ONSTACK;
    sigaltstack(&before, nullptr);
    worker = nullptr;
    {
        std::lock_guard<std::mutex> held(job.lock);
        job.declared = std::max(job.declared, w->most_declared);
    }
    std::lock_guard<std::mutex> held(pool_lock);
    pool.push_back(w);
}

static void choose_block_order(Job& job) {
    if (job.how.order == Order::forward) return;
    job.order.resize(job.blocks);
    for (size_t i = 0; i < job.blocks; i++) job.order[i] = job.blocks - 1 - i;
    if (job.how.order != Order::random) return;
    u64 random = job.how.seed * 0x9E3779B97F4A7C15ull | 1;
    for (size_t i = job.blocks; i > 1; i--) {
        random = step(random);
        std::swap(job.order[i - 1], job.order[random % i]);
    }
}

int launch(const char* name, const Launch& launch, void (*body)(void*), void* argument) {
    static std::mutex race_lock;  // the race checker watches one launch at a time
    static std::atomic<u32> serials{1};
    size_t threads = (size_t)launch.block.x * launch.block.y * launch.block.z;
    size_t blocks = (size_t)launch.grid.x * launch.grid.y * launch.grid.z;
    if (threads < 1 || threads > 1024 || blocks < 1 || launch.shared_bytes > MAX_SHARED) {
        last_message = std::string(name) + ": invalid launch configuration";
        return 1;
    }
    catch_faults();
    Job job{name, launch, body, argument, config(), {}, blocks, serials.fetch_add((u32)blocks), {}, shared_limit, {}, {}, {}};
    choose_block_order(job);
    // Small launches are not worth another host thread.
    size_t helpers = threads * blocks < 4096 ? 0 : std::min<size_t>(std::thread::hardware_concurrency(), blocks) - 1;
    std::unique_lock<std::mutex> alone(race_lock, std::defer_lock);
    if (job.how.race) {
        alone.lock();
        helpers = 0;
    }
    std::vector<std::thread> others;
    for (size_t i = 0; i < helpers; i++) others.emplace_back([&job] { work(job); });
    work(job);
    for (std::thread& t : others) t.join();
    last_message = job.error;
    shared_declared = job.declared;
    return job.failed ? 1 : 0;
}

}  // namespace emu

// How the launches of this host thread run: 0 forward, 1 reverse, 2 random order; with or without
// the race checker, which sees kernels compiled with -fsanitize=thread.
extern "C" __attribute__((visibility("default"))) void emu_configure(int order, uint64_t seed, int race) {
    emu::config() = {(emu::Order)order, seed, race != 0};
}
