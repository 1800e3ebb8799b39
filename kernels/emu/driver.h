// What the parts of the stand-in driver share: results of calls, and streams.
#pragma once
#include "internal.h"

#include <functional>

#define API extern "C" __attribute__((visibility("default"))) Result
typedef unsigned long long Pointer;

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
};

// Puts an operation at the end of a stream, which does it now or later; a kernel or a copy.
Result enqueue(void* stream, bool kernel, std::function<Result()> run);

// Does all that this thread's streams still have to do.
Result finish_streams_of_this_thread();

// For calls that no stream of this thread may be captured during: CAPTURE_UNSUPPORTED if one is, and the capture
// is invalidated.
Result outside_of_capture();
// The same for calls that concern the whole context: no stream of it, of any thread.
Result outside_of_captures_of_context();

// The context of this thread.
void* current_context();
