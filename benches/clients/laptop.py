"""A client of the shape of Qwen2.5-0.5B with random bf16 weights, and rows of 314 tokens; or a command's peak memory.

    laptop.py make WORLD OUT      OUT/model and OUT/data.jsonl; tokenizer and words are those of the world (gradtx world)
    laptop.py run NAME COMMAND... prints a line of JSON: seconds and peak resident memory of the command

`make` needs torch and safetensors.
"""

import json
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import time

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, KEYS = 896, 4864, 24, 151_936, 128


def make(world, out):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    tensors = {}

    def matrix(name, *shape):
        tensors[f"{name}.weight"] = (0.02 * torch.randn(*shape)).to(torch.bfloat16)

    def filled(name, size, value):
        tensors[name] = torch.full((size,), value, dtype=torch.bfloat16)

    matrix("model.embed_tokens", VOCABULARY, HIDDEN)
    filled("model.norm.weight", HIDDEN, 1.0)
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        for name, size in (("q", HIDDEN), ("k", KEYS), ("v", KEYS)):
            matrix(f"{layer}.self_attn.{name}_proj", size, HIDDEN)
            filled(f"{layer}.self_attn.{name}_proj.bias", size, 0.0)
        matrix(f"{layer}.self_attn.o_proj", HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            matrix(f"{layer}.mlp.{name}_proj", INTERMEDIATE, HIDDEN)
        matrix(f"{layer}.mlp.down_proj", HIDDEN, INTERMEDIATE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            filled(f"{layer}.{name}.weight", HIDDEN, 1.0)
    model = out / "model"
    model.mkdir(parents=True)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "use_sliding_window": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 4, "initializer_range": 0.02, "torch_dtype": "bfloat16",
    }
    (model / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(world / "tiny" / name, model / name)
    data = sorted((world / "private").glob("*/train.jsonl"))[0]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    random.seed(1)

    def joined(field):
        return " ".join(row[field] for row in random.choices(rows, k=24))

    lines = [json.dumps({"prompt": joined("question"), "response": joined("answer")}) for _ in range(64)]
    (out / "data.jsonl").write_text("\n".join(lines) + "\n")


def run(name, command):
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    took, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"what": name, "seconds": round(took, 1), "peak_resident_bytes": peak}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
    else:
        run(sys.argv[2], sys.argv[3:])
