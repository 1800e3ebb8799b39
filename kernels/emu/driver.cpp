// A stand-in for libcuda.so: the part of the driver's interface that gradtx calls, carried out by
// the emulator. A module is a shared object for the host, made from the same .cu files. When a
// stream does what is put into it, streams.cpp says; a failed launch is reported by the call that
// makes the stream do it, and the next one may go on.
#include "driver.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <elf.h>
#include <mutex>
#include <string>
#include <unistd.h>
#include <unordered_map>
#include <vector>

// A device: what an A100 has of everything that a launch depends on, but for registers, and 8 GiB of memory.
constexpr size_t MEMORY = 8ull << 30;
constexpr int MAX_DEVICES = 16;
constexpr int PLAIN_SHARED = 48 * 1024;
constexpr int REGISTERS = 64 * 1024, MAX_THREADS = 1024, MAX_GRID_X = 0x7fffffff, MAX_GRID_YZ = 65535;

// Bytes of shared memory that a block can ask for: EMU_SHARED, or what emu_shared has set for this
// host thread; else those of an A100.
static int& most_shared() {
    auto of_environment = [] {
        const char* text = getenv("EMU_SHARED");
        return text ? std::clamp(atoi(text), PLAIN_SHARED, (int)emu::MAX_SHARED) : 163 * 1024;
    };
    static thread_local int bytes = of_environment();
    return bytes;
}
extern "C" __attribute__((visibility("default"))) void emu_shared(int bytes) { most_shared() = bytes; }

// Compute capability: EMU_CAPABILITY, or what emu_capability has set for this host thread, as ten times the major
// number and the minor one; else that of an A100. All that it changes is which kernels are launched.
static int& capability() {
    auto of_environment = [] {
        const char* text = getenv("EMU_CAPABILITY");
        return text ? atoi(text) : 80;
    };
    static thread_local int value = of_environment();
    return value;
}
extern "C" __attribute__((visibility("default"))) void emu_capability(int value) { capability() = value; }

// Faults that tests plant: kernels whose names hold EMU_FAIL fail, those with EMU_HANG never end.
static bool named_by(const char* variable, const std::string& kernel) {
    const char* text = getenv(variable);
    return text && *text && kernel.find(text) != std::string::npos;
}

struct Function {
    std::string name;
    int (*run)(const unsigned*, size_t, void**);
    std::vector<size_t> parameters;  // their sizes
    int permitted_shared = 0;  // dynamic, on request; 0: nothing was asked for
    size_t declared_shared = 0;  // of its last launch: before the first nobody knows
};
struct Module {
    void* handle;
    std::unordered_map<std::string, Function> functions;
};

static char contexts[MAX_DEVICES];
static thread_local void* context_of_thread;
void* current_context() { return context_of_thread; }

// How many devices there are: EMU_DEVICES, or what emu_devices has set for this host thread. All
// have the same memory, that of the host.
static int& devices() {
    auto of_environment = [] {
        const char* text = getenv("EMU_DEVICES");
        return text ? std::clamp(atoi(text), 0, MAX_DEVICES) : 1;
    };
    static thread_local int count = of_environment();
    return count;
}
extern "C" void emu_devices(int count) { devices() = std::clamp(count, 0, MAX_DEVICES); }
// For other stand-ins: the device of this thread's context.
extern "C" int emu_current_device() { return static_cast<int>(static_cast<char*>(current_context()) - contexts); }

API cuInit(unsigned) { return SUCCESS; }
API cuDriverGetVersion(int* version) {
    *version = 12040;
    return SUCCESS;
}
API cuDeviceGetCount(int* count) {
    *count = devices();
    return SUCCESS;
}
API cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return 0 <= ordinal && ordinal < devices() ? SUCCESS : INVALID_DEVICE;
}
API cuDeviceGetPCIBusId(char* id, int size, int device) {
    snprintf(id, size, "0000:%02X:00.0", device + 1);
    return SUCCESS;
}
API cuDeviceGetName(char* name, int size, int) {
    snprintf(name, size, "emulated device");
    return SUCCESS;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = MEMORY;
    return SUCCESS;
}
API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 1: *value = MAX_THREADS; break;     // threads per block
        case 5: *value = MAX_GRID_X; break;      // blocks of a grid
        case 6:
        case 7: *value = MAX_GRID_YZ; break;
        case 8: *value = PLAIN_SHARED; break;     // shared memory per block
        case 10: *value = 32; break;              // warp size
        case 12: *value = REGISTERS; break;       // registers per block
        case 16: *value = 8; break;               // multiprocessors
        case 75: *value = capability() / 10; break;  // compute capability, major
        case 76: *value = capability() % 10; break;  // and minor
        case 81: *value = 164 * 1024; break;      // shared memory per multiprocessor
        case 97: *value = most_shared(); break;   // shared memory per block on request
        default: *value = 0;
    }
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &contexts[device];
    return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void* context) {
    context_of_thread = context;
    return SUCCESS;
}
API cuCtxGetCurrent(void** context) {
    *context = current_context();
    return SUCCESS;
}
// Memory of a device is given out in pages of 2 MiB. Small allocations share them, and a page that was taken for
// those stays with the device.
struct Memory {
    size_t pages = 0;        // bytes of whole pages
    size_t small = 0;        // bytes of allocations that share pages,
    size_t small_pages = 0;  // and of their pages
    size_t most = 0;         // bytes that were in use at a time
    std::unordered_map<Pointer, size_t> sizes;

    size_t used() const { return pages + small_pages; }
};
constexpr size_t PAGE = 2 << 20, SMALL = 1 << 20, UNIT = 512;
static std::mutex memory_lock;
static Memory memories[MAX_DEVICES];
static Memory& own_memory() { return memories[emu_current_device()]; }
static size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

API cuMemAlloc_v2(Pointer* p, size_t bytes) {
    if (bytes == 0) return INVALID_VALUE;
    if (Result result = outside_of_capture()) return result;
    std::lock_guard<std::mutex> held(memory_lock);
    Memory& m = own_memory();
    bool is_small = bytes < SMALL;
    size_t taken = rounded(bytes, is_small ? UNIT : PAGE);
    size_t small = m.small + (is_small ? taken : 0), small_pages = std::max(m.small_pages, rounded(small, PAGE));
    size_t pages = m.pages + (is_small ? 0 : taken);
    if (bytes > MEMORY || pages + small_pages > MEMORY) return OUT_OF_MEMORY;
    void* memory = emu::guarded_alloc(bytes);
    if (!memory) return OUT_OF_MEMORY;
    *p = reinterpret_cast<Pointer>(memory);
    m.sizes[*p] = bytes;
    m.pages = pages, m.small = small, m.small_pages = small_pages;
    m.most = std::max(m.most, m.used());
    return SUCCESS;
}
API cuMemFree_v2(Pointer p) {
    if (Result result = outside_of_captures_of_context()) return result;
    std::lock_guard<std::mutex> held(memory_lock);
    Memory& m = own_memory();
    auto found = m.sizes.find(p);
    if (found == m.sizes.end()) return INVALID_VALUE;
    bool is_small = found->second < SMALL;
    (is_small ? m.small : m.pages) -= rounded(found->second, is_small ? UNIT : PAGE);
    m.sizes.erase(found);
    emu::guarded_free(reinterpret_cast<void*>(p));
    return SUCCESS;
}
API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    std::lock_guard<std::mutex> held(memory_lock);
    *total = MEMORY;
    *free_bytes = MEMORY - own_memory().used();
    return SUCCESS;
}
// For tests: the most bytes that were in use at a time on the device of this thread's context, from now on or so far.
extern "C" __attribute__((visibility("default"))) void emu_peak_memory(size_t* bytes, int from_now_on) {
    std::lock_guard<std::mutex> held(memory_lock);
    Memory& m = own_memory();
    if (from_now_on) m.most = m.used();
    *bytes = m.most;
}
API cuMemHostAlloc(void** p, size_t bytes, unsigned) {
    if (Result result = outside_of_captures_of_context()) return result;
    *p = malloc(bytes);
    return *p ? SUCCESS : OUT_OF_MEMORY;
}
API cuMemFreeHost(void* p) {
    if (Result result = outside_of_captures_of_context()) return result;
    free(p);
    return SUCCESS;
}
static void* host(Pointer p) { return reinterpret_cast<void*>(p); }
// Whether all of it is one allocation's; else nothing is touched, as a device would refuse.
static bool is_ours(Pointer p, size_t bytes) { return emu::is_allocated(host(p), bytes); }
static Result copy(void* stream, void* to, const void* from, size_t bytes, bool allowed) {
    return enqueue(stream, false, [=] {
        if (!allowed) return INVALID_VALUE;
        memcpy(to, from, bytes);
        return SUCCESS;
    });
}
API cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) {
    return copy(stream, host(to), from, bytes, is_ours(to, bytes));
}
API cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) {
    return copy(stream, to, host(from), bytes, is_ours(from, bytes));
}
API cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void* stream) {
    return copy(stream, host(to), host(from), bytes, is_ours(from, bytes) && is_ours(to, bytes));
}
template <class T> static Result set(void* stream, Pointer to, T value, size_t count) {
    if (to % sizeof(T) || !is_ours(to, count * sizeof(T))) return INVALID_VALUE;
    return enqueue(stream, false, [=] {
        for (size_t i = 0; i < count; i++) static_cast<T*>(host(to))[i] = value;
        return SUCCESS;
    });
}
API cuMemsetD8Async(Pointer to, unsigned char value, size_t n, void* stream) { return set(stream, to, value, n); }
API cuMemsetD16Async(Pointer to, unsigned short value, size_t n, void* stream) { return set(stream, to, value, n); }
API cuMemsetD32Async(Pointer to, unsigned value, size_t n, void* stream) { return set(stream, to, value, n); }

// An image is a shared object of the host; what is for a real device is refused.
API cuModuleLoadData(void** module, const void* image) {
    auto* header = static_cast<const Elf64_Ehdr*>(image);
    if (Result result = outside_of_captures_of_context()) return result;
    if (reinterpret_cast<uintptr_t>(image) % 16) return INVALID_IMAGE;  // its headers are read where they lie
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_machine != EM_X86_64) return INVALID_IMAGE;
    size_t bytes = header->e_shoff + (size_t)header->e_shentsize * header->e_shnum;
    // A file of its own under a name of its own: the loader takes a name it has seen for the same object.
    char path[] = "/tmp/emulated-module-XXXXXX";
    int file = mkstemp(path);
    if (file < 0) return OUT_OF_MEMORY;
    bool written = write(file, image, bytes) == (ssize_t)bytes;
    close(file);
    void* handle = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    unlink(path);
    if (!handle) {
        fprintf(stderr, "emulated driver: %s\n", dlerror());
        return INVALID_IMAGE;
    }
    *module = new Module{handle, {}};
    return SUCCESS;
}
API cuModuleUnload(void* module) {
    if (Result result = outside_of_captures_of_context()) return result;
    delete static_cast<Module*>(module);  // the object stays mapped: a fault may still name its code
    return SUCCESS;
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
    auto* m = static_cast<Module*>(module);
    void* entry = dlsym(m->handle, (std::string("emu_launch_") + name).c_str());
    void* describe = dlsym(m->handle, (std::string("emu_parameters_") + name).c_str());
    if (!entry || !describe) return NOT_FOUND;
    auto run = reinterpret_cast<int (*)(const unsigned*, size_t, void**)>(entry);
    const size_t* sizes;
    unsigned count = reinterpret_cast<unsigned (*)(const size_t**)>(describe)(&sizes);
    *function = &m->functions.try_emplace(name, Function{name, run, {sizes, sizes + count}}).first->second;
    return SUCCESS;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
    constexpr int MAX_DYNAMIC_SHARED = 8;
    if (Result result = outside_of_captures_of_context()) return result;
    if (attribute != MAX_DYNAMIC_SHARED) return SUCCESS;
    auto* f = static_cast<Function*>(function);
    if (value < 0 || value + (int)f->declared_shared > most_shared()) return INVALID_VALUE;
    f->permitted_shared = value;
    return SUCCESS;
}
API cuFuncGetAttribute(int* value, int attribute, void* function) {
    switch (attribute) {
        case 0: *value = MAX_THREADS; break;  // threads per block
        case 1: *value = (int)static_cast<Function*>(function)->declared_shared; break;
        default: *value = 0;  // registers are not modelled
    }
    return SUCCESS;
}

static thread_local std::string launch_error;

// A launch with its own copy of the arguments.
struct Launched {
    Function* function;
    unsigned dims[6];
    size_t shared_bytes, most_shared;
    std::vector<std::vector<char>> arguments;

    Result run() {
        std::vector<void*> pointers;
        for (auto& argument : arguments) pointers.push_back(argument.data());
        launch_error.clear();
        while (named_by("EMU_HANG", function->name)) sleep(1);
        emu::limit_shared(most_shared);
        int failed = function->run(dims, shared_bytes, pointers.data());
        function->declared_shared = emu::declared_shared();
        if (!failed) return SUCCESS;
        launch_error = emu::last_error();
        if (launch_error.find("illegal memory") != std::string::npos) return ILLEGAL_ADDRESS;
        return launch_error.find("invalid launch") != std::string::npos ? INVALID_VALUE : LAUNCH_FAILED;
    }
};

API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared_bytes, void* stream, void** arguments, void** extra) {
    auto* f = static_cast<Function*>(function);
    launch_error.clear();
    if (extra) return NOT_SUPPORTED;
    // What is declared counts too; the emulator knows how much when the kernel runs.
    int limit = f->permitted_shared ? f->permitted_shared : PLAIN_SHARED;
    if ((int)shared_bytes > limit || gx > (unsigned)MAX_GRID_X || gy > (unsigned)MAX_GRID_YZ ||
        gz > (unsigned)MAX_GRID_YZ || bz > 64) {
        launch_error = f->name + ": a launch that no device takes";
        return INVALID_VALUE;
    }
    if (named_by("EMU_FAIL", f->name)) {
        launch_error = f->name + ": a planted failure";
        return LAUNCH_FAILED;
    }
    size_t most = f->permitted_shared ? most_shared() : PLAIN_SHARED;
    Launched launched{f, {gx, gy, gz, bx, by, bz}, shared_bytes, most, {}};
    for (size_t i = 0; i < f->parameters.size(); i++) {
        auto* from = static_cast<const char*>(arguments[i]);
        launched.arguments.emplace_back(from, from + f->parameters[i]);
    }
    return enqueue(stream, true, [launched]() mutable { return launched.run(); });
}

API cuGetErrorName(int error, const char** name) {
    switch (error) {
        case SUCCESS: *name = "CUDA_SUCCESS"; break;
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
        case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
        case NOT_READY: *name = "CUDA_ERROR_NOT_READY"; break;
        case CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case CAPTURE_INVALIDATED: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
        case CAPTURE_UNJOINED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"; break;
        case CAPTURE_ISOLATION: *name = "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"; break;
        case ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        case LAUNCH_FAILED: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
        default: *name = "CUDA_ERROR_NOT_SUPPORTED";
    }
    return SUCCESS;
}
API cuGetErrorString(int error, const char** text) {
    cuGetErrorName(error, text);
    if (error && !launch_error.empty()) *text = launch_error.c_str();
    return SUCCESS;
}
