// Streams and events: see streams.h. A stream is used by the host thread that made it.
#include "streams.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <mutex>
#include <set>
#include <thread>

namespace emu {

struct Stream {
    uint64_t id;
    int device;
    std::thread::id owner;
    std::deque<std::function<bool()>> tasks;  // put off, in their order
    uint64_t tasks_done = 0;
    uint64_t kernels = 0;               // launched so far
    uint64_t waited = 0;                // of them, those that the host has waited for
    std::map<uint64_t, uint64_t> seen;  // kernels of others that the next work comes after, by stream
};

static std::mutex lock;
static std::set<Stream*> streams;
static thread_local bool waits_are_forgotten = false;

static bool is_mine(const Stream* stream, int device) {
    return stream->device == device && stream->owner == std::this_thread::get_id();
}

Stream* new_stream(int device) {
    static uint64_t ids;
    std::lock_guard<std::mutex> held(lock);
    auto* stream = new Stream{++ids, device, std::this_thread::get_id(), {}, 0, 0, 0, {}};
    streams.insert(stream);
    return stream;
}
void delete_stream(Stream* stream) {
    std::lock_guard<std::mutex> held(lock);
    streams.erase(stream);
    delete stream;
}

// Does what was put off, up to this many tasks in all, as far as it can be done now.
static bool attempt(Stream* stream, uint64_t tasks) {
    while (stream->tasks_done < tasks) {
        if (!stream->tasks.front()()) return false;
        stream->tasks.pop_front();
        stream->tasks_done++;
    }
    return true;
}
static void complete(Stream* stream, uint64_t tasks) {
    while (!attempt(stream, tasks)) std::this_thread::yield();
}
static uint64_t tasks_of(const Stream* stream) { return stream->tasks_done + stream->tasks.size(); }

void begin(Stream* stream, bool kernel) {
    complete(stream, tasks_of(stream));
    if (kernel) stream->kernels++;
}
void finish(Stream* stream) {
    complete(stream, tasks_of(stream));
    stream->waited = stream->kernels;
}
void finish_all(int device) {
    std::set<Stream*> all;
    {
        std::lock_guard<std::mutex> held(lock);
        all = streams;
    }
    for (Stream* stream : all)
        if (is_mine(stream, device)) finish(stream);
}

void record(Event* event, Stream* stream) {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    event->milliseconds = std::chrono::duration<double, std::milli>(now).count();
    event->stream = stream;
    event->tasks = tasks_of(stream);
    event->seen = stream->seen;
    event->seen[stream->id] = stream->kernels;
}
void wait(Stream* stream, const Event* event) {
    if (!event->stream || waits_are_forgotten) return;
    complete(event->stream, event->tasks);
    for (auto [id, kernels] : event->seen) stream->seen[id] = std::max(stream->seen[id], kernels);
}
void finish(const Event* event) {
    if (event->stream) complete(event->stream, event->tasks);
}
bool has_passed(const Event* event) { return !event->stream || attempt(event->stream, event->tasks); }

std::string put_off(Stream* stream, std::function<bool()> work) {
    std::lock_guard<std::mutex> held(lock);
    for (Stream* other : streams) {
        if (other == stream || !is_mine(other, stream->device)) continue;
        if (std::max(stream->seen[other->id], other->waited) < other->kernels)
            return "put on a stream that has not waited for the kernels of another one";
    }
    stream->tasks.push_back(std::move(work));
    return "";
}

}  // namespace emu

// Whether this thread's streams forget to wait for events: a fault that tests plant.
extern "C" void emu_forget_waits(int forget) { emu::waits_are_forgotten = forget != 0; }
