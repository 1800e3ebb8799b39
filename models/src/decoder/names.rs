//! [`Names`]: what the tensors and modules of a family are called in model and adapter files.

use super::Family;
use super::family::Positions;
use super::module::Module;

/// The LM head, where it is not the embedding.
pub(super) const HEAD: &str = "lm_head.weight";

/// The names of a family.
#[derive(Debug)]
pub(super) struct Names {
    /// What stands before `embed_tokens`, `layers` and the final norm.
    decoder: &'static str,
    /// The norms before the parts of a layer, and the last one.
    pub(super) attention_norm: &'static str,
    pub(super) mlp_norm: &'static str,
    final_norm: &'static str,
    /// Paths of all modules below a layer.
    modules: [&'static str; Module::ALL.len()],
}

/// Of Llama, and most that came after it.
pub(super) const LLAMA: Names = Names {
    decoder: "model",
    attention_norm: "input_layernorm",
    mlp_norm: "post_attention_layernorm",
    final_norm: "norm",
    modules: [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ],
};

/// Of OPT. It has no gate.
pub(super) const OPT: Names = Names {
    decoder: "model.decoder",
    attention_norm: "self_attn_layer_norm",
    mlp_norm: "final_layer_norm",
    final_norm: "final_layer_norm",
    modules: [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "",
        "fc1",
        "fc2",
    ],
};

impl Names {
    /// `[V, H]`
    pub(super) fn embedding(&self) -> String {
        format!("{}.embed_tokens.weight", self.decoder)
    }

    /// The table of learned positions.
    pub(super) fn positions(&self) -> String {
        format!("{}.embed_positions.weight", self.decoder)
    }

    /// The norm after the last layer, without `.weight`.
    pub(super) fn final_norm(&self) -> String {
        format!("{}.{}", self.decoder, self.final_norm)
    }
}

/// The layer that a tensor is of, by its name in any family.
pub fn layer_of(name: &str) -> Option<usize> {
    name.split_once(".layers.")?.1.split('.').next()?.parse().ok()
}

/// The names of one layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerNames {
    pub(super) family: Family,
    pub(super) layer: usize,
}

impl LayerNames {
    /// A tensor of a module, such as `.weight`.
    pub(super) fn of(self, module: Module, tensor: &str) -> String {
        self.family.tensor(self.layer, module, tensor)
    }

    /// The name of what has this path below the layer.
    pub(super) fn below(self, path: &str) -> String {
        format!("{}{path}", self.family.layer(self.layer))
    }
}

impl Family {
    /// What the names of a layer's tensors begin with, e.g. `model.layers.3.`.
    pub fn layer(self, layer: usize) -> String {
        format!("{}{layer}.", self.layers())
    }

    /// What the names of all layers' tensors begin with, e.g. `model.layers.`.
    pub fn layers(self) -> String {
        format!("{}.layers.", self.names().decoder)
    }

    /// The name of a module's tensor, such as `.weight`.
    pub fn tensor(self, layer: usize, module: Module, tensor: &str) -> String {
        format!("{}{}{tensor}", self.layer(layer), self.module_path(module))
    }

    /// Paths of the modules outside the layers that PEFT can adapt too.
    pub(crate) fn modules_outside(self) -> Vec<String> {
        let names = self.names();
        let positions = match self.traits().positions {
            Positions::Rotary => None,
            Positions::Learned { .. } => Some(names.positions()),
        };
        let tensors = [HEAD.to_owned(), names.embedding()].into_iter().chain(positions);
        tensors.map(|tensor| tensor.trim_end_matches(".weight").to_owned()).collect()
    }

    /// The path of a module below its layer, e.g. `self_attn.q_proj`; empty for one that the family lacks.
    pub fn module_path(self, module: Module) -> &'static str {
        self.names().modules[module as usize]
    }

    /// The name of a module in adapter files, e.g. `q_proj`; empty for one that the family lacks.
    pub fn module_name(self, module: Module) -> &'static str {
        let path = self.module_path(module);
        path.rsplit_once('.').map_or(path, |(_, name)| name)
    }

    /// The modules that its blocks have.
    pub fn modules(self) -> impl Iterator<Item = Module> {
        Module::ALL.into_iter().filter(move |module| self.has(*module))
    }

    /// Whether its blocks have such a module.
    pub fn has(self, module: Module) -> bool {
        !self.module_path(module).is_empty()
    }
}
