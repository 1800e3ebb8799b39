//! [`DecoderConfig`]: what a decoder LLM computes, from its `config.json`.
//!
//! Four families are the same network with few differences: Llama and Mistral (no
//! biases), Qwen2 (biases on q, k, v), Qwen3 (no biases, RMS norm of every query
//! and key head). Every field of the file is either honoured, known to change
//! nothing, or an error that names file, field and value: a field that is silently
//! ignored gives a model that runs and is wrong.

use super::config_fields::Fields;
use super::rope::RopeScaling;
use gradtx_runtime::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

/// Which published architecture a model belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    pub(super) const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// `model_type` in config.json.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The entry of `architectures` in config.json.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// q, k and v have biases.
    pub fn qkv_bias(self) -> bool {
        self == Self::Qwen2
    }

    /// Query and key heads are normalised before the rotation.
    pub fn qk_norm(self) -> bool {
        self == Self::Qwen3
    }
}

/// Sizes and constants of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Architecture.
    pub family: Family,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values per head; even.
    pub head_dim: usize,
    /// ε of every RMS norm.
    pub norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the rotary frequencies for longer contexts.
    pub rope_scaling: RopeScaling,
    /// Positions that the model was made for.
    pub max_positions: usize,
    /// The LM head is the token embedding.
    pub tied: bool,
    /// Id of the token that begins a text, where the model has one.
    pub bos: Option<u32>,
    /// Ids of the tokens that end a text.
    pub eos: Vec<u32>,
    /// Id of the padding token, where the model has one; nothing here pads.
    pub pad: Option<u32>,
}

impl DecoderConfig {
    /// Reads `config.json` of a model directory.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        Self::parse(&path, &text)
    }

    /// Reads the text of a `config.json`; `path` is for messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))?;
        let Value::Object(map) = value else {
            return Err(Error::file(path, "expected a JSON object"));
        };
        let mut fields = Fields::new(path, map);
        let family = fields.family()?;
        fields.check_neutral()?;
        let hidden = fields.size("hidden_size")?;
        let heads = fields.size("num_attention_heads")?;
        let layers = fields.size("num_hidden_layers")?;
        let max_positions = fields.size("max_position_embeddings")?;
        fields.check_window(family, max_positions, layers)?;
        let kv_heads = match fields.optional_size("num_key_value_heads")? {
            Some(n) => n,
            None if family == Family::Llama => heads,
            None => return Err(fields.missing("num_key_value_heads")),
        };
        let head_dim = match fields.optional_size("head_dim")? {
            Some(n) => n,
            None if family == Family::Qwen3 => 128,
            None => hidden / heads,
        };
        let (rope_theta, rope_scaling) = fields.rope(max_positions)?;
        let config = Self {
            family,
            vocab: fields.size("vocab_size")?,
            hidden,
            intermediate: fields.size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            max_positions,
            tied: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            bos: fields.ids("bos_token_id")?.first().copied(),
            eos: fields.ids("eos_token_id")?,
            pad: fields.ids("pad_token_id")?.first().copied(),
        };
        fields.finish()?;
        config.check().map_err(|why| Error::file(path, why))?;
        Ok(config)
    }

    /// Fails, saying why, when sizes do not fit each other.
    fn check(&self) -> std::result::Result<(), String> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv) = (self.heads, self.kv_heads);
            return Err(format!(
                "`num_attention_heads` = {heads} is not a multiple of `num_key_value_heads` = {kv}"
            ));
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim == 0 {
            return Err(format!(
                "`head_dim` = {}: the rotary embedding needs an even, positive number",
                self.head_dim
            ));
        }
        Ok(())
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

    /// Tokens that a text may have at most.
    pub fn longest_context(&self) -> usize {
        self.max_positions
    }

    /// The file that transformers reads for this model; `dtype` is the one of the weights, e.g. "float32".
    pub fn to_json(&self, dtype: &str) -> Value {
        let eos = match self.eos.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
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
            "sliding_window": null,
            "tie_word_embeddings": self.tied,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab,
        });
        match self.family {
            Family::Llama => {
                out["attention_bias"] = json!(false);
                out["mlp_bias"] = json!(false);
            }
            Family::Qwen3 => out["attention_bias"] = json!(false),
            Family::Mistral | Family::Qwen2 => {}
        }
        if matches!(self.family, Family::Qwen2 | Family::Qwen3) {
            out["use_sliding_window"] = json!(false);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Value {
        json!({
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
            "eos_token_id": [2, 3], "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
            "intermediate_size": 64, "max_position_embeddings": 256, "max_window_layers": 28,
            "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 2,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 128,
            "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4",
            "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 131
        })
    }

    fn parse(value: &Value) -> Result<DecoderConfig> {
        DecoderConfig::parse(Path::new("m/config.json"), &value.to_string())
    }

    #[test]
    fn a_published_file_is_understood_and_written_again() {
        let config = parse(&base()).unwrap();
        assert_eq!((config.q_dim(), config.kv_dim(), config.qkv_dim()), (32, 16, 64));
        assert_eq!((config.rope_theta, config.tied, config.eos.as_slice()), (1e6, true, [2, 3].as_slice()));
        assert_eq!(parse(&config.to_json("float32")).unwrap(), config);
        for family in Family::ALL {
            let config = DecoderConfig { family, ..config.clone() };
            assert_eq!(parse(&config.to_json("float32")).unwrap(), config);
        }
    }

    #[test]
    fn every_unsupported_field_is_named_with_its_value() {
        let cases = [
            ("hidden_act", json!("gelu")),
            ("use_sliding_window", json!(true)),
            ("attention_bias", json!(true)),
            ("mlp_bias", json!(true)),
            ("rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0})),
            ("rope_scaling", json!({"rope_type": "linear", "factor": 2.0, "surprise": 1})),
            ("partial_rotary_factor", json!(0.5)),
            ("num_local_experts", json!(8)),
            ("num_experts_per_tok", json!(2)),
            ("final_logit_softcapping", json!(30.0)),
            ("quantization_config", json!({"bits": 4})),
            ("embedding_multiplier", json!(12.0)),
            ("query_pre_attn_scalar", json!(256)),
            ("attention_dropout", json!(0.1)),
            ("architectures", json!(["Qwen2ForSequenceClassification"])),
            ("model_type", json!("gemma")),
            ("num_key_value_heads", json!(3)),
            ("hidden_size", json!("32")),
            ("vocab_size", Value::Null),
            ("head_dim", json!(7)),
            ("layer_types", json!(["full_attention", "sliding_attention"])),
        ];
        for (field, value) in cases {
            let mut file = base();
            file[field] = value.clone();
            let message = parse(&file).expect_err(field).to_string();
            let named = if field == "use_sliding_window" { "sliding_window" } else { field };
            assert!(message.contains("config.json") && message.contains(named), "{field}: {message}");
        }
    }

    #[test]
    fn mistral_has_a_window_unless_its_file_says_otherwise() {
        let mut file = base();
        for field in ["use_sliding_window", "max_window_layers", "architectures"] {
            file.as_object_mut().unwrap().remove(field);
        }
        file["model_type"] = json!("mistral");
        file["max_position_embeddings"] = json!(32768);
        assert!(parse(&file).is_err(), "a window of 128 tokens is in force");
        file["sliding_window"] = Value::Null;
        assert_eq!(parse(&file).unwrap().family, Family::Mistral);
        file.as_object_mut().unwrap().remove("sliding_window");
        assert!(parse(&file).is_err(), "the default window of 4096 is in force");
        file["max_position_embeddings"] = json!(4096);
        assert!(parse(&file).is_ok());
    }
}
