"""Encoder-decoder fixtures: T5 v1.1, and the Grad-Transformer built on it.

In: nothing but seeds. Out, per fixture: model directories and golden tensors.
Shapes: B batch, S source length, T target length, d the T5's model width, DS and
DT the widths of a student's and a teacher's block.
"""

import copy
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

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

T5_SETTINGS = {
    "vocab_size": 67,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 3,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
BATCH, SOURCE, TARGET, TUPLES = 3, 5, 7, 40
LONG_SOURCE, LONG_TARGET = 150, 140
NEW_TOKENS = 12
LR = 1e-3
T5_WEIGHT_DECAY = 0.01
DS, DT = 20, 28

T5_FINAL = [
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.block.1.layer.2.DenseReluDense.wi_0.weight",
]
TRANSLATOR_FINAL = ["embed_proj.bias", "t5.decoder.block.0.layer.1.EncDecAttention.k.weight"]


def build_t5(seed):
    """A T5 with random weights. Scores are not divided by √d_kv, so the query's
    weights are that much smaller, as in the published initialisation.
    """
    model = T5ForConditionalGeneration(T5Config(**T5_SETTINGS)).eval()

    def std(name, p):
        if "layer_norm" in name:
            return 0.2
        if "relative_attention_bias" in name:
            return 0.8
        if name == "shared.weight":
            return 1.0
        gain = 1.5 / math.sqrt(T5_SETTINGS["d_kv"]) if name.endswith("Attention.q.weight") else 1.0
        return gain / math.sqrt(p.shape[-1])

    randomise(model, generator(seed), std)
    return model


def run_stacks(t5, enc_in, dec_in):
    """(encoder output, decoder output), both after their final layer norm."""
    enc_out = t5.encoder(inputs_embeds=enc_in).last_hidden_state
    dec = t5.decoder(inputs_embeds=dec_in, encoder_hidden_states=enc_out, use_cache=False)
    return enc_out, dec.last_hidden_state


def stack_parameters(model, prefix=""):
    """(name, parameter) of all that is used when embeddings come from outside."""
    unused = (f"{prefix}shared.", f"{prefix}lm_head.")
    return [(n, p) for n, p in model.named_parameters() if not n.startswith(unused)]


def cast(tensors, dtype):
    """The same dictionary in another floating-point type."""
    return {name: t.to(dtype) for name, t in tensors.items()}


def t5_inputs(seed):
    """All random inputs of the T5 fixture."""
    gen = generator(seed)
    d = T5_SETTINGS["d_model"]
    return {
        "enc_in": normal(gen, BATCH, SOURCE, d),
        "dec_in": normal(gen, BATCH, TARGET, d),
        "target": normal(gen, BATCH, TARGET, d, std=0.7),
        "train_enc": normal(gen, TUPLES, SOURCE, d),
        "train_dec": normal(gen, TUPLES, TARGET, d),
        "train_target": normal(gen, TUPLES, TARGET, d, std=0.6),
        "long.enc_in": normal(gen, 1, LONG_SOURCE, d),
        "long.dec_in": normal(gen, 1, LONG_TARGET, d),
    }


def measure_t5(model, x):
    """All floating-point outputs of the T5 fixture. Trains the model."""
    out = {}
    with torch.no_grad():
        out["long.enc_out"], out["long.out"] = run_stacks(model, x["long.enc_in"], x["long.dec_in"])
    enc_in, dec_in = x["enc_in"].clone().requires_grad_(), x["dec_in"].clone().requires_grad_()
    enc_out, dec_out = run_stacks(model, enc_in, dec_in)
    loss = F.mse_loss(dec_out, x["target"])
    loss.backward()
    out |= {"enc_out": enc_out.detach(), "out": dec_out.detach(), "loss": loss.detach()[None]}
    out |= {"grad.enc_in": enc_in.grad, "grad.dec_in": dec_in.grad}
    parameters = stack_parameters(model)
    for name, p in parameters:
        out[f"grad.{name}"] = p.grad.clone()

    def micro_loss(i):
        _, h = run_stacks(model, x["train_enc"][i : i + 1], x["train_dec"][i : i + 1])
        return F.mse_loss(h, x["train_target"][i : i + 1])

    losses, norms = train([p for _, p in parameters], micro_loss, LR, T5_WEIGHT_DECAY)
    out["train_losses"], out["train_grad_norms"] = losses, norms
    named = dict(parameters)
    for name in T5_FINAL:
        out[f"final.{name}"] = named[name].detach().clone()
    return out


@torch.no_grad()
def greedy_t5(model, input_ids, count):
    """Argmax decoding from token 0, recomputing every step: (tokens, smallest margin)."""
    enc_out = model.encoder(input_ids=input_ids).last_hidden_state
    ids, margin = [0], math.inf
    for _ in range(count):
        h = model.decoder(input_ids=torch.tensor([ids]), encoder_hidden_states=enc_out, use_cache=False)
        logits = model.lm_head(h.last_hidden_state[0, -1])
        margin = min(margin, top_margin(logits))
        ids.append(int(logits.argmax()))
    return ids[1:], margin


def make_t5(root, seed):
    """Writes the T5 fixture."""
    model = build_t5(seed)
    model.save_pretrained(root / "t5" / "model")

    def ids(s):
        return torch.randint(2, T5_SETTINGS["vocab_size"], (1, 11), generator=generator(s))

    ids_seed, margin = greedy_seed(seed + 2000, 6, lambda s: greedy_t5(model, ids(s), NEW_TOKENS))
    greedy_ids = ids(ids_seed)
    tokens, _ = greedy_t5(model, greedy_ids, NEW_TOKENS)
    # The library's own cached decoding agrees (it stops at the end token, ours does not).
    model.generation_config.eos_token_id = None
    library = model.generate(greedy_ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert library[0, 1:].tolist() == tokens, (library, tokens)

    x = t5_inputs(seed + 1000)
    double = copy.deepcopy(model).double()
    out = measure_t5(model, x)
    moved = rounding(out, measure_t5(double, cast(x, torch.float64)))
    tensors = x | out
    tensors["greedy_input_ids"] = greedy_ids[0].int()
    tensors["greedy_tokens"] = torch.tensor(tokens, dtype=torch.int32)
    info = {
        "fixture": "t5",
        "weight_seed": seed,
        "data_seed": seed + 1000,
        "ids_seed": ids_seed,
        "training": optimizer_settings(LR, T5_WEIGHT_DECAY),
        "final": T5_FINAL,
        "greedy_smallest_margin": float(f"{margin:.4g}"),
        "rounding": moved,
    }
    write_golden(root / "t5", tensors, info)


class GradTransformer(nn.Module):
    """T5 between three projections: student blocks [B, S, DS] in, teacher blocks
    [B, T, DT] out. Parameter names are those of the released code.
    """

    def __init__(self, t5):
        super().__init__()
        self.t5 = t5
        d = t5.config.d_model
        self.input_proj = nn.Linear(DS, d)
        self.embed_proj = nn.Linear(DT, d)
        self.output_proj = nn.Linear(d, DT)

    def start(self, like, released):
        """Decoder input of position 0, [B, 1, d]: the projected zero block, or the
        released code's plain zero vector when generating.
        """
        zero_block = like.new_zeros(like.shape[0], 1, DT)
        projected = self.embed_proj(zero_block)
        return torch.zeros_like(projected) if released else projected

    def forward(self, student, teacher, released_start=False):
        """Teacher-forced prediction: position j sees teacher blocks before j."""
        earlier = self.embed_proj(teacher[:, :-1])
        dec_in = torch.cat([self.start(student, released_start), earlier], dim=1)
        _, h = run_stacks(self.t5, self.input_proj(student), dec_in)
        return self.output_proj(h)

    @torch.no_grad()
    def generate(self, student, released_start):
        """Autoregressive prediction [B, TARGET, DT], each step fed its own output."""
        enc_in = self.input_proj(student)
        dec_in = self.start(student, released_start)
        for step in range(TARGET):
            _, h = run_stacks(self.t5, enc_in, dec_in)
            blocks = self.output_proj(h)
            if step + 1 < TARGET:
                dec_in = torch.cat([dec_in, self.embed_proj(blocks[:, -1:])], dim=1)
        return blocks


def build_translator(seed):
    """Xavier projections; biases are random rather than zero, since only then do
    the two decoder starts differ.
    """
    model = GradTransformer(build_t5(seed)).eval()
    gen = generator(seed + 1)
    with torch.no_grad():
        for linear in (model.input_proj, model.embed_proj, model.output_proj):
            nn.init.xavier_uniform_(linear.weight, generator=gen)
            linear.bias.copy_(normal(gen, *linear.bias.shape, std=0.5))
    return model


def measure_translator(model, x):
    """All floating-point outputs of the Grad-Transformer fixture. Trains the model."""
    student, teacher = x["student"], x["teacher"]
    first, wanted = student[:BATCH], teacher[:BATCH]
    out = {}
    with torch.no_grad():
        out["train_start_released"] = model(first, wanted, released_start=True)
    out["generated"] = model.generate(first, released_start=False)
    out["generated_released"] = model.generate(first, released_start=True)
    pred = model(first, wanted)
    loss = F.mse_loss(pred, wanted)
    loss.backward()
    out |= {"pred": pred.detach(), "loss": loss.detach()[None]}
    parameters = stack_parameters(model, "t5.")
    for name, p in parameters:
        out[f"grad.{name}"] = p.grad.clone()

    def micro_loss(i):
        return F.mse_loss(model(student[i : i + 1], teacher[i : i + 1]), teacher[i : i + 1])

    losses, norms = train([p for _, p in parameters], micro_loss, LR, 0.0)
    out["train_losses"], out["train_grad_norms"] = losses, norms
    named = dict(parameters)
    for name in TRANSLATOR_FINAL:
        out[f"final.{name}"] = named[name].detach().clone()
    return out


def write_translator(folder, model, names):
    """A translator directory holding the tensors of `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    save_file({n: state[n].clone().contiguous() for n in names}, str(folder / "model.safetensors"))
    config = {
        "model_type": "grad_transformer",
        "student_width": DS,
        "teacher_width": DT,
        "student_blocks": SOURCE,
        "teacher_blocks": TARGET,
        "t5": T5_SETTINGS,
    }
    write_json(folder / "config.json", config)


def make_translator(root, seed):
    """Writes the Grad-Transformer fixture: the model without, and with, the token
    embeddings and head that it does not use.
    """
    model = build_translator(seed)
    folder = root / "grad_transformer"
    write_translator(folder / "model", model, [n for n, _ in stack_parameters(model, "t5.")])
    write_translator(folder / "model_with_unused", model, list(model.state_dict()))

    gen = generator(seed + 1000)
    x = {
        "student": normal(gen, TUPLES, SOURCE, DS, std=0.5),
        "teacher": normal(gen, TUPLES, TARGET, DT, std=0.5),
    }
    # The whole library model, asked for its last hidden state, agrees with the two stacks.
    with torch.no_grad():
        enc_in, dec_in = model.input_proj(x["student"][:1]), model.embed_proj(x["teacher"][:1])
        whole = model.t5(inputs_embeds=enc_in, decoder_inputs_embeds=dec_in, output_hidden_states=True, use_cache=False)
        assert torch.equal(whole.decoder_hidden_states[-1], run_stacks(model.t5, enc_in, dec_in)[1])

    double = copy.deepcopy(model).double()
    out = measure_translator(model, x)
    moved = rounding(out, measure_translator(double, cast(x, torch.float64)))
    info = {
        "fixture": "grad_transformer",
        "weight_seed": seed,
        "data_seed": seed + 1000,
        "batch": BATCH,
        "training": optimizer_settings(LR, 0.0),
        "final": TRANSLATOR_FINAL,
        "rounding": moved,
    }
    write_golden(folder, x | out, info)
