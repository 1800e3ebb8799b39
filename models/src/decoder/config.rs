//! [`DecoderConfig`]: what a decoder LLM computes, from its `config.json`.
//!
//! Four families are the same network with few differences: Llama and Mistral (no
//! biases), Qwen2 (biases on q, k, v), Qwen3 (no biases, RMS norm of every query
//! and key head). OPT is another one, and so is its file (`config_opt.rs`).
//!
//! Every field of the file is either honoured, known to change nothing, or an error that names file, field and
//! value: a field that is silently ignored gives a model that runs and is wrong.

use super::config_fields::HARMLESS;
use super::config_opt;
use super::family::{Positions, Traits, WindowRule};
use super::rope::{RopeScaling, Rotation};
use super::{AttentionConfig, BlockConfig, Emulator, Family, MlpConfig, Ranks};
use crate::fields::Fields;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, not_a_model, read_text};
use gradtx_runtime::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// Blocks of a model at most; the largest published ones have 126.
const MAX_LAYERS: usize = 4096;
/// Parameters of a model at most: sums of bytes stay far inside 64 bits.
const MAX_PARAMETERS: u128 = 1 << 46;

/// Sizes and constants of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Architecture.
    pub family: Family,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values per head; even where positions are rotary.
    pub head_dim: usize,
    /// ε of every norm.
    pub norm_eps: f64,
    /// Base of the rotary frequencies; like their scaling without a meaning where positions are learned.
    pub rope_theta: f64,
    /// Change of the rotary frequencies for longer contexts.
    pub rope_scaling: RopeScaling,
    /// Positions that the model was made for, before any scaling.
    pub max_positions: usize,
    /// Tokens that a token of some layer sees at most, itself included, where that is limited.
    /// Not computed: texts must not be longer, see [`Self::longest_context`].
    pub window: Option<usize>,
    /// The LM head is the token embedding.
    pub tied: bool,
    /// Id of the token that begins a text, where the model has one.
    pub bos: Option<u32>,
    /// Ids of the tokens that end a text.
    pub eos: Vec<u32>,
    /// Id of the padding token, where the model has one; nothing here pads.
    pub pad: Option<u32>,
    /// Where the model is an emulator: the shapes of its layers, and what it was made of.
    pub emulator: Option<Emulator>,
}

impl DecoderConfig {
    /// Reads `config.json` of a model directory.
    ///
    /// # Errors
    /// Names the field that is missing, unknown, or has a value that is not supported; for a path
    /// that is no model, what it is instead.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        if path.symlink_metadata().is_err() {
            return Err(not_a_model(dir));
        }
        Self::parse(&path, &read_text(&path, MAX_CONFIG_BYTES)?)
    }

    /// Reads the text of a `config.json`; `path` is for messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let mut fields = Fields::parse(path, text, "model")?;
        let (family, is_emulator) = fields.family()?;
        let config = match family.traits().positions {
            Positions::Rotary => Self::read_rotary(&mut fields, family)?,
            Positions::Learned { .. } => config_opt::read(&mut fields)?,
        };
        let emulator = is_emulator.then(|| Emulator::read(&mut fields)).transpose()?;
        fields.finish(HARMLESS)?;
        let config = Self { emulator, ..config };
        config.check().map_err(|why| Error::file(path, why))?;
        Ok(config)
    }

    /// Takes the fields of a model with rotary positions, emulator's apart.
    fn read_rotary(fields: &mut Fields, family: Family) -> Result<Self> {
        fields.only("hidden_act", &json!("silu"))?;
        fields.check_neutral()?;
        let hidden = fields.size("hidden_size")?;
        let heads = fields.size("num_attention_heads")?;
        let layers = fields.size("num_hidden_layers")?;
        let max_positions = fields.size("max_position_embeddings")?;
        let window = fields.window(family.traits().window, layers)?;
        let kv_heads = match fields.optional_size("num_key_value_heads")? {
            Some(n) => n,
            None if family.traits().is_multi_head => heads,
            None => return Err(fields.missing("num_key_value_heads")),
        };
        let head_dim = match fields.optional_size("head_dim")?.or(family.traits().head_dim) {
            Some(n) => n,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let why =
                    format!("`hidden_size` = {hidden} is not a multiple of `num_attention_heads` = {heads}");
                return Err(fields.file_error(format!("{why}, and `head_dim` is missing")));
            }
        };
        let (rope_theta, rope_scaling) = fields.rope(max_positions)?;
        Ok(Self {
            family,
            vocab: fields.size("vocab_size")?,
            hidden,
            intermediate: fields.size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            max_positions,
            window,
            tied: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            bos: fields.ids("bos_token_id")?.first().copied(),
            eos: fields.ids("eos_token_id")?,
            pad: fields.ids("pad_token_id")?.first().copied(),
            emulator: None,
        })
    }

    /// Fails, saying why, when sizes do not fit each other.
    fn check(&self) -> std::result::Result<(), String> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv) = (self.heads, self.kv_heads);
            return Err(format!(
                "`num_attention_heads` = {heads} is not a multiple of `num_key_value_heads` = {kv}"
            ));
        }
        let is_rotary = self.family.traits().positions == Positions::Rotary;
        if is_rotary && (!self.head_dim.is_multiple_of(2) || self.head_dim == 0) {
            return Err(format!(
                "`head_dim` = {}: the rotary embedding needs an even, positive number",
                self.head_dim
            ));
        }
        if self.layers > MAX_LAYERS {
            return Err(format!(
                "`num_hidden_layers` = {}; models have at most {MAX_LAYERS} here",
                self.layers
            ));
        }
        if self.norm_eps > 0.1 {
            return Err(format!("`rms_norm_eps` = {}; expected a small number such as 1e-6", self.norm_eps));
        }
        if let Some(emulator) = &self.emulator {
            emulator.check(self)?;
        }
        let parameters = self.parameters();
        if parameters > MAX_PARAMETERS {
            return Err(format!(
                "its sizes make {parameters} parameters; at most {MAX_PARAMETERS} are possible"
            ));
        }
        Ok(())
    }

    /// Parameters of embeddings, head and matrices.
    fn parameters(&self) -> u128 {
        let tables = if self.tied { 1 } else { 2 } * self.vocab as u128;
        let in_blocks = self.blocks().iter().map(BlockConfig::matrix_values).sum::<u128>();
        (tables + self.position_rows() as u128) * self.hidden as u128 + in_blocks
    }

    /// Rows of the table of learned positions; 0 where positions are rotary.
    pub fn position_rows(&self) -> usize {
        match self.family.traits().positions {
            Positions::Rotary => 0,
            Positions::Learned { offset } => offset + self.max_positions,
        }
    }

    /// Tokens that a text may have at most: the positions that the model was made for, as scaled,
    /// or its window where that is smaller.
    pub fn longest_context(&self) -> usize {
        let positions = self.rope_scaling.positions(self.max_positions);
        self.window.map_or(positions, |window| window.min(positions))
    }

    /// How heads are rotated, where positions are rotary.
    pub(super) fn rotation(&self) -> Option<Rotation> {
        let (head_dim, theta, scaling) = (self.head_dim, self.rope_theta, self.rope_scaling);
        self.block().attention.is_rotary.then_some(Rotation { head_dim, theta, scaling })
    }

    /// What an uncompressed block is made of: the parts of the family, with the sizes of this model.
    pub fn block(&self) -> BlockConfig {
        let &Traits { norm, activation, positions, qkv_bias, other_biases, qk_norm, .. } =
            self.family.traits();
        let &Self { hidden, norm_eps, heads, kv_heads, head_dim, intermediate, .. } = self;
        BlockConfig {
            hidden,
            norm,
            norm_eps,
            attention: AttentionConfig {
                heads,
                kv_heads,
                head_dim,
                is_rotary: positions == Positions::Rotary,
                qkv_bias,
                o_bias: other_biases,
                qk_norm,
                ranks: Ranks::default(),
            },
            mlp: MlpConfig { intermediate, activation, has_bias: other_biases },
        }
    }

    /// All blocks, in their order. Those of published models are alike, those of emulators are not.
    pub fn blocks(&self) -> Vec<BlockConfig> {
        let mut blocks = vec![self.block(); self.layers];
        let shapes = self.emulator.iter().flat_map(|emulator| &emulator.layers);
        for (block, shape) in blocks.iter_mut().zip(shapes) {
            block.attention.ranks = shape.ranks;
            block.mlp.intermediate = shape.intermediate;
        }
        blocks
    }

    /// Width of all query heads together; columns of the input of `o_proj`.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together, and of all value heads.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Columns of fused q, k, v rows.
    pub fn qkv_dim(&self) -> usize {
        self.q_dim() + 2 * self.kv_dim()
    }

    /// The file that transformers reads for this model; `dtype` is the one of the weights, e.g. "float32".
    pub fn to_json(&self, dtype: &str) -> Value {
        let eos = match self.eos.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        let mut out = match self.family.traits().positions {
            Positions::Rotary => self.rotary_json(&eos, dtype),
            Positions::Learned { .. } => config_opt::to_json(self, &eos, dtype),
        };
        if let Some(emulator) = &self.emulator {
            emulator.write(self, &mut out);
        }
        out
    }

    fn rotary_json(&self, eos: &Value, dtype: &str) -> Value {
        let mut out = json!({
            "architectures": [self.family.architecture()],
            "attention_dropout": 0.0,
            "bos_token_id": self.bos,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.max_positions,
            "model_type": self.family.model_type(),
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": self.pad,
            "rms_norm_eps": self.norm_eps,
            "rope_scaling": self.rope_scaling.to_json(),
            "rope_theta": self.rope_theta,
            "sliding_window": self.window,
            "tie_word_embeddings": self.tied,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab,
        });
        let Traits { switches, window, .. } = self.family.traits();
        for switch in *switches {
            out[switch] = json!(false);
        }
        if *window == WindowRule::Switched {
            out["use_sliding_window"] = json!(self.window.is_some());
            if self.window.is_some() {
                out["max_window_layers"] = json!(0);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests;
