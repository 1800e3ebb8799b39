// Streams, events and graphs of the stand-in driver.
//
// A device does what is in two streams in any order that events allow, and whoever forgets an
// event must find out. So one kind of stream is late: it does nothing until somebody waits for
// it, the host or another stream by an event. By default those streams are late that have never
// launched a kernel, which is where copies go that run beside the kernels: data that nobody
// waited for is not there. With `emu_late_kernels` it is the other way round: a copy that
// overwrites what a kernel has still to read does so before.
//
// A stream that is being captured does nothing; what is put into it becomes a graph. Another stream
// that waits for an event of the capture belongs to it from then on, and becomes a branch of the graph.
// Branches are late as streams are: by default those beside the first do nothing until it waits for
// them, with `emu_late_kernels` it is the first.
//
// Calls that a capture makes illegal fail and invalidate it: those of the thread that captures that would wait or
// take memory, and those of any thread that concern the whole context. What is then put into it fails, as on a device.
#include "driver.h"

#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace {

struct Stream;

// One recording of an event.
struct Mark {
    Stream* stream;
    bool done = false;
    double milliseconds = 0;
};

typedef std::function<Result()> Operation;

// An operation of a branch; or, without one, a point of it: passed, or waited for.
struct Node {
    size_t branch;
    Operation run;
    size_t mark;
    bool waits;
};
struct Graph {
    std::vector<Node> nodes;
    std::vector<size_t> marks;  // the branch of each
};
struct Capture {
    Graph graph;
    std::vector<Stream*> branches;
    std::atomic<bool> spoiled{false};  // something was asked that a capture makes illegal
};

struct Event {
    std::shared_ptr<Mark> last;
    std::weak_ptr<Capture> capture;  // where it was recorded in one
    size_t mark = 0;
};

struct Stream {
    void* context = current_context();
    std::recursive_mutex lock;
    std::deque<Operation> waiting;
    bool has_launched = false;
    std::shared_ptr<Capture> captured;  // while it is
    size_t branch = 0;
};

bool late_from_environment() {
    const char* value = getenv("EMU_LATE");
    return value && std::string(value) == "kernels";
}
bool& late_kernels() {
    static thread_local bool late = late_from_environment();
    return late;
}

// Those that this thread has created and not destroyed.
std::set<Stream*>& own_streams() {
    static thread_local std::set<Stream*> streams;
    return streams;
}
thread_local Stream* capturing;
// Those of all threads.
std::mutex captures_lock;
std::set<Stream*> captures;

// Does what waits in a stream, in order, all of it or until a mark is passed; the first failure. Stops before
// an operation that is not ready, for it waits for somebody else: then that is the result.
Result drain(Stream* s, const Mark* until = nullptr) {
    std::lock_guard<std::recursive_mutex> held(s->lock);
    Result first = SUCCESS;
    while (!s->waiting.empty() && !(until && until->done)) {
        Operation next = std::move(s->waiting.front());
        s->waiting.pop_front();
        Result result = next();
        if (result == NOT_READY) {
            s->waiting.push_front(std::move(next));
            return first == SUCCESS ? NOT_READY : first;
        }
        if (first == SUCCESS) first = result;
    }
    return first;
}

// Asks until it is ready; what nobody makes ready in a minute has failed.
template <class Ask> Result until_ready(Ask ask) {
    auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    Result result;
    while ((result = ask()) == NOT_READY && std::chrono::steady_clock::now() < end) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return result == NOT_READY ? LAUNCH_FAILED : result;
}

// A launched graph: the nodes of each branch that are still to be done.
struct Running {
    const Graph& graph;
    std::vector<std::deque<const Node*>> branches;
    std::vector<bool> passed;
    Result first = SUCCESS;

    explicit Running(const Graph& g) : graph(g), passed(g.marks.size()) {
        for (const Node& node : g.nodes) {
            if (node.branch >= branches.size()) branches.resize(node.branch + 1);
            branches[node.branch].push_back(&node);
        }
    }
    // Goes along a branch, to a mark or to its end.
    void advance(size_t branch, const size_t* until = nullptr) {
        auto& left = branches[branch];
        while (!left.empty() && !(until && passed[*until])) {
            const Node* node = left.front();
            left.pop_front();
            if (node->run) {
                Result result = node->run();
                if (first == SUCCESS) first = result;
            } else if (node->waits) {
                if (!passed[node->mark]) advance(graph.marks[node->mark], &node->mark);
            } else {
                passed[node->mark] = true;
            }
        }
    }
    Result all(bool first_is_late) {
        size_t count = branches.size();
        for (size_t i = 0; i < count; i++) advance(first_is_late ? count - 1 - i : i);
        return first;
    }
};

// Whether the first branch waits at its end for what every other one does.
bool is_joined(const Graph& graph) {
    std::set<size_t> awaited, joined;  // marks that the first branch waits for; branches that end before one
    for (const Node& node : graph.nodes) {
        if (node.branch == 0 && node.waits) awaited.insert(node.mark);
    }
    for (auto node = graph.nodes.rbegin(); node != graph.nodes.rend(); node++) {
        if (node->branch == 0) continue;
        if (!node->run && !node->waits && awaited.count(node->mark)) joined.insert(node->branch);
        if (node->run && !joined.count(node->branch)) return false;
    }
    return true;
}

Result pass(const std::shared_ptr<Mark>& mark) { return mark && !mark->done ? drain(mark->stream, mark.get()) : SUCCESS; }

}  // namespace

Result enqueue(void* stream, bool kernel, Operation run) {
    auto* s = static_cast<Stream*>(stream);
    if (!s) {  // the default stream has rules of its own
        Result result = outside_of_captures_of_context();
        return result ? result : NOT_SUPPORTED;
    }
    std::lock_guard<std::recursive_mutex> held(s->lock);
    if (s->captured) {
        if (s->captured->spoiled) return CAPTURE_INVALIDATED;
        s->captured->graph.nodes.push_back({s->branch, std::move(run), 0, false});
        return SUCCESS;
    }
    s->waiting.push_back(std::move(run));
    s->has_launched |= kernel;
    Result result = s->has_launched == late_kernels() ? SUCCESS : drain(s);
    return result == NOT_READY ? SUCCESS : result;
}

Result finish_streams_of_this_thread() {
    Result first = SUCCESS;
    for (Stream* s : own_streams()) {
        Result result = until_ready([s] { return drain(s); });
        if (first == SUCCESS) first = result;
    }
    return first;
}

Result outside_of_capture() {
    if (!capturing) return SUCCESS;
    capturing->captured->spoiled = true;
    return CAPTURE_UNSUPPORTED;
}

Result outside_of_captures_of_context() {
    std::lock_guard<std::mutex> held(captures_lock);
    Result result = SUCCESS;
    for (Stream* s : captures) {
        if (s->context != current_context()) continue;
        s->captured->spoiled = true;
        result = CAPTURE_UNSUPPORTED;
    }
    return result;
}

extern "C" __attribute__((visibility("default"))) void emu_late_kernels(int late) { late_kernels() = late != 0; }

// For other stand-ins: `run(argument)` in a stream, as a kernel; `drop(argument)` when it cannot run again.
extern "C" __attribute__((visibility("default"))) int emu_enqueue(void* stream, int (*run)(void*), void (*drop)(void*),
                                                                 void* argument) {
    std::shared_ptr<void> kept(argument, drop);
    return enqueue(stream, true, [run, kept] { return (Result)run(kept.get()); });
}

// The same for what goes beside the kernels, as a copy does.
extern "C" __attribute__((visibility("default"))) int emu_enqueue_beside(void* stream, int (*run)(void*),
                                                                        void (*drop)(void*), void* argument) {
    std::shared_ptr<void> kept(argument, drop);
    return enqueue(stream, false, [run, kept] { return (Result)run(kept.get()); });
}

// Whether this thread's streams forget to wait for events: a fault that tests plant.
static thread_local bool waits_are_forgotten;
extern "C" __attribute__((visibility("default"))) void emu_forget_waits(int forget) { waits_are_forgotten = forget != 0; }

API cuStreamCreate(void** stream, unsigned) {
    if (Result result = outside_of_capture()) return result;
    auto* s = new Stream;
    own_streams().insert(s);
    *stream = s;
    return SUCCESS;
}
API cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}
API cuStreamDestroy_v2(void* stream) {
    auto* s = static_cast<Stream*>(stream);
    Result result = until_ready([s] { return drain(s); });
    own_streams().erase(s);
    delete s;
    return result;
}
API cuStreamSynchronize(void* stream) {
    if (Result result = outside_of_capture()) return result;
    return until_ready([=] { return drain(static_cast<Stream*>(stream)); });
}
API cuCtxSynchronize() {
    if (Result result = outside_of_captures_of_context()) return result;
    return finish_streams_of_this_thread();
}

API cuEventCreate(void** event, unsigned) {
    *event = new Event;
    return SUCCESS;
}
API cuEventDestroy_v2(void* event) {
    delete static_cast<Event*>(event);
    return SUCCESS;
}
API cuEventRecord(void* event, void* stream) {
    auto *e = static_cast<Event*>(event);
    auto *s = static_cast<Stream*>(stream);
    if (s->captured) {
        if (s->captured->spoiled) return CAPTURE_INVALIDATED;
        Graph& graph = s->captured->graph;
        e->last.reset();
        e->capture = s->captured;
        e->mark = graph.marks.size();
        graph.marks.push_back(s->branch);
        graph.nodes.push_back({s->branch, nullptr, e->mark, false});
        return SUCCESS;
    }
    if (Result result = outside_of_capture()) return result;
    e->capture.reset();
    auto mark = std::make_shared<Mark>(Mark{s});
    e->last = mark;
    return enqueue(stream, false, [mark] {
        auto now = std::chrono::steady_clock::now().time_since_epoch();
        mark->milliseconds = std::chrono::duration<double, std::milli>(now).count();
        mark->done = true;
        return SUCCESS;
    });
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
    auto *e = static_cast<Event*>(event);
    auto *s = static_cast<Stream*>(stream);
    std::shared_ptr<Capture> capture = e->capture.lock();
    // Neither may a stream wait for what a graph will do some day, nor a graph for what a stream has done.
    if (capture != (capturing ? capturing->captured : nullptr) || (s->captured && !capture)) {
        outside_of_capture();
        return CAPTURE_ISOLATION;
    }
    if (capture && capture->spoiled) return CAPTURE_INVALIDATED;
    if (capture && !s->captured) {
        s->captured = capture;
        s->branch = capture->branches.size();
        capture->branches.push_back(s);
    }
    if (waits_are_forgotten) return SUCCESS;
    if (capture) {
        capture->graph.nodes.push_back({s->branch, nullptr, e->mark, true});
        return SUCCESS;
    }
    return enqueue(stream, false, [mark = e->last] { return pass(mark); });
}
// Who asks again and again has an answer in the end: asking moves the stream on.
API cuEventQuery(void* event) {
    auto& mark = static_cast<Event*>(event)->last;
    if (Result result = pass(mark)) return result;
    return mark && !mark->done ? NOT_READY : SUCCESS;
}
API cuEventSynchronize(void* event) {
    if (Result result = outside_of_capture()) return result;
    return until_ready([=] { return pass(static_cast<Event*>(event)->last); });
}
API cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    auto &from = static_cast<Event*>(start)->last, &to = static_cast<Event*>(end)->last;
    if (!from || !to || !from->done || !to->done) return NOT_READY;
    *milliseconds = (float)(to->milliseconds - from->milliseconds);
    return SUCCESS;
}
API cuEventElapsedTime_v2(float* ms, void* start, void* end) { return cuEventElapsedTime(ms, start, end); }

API cuStreamBeginCapture_v2(void* stream, int) {
    auto* s = static_cast<Stream*>(stream);
    if (Result result = outside_of_capture()) return result;
    s->captured = std::make_shared<Capture>();
    s->captured->branches.push_back(s);
    s->branch = 0;
    capturing = s;
    std::lock_guard<std::mutex> held(captures_lock);
    captures.insert(s);
    return SUCCESS;
}
API cuStreamEndCapture(void* stream, void** graph) {
    auto* s = static_cast<Stream*>(stream);
    if (capturing != s) return INVALID_VALUE;
    capturing = nullptr;
    std::shared_ptr<Capture> capture = s->captured;
    {
        std::lock_guard<std::mutex> held(captures_lock);
        captures.erase(s);
    }
    for (Stream* branch : capture->branches) branch->captured.reset();
    bool joined = waits_are_forgotten || is_joined(capture->graph);
    bool whole = joined && !capture->spoiled;
    *graph = whole ? new Graph(capture->graph) : nullptr;
    return whole ? SUCCESS : joined ? CAPTURE_INVALIDATED : CAPTURE_UNJOINED;
}
API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    *executable = new Graph(*static_cast<Graph*>(graph));
    return SUCCESS;
}
API cuGraphLaunch(void* executable, void* stream) {
    // A graph may be destroyed before a late stream has come to it.
    auto graph = std::make_shared<Graph>(*static_cast<Graph*>(executable));
    bool first_is_late = late_kernels();
    return enqueue(stream, true, [graph, first_is_late] { return Running(*graph).all(first_is_late); });
}
API cuGraphDestroy(void* graph) {
    delete static_cast<Graph*>(graph);
    return SUCCESS;
}
API cuGraphExecDestroy(void* executable) { return cuGraphDestroy(executable); }
