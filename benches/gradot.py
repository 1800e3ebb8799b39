#!/usr/bin/env python3
"""Statistics and decompositions for a GradOT emulator: a model to measure on, and the same work in PyTorch.

    gradot.py make DIR --world WORLD [--layers N]   a model with random weights and the sizes of Qwen2.5-0.5B, with the
                                                    tokenizer of a directory that `gradtx world WORLD` made
    gradot.py peer [--tokens N] [--layers N]        the same work in PyTorch: one JSON line
    gradot.py run GRADTX DIR --world WORLD          gradtx on that model, with the time of each part: one JSON line

All take --threads (default 2). `peer` and `run` measure the rate of a float32 matrix product [2048, 2048] before their
work, and give the sums' operations per second also as a share of that rate. Seconds are of the processor, of all threads
together, so that other work on the machine changes them little; those of a clock are there too.

What is computed: for the middle layers (20 of 24), over all tokens, A = sum a a^T and G = sum g g^T of the four fused
products (q, k, v; o; gate, up; down), the gradient D of all but gate and up; then the singular value decompositions of
q, k, v and o, and the terms of all scores. PyTorch's decomposition is float32 (LAPACK's), that of gradtx float64.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

SIZES = {"hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "vocab": 151_936}


def config(layers):
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": SIZES["hidden"],
        "intermediate_size": SIZES["intermediate"],
        "num_hidden_layers": layers,
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv_heads"],
        "vocab_size": SIZES["vocab"],
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "attention_dropout": 0.0,
    }


def model(layers):
    import torch
    import transformers

    torch.manual_seed(1)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config(layers))).float()


def make(args):
    model(args.layers).save_pretrained(args.dir)
    llm = os.path.join(args.world, "llm")
    for name in os.listdir(llm):
        if name.startswith(("tokenizer", "special_tokens", "vocab")):
            shutil.copy(os.path.join(llm, name), args.dir)
    # The world's tokens end its answers.
    with open(os.path.join(llm, "config.json")) as file:
        ends = json.load(file).get("eos_token_id")
    path = os.path.join(args.dir, "config.json")
    with open(path) as file:
        written = json.load(file)
    written["eos_token_id"] = ends
    with open(path, "w") as file:
        json.dump(written, file, indent=2)
    shutil.rmtree(os.path.join(args.dir, "generation_config.json"), ignore_errors=True)


def gemm_rate(torch):
    """Operations per second of the processor."""
    n, runs = 2048, 20
    a, b = torch.randn(n, n), torch.randn(n, n)
    a @ b
    spent, _ = seconds(lambda: [a @ b for _ in range(runs)])
    return runs * 2 * n**3 / spent


def seconds(work):
    """Of the processor, and of a clock."""
    spent, began = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - spent, time.perf_counter() - began


def operations(layers, edge):
    """For a token: of forward and backward passes, and of the sums of all middle layers."""
    h, f = SIZES["hidden"], SIZES["intermediate"]
    kv = h * SIZES["kv_heads"] // SIZES["heads"]
    block = 2 * h * h + 2 * h * kv + 3 * h * f
    head = h * SIZES["vocab"]
    passes = 2 * (layers * block + head) + 2 * ((layers - edge) * block + head)
    products = [(h, h + 2 * kv, True), (h, h, True), (h, 2 * f, False), (f, h, True)]
    sums = sum(2 * (i * i + o * o + (i * o if wants else 0)) for i, o, wants in products)
    return passes + (layers - 2 * edge) * sums


def peer(args):
    import torch

    torch.set_num_threads(args.threads)
    rate = gemm_rate(torch)
    net = model(args.layers)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    middle = net.model.layers[args.edge : args.layers - args.edge]
    sums = [{} for _ in middle]
    inputs = {}

    def add(layer, name, value):
        if name in sums[layer]:
            sums[layer][name] += value
        else:
            sums[layer][name] = value

    def fused(layer, product, modules, wants_gradient):
        grads = {}

        def forward(module, args_):
            inputs[layer, product] = args_[0].detach().flatten(0, 1)

        def backward(name):
            def hook(module, grad_in, grad_out):
                grads[name] = grad_out[0].flatten(0, 1)
                if len(grads) < len(modules):
                    return
                g = torch.cat([grads[n] for n, _ in modules], 1)
                a = inputs.pop((layer, product))
                add(layer, product + ".inputs", a.T @ a)
                add(layer, product + ".outputs", g.T @ g)
                if wants_gradient:
                    add(layer, product + ".gradient", g.T @ a)
                grads.clear()

            return hook

        modules[0][1].register_forward_pre_hook(forward)
        for name, module in modules:
            module.register_full_backward_hook(backward(name))

    for at, block in enumerate(middle):
        attention, mlp = block.self_attn, block.mlp
        fused(at, "qkv", [("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)], True)
        fused(at, "o", [("o", attention.o_proj)], True)
        fused(at, "gate_up", [("gate", mlp.gate_proj), ("up", mlp.up_proj)], False)
        fused(at, "down", [("down", mlp.down_proj)], True)

    def stream(count):
        ids = torch.randint(0, 100, (max(1, count // args.length), args.length))
        hidden = net.model.embed_tokens(ids).requires_grad_(True)
        logits = net(inputs_embeds=hidden).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
        return ids.numel()

    # The first pass touches its memory for the first time.
    stream(args.length)
    for of_layer in sums:
        of_layer.clear()
    done = 0

    def all_streams():
        nonlocal done
        while done < args.tokens:
            done += stream(min(args.stream, args.tokens - done))

    of_sums = seconds(all_streams)

    def decompose():
        for block, of_layer in zip(middle, sums):
            for name in ["q_proj", "k_proj", "v_proj", "o_proj"]:
                torch.linalg.svd(getattr(block.self_attn, name).weight, full_matrices=False)

    of_svd = seconds(decompose)
    print(json.dumps(result("peer", args, rate, done, of_sums, of_svd)))


def result(who, args, rate, tokens, of_sums, of_svd, **more):
    per_second = tokens / of_sums[0] * operations(args.layers, args.edge)
    return {
        "who": who,
        "threads": args.threads,
        "middle_layers": args.layers - 2 * args.edge,
        "tokens": tokens,
        "statistics_cpu_seconds": round(of_sums[0], 1),
        "statistics_seconds": round(of_sums[1], 1),
        "tokens_per_cpu_second": round(tokens / of_sums[0], 2),
        "gemm_gflops_per_cpu_second": round(rate / 1e9, 1),
        "statistics_gflops_per_cpu_second": round(per_second / 1e9, 1),
        "share_of_gemm": round(per_second / rate, 3),
        "decomposition_cpu_seconds": round(of_svd[0], 1),
        "decomposition_seconds": round(of_svd[1], 1),
        **more,
    }


def spent_by(child):
    """Seconds of the processor that a process has taken."""
    with open(f"/proc/{child.pid}/stat") as file:
        fields = file.read().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def gradtx_gemm_rate(gradtx):
    """Operations per second of the processor of the large product that `gradtx bench` begins with."""
    runs = 40
    with tempfile.TemporaryDirectory() as home:
        out = os.path.join(home, "bench.jsonl")
        words = [*gradtx, "--quiet", "bench", "kernels", "--large", "2048", "--runs", str(runs), "--out", out]
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (os.path.exists(out) and open(out).read().count("\n")):
            spent = spent_by(child)
            if child.poll() is not None:
                sys.exit("gradtx bench: no result")
            time.sleep(0.02)
        child.terminate()
        child.wait()
        measured = json.loads(open(out).readline())
    # One sample is not counted.
    return (runs + 1) * measured["calls_per_run"] * measured["flops"] / spent


def run(args):
    gradtx = [args.gradtx, "--threads", str(args.threads)]
    rate = gradtx_gemm_rate(gradtx)
    settings = [
        f"models.llm={os.path.abspath(args.dir)}",
        f"emulator.num_tokens={args.tokens}",
        f"emulator.edge=[{args.edge},{args.edge}]",
        f"device.max_tokens_per_microbatch={args.stream}",
        "device.kind=cpu",
    ]
    words = ["emulate", "--run", args.out, "--config", f"{args.world}/settings.toml"]
    words += [word for setting in settings for word in ("--set", setting)]
    lines = []
    began = time.perf_counter()
    with subprocess.Popen([*gradtx, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        for line in child.stdout:
            lines.append((spent_by(child), time.perf_counter() - began, line.rstrip()))
            print(f"{lines[-1][0]:8.1f} {lines[-1][1]:8.1f}  {lines[-1][2]}", file=sys.stderr)
    if child.returncode:
        sys.exit(child.returncode)

    def since(before, what):
        """Seconds from the last line with one text to the last with another."""
        first, last = [[line for line in lines if text in line[2]][-1] for text in (before, what)]
        return last[0] - first[0], last[1] - first[1]

    tokens = sum(int(n) for _, _, line in lines for n in re.findall(r"pass \d+ of \d+, \d+ layers, (\d+) tokens", line))
    of_sums, of_svd = since("of memory", "statistics: pass"), since("statistics: pass", "decomposition and scores")
    more = {"whole_cpu_seconds": round(lines[-1][0], 1), "whole_seconds": round(lines[-1][1], 1)}
    print(json.dumps(result("gradtx", args, rate, tokens, of_sums, of_svd, **more)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ["make", "peer", "run"]:
        command = commands.add_parser(name)
        if name == "run":
            command.add_argument("gradtx")
        if name != "peer":
            command.add_argument("dir")
            command.add_argument("--world", required=True)
        command.add_argument("--out", default="run")
        command.add_argument("--tokens", type=int, default=2048)
        command.add_argument("--stream", type=int, default=1024)
        command.add_argument("--length", type=int, default=128)
        command.add_argument("--layers", type=int, default=SIZES["layers"])
        command.add_argument("--edge", type=int, default=2, help="first and last layers that are left out")
        command.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    {"make": make, "peer": peer, "run": run}[args.command](args)


if __name__ == "__main__":
    main()
