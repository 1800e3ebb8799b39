"""A GradOT emulator for transformers: an LLM of which the layers between the first and the last ones are compressed.

Written by gradtx beside the weights; opened with

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

Layers are those of the family, with the sizes that `gradot.layers` of config.json gives each: `intermediate` is the
width of the MLP, and `q`, `k`, `v`, `o` are ranks: where one is not 0, the projection is `up(down(x))`. Adapters
belong to the layers of the edge: `layers_to_transform` of PEFT names them.
"""

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VERSION = 1


class Factored(nn.Module):
    """A linear layer whose matrix is a product of two thin ones."""

    def __init__(self, inputs, outputs, rank, bias):
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x):
        return self.up(self.down(x))


def compress(model):
    """Gives every layer its own sizes."""
    gradot = model.config.gradot
    if gradot["version"] != VERSION:
        raise ValueError(f"config.json: gradot.version is {gradot['version']}, expected {VERSION}")
    for layer, shape in zip(model.model.layers, gradot["layers"], strict=True):
        mlp, attention, width = layer.mlp, layer.self_attn, shape["intermediate"]
        if width != mlp.gate_proj.out_features:
            hidden = mlp.gate_proj.in_features
            mlp.gate_proj = nn.Linear(hidden, width, bias=False)
            mlp.up_proj = nn.Linear(hidden, width, bias=False)
            mlp.down_proj = nn.Linear(width, hidden, bias=False)
            mlp.intermediate_size = width
        for name in ("q", "k", "v", "o"):
            if shape[name]:
                whole = getattr(attention, f"{name}_proj")
                factored = Factored(whole.in_features, whole.out_features, shape[name], whole.bias is not None)
                setattr(attention, f"{name}_proj", factored)
    model.post_init()


class GradOtLlamaConfig(LlamaConfig):
    model_type = "gradot_llama"


class GradOtMistralConfig(MistralConfig):
    model_type = "gradot_mistral"


class GradOtQwen2Config(Qwen2Config):
    model_type = "gradot_qwen2"


class GradOtQwen3Config(Qwen3Config):
    model_type = "gradot_qwen3"


class GradOtLlamaForCausalLM(LlamaForCausalLM):
    config_class = GradOtLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        compress(self)


class GradOtMistralForCausalLM(MistralForCausalLM):
    config_class = GradOtMistralConfig

    def __init__(self, config):
        super().__init__(config)
        compress(self)


class GradOtQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = GradOtQwen2Config

    def __init__(self, config):
        super().__init__(config)
        compress(self)


class GradOtQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = GradOtQwen3Config

    def __init__(self, config):
        super().__init__(config)
        compress(self)
