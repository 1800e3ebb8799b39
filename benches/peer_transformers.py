#!/usr/bin/env python3
"""The work of `gradtx bench` in PyTorch with transformers and PEFT, on the same device.

    peer_transformers.py finetune|train|generate [--device cuda|cpu] [--model qwen2.5-7b] ...

Random weights from configurations, nothing is downloaded. One JSON line per
measurement with the names and fields of `gradtx bench` and `"who": "peer"`;
`gradtx bench table` puts the two side by side.

finetune released   LoRA (r=2, alpha 32, q and v, dropout 0.05) the way the method's
                    scripts train: 16 micro-batches of one example, then one step.
finetune batched    the same examples in micro-batches of --micro examples, as many
                    at once as memory has room for (halved until it fits): all have
                    the same length, so that nothing is padding.
train               a step of the Grad-Transformer: T5 stacks between three
                    projections, teacher forced, all parameters trained. Masters in
                    float32 with autocast to bf16, and with --pure (reported as
                    `train pure`) everything in bf16 without masters.
generate            greedy decoding: one more token for every sequence, as the time of
                    all tokens beyond that of the first, by their number.

Attention is PyTorch's fused one (sdpa), the optimizer its fused AdamW. Every token
but the first of an example is a label, as in `gradtx bench`.
"""

import argparse
import datetime
import json
import math
import os
import statistics
import time

# Large buffers in huge pages, which a CPU needs for fresh logits. Read when
# PyTorch first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.nn.functional as F
import transformers
from torch import nn

# hidden, intermediate, layers, heads, key/value heads
QWEN = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2),
    "qwen2.5-3b": (2048, 11_008, 36, 16, 2),
    "qwen2.5-7b": (3584, 18_944, 28, 28, 4),
    "qwen2.5-14b": (5120, 13_824, 48, 40, 8),
    "qwen2.5-32b": (5120, 27_648, 64, 40, 8),
}
# d_model, d_ff, layers, heads
FLAN = {
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
}
ACCUMULATION = 16
CLIP = 1.0


def wait(arguments):
    """Returns when the device has done all that it was given."""
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def measured(step, arguments):
    """Seconds of `step`, which returns a number that must be finite, several times."""
    seconds = []
    for run in range(arguments.warmup + arguments.runs):
        wait(arguments)
        begin = time.perf_counter()
        value = step()
        wait(arguments)
        took = time.perf_counter() - begin
        assert math.isfinite(value), f"a loss is {value}"
        if run >= arguments.warmup:
            seconds.append(took)
    return sorted(seconds)


def quantile(seconds, q):
    """The value below which the part `q` of sorted `seconds` lies."""
    at = q * (len(seconds) - 1)
    low, high = seconds[math.floor(at)], seconds[math.ceil(at)]
    return low + (high - low) * (at % 1)


def report(name, seconds, arguments, **more):
    """Prints the line, and adds it to the file."""
    on_gpu = arguments.device == "cuda"
    line = {
        "who": "peer",
        "name": name,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": None if on_gpu else torch.get_num_threads(),
        "dtype": arguments.dtype,
        "median_s": statistics.median(seconds),
        "q1_s": quantile(seconds, 0.25),
        "q3_s": quantile(seconds, 0.75),
        "runs": len(seconds),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        **more,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    text = json.dumps({key: value for key, value in line.items() if value is not None})
    print(text, flush=True)
    if arguments.out:
        with open(arguments.out, "a", encoding="utf-8") as out:
            out.write(text + "\n")


def dtype_of(arguments):
    """PyTorch's name of the element type."""
    return {"bf16": torch.bfloat16, "f32": torch.float32}[arguments.dtype]


def autocast(arguments):
    """Products in the element type, whatever their operands are stored in."""
    return torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.dtype == "bf16")


def decoder(arguments):
    """Name and model, by the name of a Qwen2.5 or by a config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

    if arguments.model in QWEN:
        hidden, intermediate, layers, heads, kv_heads = QWEN[arguments.model]
        tied = hidden <= 2048
        config = Qwen2Config(
            vocab_size=151_936 if tied else 152_064,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
            rope_theta=1e6,
            max_position_embeddings=32_768,
        )
        name = arguments.model
    else:
        config = AutoConfig.from_pretrained(arguments.model)
        name = os.path.basename(os.path.dirname(os.path.abspath(arguments.model)))
    # The default type, for the argument that says the same has other names in other versions.
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(arguments))
    try:
        with torch.device(arguments.device):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(usual)
    return name, model.to(dtype_of(arguments))


def bench_finetune(arguments):
    """Adapters on a frozen base: the released loop, and larger micro-batches."""
    from peft import LoraConfig, get_peft_model

    name, base = decoder(arguments)
    lora = LoraConfig(
        r=arguments.rank,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=arguments.targets.split(","),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def run(how, examples, micro):
        tokens = torch.randint(0, base.config.vocab_size, (examples, arguments.context), device=arguments.device)

        def step():
            total = 0.0
            for part in tokens.split(micro):
                with autocast(arguments):
                    loss = model(input_ids=part, labels=part, use_cache=False).loss
                loss = loss * (len(part) / examples)
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(total)

        seconds = measured(step, arguments)
        rate = examples * arguments.context / statistics.median(seconds)
        shape = f"{name}, {examples} x {arguments.context} tokens, {micro} at a time"
        report(how, seconds, arguments, shape=shape, model=name, tokens=examples * arguments.context,
               examples=examples, micro=micro, rank=arguments.rank, tokens_per_s=round(rate, 2))

    if not arguments.batched:
        run("finetune released", ACCUMULATION, 1)
    examples = max(arguments.tokens // arguments.context, 1)
    micro = min(arguments.micro or examples, examples)
    while True:
        try:
            run("finetune batched", examples, micro)
            return
        except torch.OutOfMemoryError:
            # Gradients of the part that did fit are not those of the next attempt.
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            if micro == 1:
                raise
            micro //= 2


class Translator(nn.Module):
    """T5 stacks between three projections, teacher forced."""

    def __init__(self, config, student_width, teacher_width):
        super().__init__()
        from transformers import T5ForConditionalGeneration

        whole = T5ForConditionalGeneration(config)
        self.encoder, self.decoder = whole.encoder, whole.decoder
        self.encoder.embed_tokens = self.decoder.embed_tokens = None
        self.input_proj = nn.Linear(student_width, config.d_model)
        self.embed_proj = nn.Linear(teacher_width, config.d_model)
        self.output_proj = nn.Linear(config.d_model, teacher_width)

    def forward(self, student, teacher):
        earlier = F.pad(teacher[:, :-1], (0, 0, 1, 0))
        encoded = self.encoder(inputs_embeds=self.input_proj(student)).last_hidden_state
        hidden = self.decoder(
            inputs_embeds=self.embed_proj(earlier), encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
        return self.output_proj(hidden)


def t5_config(arguments):
    """Name and sizes, of a Flan-T5 or from a config.json."""
    from transformers import T5Config

    size = arguments.translator.removeprefix("flan-t5-")
    if size not in FLAN:
        config = T5Config.from_pretrained(arguments.translator)
        config.vocab_size = 1
        return os.path.basename(os.path.dirname(os.path.abspath(arguments.translator))), config
    d_model, d_ff, layers, heads = FLAN[size]
    # Token embeddings and head are not used; one token keeps them out of the way.
    return f"flan-t5-{size}", T5Config(
        vocab_size=1,
        d_model=d_model,
        d_kv=64,
        num_heads=heads,
        d_ff=d_ff,
        num_layers=layers,
        num_decoder_layers=layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        tie_word_embeddings=False,
    )


def bench_train(arguments):
    """A step of the Grad-Transformer, with masters and without."""
    name, config = t5_config(arguments)
    (ls, ds), (lt, dt) = (map(int, blocks.split("x")) for blocks in (arguments.tiny, arguments.llm))
    batch = arguments.batch
    pure_types = [False, True] if arguments.pure and arguments.dtype == "bf16" else [False]
    for pure in pure_types:
        with torch.device(arguments.device):
            model = Translator(config, ds, dt).train()
        model = model.to(torch.bfloat16 if pure else torch.float32)
        kind = next(model.parameters()).dtype
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
        student = torch.randn(batch, ls, ds, device=arguments.device, dtype=kind)
        teacher = torch.randn(batch, lt, dt, device=arguments.device, dtype=kind)

        def step():
            with autocast(arguments):
                loss = F.mse_loss(model(student, teacher).float(), teacher.float())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        seconds = measured(step, arguments)
        rate = batch / statistics.median(seconds)
        shape = f"{name} {ls}x{ds}-{lt}x{dt} batch {batch}"
        report("train pure" if pure else "train", seconds, arguments, shape=shape, model=name, batch=batch,
               tuples_per_s=round(rate, 3))
        del model, optimizer


def bench_generate(arguments):
    """Greedy decoding with transformers' own loop and cache."""
    name, model = decoder(arguments)
    model = model.eval()
    batch, prompt, new = arguments.batch, arguments.context, arguments.tokens
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), device=arguments.device)
    settings = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}

    def times(count):
        def step():
            with torch.no_grad():
                ids = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count,
                                     min_new_tokens=count, **settings)
            assert ids.shape[1] == prompt + count
            return float(ids[0, -1])

        return measured(step, arguments)

    first = min(times(1))
    seconds = times(new)
    each = [(s - first) / (new - 1) for s in seconds]
    rate = batch / statistics.median(each)
    shape = f"{name}, batch {batch}, prompt {prompt}, {new} new"
    report("generate", each, arguments, shape=shape, model=name, batch=batch, prompt=prompt, new=new,
           tokens_per_s=round(rate, 2), generation_s=statistics.median(seconds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["finetune", "train", "generate"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "f32"], help="default: f32 on a CPU, bf16 on a GPU")
    parser.add_argument("--model", help="Qwen2.5 by name, or a config.json (default: 0.5b on a CPU, 7b on a GPU)")
    parser.add_argument("--translator", help="small, base, large, xl, or a config.json")
    parser.add_argument("--tiny", default="36x12800", help="BLOCKSxWIDTH")
    parser.add_argument("--llm", default="28x22528", help="BLOCKSxWIDTH")
    parser.add_argument("--tokens", type=int, help="of a step; of a continuation")
    parser.add_argument("--context", type=int, help="tokens of an example; of a prompt")
    parser.add_argument("--batch", type=int, help="tuples; sequences")
    parser.add_argument("--micro", type=int, help="examples at a time, where not one by one")
    parser.add_argument("--batched", action="store_true", help="leave out `finetune released`")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--pure", action="store_true", help="also train without float32 masters")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", help="add the lines to this file too")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"

    def by_default(key, cpu, gpu):
        if getattr(arguments, key) is None:
            setattr(arguments, key, gpu if on_gpu else cpu)

    by_default("dtype", "f32", "bf16")
    by_default("model", "qwen2.5-0.5b", "qwen2.5-7b")
    by_default("translator", "small", "large")
    if arguments.what == "generate":
        for key, cpu, gpu in (("batch", 4, 64), ("context", 32, 256), ("tokens", 8, 128)):
            by_default(key, cpu, gpu)
    else:
        for key, cpu, gpu in (("batch", 8, 32), ("context", 128, 512), ("tokens", 256, 8192)):
            by_default(key, cpu, gpu)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    {"finetune": bench_finetune, "train": bench_train, "generate": bench_generate}[arguments.what](arguments)


if __name__ == "__main__":
    main()
