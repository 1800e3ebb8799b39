"""Runs the snippet of docs/clients.md that turns a pickled dictionary of changes into a PEFT adapter.

    dictionaries.py SNIPPET INITIAL TRAINED [NAMES]

In the current directory, where `package/` is. Writes `changes.pt`, the changes from adapter INITIAL to TRAINED,
with names as `model.named_parameters()` of PEFT has them (NAMES `full`, the default) or without what PEFT puts
before and into them (`short`); then runs SNIPPET, a file.
"""

import pathlib
import sys

import torch
from safetensors.torch import load_file

NAME = "adapter_model.safetensors"

snippet, initial, trained = map(pathlib.Path, sys.argv[1:4])
names = sys.argv[4] if len(sys.argv) > 4 else "full"
start, end = load_file(initial / NAME), load_file(trained / NAME)
changes = {}
for name, values in end.items():
    change = values - start[name]
    if names == "full":
        changes[name.replace(".weight", ".default.weight")] = change
    else:
        changes[name.removeprefix("base_model.model.")] = change.flatten()
torch.save(changes, "changes.pt")
exec(compile(snippet.read_text(), str(snippet), "exec"))
