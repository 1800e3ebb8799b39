"""What dictionaries.py and the snippet of docs/clients.md need of PyTorch, where that is not installed.

Tensors are lists of floats with a shape, files of them are JSON.
"""

import json
import math


class Tensor:
    def __init__(self, values, shape):
        self.values, self.shape = list(values), tuple(shape)
        assert len(self.values) == math.prod(self.shape), f"{len(self.values)} values of shape {self.shape}"

    def __add__(self, other):
        assert self.shape == other.shape, f"{self.shape} + {other.shape}"
        return Tensor((a + b for a, b in zip(self.values, other.values)), self.shape)

    def __sub__(self, other):
        assert self.shape == other.shape, f"{self.shape} - {other.shape}"
        return Tensor((a - b for a, b in zip(self.values, other.values)), self.shape)

    def reshape(self, shape):
        return Tensor(self.values, shape)

    def flatten(self):
        return Tensor(self.values, (len(self.values),))

    def float(self):
        return self


def save(tensors, path):
    with open(path, "w") as file:
        json.dump({name: [tensor.values, tensor.shape] for name, tensor in tensors.items()}, file)


def load(path, map_location, weights_only):
    assert map_location == "cpu" and weights_only is True, "a file of somebody else's may run any program"
    with open(path) as file:
        return {name: Tensor(values, shape) for name, (values, shape) in json.load(file).items()}
