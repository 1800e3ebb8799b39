//! [`DecoderConfig`]: what a decoder LLM computes, from its `config.json`.
//!
//! Four families are the same network with few differences: Llama and Mistral (no
//! biases), Qwen2 (biases on q, k, v), Qwen3 (no biases, RMS norm of every query
//! and key head). Every field of the file is either honoured, known to change
//! nothing, or an error that names file, field and value: a field that is silently
//! ignored gives a model that runs and is wrong.

use super::rope::RopeScaling;
use gradtx_runtime::{Error, Result};
use serde_json::{Map, Value, json};
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
    const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

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

/// Fields that say nothing about the mathematics of a forward or backward pass.
const HARMLESS: &[&str] = &[
    "_attn_implementation_autoset",
    "_name_or_path",
    "decoder_start_token_id",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "use_cache",
];

/// Fields that are supported at one value only: null, or this one.
const NEUTRAL: &[(&str, Value)] = &[
    ("add_cross_attention", Value::Bool(false)),
    ("attention_bias", Value::Bool(false)),
    ("is_decoder", Value::Bool(false)),
    ("is_encoder_decoder", Value::Bool(false)),
    ("mlp_bias", Value::Bool(false)),
    ("tie_encoder_decoder", Value::Bool(false)),
    ("use_mrope", Value::Bool(false)),
    ("attn_logit_softcapping", Value::Null),
    ("final_logit_softcapping", Value::Null),
    ("quantization_config", Value::Null),
];

/// Factors and rates that are supported at one number only: null, or this one.
const NEUTRAL_NUMBERS: &[(&str, f64)] = &[
    ("attention_dropout", 0.0),
    ("chunk_size_feed_forward", 0.0),
    ("embedding_multiplier", 1.0),
    ("logits_scaling", 1.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("partial_rotary_factor", 1.0),
    ("residual_multiplier", 1.0),
];

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
        let mut fields = Fields { path, map };
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

/// The fields of a file that nobody has looked at yet.
struct Fields<'a> {
    path: &'a Path,
    map: Map<String, Value>,
}

impl Fields<'_> {
    fn unsupported(&self, field: &str, value: &Value, want: &str) -> Error {
        Error::file(self.path, format!("field `{field}` = {value} is not supported; expected {want}"))
    }

    fn missing(&self, field: &str) -> Error {
        Error::file(self.path, format!("field `{field}` is missing"))
    }

    /// Takes a field; null is the same as absent.
    fn take(&mut self, field: &str) -> Option<Value> {
        self.map.remove(field).filter(|v| !v.is_null())
    }

    fn optional_size(&mut self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.take(field) else { return Ok(None) };
        match value.as_u64() {
            // Products of three sizes stay far inside 64 bits.
            Some(n @ 1..=0x0FFF_FFFF) => Ok(Some(n as usize)),
            _ => Err(self.unsupported(field, &value, "a positive integer below 2^28")),
        }
    }

    fn size(&mut self, field: &str) -> Result<usize> {
        self.optional_size(field)?.ok_or_else(|| self.missing(field))
    }

    fn number(&mut self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.take(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x > 0.0 && x.is_finite() => Ok(Some(x)),
            _ => Err(self.unsupported(field, &value, "a positive number")),
        }
    }

    fn flag(&mut self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.take(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.unsupported(field, &value, "true or false"))
    }

    /// One token id or a list of them.
    fn ids(&mut self, field: &str) -> Result<Vec<u32>> {
        let Some(value) = self.take(field) else { return Ok(vec![]) };
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match &value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|n| vec![n]),
        };
        ids.ok_or_else(|| self.unsupported(field, &value, "a token id or a list of token ids"))
    }

    fn family(&mut self) -> Result<Family> {
        let value = self.take("model_type").ok_or_else(|| self.missing("model_type"))?;
        let family = Family::ALL.into_iter().find(|f| value.as_str() == Some(f.model_type()));
        let family = family
            .ok_or_else(|| self.unsupported("model_type", &value, "one of llama, mistral, qwen2, qwen3"))?;
        if let Some(value) = self.take("architectures")
            && value != json!([family.architecture()])
        {
            let want = format!("[\"{}\"]", family.architecture());
            return Err(self.unsupported("architectures", &value, &want));
        }
        if let Some(value) = self.take("hidden_act")
            && value != "silu"
        {
            return Err(self.unsupported("hidden_act", &value, "\"silu\""));
        }
        Ok(family)
    }

    fn check_neutral(&mut self) -> Result<()> {
        for (field, neutral) in NEUTRAL {
            if let Some(value) = self.take(field)
                && value != *neutral
            {
                return Err(self.unsupported(field, &value, &neutral.to_string()));
            }
        }
        for (field, neutral) in NEUTRAL_NUMBERS {
            if let Some(value) = self.take(field)
                && value.as_f64() != Some(*neutral)
            {
                return Err(self.unsupported(field, &value, &neutral.to_string()));
            }
        }
        Ok(())
    }

    /// A sliding window is refused where it would hide a token from another.
    fn check_window(&mut self, family: Family, max_positions: usize, layers: usize) -> Result<()> {
        let used = self.flag("use_sliding_window")?;
        // Only some layers would use a window; without one the number has no meaning.
        self.take("max_window_layers");
        let window = match self.map.remove("sliding_window") {
            None if family == Family::Mistral => Some(json!(4096)),
            other => other.filter(|v| !v.is_null()),
        };
        let in_force = match family {
            Family::Mistral => true,
            Family::Qwen2 | Family::Qwen3 => used == Some(true),
            Family::Llama => false,
        };
        if let Some(window) = window.filter(|_| in_force)
            && window.as_u64().is_none_or(|w| w < max_positions as u64)
        {
            let want = format!("none, or at least `max_position_embeddings` = {max_positions}");
            return Err(self.unsupported("sliding_window", &window, &want));
        }
        if let Some(value) = self.take("layer_types")
            && value != json!(vec!["full_attention"; layers])
        {
            return Err(self.unsupported("layer_types", &value, "\"full_attention\" for every layer"));
        }
        Ok(())
    }

    /// Base and scaling of the rotary frequencies: `rope_theta` and `rope_scaling`, or
    /// both in `rope_parameters` as newer files have it.
    fn rope(&mut self, max_positions: usize) -> Result<(f64, RopeScaling)> {
        let mut theta = self.number("rope_theta")?;
        let mut scaling = self.take("rope_scaling");
        if let Some(mut value) = self.take("rope_parameters") {
            let inner = value.as_object_mut().and_then(|o| o.remove("rope_theta"));
            theta = match inner {
                Some(v) => {
                    self.map.insert("rope_theta".into(), v);
                    self.number("rope_theta")?
                }
                None => theta,
            };
            scaling = Some(value);
        }
        let scaling = match scaling {
            None => RopeScaling::None,
            Some(value) => RopeScaling::parse(&value, max_positions)
                .map_err(|why| Error::file(self.path, format!("field `rope_scaling`: {why}")))?,
        };
        Ok((theta.unwrap_or(10_000.0), scaling))
    }

    /// Fails when a field is left that nobody knows.
    fn finish(self) -> Result<()> {
        match self.map.iter().find(|(field, _)| !HARMLESS.contains(&field.as_str())) {
            None => Ok(()),
            Some((field, value)) => Err(Error::file(
                self.path,
                format!("unknown field `{field}` = {value}: it may change what the model computes"),
            )),
        }
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
