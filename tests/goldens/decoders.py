"""Decoder fixtures: Qwen2 (tied and untied head), Llama, Mistral, Qwen3, OPT, and
Qwen2 and OPT under PEFT adapters.

In: nothing but seeds. Out, per fixture: a Hugging Face model directory (or a
PEFT adapter directory) and golden tensors measured on it.
"""

import copy
import json
import math

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from common import (
    generator,
    greedy_seed,
    normal,
    optimizer_settings,
    randomise,
    rounding,
    top_margin,
    train,
    write_golden,
    write_json,
)

VOCAB = 131
EXAMPLES = 40
SHORTEST, LONGEST = 5, 37
NEW_TOKENS = 16
LR, LR_ADAPTER, WEIGHT_DECAY = 1e-3, 1e-2, 0.01

SMALL = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}

CONFIGS = {
    "qwen2": lambda: Qwen2Config(
        **SMALL, hidden_size=32, intermediate_size=64, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True
    ),
    "qwen2_untied": lambda: Qwen2Config(
        **SMALL, hidden_size=40, intermediate_size=72, rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False
    ),
    # Head width 12 has wavelengths 6.3, 29, 135, ...: with an original length of
    # 32 the first is kept, the second interpolated and the others stretched.
    "llama": lambda: LlamaConfig(
        **SMALL,
        hidden_size=48,
        intermediate_size=96,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": lambda: MistralConfig(
        **SMALL,
        hidden_size=32,
        intermediate_size=80,
        head_dim=8,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
    # Heads of 12 make the attention 48 wide in a model 40 wide.
    "qwen3": lambda: Qwen3Config(
        **SMALL,
        hidden_size=40,
        intermediate_size=64,
        head_dim=12,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
    # Dropout as published, which evaluation does without.
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=36,
        ffn_dim=56,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
        word_embed_proj_dim=36,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    ),
}

# What the last weights of training are checked on: one matrix, one vector.
FINAL = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.post_attention_layernorm.weight"]
FINAL_OPT = ["model.decoder.layers.0.fc1.bias", "model.decoder.layers.1.final_layer_norm.weight"]
# Fixture, base model, targets, and what is checked after training.
ADAPTERS = {
    "qwen2_lora": (
        "qwen2",
        ["q_proj", "v_proj"],
        [
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight",
        ],
    ),
    "opt_lora": (
        "opt",
        ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
        [
            "base_model.model.model.decoder.layers.0.fc1.lora_A.weight",
            "base_model.model.model.decoder.layers.1.self_attn.out_proj.lora_B.weight",
        ],
    ),
}


def build(name, seed):
    """The fixture's model with random weights: logits of size one, attention
    scores that are far from uniform, biases and norm weights away from 0 and 1.
    """
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()

    def std(parameter_name, p):
        if "norm" in parameter_name:
            return 0.2
        if parameter_name.endswith(".bias"):
            return 0.4
        gain = 1.5 if "q_proj" in parameter_name or "k_proj" in parameter_name else 1.0
        if "embed_tokens" in parameter_name or "lm_head" in parameter_name:
            gain = 1.2
        return gain / math.sqrt(p.shape[-1])

    randomise(model, generator(seed), std)
    model.tie_weights()
    return model


def make_data(seed, padding=None):
    """Forty random token sequences with prompts: (tokens, offsets, prompt_lens), i32. Without the padding token,
    whose embedding PyTorch does not train as an input.

    The lengths include both extremes; the prompt leaves at least two targets and
    has at least one token (the first token has no predictor).
    """
    gen = generator(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (EXAMPLES,), generator=gen)
    lengths[0], lengths[1], lengths[2] = 23, SHORTEST, LONGEST
    prompts = torch.stack([torch.randint(1, int(n) - 1, (1,), generator=gen)[0] for n in lengths])
    prompts[0], prompts[3] = 9, 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens = torch.randint(0, VOCAB, (int(offsets[-1]),), generator=gen)
    if padding is not None:
        tokens[tokens == padding] = 0
    return tokens.int(), offsets.int(), prompts.int()


def example_logits(model, tokens):
    """Logits [T, V] of one sequence alone."""
    return model(input_ids=tokens.long()[None], use_cache=False).logits[0]


def example_loss(model, data, i):
    """Mean cross-entropy of example i over its targets: the tokens at index ≥
    prompt_len, each predicted by the position before it.
    """
    tokens, offsets, prompts = data
    own = tokens[offsets[i] : offsets[i + 1]].long()
    first = int(prompts[i])
    logits = example_logits(model, own)
    return F.cross_entropy(logits[first - 1 : -1], own[first:])


def library_loss(model, data, i):
    """The same loss as the library computes it from masked labels."""
    tokens, offsets, prompts = data
    own = tokens[offsets[i] : offsets[i + 1]].long()[None]
    labels = own.clone()
    labels[0, : int(prompts[i])] = -100
    return model(input_ids=own, labels=labels, use_cache=False).loss


@torch.no_grad()
def greedy(model, prompt, count):
    """Argmax decoding with a key/value cache; no token ends it.
    Returns (tokens, smallest margin).
    """
    cache, feed, out, margin = DynamicCache(), prompt.long()[None], [], math.inf
    for _ in range(count):
        logits = model(input_ids=feed, past_key_values=cache, use_cache=True).logits[0, -1]
        margin = min(margin, top_margin(logits))
        out.append(int(logits.argmax()))
        feed = torch.tensor([[out[-1]]])
    return out, margin


def trainable(model):
    """(name as stored on disk, parameter) of everything that is trained."""
    return [(n.replace(".default.", "."), p) for n, p in model.named_parameters() if p.requires_grad]


def measure(model, data, lr, final):
    """All floating-point golden tensors of `model` on `data`. Trains the model."""
    tokens, offsets, _ = data
    out = {}
    with torch.no_grad():
        out["logits"] = example_logits(model, tokens[: offsets[1]])
        out["example_losses"] = torch.stack([example_loss(model, data, i) for i in range(EXAMPLES)])
    loss = example_loss(model, data, 0)
    assert abs(float(loss - library_loss(model, data, 0))) < 1e-5
    loss.backward()
    out["loss"] = loss.detach()[None]
    for name, p in trainable(model):
        # Without rotation a bias of the keys shifts all scores of a query alike: its gradient is rounding alone.
        if not (model.config.model_type == "opt" and name.endswith("k_proj.bias")):
            out[f"grad.{name}"] = p.grad.clone()
    losses, norms = train([p for _, p in trainable(model)], lambda i: example_loss(model, data, i), lr, WEIGHT_DECAY)
    out["train_losses"], out["train_grad_norms"] = losses, norms
    named = dict(trainable(model))
    for name in final:
        out[f"final.{name}"] = named[name].detach().clone()
    return out


def golden(folder, model, data_seed, lr, final, info):
    """Chooses the data, measures twice, writes the golden files."""

    def decode(seed):
        tokens, offsets, prompts = make_data(seed, model.config.pad_token_id)
        return greedy(model, tokens[: prompts[0]], NEW_TOKENS)

    data_seed, margin = greedy_seed(data_seed, 8, decode)
    data = make_data(data_seed, model.config.pad_token_id)
    prompt = data[0][: data[2][0]].clone()
    picked, _ = greedy(model, prompt, NEW_TOKENS)
    # The cache must not change what the model says.
    again = example_logits(model, torch.cat([prompt, torch.tensor(picked[:-1], dtype=torch.int32)]))
    assert again[len(prompt) - 1 :].argmax(-1).tolist() == picked

    double = copy.deepcopy(model).double()
    tensors = measure(model, data, lr, final)
    moved = rounding(tensors, measure(double, data, lr, final))
    tensors["tokens"], tensors["offsets"], tensors["prompt_lens"] = data
    tensors["greedy_prompt"], tensors["greedy_tokens"] = prompt, torch.tensor(picked, dtype=torch.int32)
    info = info | {
        "data_seed": data_seed,
        "examples": EXAMPLES,
        "normalisation": "sequence",
        "training": optimizer_settings(lr, WEIGHT_DECAY),
        "final": final,
        "greedy_smallest_margin": float(f"{margin:.4g}"),
        "rounding": moved,
    }
    write_golden(folder, tensors, info)


def make_decoder(root, name, seed):
    """Writes one full-training decoder fixture."""
    model = build(name, seed)
    model.save_pretrained(root / name / "model")
    final = FINAL_OPT if name == "opt" else FINAL
    golden(root / name, model, seed + 1000, LR, final, {"fixture": name, "weight_seed": seed})


def make_adapter(root, fixture, seed):
    """Writes an adapter fixture over the base model of another one."""
    below, targets, final = ADAPTERS[fixture]
    base = AutoModelForCausalLM.from_pretrained(root / below / "model", attn_implementation="eager").eval()
    config = LoraConfig(r=2, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    gen = generator(seed)
    with torch.no_grad():
        for name, p in trainable(model):
            std = 1 / math.sqrt(p.shape[1]) if "lora_A" in name else 0.04
            p.copy_(normal(gen, *p.shape, std=std))
    folder = root / fixture
    model.save_pretrained(folder / "adapter")
    tidy_adapter(folder / "adapter", f"../../{below}/model")
    info = {"fixture": fixture, "weight_seed": seed, "base": f"../{below}/model", "r": 2, "alpha": 32, "dropout": 0.0}
    golden(folder, model, seed + 1000, LR_ADAPTER, final, info)


def tidy_adapter(folder, base):
    """Makes what PEFT wrote the same on every machine: no model card, `base` in the
    place of a local path, and the targets (a set, in random order) sorted.
    """
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    write_json(path, config)
