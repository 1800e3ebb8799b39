// A stand-in for libnccl.so: the part of its interface that gradtx calls. Ranks are threads of one process,
// each with a device of the stand-in driver; memory of all devices is the host's. They find each other by
// the id of their group, and everything that they do together is a meeting: a rank's part of it is done when all
// ranks have come, and its stream waits there. Sums are taken in the order of ranks; but unless NCCL_NVLS_ENABLE=0,
// as on machines whose switches add up values, in an order that differs from call to call. To be destroyed together,
// ranks wait for each other; who aborts waits for nobody, and of the others only those hear of it that wait for him.
// Operations that do not fit each other, which would hang or destroy memory with NCCL itself, end the group
// with a sentence; so does a rank that gives up.
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

// The stand-in driver's (driver.cpp, memory.cpp, streams.cpp).
extern "C" int emu_current_device();
extern "C" int emu_is_allocated(const void* p, size_t bytes);
extern "C" int emu_enqueue_beside(void* stream, int (*run)(void*), void (*drop)(void*), void* argument);

#define API extern "C" __attribute__((visibility("default"))) Result

enum Result : int {
    SUCCESS = 0,
    UNHANDLED_CUDA_ERROR = 1,
    SYSTEM_ERROR = 2,
    INVALID_ARGUMENT = 4,
    INVALID_USAGE = 5,
    REMOTE_ERROR = 6,
};
constexpr int DRIVER_NOT_READY = 600;
enum Type : int { UINT8 = 1, FLOAT32 = 7 };
enum Operator : int { SUM = 0 };
struct UniqueId { char bytes[128]; };

enum class Kind { reduce, reduce_scatter, broadcast, all_gather };
static const char* const NAMES[] = {"reduce", "reduce-scatter", "broadcast", "all-gather"};

struct Operation {
    Kind kind;
    const char* in;
    char* out;
    size_t count;  // as the caller gives it: elements of one share where there are shares
    Type type;
    int root;

    size_t bytes() const { return count * (type == FLOAT32 ? 4 : 1); }
    std::string text() const {
        std::string to = kind == Kind::reduce || kind == Kind::broadcast ? ", rank " + std::to_string(root) : "";
        return std::string(NAMES[(int)kind]) + " of " + std::to_string(count) + " of type " + std::to_string(type) + to;
    }
};

// What the ranks do together at one time: one operation, or a group of them.
struct Meeting {
    std::map<int, std::vector<Operation>> brought;  // by rank
    bool done = false;
};

struct World {
    int size = 0, closed = 0;
    std::map<int, int> devices;  // of the ranks that have joined
    std::map<uint64_t, Meeting> meetings;
    std::string wrong;  // why nothing more will be done
    Result error = SUCCESS;

    void fail(Result e, const std::string& why) {
        if (wrong.empty()) error = e, wrong = why;
    }
};
struct Comm {
    std::shared_ptr<World> world;
    int rank, device;
    uint64_t next = 0;          // meeting
    uint64_t outstanding = 0;   // meetings that are not done
    bool left = false;
};

constexpr auto PATIENCE = std::chrono::seconds(60);
static std::mutex lock;
static std::condition_variable changed;
static std::map<std::string, std::shared_ptr<World>> worlds;
static thread_local std::string last_error;
static thread_local bool broken = false;
// What is wrong about a device: ranks with it cannot join, and the others hear of it or do not; or cannot sum.
enum class Fault { none, join, silent_join, sums };
static std::map<int, Fault> faults;
static Fault fault_of(int device) {
    auto found = faults.find(device);
    return found == faults.end() ? Fault::none : found->second;
}
static thread_local int depth = 0;
struct Queued { Comm* comm; void* stream; Operation operation; };
static thread_local std::vector<Queued> queued;

static Result refuse(Result e, const std::string& why) {
    last_error = why;
    return e;
}

// One operation of a meeting: `all` has that of every rank.
static void carry_out(const std::vector<Operation>& all) {
    size_t size = all.size(), bytes = all[0].bytes();
    static size_t calls;
    const char* nvls = getenv("NCCL_NVLS_ENABLE");
    size_t first = nvls && !strcmp(nvls, "0") ? 0 : calls++;
    auto sum = [&](size_t offset) {
        std::vector<float> total(all[0].count);
        for (size_t turn = 0; turn < size; turn++)
            for (size_t i = 0; i < total.size(); i++) {
                float x;
                memcpy(&x, all[(first + turn) % size].in + offset + 4 * i, 4);
                total[i] = turn == 0 ? x : total[i] + x;
            }
        return total;
    };
    switch (all[0].kind) {
        case Kind::reduce: memcpy(all[all[0].root].out, sum(0).data(), bytes); break;
        case Kind::reduce_scatter:
            for (size_t rank = 0; rank < size; rank++) memcpy(all[rank].out, sum(rank * bytes).data(), bytes);
            break;
        case Kind::broadcast:
            for (auto& to : all) memmove(to.out, all[all[0].root].in, bytes);
            break;
        case Kind::all_gather:
            for (auto& to : all)
                for (size_t rank = 0; rank < size; rank++) memmove(to.out + rank * bytes, all[rank].in, bytes);
    }
}

// All ranks have come: does what they brought, if it fits.
static void meet(World& world, Meeting& meeting) {
    auto& first = meeting.brought[0];
    for (int rank = 1; rank < world.size; rank++) {
        auto& other = meeting.brought[rank];
        if (other.size() != first.size())
            return world.fail(INVALID_USAGE, "rank 0 brings " + std::to_string(first.size()) + " operations, rank " +
                                                 std::to_string(rank) + " " + std::to_string(other.size()));
        for (size_t i = 0; i < first.size(); i++)
            if (other[i].text() != first[i].text())
                return world.fail(INVALID_USAGE, "rank 0 calls " + first[i].text() + ", rank " + std::to_string(rank) +
                                                     " " + other[i].text());
    }
    for (size_t i = 0; i < first.size(); i++) {
        std::vector<Operation> all;
        for (int rank = 0; rank < world.size; rank++) all.push_back(meeting.brought[rank][i]);
        carry_out(all);
    }
    meeting.done = true;
}

// A rank's part of a meeting, as work of a stream.
struct Part {
    Comm* comm;
    uint64_t number;
    std::vector<Operation> operations;

    // Comes, if it has not yet, and sees whether all have. When the group has failed, nothing is done.
    int attend() {
        std::lock_guard<std::mutex> held(lock);
        World& world = *comm->world;
        if (comm->left || !world.wrong.empty()) return 0;
        Meeting& meeting = world.meetings[number];
        bool is_new = meeting.brought.emplace(comm->rank, operations).second;
        if (is_new && (int)meeting.brought.size() == world.size) meet(world, meeting);
        if (!meeting.done) return world.wrong.empty() ? DRIVER_NOT_READY : 0;
        comm->outstanding--;
        return 0;
    }
};

static Result put_off(Comm* comm, void* stream, std::vector<Operation> operations) {
    auto run = [](void* part) { return static_cast<Part*>(part)->attend(); };
    auto drop = [](void* part) { delete static_cast<Part*>(part); };
    comm->outstanding++;
    bool fine = emu_enqueue_beside(stream, run, drop, new Part{comm, comm->next++, std::move(operations)}) == 0;
    return fine ? SUCCESS : refuse(UNHANDLED_CUDA_ERROR, "the driver refused it");
}

// Everything of one communicator and stream becomes one meeting.
static Result end_group() {
    std::vector<Operation> operations;
    for (auto& item : queued) {
        if (item.comm != queued[0].comm || item.stream != queued[0].stream)
            return refuse(INVALID_USAGE, "a group of more than one communicator or stream");
        operations.push_back(item.operation);
    }
    return operations.empty() ? SUCCESS : put_off(queued[0].comm, queued[0].stream, operations);
}

static Result add(Comm* comm, void* stream, Operation operation) {
    World& world = *comm->world;
    size_t whole = operation.bytes() * world.size, own = operation.bytes() * comm->rank;
    bool scatters = operation.kind == Kind::reduce_scatter, gathers = operation.kind == Kind::all_gather;
    if (comm->device != emu_current_device()) return refuse(INVALID_USAGE, "the thread's device is another one");
    if (operation.root < 0 || operation.root >= world.size) return refuse(INVALID_ARGUMENT, "there is no such root");
    bool sums = scatters || operation.kind == Kind::reduce;
    if (sums && fault_of(comm->device) == Fault::sums) return refuse(UNHANDLED_CUDA_ERROR, "invalid device ordinal");
    if (operation.type != (sums ? FLOAT32 : UINT8)) return refuse(INVALID_ARGUMENT, "not a type of this stand-in");
    const char *in = operation.in, *out = operation.out;
    if (!emu_is_allocated(in, scatters ? whole : operation.bytes()) || !emu_is_allocated(out, gathers ? whole : operation.bytes()))
        return refuse(INVALID_ARGUMENT, operation.text() + ": not memory of a device");
    bool in_place = scatters ? out == in + own : gathers ? in == out + own : in == out;
    if (!in_place) return refuse(INVALID_ARGUMENT, operation.text() + ": not in place, as this stand-in wants it");
    queued.push_back({comm, stream, operation});
    if (depth > 0) return SUCCESS;
    Result result = end_group();
    queued.clear();
    return result;
}

API ncclGetVersion(int* version) {
    *version = 22602;
    return broken ? refuse(SYSTEM_ERROR, "this thread's library is broken") : SUCCESS;
}
// Whether the library fails on this thread.
extern "C" void emu_break_nccl(int is_broken) { broken = is_broken != 0; }

// What is wrong about a device from now on, as in `Fault`.
extern "C" void emu_nccl_fault(int device, int fault) {
    std::lock_guard<std::mutex> held(lock);
    faults[device] = static_cast<Fault>(fault);
}

API ncclGetUniqueId(UniqueId* id) {
    static int made;
    std::lock_guard<std::mutex> held(lock);
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "stand-in group %d", ++made);
    return SUCCESS;
}
API ncclCommInitRank(Comm** comm, int size, UniqueId id, int rank) {
    std::unique_lock<std::mutex> held(lock);
    auto& place = worlds[std::string(id.bytes, sizeof id.bytes)];
    if (!place) place = std::make_shared<World>();
    auto world = place;
    if (world->size == 0) world->size = size;
    int device = emu_current_device();
    Fault fault = fault_of(device);
    if (fault == Fault::join) world->fail(UNHANDLED_CUDA_ERROR, "invalid device ordinal");
    if (fault == Fault::silent_join) return refuse(UNHANDLED_CUDA_ERROR, "invalid device ordinal");
    for (auto [other, its_device] : world->devices)
        if (its_device == device)
            world->fail(INVALID_USAGE, "ranks " + std::to_string(other) + " and " + std::to_string(rank) + " have the same device");
    if (world->size != size || rank < 0 || rank >= size || world->devices.count(rank))
        world->fail(INVALID_ARGUMENT, "a rank or size that does not fit the group");
    if (world->wrong.empty()) world->devices.emplace(rank, device);
    changed.notify_all();
    auto all_are_there = [&] { return (int)world->devices.size() == size; };
    auto decided = [&] { return all_are_there() || !world->wrong.empty(); };
    if (!changed.wait_for(held, PATIENCE, decided)) world->fail(SYSTEM_ERROR, "not all ranks have come");
    if (!all_are_there()) return refuse(world->error, world->wrong);
    *comm = new Comm{world, rank, device};
    return SUCCESS;
}

// A rank's membership ends; its memory stays, for work that was put off may still look at it.
API ncclCommDestroy(Comm* comm) {
    std::unique_lock<std::mutex> held(lock);
    World& world = *comm->world;
    if (comm->outstanding > 0) return refuse(INVALID_USAGE, "destroyed while something is not done");
    comm->left = true;
    world.closed++;
    changed.notify_all();
    auto decided = [&] { return world.closed == world.size || !world.wrong.empty(); };
    if (!changed.wait_for(held, PATIENCE, decided)) return refuse(SYSTEM_ERROR, "not all ranks have left");
    return SUCCESS;
}
API ncclCommAbort(Comm* comm) {
    std::lock_guard<std::mutex> held(lock);
    comm->left = true;
    if (comm->outstanding > 0) comm->world->fail(REMOTE_ERROR, "rank " + std::to_string(comm->rank) + " has given up");
    changed.notify_all();
    return SUCCESS;
}
API ncclCommGetAsyncError(Comm* comm, Result* error) {
    std::lock_guard<std::mutex> held(lock);
    *error = comm->world->error;
    return SUCCESS;
}

API ncclGroupStart() {
    depth++;
    return SUCCESS;
}
API ncclGroupEnd() {
    if (depth == 0) return refuse(INVALID_USAGE, "no group was begun");
    Result result = --depth == 0 ? end_group() : SUCCESS;
    if (depth == 0) queued.clear();
    return result;
}

static Operation operation(Kind kind, const void* in, void* out, size_t count, Type type, int root) {
    return {kind, static_cast<const char*>(in), static_cast<char*>(out), count, type, root};
}
API ncclReduce(const void* in, void* out, size_t count, Type type, Operator op, int root, Comm* comm, void* stream) {
    if (op != SUM) return refuse(INVALID_ARGUMENT, "not a sum");
    return add(comm, stream, operation(Kind::reduce, in, out, count, type, root));
}
API ncclReduceScatter(const void* in, void* out, size_t count, Type type, Operator op, Comm* comm, void* stream) {
    if (op != SUM) return refuse(INVALID_ARGUMENT, "not a sum");
    return add(comm, stream, operation(Kind::reduce_scatter, in, out, count, type, 0));
}
API ncclBroadcast(const void* in, void* out, size_t count, Type type, int root, Comm* comm, void* stream) {
    return add(comm, stream, operation(Kind::broadcast, in, out, count, type, root));
}
API ncclAllGather(const void* in, void* out, size_t count, Type type, Comm* comm, void* stream) {
    return add(comm, stream, operation(Kind::all_gather, in, out, count, type, 0));
}

extern "C" const char* ncclGetErrorString(Result result) {
    switch (result) {
        case SUCCESS: return "no error";
        case UNHANDLED_CUDA_ERROR: return "unhandled cuda error";
        case SYSTEM_ERROR: return "unhandled system error";
        case INVALID_ARGUMENT: return "invalid argument";
        case INVALID_USAGE: return "invalid usage";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
    }
    return "unknown result code";
}
extern "C" const char* ncclGetLastError(Comm* comm) {
    if (!comm) return last_error.c_str();
    std::lock_guard<std::mutex> held(lock);
    return comm->world->wrong.empty() ? last_error.c_str() : comm->world->wrong.c_str();
}
