"""Greedy texts across programs: does transformers (with PEFT) write what gradtx wrote?

    generate.py MODEL --data test.jsonl --predictions predictions.jsonl
                [--adapter ADAPTER] [--prompt chatml|template|plain] [--max-new-tokens N]

MODEL is a Hugging Face directory, such as one that `gradtx merge` made; with
--adapter it is the base model under that PEFT directory. PREDICTIONS is what
`gradtx evaluate` wrote for the same model on DATA, with the same settings
`data.prompt` and `evaluate.max_new_tokens`. Every prompt of DATA is rendered and
continued here, alone and in float32, and compared text for text. Texts are not
printed: for a difference its line, and by how much the two candidates for the
first differing token differ in logits (about 1e-6 is rounding).

Exits with 1 on any difference. Run by hand, with the libraries of
../goldens/requirements.txt.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def read_lines(path):
    """JSON objects by their line, from 1; empty lines are skipped."""
    lines = enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1)
    return {number: json.loads(text) for number, text in lines if text.strip()}


def question(row):
    """What is asked; of a bare question, as with the setting `data.instruction = "none"`."""
    return row["prompt"] if "prompt" in row else row["question"]


def conversation(row):
    """The messages before the answer."""
    if "messages" in row:
        return row["messages"][:-1]
    return [{"role": "user", "content": question(row)}]


def prompt_text(row, form, tokenizer):
    """The text that generation starts from."""
    if form == "plain":
        return question(row)
    if form == "template":
        return tokenizer.apply_chat_template(conversation(row), tokenize=False, add_generation_prompt=True)
    messages = conversation(row)
    if "messages" not in row:
        messages = [{"role": "user", "content": "\n" + question(row).strip() + "\n"}]
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}] + messages
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return turns + "<|im_start|>assistant\n"


@torch.no_grad()
def continuation(model, tokenizer, prompt, limit):
    """(text, logits [steps, V]) of the greedy continuation."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    text = tokenizer.decode(
        found.sequences[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text, torch.cat(found.logits)


def margin_at_difference(logits, text, other, tokenizer):
    """How much the best token leads where `text` and `other` part; the smallest lead
    before, if the tokens cannot be told.
    """
    best = torch.topk(logits, 2, dim=-1)
    leads = best.values[:, 0] - best.values[:, 1]
    common = 0
    while common < min(len(text), len(other)) and text[common] == other[common]:
        common += 1
    for step in range(len(leads)):
        if len(tokenizer.decode(best.indices[: step + 1, 0], skip_special_tokens=True)) > common:
            return float(leads[: step + 1].min())
    return float(leads.min())


def differences(found, wanted):
    """Lines whose texts differ, or that only one side has."""
    return [line for line in sorted(found.keys() | wanted.keys()) if found.get(line) != wanted.get(line)]


def comparison_can_fail():
    """Negative controls of `differences`."""
    good = {1: "a", 3: ""}
    assert differences(good, dict(good)) == []
    for broken in ({1: "a "}, {1: "a"}, {1: "a", 3: "", 4: ""}, {}):
        assert differences(broken, good), broken


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--prompt", choices=["chatml", "template", "plain"], default="chatml")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    arguments = parser.parse_args()
    comparison_can_fail()
    torch.set_num_threads(1)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if arguments.adapter:
        model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    rows, predictions = read_lines(arguments.data), read_lines(arguments.predictions)
    wanted = {p["line"]: p["prediction"] for p in predictions.values()}
    found, margins = {}, {}
    for line, row in rows.items():
        prompt = prompt_text(row, arguments.prompt, tokenizer)
        found[line], logits = continuation(model, tokenizer, prompt, arguments.max_new_tokens)
        if found[line] != wanted.get(line):
            margins[line] = margin_at_difference(logits, found[line], wanted.get(line, ""), tokenizer)

    bad = differences(found, wanted)
    for line in bad:
        where = f"margin {margins[line]:.2e}" if line in margins else "not in the data"
        print(f"line {line}: differs, {where}")
    what = f"{arguments.model} under {arguments.adapter}" if arguments.adapter else str(arguments.model)
    print(f"{what}: {len(found) - len(bad)} of {len(found)} texts are the same, {len(set(found.values()))} distinct")
    sys.exit(1 if bad or not found else 0)


if __name__ == "__main__":
    main()
