"""What a user brings: a second model directory as transformers writes it, and a data set
in two Parquet files as pyarrow writes them (GSM8K's columns, invented problems).
"""

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from texts import make_tokenizer

PROBLEMS = 96


def problem(i):
    """One of the invented word problems."""
    a, b = 3 + i % 17, 2 + i % 11
    answer = f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"
    return {"question": f"Mia has {a} apples and finds {b} more. How many has she?", "answer": answer}


def make_own(root, seed):
    """Writes the fixture below `root`/own."""
    folder = root / "own"
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "llm", safe_serialization=True)
    tokenizer.save_pretrained(folder / "llm")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    half = PROBLEMS // 2
    for part in range(2):
        table = pa.Table.from_pylist([problem(i) for i in range(part * half, (part + 1) * half)])
        pq.write_table(table, folder / "data" / f"train-{part:05}-of-00002.parquet")
