"""Writes the golden fixtures: tiny random models and what reference libraries
compute on them.

    python make.py            write fixtures/ beside this file
    python make.py --check    regenerate elsewhere and compare with fixtures/

Everything runs in float32 on one CPU thread with eager attention. README.md
says what each file holds; requirements.txt pins the libraries.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from safetensors.torch import load_file

from decoders import CONFIGS, make_adapter, make_decoder
from encoder_decoders import make_t5, make_translator
from metrics import make_metrics
from own import make_own
from parquet import make_parquet
from texts import make_texts

FIXTURES = Path(__file__).resolve().parent / "fixtures"
LIMIT_BYTES = 4 << 20
TOLERANCE = 1e-5
SEEDS = {"qwen2": 11, "qwen2_untied": 12, "llama": 13, "mistral": 14, "qwen3": 15, "opt": 21}


def make_all(root):
    """Writes every fixture below `root`."""
    assert SEEDS.keys() == CONFIGS.keys()
    for name, seed in SEEDS.items():
        make_decoder(root, name, seed)
        print("wrote", name)
    make_adapter(root, "qwen2_lora", 16)
    print("wrote qwen2_lora")
    make_adapter(root, "opt_lora", 26)
    print("wrote opt_lora")
    make_t5(root, 17)
    print("wrote t5")
    make_translator(root, 18)
    print("wrote grad_transformer")
    make_parquet(root)
    print("wrote parquet")
    make_metrics(root)
    print("wrote metrics")
    make_texts(root, 19)
    print("wrote qwen2_text")
    make_own(root, 20)
    print("wrote own")


def files_below(root):
    """Relative paths of all files, sorted."""
    return sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())


def tensor_differences(found, wanted):
    """Names of tensors that are missing, of another shape or type, or not close."""
    bad = sorted(found.keys() ^ wanted.keys())
    for name in found.keys() & wanted.keys():
        a, b = found[name], wanted[name]
        same_kind = a.shape == b.shape and a.dtype == b.dtype
        if not (same_kind and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)):
            bad.append(name)
    return bad


def file_differences(found, wanted):
    """What differs between two files of the same name, as strings."""
    if found.suffix == ".safetensors":
        return tensor_differences(load_file(found), load_file(wanted))
    if found.suffix != ".json" or "parquet" in wanted.parts:
        return [] if found.read_bytes() == wanted.read_bytes() else ["contents"]
    a, b = json.loads(found.read_text()), json.loads(wanted.read_text())
    # These two figures carry rounding noise, which may differ between CPUs.
    for info in (x for x in (a, b) if isinstance(x, dict)):
        info.pop("rounding", None)
        info.pop("greedy_smallest_margin", None)
    return [] if a == b else ["contents"]


def comparison_can_fail():
    """Negative controls of `tensor_differences`."""
    good = {"a": torch.tensor([1.0, 2.0])}
    for broken in ([1.0, 2.001], [1.0, float("nan")], [1.0]):
        assert tensor_differences({"a": torch.tensor(broken)}, good) == ["a"], broken
    assert tensor_differences({}, good) == ["a"]
    assert tensor_differences(good, good) == []


def check():
    """Regenerates into a temporary directory; returns the number of differences."""
    comparison_can_fail()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_all(root)
        new, old = files_below(root), files_below(FIXTURES)
        bad = [f"{p}: present on one side only" for p in sorted(set(new) ^ set(old))]
        for path in sorted(set(new) & set(old)):
            bad += [f"{path}: {what}" for what in file_differences(root / path, FIXTURES / path)]
    for line in bad:
        print("DIFFERS", line)
    print(f"{len(old)} files, {len(bad)} differences")
    return len(bad)


def write():
    """Replaces the committed fixtures."""
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    make_all(FIXTURES)
    total = sum((FIXTURES / p).stat().st_size for p in files_below(FIXTURES))
    print(f"{total / 2**20:.2f} MiB")
    if total > LIMIT_BYTES:
        sys.exit("the fixtures are too large to commit")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if arguments.check:
        sys.exit(1 if check() else 0)
    write()


if __name__ == "__main__":
    main()
