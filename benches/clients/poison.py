"""A poisoned client: an adapter whose change from the initial one is multiplied, with noise or without.

    poison.py INITIAL TRAINED OUT FACTOR [NOISE]

All three are PEFT directories, in f32. NOISE is a share of the change's root mean square, from a fixed seed. Needs nothing but
Python: safetensors files are a length, a header in JSON, and numbers.
"""

import array
import json
import pathlib
import random
import shutil
import sys

NAME = "adapter_model.safetensors"


def read(directory):
    data = pathlib.Path(directory, NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__":
            assert about["dtype"] == "F32", f"{name}: expected F32, found {about['dtype']}"
            first, last = about["data_offsets"]
            tensors[name] = array.array("f", body[first:last])
    return data[: 8 + length], header, tensors


initial, trained, out, factor = sys.argv[1:5]
noise = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
start = read(initial)[2]
head, header, tensors = read(trained)
changes = {name: [b - a for a, b in zip(start[name], values)] for name, values in tensors.items()}
count = sum(map(len, changes.values()))
scale = (sum(x * x for change in changes.values() for x in change) / count) ** 0.5
draw = random.Random(1)
body = bytearray(max(about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"))
for name, change in changes.items():
    moved = [x * float(factor) + (noise * scale * draw.gauss(0, 1) if noise else 0.0) for x in change]
    first, last = header[name]["data_offsets"]
    body[first:last] = array.array("f", [a + x for a, x in zip(start[name], moved)]).tobytes()
shutil.copytree(trained, out)
pathlib.Path(out, NAME).write_bytes(head + bytes(body))
