"""A model with a tokenizer: what the whole program is held to, text in, text out.

In: nothing but a seed and the sentences below. Out, below `qwen2_text/`:

    model/    tiny random Qwen2 with a byte-level BPE tokenizer (the special tokens of
              Qwen2, a ChatML chat template), as `save_pretrained` writes it
    adapter/  PEFT adapter of it, r = 3, α = 12, on q, v, o and down
    merged/   both, as `merge_and_unload` and `save_pretrained` make it
    test.jsonl    prompts and references
    greedy.json   what transformers and PEFT continue every prompt with
"""

import json
import math

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from common import generator, normal, randomise, top_margin, write_json
from decoders import tidy_adapter

MERGES = 200
NEW_TOKENS = 24
SMALLEST_MARGIN = 2e-3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# As Qwen2 cuts text before it merges bytes: contractions, words, single digits,
# punctuation, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = """A farmer has three fields and sells the grain of two of them. How much is left for the winter?
The train leaves at nine and arrives at half past eleven; how long does the journey take?
Let's think step by step. There are four boxes with six apples each, so there are twenty-four apples.
She gave five of them to her brother and kept the rest. What remains is nineteen.
The answer is written at the end of the line, after the sign that says where it begins.
Which of the following options is correct? Answer only with the letter of the choice.
A summary of the dialogue: Maria can't come to the meeting, because she's at the dentist's.
Tom will bring the books back to the library on Friday, and Anna is going to help him.
The price rose from 120 to 150 euros, which is a rise of twenty-five per cent.
Water flows downhill, birds fly south in autumn, and the days are getting shorter.
"""

ROWS = [
    ("How many apples are left?", "#### 19"),
    ("The train leaves at 9:15.\nWhen does it arrive?", "at half past eleven\n#### 11:30"),
    ("Which option is correct?\nA) one\nB) two", "#### B"),
    ("  leading and trailing spaces  ", "none"),
    ("Grüße aus Ko\u0308ln, 東京 😀!", "Grüße"),
    ("$1,250.75 is 25% of what?", "#### 5,003"),
    ("it's, we'll, THEY'RE", "contractions"),
    ("a", "b"),
    ("tabs\tand  double  spaces\n\n\nand lines", "x"),
    ("The quick brown fox jumps over the lazy dog. " * 4, "#### 4"),
    ("def f(x):\n    return x ** 2", "#### f"),
    ("What remains is nineteen.", "#### nineteen."),
]


def make_tokenizer():
    """A byte-level BPE tokenizer trained on TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=TEMPLATE,
    )


def make_model(tokenizer, seed):
    """A random Qwen2 that is sure of what it says, and ends some of its texts."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()

    def std(name, p):
        if "norm" in name:
            return 0.2
        if name.endswith(".bias"):
            return 0.4
        # Branches that outweigh the embedding keep a model from repeating itself.
        return 1.0 if "embed_tokens" in name else 3.0 / math.sqrt(p.shape[-1])

    randomise(model, generator(seed), std)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[end] *= 1.5
        # Single bytes of other scripts make no text: they are to be rare.
        for token, i in tokenizer.get_vocab().items():
            if len(token) == 1 and not token.isascii():
                embedding[i] *= 0.5
    model.tie_weights()
    model.generation_config.eos_token_id = [end, pad]
    model.generation_config.pad_token_id = pad
    model.generation_config.do_sample = False
    return model


def make_adapter(model, seed):
    """The model under a random adapter."""
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=3, lora_alpha=12, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    gen = generator(seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(normal(gen, *p.shape, std=1 / math.sqrt(p.shape[1]) if "lora_A" in name else 0.1))
    return adapted


def prompt_tokens(tokenizer, prompt):
    """Token ids [1, T] of the model's own chat prompt."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


@torch.no_grad()
def continue_all(model, tokenizer):
    """What `generate` writes after every prompt; also the smallest margin between the
    best and the second token, over all steps.
    """
    out, margin = [], math.inf
    for prompt, _ in ROWS:
        ids = prompt_tokens(tokenizer, prompt)
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        margin = min(margin, min(top_margin(step[0]) for step in found.logits))
        tokens = found.sequences[0, ids.shape[1] :].tolist()
        ended = tokens[-1] in model.generation_config.eos_token_id
        out.append({"text": tokenizer.decode(tokens, skip_special_tokens=True), "ended": ended})
    return out, margin


def acceptable(base, adapted, margin):
    """Clear winners only; some texts end and some do not; the adapter matters; texts vary."""
    ended = sum(x["ended"] for x in base), sum(x["ended"] for x in adapted)
    different = sum(a != b for a, b in zip(base, adapted))
    letters = min(len(set("".join(x["text"] for x in texts))) for texts in (base, adapted))
    long = [x["text"] for x in base + adapted if not x["ended"]]
    varied = sum(len(set(text)) > 12 for text in long)
    return (
        margin > SMALLEST_MARGIN
        and all(3 <= n <= len(ROWS) - 4 for n in ended)
        and different >= len(ROWS) - 2
        and letters > 25
        and varied > len(long) // 2
    )


def make_texts(root, seed):
    """Writes the fixture below `root`/qwen2_text."""
    folder = root / "qwen2_text"
    tokenizer = make_tokenizer()
    for seed in range(seed, seed + 500):
        model = make_model(tokenizer, seed)
        base, margin = continue_all(model, tokenizer)
        model.save_pretrained(folder / "model")
        adapted_model = make_adapter(model, seed + 1000)
        adapted, other = continue_all(adapted_model, tokenizer)
        if acceptable(base, adapted, min(margin, other)):
            break
    else:
        raise SystemExit("no seed gives clear and varied texts")
    tokenizer.save_pretrained(folder / "model")
    adapted_model.save_pretrained(folder / "adapter")
    tidy_adapter(folder / "adapter", "../model")
    # From the files, so that what is merged is what anyone would merge.
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    merged = PeftModel.from_pretrained(loaded, folder / "adapter").merge_and_unload().eval()
    again, third = continue_all(merged, tokenizer)
    assert again == adapted and third > SMALLEST_MARGIN
    merged.save_pretrained(folder / "merged")
    lines = [json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False) for prompt, response in ROWS]
    (folder / "test.jsonl").write_text("".join(f"{line}\n" for line in lines))
    info = {
        "seed": seed,
        "max_new_tokens": NEW_TOKENS,
        "greedy_smallest_margin": float(f"{min(margin, other, third):.4g}"),
        "base": base,
        "adapter": adapted,
    }
    write_json(folder / "greedy.json", info)
