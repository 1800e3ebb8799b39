"""Emulators of gradtx in one version of transformers and PEFT: opened, trained through, plugged in.

    emulators.py write HOME FOLDER   HOME has what gradtx wrote: llm/, factored/ (an emulator), dense/ (the same in whole
                                     matrices). FOLDER gets an adapter that PEFT trained on the emulator's edge, the
                                     edge's full weights that torch trained, and the logits of one sequence:
                                       emulator, dense        of the emulator, with code of ours and with stock classes
                                       emulator_adapter       of the emulator with the adapter
                                       llm_adapter, llm_layers  of the LLM with what was trained through the emulator
    emulators.py open LLM LOGITS NAME   a model that gradtx has plugged something into gives the stored logits NAME

fixtures/ beside this file holds what `write` wrote in the versions that its directories name; emulators.rs reads it.
Run by emulators.sh with the Python of each version's environment.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from versions import TOLERANCE, largest_error, logits_of


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", **more
    )


def load_emulator(folder):
    return load(folder, trust_remote_code=True)


def edge_of(folder):
    """The layers that clients train."""
    config = json.loads((folder / "config.json").read_text())
    first, last = config["gradot"]["edge"]
    layers = config["num_hidden_layers"]
    return [*range(first), *range(layers - last, layers)]


def train(model, tokens, parameters, rate):
    """Some steps on one sequence."""
    optimizer = torch.optim.SGD(parameters, lr=rate)
    ids = tokens.long()[None]
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


def write(home, folder):
    folder.mkdir(parents=True, exist_ok=True)
    edge = edge_of(home / "factored")
    vocabulary = json.loads((home / "llm" / "config.json").read_text())["vocab_size"]
    tokens = torch.arange(23, dtype=torch.int32) * 7 % vocabulary
    stored = {
        "tokens": tokens,
        "emulator": logits_of(load_emulator(home / "factored"), tokens),
        "dense": logits_of(load(home / "dense"), tokens),
    }
    assert largest_error(stored["dense"], stored["emulator"]) <= TOLERANCE

    torch.manual_seed(1)
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=edge,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(load_emulator(home / "factored"), config)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names and all(any(f".layers.{layer}." in name for layer in edge) for name in names), names
    train(adapted, tokens, [p for p in adapted.parameters() if p.requires_grad], 0.5)
    adapter = folder / "adapter_emulator"
    adapted.save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)
    stored["emulator_adapter"] = logits_of(adapted, tokens)
    stored["llm_adapter"] = logits_of(PeftModel.from_pretrained(load(home / "llm"), adapter), tokens)
    # Where it was written is nobody's business.
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "emulator"
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    model = load_emulator(home / "factored")
    is_edge = lambda name: any(name.startswith(f"model.layers.{layer}.") for layer in edge)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_edge(name))
    train(model, tokens, [p for p in model.parameters() if p.requires_grad], 0.05)
    layers = {name: value.contiguous() for name, value in model.state_dict().items() if is_edge(name)}
    save_file(layers, folder / "layers.safetensors")
    llm = load(home / "llm")
    result = llm.load_state_dict(layers, strict=False)
    assert not result.unexpected_keys, result
    stored["llm_layers"] = logits_of(llm, tokens)
    for name in ("emulator_adapter", "llm_adapter", "llm_layers"):
        plain = stored["emulator"] if name.startswith("emulator") else logits_of(load(home / "llm"), tokens)
        assert largest_error(stored[name], plain) > 10 * TOLERANCE, f"{name}: training hardly changes the model"
    save_file(stored, folder / "emulator_logits.safetensors")
    print(f"transformers {transformers.__version__}: wrote an adapter and full weights of layers {edge}")


def open_model(folder, logits, name):
    stored = load_file(logits)
    error = largest_error(logits_of(load(folder), stored["tokens"]), stored[name])
    print(f"transformers {transformers.__version__}, {name}: {error:.3e}")
    # Written so that NaN does not agree.
    return 0 if error <= TOLERANCE else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("write")
    command.add_argument("home", type=Path)
    command.add_argument("folder", type=Path)
    opened = commands.add_parser("open")
    opened.add_argument("model", type=Path)
    opened.add_argument("logits", type=Path)
    opened.add_argument("name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "write":
        write(arguments.home, arguments.folder)
    else:
        sys.exit(open_model(arguments.model, arguments.logits, arguments.name))


if __name__ == "__main__":
    main()
