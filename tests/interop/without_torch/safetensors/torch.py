"""Reads and writes safetensors files of f32."""

import array
import json

from torch import Tensor


def load_file(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        body = file.read()
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__":
            assert about["dtype"] == "F32", f"{name}: expected F32, found {about['dtype']}"
            first, last = about["data_offsets"]
            tensors[name] = Tensor(array.array("f", body[first:last]), about["shape"])
    return tensors


def save_file(tensors, path):
    header, body = {}, b""
    for name, tensor in tensors.items():
        data = array.array("f", tensor.values).tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": offsets}
        body += data
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head + body)
