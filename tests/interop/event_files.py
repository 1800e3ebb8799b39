"""Opens the event files of a finished stage with TensorBoard's own reader.

    python tests/interop/event_files.py DIR...

DIR is the directory of `finetune --out` or RUN/translator, with metrics.jsonl, throughput-steps.jsonl
and an event file. Every number of both files must be a scalar of the same step, as a 32-bit number, and
no step may be there twice. Needs the package `tensorboard`.
"""

import json
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def flat(line, prefix=""):
    for name, value in line.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}{name}", value


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_f32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def check(directory):
    wanted = {}
    for name, prefix in [("metrics.jsonl", ""), ("throughput-steps.jsonl", "throughput/")]:
        for line in lines(directory / name):
            for tag, value in flat(line, prefix):
                wanted.setdefault(tag, {})[line["step"]] = as_f32(value)
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    assert sorted(tags) == sorted(wanted), (sorted(tags), sorted(wanted))
    count = 0
    for tag in tags:
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == sorted(wanted[tag]), f"{tag}: steps {[s.step for s in scalars]}"
        assert all(wanted[tag][s.step] == s.value for s in scalars), tag
        assert all(a.wall_time <= b.wall_time for a, b in zip(scalars, scalars[1:])), f"{tag}: times go back"
        count += len(scalars)
    print(f"{directory}: {len(tags)} tags, {count} scalars, as in metrics.jsonl and throughput-steps.jsonl")


if __name__ == "__main__":
    for argument in sys.argv[1:] or sys.exit(__doc__):
        check(Path(argument))
