//! [`Family`]: the published architectures. A family is one entry of this file: the parts that its blocks are
//! made of, and what its `config.json` means where it is silent.

use super::block_config::{Activation, NormKind};
use super::names::{self, Names};
use gradtx_kernels::ops::GatedKind;

/// Which published architecture a model belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Opt,
}

/// In what families differ.
pub(super) struct Traits {
    model_type: &'static str,
    architecture: &'static str,
    pub(super) names: &'static Names,
    /// What normalises the residual stream.
    pub(super) norm: NormKind,
    /// What the hidden row of the MLP goes through.
    pub(super) activation: Activation,
    /// How tokens know where they are.
    pub(super) positions: Positions,
    /// q, k and v have biases.
    pub(super) qkv_bias: bool,
    /// All other products inside the blocks have biases.
    pub(super) other_biases: bool,
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

/// How tokens know their positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Positions {
    /// Queries and keys are rotated.
    Rotary,
    /// A row of a table is added to the embedding of a token: that of its position, after this many others.
    Learned {
        /// Rows before that of position 0.
        offset: usize,
    },
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
    names: &names::LLAMA,
    norm: NormKind::Rms,
    activation: Activation::Gated(GatedKind::Silu),
    positions: Positions::Rotary,
    qkv_bias: false,
    other_biases: false,
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

/// Its `config.json` is read in `config_opt.rs`.
const OPT: Traits = Traits {
    model_type: "opt",
    architecture: "OPTForCausalLM",
    names: &names::OPT,
    norm: NormKind::Layer,
    activation: Activation::Relu,
    positions: Positions::Learned { offset: 2 },
    qkv_bias: true,
    other_biases: true,
    switches: &[],
    ..LLAMA
};

impl Family {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Opt];

    /// In what it differs from the others.
    pub(super) fn traits(self) -> &'static Traits {
        match self {
            Self::Llama => &LLAMA,
            Self::Mistral => &MISTRAL,
            Self::Qwen2 => &QWEN2,
            Self::Qwen3 => &QWEN3,
            Self::Opt => &OPT,
        }
    }

    pub(super) fn names(self) -> &'static Names {
        self.traits().names
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
