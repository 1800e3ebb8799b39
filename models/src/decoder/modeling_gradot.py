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
    OPTConfig,
    OPTForCausalLM,
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
    is_opt = model.config.model_type == "gradot_opt"
    layers = model.model.decoder.layers if is_opt else model.model.layers
    for layer, shape in zip(layers, gradot["layers"], strict=True):
        if is_opt:
            narrow(layer, ["fc1"], "fc2", shape["intermediate"])
        else:
            narrow(layer.mlp, ["gate_proj", "up_proj"], "down_proj", shape["intermediate"])
            layer.mlp.intermediate_size = shape["intermediate"]
        for name in ("q", "k", "v", "o"):
            if shape[name]:
                path = "out_proj" if is_opt and name == "o" else f"{name}_proj"
                whole = getattr(layer.self_attn, path)
                factored = Factored(whole.in_features, whole.out_features, shape[name], whole.bias is not None)
                setattr(layer.self_attn, path, factored)
    model.post_init()


def narrow(mlp, first, last, width):
    """Gives an MLP this width."""
    whole = getattr(mlp, last)
    if width == whole.in_features:
        return
    hidden, bias = whole.out_features, whole.bias is not None
    for name in first:
        setattr(mlp, name, nn.Linear(hidden, width, bias=bias))
    setattr(mlp, last, nn.Linear(width, hidden, bias=bias))


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


class GradOtOPTConfig(OPTConfig):
    model_type = "gradot_opt"


class GradOtOPTForCausalLM(OPTForCausalLM):
    config_class = GradOtOPTConfig

    def __init__(self, config):
        super().__init__(config)
        compress(self)
