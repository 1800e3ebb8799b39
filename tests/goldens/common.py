"""What every fixture needs: random weights, one training loop, one way to
compare, one way to write.

A fixture is measured twice: as written (float32), and with the weights in
float64. The second measurement is not stored. It only shows how far rounding
alone moves each number, so that a fixture whose values hang on the last bits
(Adam divides by tiny gradients) is refused here rather than discovered as a
mysterious failure of the program under test.
"""

import json
from pathlib import Path

import numpy
import peft
import safetensors
import torch
import transformers
from safetensors.torch import save_file

STEPS = 10
ACCUMULATION = 4
CLIP = 1.0
BETAS = (0.9, 0.999)
EPS = 1e-8
# The program is held to 1e-4; rounding alone must stay well below that.
ROUNDING_LIMIT = 2e-5
MARGIN = 1e-2


def generator(seed):
    """A CPU random generator of its own, so that fixtures do not depend on order."""
    return torch.Generator().manual_seed(seed)


def normal(gen, *shape, std=1.0):
    """Float32 normal values of the given shape."""
    return torch.randn(*shape, generator=gen) * std


def randomise(model, gen, std_of):
    """Overwrites every parameter: `std_of(name, parameter)` is the width of the
    normal distribution. Norm weights are centred on one, all others on zero.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if "norm" in name and not name.endswith(".bias") else 0.0
            p.copy_(centre + normal(gen, *p.shape, std=std_of(name, p)))


def train(parameters, micro_loss, lr, weight_decay):
    """Ten AdamW steps, each over four micro-batches.

    `micro_loss(i)` is the mean loss of micro-batch i (0..40). A step's loss is
    the mean of its four micro-losses, taken before the update; the gradient norm
    is the one before clipping. Returns (losses [10], norms [10]).
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for i in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
            loss = micro_loss(i) / ACCUMULATION
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        losses.append(total)
    return torch.tensor(losses), torch.tensor(norms)


def optimizer_settings(lr, weight_decay):
    """The settings of `train`, as golden.json states them."""
    return {
        "optimizer": "AdamW",
        "lr": lr,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "eps": EPS,
        "weight_decay": weight_decay,
        "clip_norm": CLIP,
        "steps": STEPS,
        "accumulation": ACCUMULATION,
    }


def relative_error(found, wanted):
    """‖found − wanted‖ / ‖wanted‖ in float64; absolute where `wanted` is zero."""
    found, wanted = found.double(), wanted.double()
    error = torch.linalg.vector_norm(found - wanted)
    norm = torch.linalg.vector_norm(wanted)
    return float(error / norm) if norm > 0 else float(error)


def rounding(single, double):
    """The largest relative error between the two measurements of one fixture,
    and the tensor that has it. Raises if it is beyond ROUNDING_LIMIT.
    """
    assert single.keys() == double.keys()
    worst = max(single, key=lambda name: relative_error(single[name], double[name]))
    error = relative_error(single[worst], double[worst])
    if not error <= ROUNDING_LIMIT:
        raise SystemExit(f"{worst}: rounding alone moves it by {error:.2e}; choose another seed or scale")
    return {"tensor": worst, "relative_error": float(f"{error:.1e}")}


def greedy_seed(first, distinct, decode):
    """The first seed from `first` on whose decode has a clear winner at every
    step and has at least `distinct` different tokens. `decode(seed)` returns
    (tokens, smallest margin between the best and the second-best logit).
    """
    for seed in range(first, first + 200):
        tokens, margin = decode(seed)
        if margin > MARGIN and len(set(tokens)) >= distinct:
            return seed, margin
    raise SystemExit(f"no seed in {first}..{first + 200} decodes clearly")


def top_margin(logits):
    """Difference between the best and the second-best entry of `logits` [V]."""
    best = torch.topk(logits, 2).values
    return float(best[0] - best[1])


def write_golden(folder, tensors, info):
    """Writes golden.safetensors and golden.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    for name, t in tensors.items():
        assert t.dtype in (torch.float32, torch.int32), f"{name} is {t.dtype}"
        assert not t.is_floating_point() or bool(torch.isfinite(t).all()), f"{name} is not finite"
    save_file(tensors, str(folder / "golden.safetensors"))
    info = dict(info)
    info["versions"] = {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "safetensors": safetensors.__version__,
        "numpy": numpy.__version__,
    }
    info["tensors"] = {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        for name, t in sorted(tensors.items())
    }
    write_json(folder / "golden.json", info)


def write_json(path, value):
    """Indented JSON with a final newline."""
    Path(path).write_text(json.dumps(value, indent=1) + "\n")
