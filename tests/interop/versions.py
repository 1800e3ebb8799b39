"""Models and adapters as one version of transformers and PEFT writes them, and what gradtx wrote
opened in that version.

    versions.py write FOLDER      tiny models of four families, adapters whose targets are written in
                                  every way that PEFT has, and the logits of one sequence
    versions.py open BASE ADAPTER LOGITS MERGED
                                  an adapter of gradtx and the model that it was merged into: both must
                                  give the stored logits within 1e-4 of the largest

fixtures/ beside this file holds what `write` wrote in the versions that its directories name; versions.rs
reads it. Run by versions.sh with the Python of each version's environment. Numbers are a function of the names
alone, so that all versions write the same values.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

TOLERANCE = 1e-4
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Before version 5, YaRN divided by max_position_embeddings / original_max_position_embeddings: here both are 4.
MODELS = {
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2_yarn": ("Qwen2", dict(rope_scaling=YARN, max_position_embeddings=128)),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "llama": ("Llama", dict(rope_scaling=LLAMA3, rope_theta=500000.0)),
    "mistral": ("Mistral", dict(sliding_window=48)),
}
EVERY_LAYER = [f"model.layers.{layer}.{module}" for layer in (0, 1) for module in ("self_attn.q_proj", "mlp.down_proj")]
ADAPTERS = {
    "names": dict(target_modules=["q_proj", "v_proj"]),
    "all_linear": dict(target_modules="all-linear"),
    "regex": dict(target_modules=r".*\.(self_attn\.(k|o)|mlp\.up)_proj"),
    "full_paths": dict(target_modules=EVERY_LAYER),
    "excluded": dict(target_modules="all-linear", exclude_modules=["gate_proj", "k_proj"]),
    "patterns": dict(target_modules=["q_proj", "o_proj"], rank_pattern={"q_proj": 3, "o_proj": 3}, alpha_pattern={".*": 5}),
    "rslora": dict(target_modules=["v_proj", "up_proj"], use_rslora=True),
}


def fill(module, wanted=lambda name: True):
    """Values of every parameter that is wanted, drawn from a key of its name."""
    for name, parameter in module.named_parameters():
        if wanted(name):
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key))
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.1
            with torch.no_grad():
                parameter.copy_(spread * noise + (1.0 if name.endswith("norm.weight") else 0.0))


@torch.no_grad()
def logits_of(model, tokens):
    """Logits [T, V] of one sequence of token ids [T]."""
    return model.eval()(input_ids=tokens.long()[None], use_cache=False).logits[0].float().contiguous()


def write(folder):
    tokens = torch.arange(23, dtype=torch.int32) * 7 % SIZES["vocab_size"]
    stored = {"tokens": tokens}
    for name, (family, settings) in MODELS.items():
        config = getattr(transformers, family + "Config")(**{**SIZES, **settings})
        config._attn_implementation = "eager"
        model = getattr(transformers, family + "ForCausalLM")(config).float()
        fill(model)
        model.save_pretrained(folder / name, safe_serialization=True)
        stored[name] = logits_of(model, tokens)
        if name != "qwen2":
            continue
        for kind, settings in ADAPTERS.items():
            base = AutoModelForCausalLM.from_pretrained(folder / name, torch_dtype=torch.float32)
            adapted = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", **settings}))
            fill(adapted, lambda name: "lora_" in name)
            adapted.save_pretrained(folder / f"adapter_{kind}")
            (folder / f"adapter_{kind}" / "README.md").unlink(missing_ok=True)
            stored[f"adapter_{kind}"] = logits_of(adapted, tokens)
    for path in folder.glob("adapter_*/adapter_config.json"):
        # Where it was written is nobody's business.
        config = json.loads(path.read_text())
        config["base_model_name_or_path"] = "qwen2"
        path.write_text(json.dumps(config, indent=2) + "\n")
    save_file(stored, folder / "logits.safetensors")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    print(f"wrote {len(MODELS)} models and {len(ADAPTERS)} adapters: {versions}")


def largest_error(found, wanted):
    """max |found - wanted| / max |wanted|; NaN if any difference is NaN."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def open_all(base, adapter, logits, merged):
    stored = load_file(logits)
    tokens, wanted = stored["tokens"], stored["logits"]
    load = lambda folder: AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    )
    found = {
        "plain": logits_of(load(base), tokens),
        "adapter": logits_of(PeftModel.from_pretrained(load(base), adapter), tokens),
        "merged": logits_of(load(merged), tokens),
    }
    errors = {name: largest_error(values, wanted) for name, values in found.items()}
    print(f"transformers {transformers.__version__}, peft {peft.__version__}:", errors)
    assert errors["plain"] > 10 * TOLERANCE, "the adapter hardly changes the model: this proves nothing"
    if (merged / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(merged)
    # Written so that NaN does not agree.
    return 0 if errors["adapter"] <= TOLERANCE and errors["merged"] <= TOLERANCE else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("write").add_argument("folder", type=Path)
    opened = commands.add_parser("open")
    for name in ("base", "adapter", "logits", "merged"):
        opened.add_argument(name, type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "write":
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write(arguments.folder)
    else:
        sys.exit(open_all(arguments.base, arguments.adapter, arguments.logits, arguments.merged))


if __name__ == "__main__":
    main()
