// Streams and events of the stand-in driver.
//
// Kernels and copies are carried out when they are asked for. What a library puts on a stream with `put_off`
// is put off as long as a device could: until the host waits for it, or other work of its stream comes after
// it. So who does not wait for it finds memory as it was before.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>

namespace emu {

struct Stream;

struct Event {
    double milliseconds = 0;
    Stream* stream = nullptr;           // where it was recorded last
    uint64_t tasks = 0;                 // what was put off there before
    std::map<uint64_t, uint64_t> seen;  // kernels that it comes after, by stream
};

Stream* new_stream(int device);
void delete_stream(Stream*);

// Before a kernel or a copy of a stream: does what was put off there.
void begin(Stream*, bool kernel);
// The host waits for a stream, or for all streams of a device that this thread has made.
void finish(Stream*);
void finish_all(int device);

void record(Event*, Stream*);
// What comes next in the stream comes after the event.
void wait(Stream*, const Event*);
// The host waits for an event, or asks whether it has passed.
void finish(const Event*);
bool has_passed(const Event*);

// Puts work on a stream that is tried again until it returns true. Such work reads and writes memory of the
// device, so the stream must have waited for the kernels that this thread launched on others; the complaint
// if it has not, or nothing.
std::string put_off(Stream*, std::function<bool()> work);

// Defined by the driver: the device of this thread's context, and whether memory there holds these bytes.
int current_device();
bool holds(const void* memory, size_t bytes);

}  // namespace emu
