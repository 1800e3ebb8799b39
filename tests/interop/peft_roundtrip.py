"""Adapters across programs: what gradtx writes opens in PEFT and says the same,
and the other way round.

    peft_roundtrip.py open BASE ADAPTER LOGITS.safetensors
        BASE is a Hugging Face model directory, ADAPTER a PEFT directory written
        by gradtx, LOGITS holds gradtx's `tokens` i32 [T] and `logits` f32 [T, V]
        of that one sequence. Recomputes the logits with PEFT, prints the largest
        error relative to the largest logit, and exits with 1 beyond 1e-4 or NaN.
    peft_roundtrip.py write BASE ADAPTER LOGITS.safetensors
        Writes a random adapter with PEFT, and its `tokens` and `logits`, for
        gradtx to check.

Run by hand, with the libraries of ../goldens/requirements.txt.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4


def load_base(folder):
    """The base model in float32 with the attention that is written out in full."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def logits_of(model, tokens):
    """Logits [T, V] of one sequence of token ids [T]."""
    return model(input_ids=tokens.long()[None], use_cache=False).logits[0].float()


def largest_error(found, wanted):
    """max |found − wanted| / max |wanted|; NaN if any difference is NaN."""
    if found.shape != wanted.shape:
        sys.exit(f"logits have shape {list(found.shape)}, expected {list(wanted.shape)}")
    return float((found - wanted).abs().max() / wanted.abs().max())


def agrees(error):
    """Written so that NaN does not agree."""
    return error <= TOLERANCE


def open_adapter(arguments):
    """The adapter and the logits come from gradtx; PEFT is the judge."""
    stored = load_file(arguments.logits)
    tokens, found = stored["tokens"], stored["logits"]
    base = load_base(arguments.base)
    plain = logits_of(base, tokens)
    wanted = logits_of(PeftModel.from_pretrained(base, arguments.adapter).eval(), tokens)

    for name, broken in {"shifted": wanted + 0.01 * wanted.abs().max(), "NaN": wanted * float("nan")}.items():
        assert not agrees(largest_error(broken, wanted)), f"negative control ({name}) passed"

    error, effect = largest_error(found, wanted), largest_error(plain, wanted)
    print(f"tokens {len(tokens)}  max relative error {error:.3e}  effect of the adapter {effect:.3e}")
    if not effect > 10 * TOLERANCE:
        print("note: the adapter hardly changes the model, so this run proves little")
    return 0 if agrees(error) else 1


def write_adapter(arguments):
    """The adapter and the logits come from PEFT; gradtx is to agree."""
    torch.manual_seed(arguments.seed)
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=0.0,
        target_modules=arguments.targets.split(","),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base(arguments.base), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.normal_(std=p.shape[1] ** -0.5)
            elif "lora_B" in name:
                # (α/r)·x·Aᵀ·Bᵀ then has about half the size of x.
                p.normal_(std=0.5 * arguments.rank**0.5 / arguments.alpha)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (arguments.tokens,), dtype=torch.int32)
    model.save_pretrained(arguments.adapter)
    save_file({"tokens": tokens, "logits": logits_of(model, tokens).contiguous()}, arguments.logits)
    print(f"wrote {arguments.adapter} and {arguments.logits}: {arguments.tokens} tokens, vocabulary {vocabulary}")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, action in {"open": open_adapter, "write": write_adapter}.items():
        command = commands.add_parser(name)
        command.set_defaults(action=action)
        for argument in ("base", "adapter", "logits"):
            command.add_argument(argument, type=Path)
        if name == "write":
            command.add_argument("--seed", type=int, default=1)
            command.add_argument("--tokens", type=int, default=37)
            command.add_argument("--rank", type=int, default=2)
            command.add_argument("--alpha", type=int, default=32)
            command.add_argument("--targets", default="q_proj,v_proj")
    arguments = parser.parse_args()
    sys.exit(arguments.action(arguments))


if __name__ == "__main__":
    main()
