//! [`Family`]: the published architectures. A family is one entry of this file: the parts that its blocks are
//! made of, and what its `config.json` means where it is silent.

/// Which published architecture a model belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

/// In what families differ.
pub(super) struct Traits {
    model_type: &'static str,
    architecture: &'static str,
    /// q, k and v have biases.
    pub(super) qkv_bias: bool,
    /// Query and key heads are normalised before the rotation.
    pub(super) qk_norm: bool,
    /// Values per head where the file is silent; otherwise the hidden ones are shared out among the heads.
    pub(super) head_dim: Option<usize>,
    /// Where the file is silent about key and value heads, there are as many as query heads.
    pub(super) is_multi_head: bool,
    /// Which layers see a window of the tokens before only.
    pub(super) window: WindowRule,
    /// Switches that transformers writes for this family and that are off here.
    pub(super) switches: &'static [&'static str],
}

/// Which layers slide, where `layer_types` does not say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WindowRule {
    /// None.
    Never,
    /// All.
    Always,
    /// Those from `max_window_layers` on, if `use_sliding_window` says so.
    Switched,
}

const LLAMA: Traits = Traits {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    qkv_bias: false,
    qk_norm: false,
    head_dim: None,
    is_multi_head: true,
    window: WindowRule::Never,
    switches: &["attention_bias", "mlp_bias"],
};

const MISTRAL: Traits = Traits {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    is_multi_head: false,
    window: WindowRule::Always,
    switches: &[],
    ..LLAMA
};

const QWEN2: Traits = Traits {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    qkv_bias: true,
    is_multi_head: false,
    window: WindowRule::Switched,
    switches: &[],
    ..LLAMA
};

const QWEN3: Traits = Traits {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    qk_norm: true,
    head_dim: Some(128),
    is_multi_head: false,
    window: WindowRule::Switched,
    switches: &["attention_bias"],
    ..LLAMA
};

impl Family {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// In what it differs from the others.
    pub(super) fn traits(self) -> &'static Traits {
        match self {
            Self::Llama => &LLAMA,
            Self::Mistral => &MISTRAL,
            Self::Qwen2 => &QWEN2,
            Self::Qwen3 => &QWEN3,
        }
    }

    /// `model_type` in config.json.
    pub fn model_type(self) -> &'static str {
        self.traits().model_type
    }

    /// Its name in the code that transformers opens emulators with, e.g. `Qwen2`.
    pub(super) fn code_name(self) -> &'static str {
        let name = self.architecture();
        name.strip_suffix("ForCausalLM").unwrap_or(name)
    }

    /// The entry of `architectures` in config.json.
    pub fn architecture(self) -> &'static str {
        self.traits().architecture
    }
}
