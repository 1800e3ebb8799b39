"""The same two training steps in PyTorch, for comparison with ours.

    peer_torch.py [lora|translator] [--threads N] [--runs N] [--dropout P] ...

lora        LoRA fine-tuning step of a Qwen2.5-0.5B-shaped model with random
            weights (PEFT, r=2, α=32, query and value projections, adapter
            dropout 0.05): forward, backward, clipping, AdamW on 4 examples of
            256 tokens. Measured as one batch of four with fused attention, and as
            four micro-batches of one, the way the method's scripts accumulate.
translator  Grad-Transformer step, Flan-T5-small-shaped: 36 blocks of 12,800 to 28
            blocks of 22,528, batch 8, dropout 0.1, all parameters trained.

Float32. The model is built before timing and all runs take the same random data.
Per variant one JSON line: name, median_s, tokens_per_s (tokens of the four
examples; blocks in and out for the translator), runs (seconds of each).
"""

import argparse
import json
import math
import os
import statistics
import time

# Large buffers in huge pages: without it the kernel's page faults on fresh
# logits cost several times what the arithmetic on them does. Read by PyTorch's
# allocator when it first allocates; set it to 0 outside to see the difference.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.nn.functional as F
from torch import nn

CLIP = 1.0
EXAMPLES, TOKENS = 4, 256
BATCH, SOURCE, TARGET, DS, DT = 8, 36, 28, 12_800, 22_528


def report(name, step, tokens, arguments):
    """Runs `step` with warm-up and prints the JSON line."""
    seconds = []
    for run in range(arguments.warmup + arguments.runs):
        begin = time.perf_counter()
        loss = step()
        took = time.perf_counter() - begin
        assert math.isfinite(loss), f"{name}: loss is {loss}"
        if run >= arguments.warmup:
            seconds.append(round(took, 4))
    median = statistics.median(seconds)
    line = {
        "name": name,
        "median_s": median,
        "tokens_per_s": round(tokens / median, 2),
        "runs": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "huge_pages": os.environ["THP_MEM_ALLOC_ENABLE"] == "1",
    }
    print(json.dumps(line), flush=True)


def make_optimizer(parameters, lr, weight_decay, kind):
    """AdamW in one of PyTorch's two batched forms; `fused` is the faster on a CPU."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, **{kind: True})


def qwen_with_adapter(dropout):
    """Qwen2.5-0.5B's shape, frozen, with trainable adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151_936,
        tie_word_embeddings=True,
        rope_theta=1e6,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=2, lora_alpha=32, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora).train()


def lora_loss(model, tokens, prompt):
    """Mean over the examples of each one's mean loss on the tokens from `prompt`
    on. All have the same number of targets, so this is the mean over targets.
    Only positions with a target go through the head.
    """
    targets = tokens[:, max(prompt, 1) :]
    kept = slice(max(prompt, 1) - 1, tokens.shape[1] - 1)
    # The wrapper's inner model gives hidden states; the head then sees what it needs.
    causal = model.get_base_model()
    hidden = causal.model(input_ids=tokens, use_cache=False).last_hidden_state[:, kept]
    # One plain matrix product: a three-dimensional slice would go through `bmm`.
    logits = causal.lm_head(hidden.flatten(0, 1))
    return F.cross_entropy(logits, targets.flatten())


def bench_lora(arguments):
    """Both ways of taking the step, with the labels asked for."""
    model = qwen_with_adapter(0.05 if arguments.dropout is None else arguments.dropout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, 1e-4, 0.01, arguments.optimizer)
    tokens = torch.randint(0, 151_936, (EXAMPLES, TOKENS))
    prompt = TOKENS // 2 if arguments.labels == "half" else 0

    def step(micro):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in tokens.split(micro):
            loss = lora_loss(model, part, prompt) * (len(part) / EXAMPLES)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return total

    for how, micro in (("batch4", 4), ("accumulate4x1", 1)):
        if arguments.how in (how, "both"):
            report(f"lora_{how}_labels_{arguments.labels}", lambda: step(micro), EXAMPLES * TOKENS, arguments)


class Translator(nn.Module):
    """T5 stacks between three projections, teacher forced."""

    def __init__(self, dropout):
        super().__init__()
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            # Token embeddings and head are not used; one token keeps them out of the way.
            vocab_size=1,
            d_model=512,
            d_kv=64,
            num_heads=6,
            d_ff=1024,
            num_layers=8,
            num_decoder_layers=8,
            feed_forward_proj="gated-gelu",
            dropout_rate=dropout,
            tie_word_embeddings=False,
        )
        whole = T5ForConditionalGeneration(config)
        self.encoder, self.decoder = whole.encoder, whole.decoder
        self.encoder.embed_tokens = self.decoder.embed_tokens = None
        self.input_proj = nn.Linear(DS, config.d_model)
        self.embed_proj = nn.Linear(DT, config.d_model)
        self.output_proj = nn.Linear(config.d_model, DT)

    def forward(self, student, teacher):
        earlier = F.pad(teacher[:, :-1], (0, 0, 1, 0))
        encoded = self.encoder(inputs_embeds=self.input_proj(student)).last_hidden_state
        hidden = self.decoder(
            inputs_embeds=self.embed_proj(earlier), encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state
        return self.output_proj(hidden)


def bench_translator(arguments):
    """One step of the Grad-Transformer."""
    model = Translator(0.1 if arguments.dropout is None else arguments.dropout).train()
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters, 5e-5, 0.0, arguments.optimizer)
    student, teacher = torch.randn(BATCH, SOURCE, DS), torch.randn(BATCH, TARGET, DT)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(model(student, teacher), teacher)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return loss.item()

    report("translator_batch8", step, BATCH * (SOURCE + TARGET), arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["lora", "translator", "both"], default="both")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dropout", type=float, help="instead of 0.05 (lora) and 0.1 (translator)")
    parser.add_argument("--labels", choices=["all", "half"], default="all", help="train on all tokens or the last half")
    parser.add_argument("--how", choices=["batch4", "accumulate4x1", "both"], default="both")
    parser.add_argument("--optimizer", choices=["fused", "foreach"], default="fused")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    if arguments.what in ("lora", "both"):
        bench_lora(arguments)
    if arguments.what in ("translator", "both"):
        bench_translator(arguments)


if __name__ == "__main__":
    main()
