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

// What no stream of this thread may be recorded over: CAPTURE_UNSUPPORTED if one is, which ends the recording.
Result outside_of_capture();
