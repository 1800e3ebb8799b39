//! [`DecoderConfig`]: what a decoder LLM computes, from its `config.json`.
//!
//! Four families are the same network with few differences: Llama and Mistral (no
//! biases), Qwen2 (biases on q, k, v), Qwen3 (no biases, RMS norm of every query
//! and key head). Every field of the file is either honoured, known to change
//! nothing, or an error that names file, field and value: a field that is silently
//! ignored gives a model that runs and is wrong.

use super::Decoder;
use super::config_fields::HARMLESS;
use super::rope::RopeScaling;
use super::weights::HEAD;
use crate::fields::Fields;
use gradtx_kernels::cpu::Cpu;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, TensorSource, not_a_model, read_text};
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
        let family = fields.family()?;
        fields.check_neutral()?;
        let hidden = fields.size("hidden_size")?;
        let heads = fields.size("num_attention_heads")?;
        let layers = fields.size("num_hidden_layers")?;
        let max_positions = fields.size("max_position_embeddings")?;
        let window = fields.window(family, layers)?;
        let kv_heads = match fields.optional_size("num_key_value_heads")? {
            Some(n) => n,
            None if family == Family::Llama => heads,
            None => return Err(fields.missing("num_key_value_heads")),
        };
        let head_dim = match fields.optional_size("head_dim")? {
            Some(n) => n,
            None if family == Family::Qwen3 => 128,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let why =
                    format!("`hidden_size` = {hidden} is not a multiple of `num_attention_heads` = {heads}");
                return Err(Error::file(path, format!("{why}, and `head_dim` is missing")));
            }
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
            norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            max_positions,
            window,
            tied: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            bos: fields.ids("bos_token_id")?.first().copied(),
            eos: fields.ids("eos_token_id")?,
            pad: fields.ids("pad_token_id")?.first().copied(),
        };
        fields.finish(HARMLESS)?;
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
        if self.layers > MAX_LAYERS {
            return Err(format!(
                "`num_hidden_layers` = {}; models have at most {MAX_LAYERS} here",
                self.layers
            ));
        }
        if self.norm_eps > 0.1 {
            return Err(format!("`rms_norm_eps` = {}; expected a small number such as 1e-6", self.norm_eps));
        }
        let parameters = self.parameters();
        if parameters > MAX_PARAMETERS {
            return Err(format!(
                "its sizes make {parameters} parameters; at most {MAX_PARAMETERS} are possible"
            ));
        }
        Ok(())
    }

    /// Parameters of embedding, head and matrices.
    fn parameters(&self) -> u128 {
        let [vocab, hidden, layers, width] =
            [self.vocab, self.hidden, self.layers, self.intermediate].map(|n| n as u128);
        let (q, kv) = (self.q_dim() as u128, self.kv_dim() as u128);
        let embeddings = if self.tied { 1 } else { 2 } * vocab * hidden;
        embeddings + layers * hidden * (2 * q + 2 * kv + 3 * width)
    }

    /// Tokens that a text may have at most: the positions that the model was made for, as scaled,
    /// or its window where that is smaller.
    pub fn longest_context(&self) -> usize {
        let positions = self.rope_scaling.positions(self.max_positions);
        self.window.map_or(positions, |window| window.min(positions))
    }

    /// Fails unless the weights have as many blocks as this says, and every tensor with its shape.
    /// Only headers are read, so this comes before anything of the model's size is made.
    pub fn check_weights(&self, weights: &TensorSource) -> Result<()> {
        let block = |name: &str| name.strip_prefix("model.layers.")?.split('.').next()?.parse::<usize>().ok();
        let found =
            weights.names().into_iter().filter_map(block).max().map_or(0, |last| last.saturating_add(1));
        if found != self.layers {
            let why = format!("has {found} blocks; config.json says `num_hidden_layers` = {}", self.layers);
            return Err(Error::file(weights.origin(), why));
        }
        for param in Decoder::<Cpu, f32>::layout_of(self).params() {
            if !self.tied && param.name == HEAD && !weights.contains(HEAD) {
                let why = "there is no such tensor, and config.json does not tie it to the embedding; set \
                           `tie_word_embeddings` to true there if the model was made so";
                return Err(Error::tensor(weights.origin(), HEAD, why));
            }
            weights.tensor(&param.name)?.expect_shape(&param.shape)?;
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
            "sliding_window": self.window,
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
            out["use_sliding_window"] = json!(self.window.is_some());
            if self.window.is_some() {
                out["max_window_layers"] = json!(0);
            }
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
            ("layer_types", json!(["full_attention"])),
            ("sliding_window", json!(0)),
            ("is_causal", json!(false)),
            ("quantization", json!({"bits": 4, "group_size": 64})),
            ("rope_theta", json!(1)),
            ("rope_theta", json!(-1e4)),
            ("rms_norm_eps", json!(-1e-6)),
            ("rms_norm_eps", json!(7)),
            ("num_hidden_layers", json!(134_217_728)),
            ("num_hidden_layers", json!(0)),
            ("vocab_size", json!(0)),
            ("head_dim", json!(0)),
            ("num_attention_heads", json!(5)),
            ("rope_scaling", json!({"rope_type": "longrope", "factor": 2.0})),
            ("rope_scaling", json!({"rope_type": "linear", "type": "yarn", "factor": 2.0})),
            ("rope_scaling", json!({"rope_type": "linear", "factor": 0.5})),
            ("rope_scaling", json!({"rope_type": "default", "factor": 2.0})),
            ("rope_scaling", json!({"factor": 2.0})),
            ("rope_scaling", json!({"rope_type": "yarn"})),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7})),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2})),
            (
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
            ),
            ("rope_parameters", json!({"rope_type": "default", "rope_theta": 5e5})),
            ("rope_parameters", json!({"rope_type": "linear", "rope_theta": 1e6, "surprise": 1})),
            ("scale_by", json!(0.5)),
        ];
        for (field, value) in cases {
            let mut file = base();
            file[field] = value.clone();
            let message = parse(&file).expect_err(field).to_string();
            assert!(message.contains("config.json") && message.contains(field), "{field}: {message}");
        }
    }

    #[test]
    fn what_cannot_change_a_result_is_accepted() {
        let plain = parse(&base()).unwrap();
        for (field, value) in [
            ("unsloth_fixed", json!(true)),
            ("unsloth_version", json!("2025.9.1")),
            ("is_llama_config", json!(true)),
            ("transformers.js_config", json!({"kv_cache_dtype": {"q4f16": "float16"}})),
            ("rope_interleaved", json!(false)),
            ("neftune_noise_alpha", json!(5)),
            ("auto_map", json!({"AutoConfig": "configuration_x.XConfig"})),
            ("attn_implementation", json!("eager")),
            ("_attn_implementation", json!("sdpa")),
            ("_commit_hash", json!("abc")),
            ("an_entry_of_next_year", Value::Null),
            ("another_entry", json!(false)),
            ("embd_pdrop", json!(0.0)),
            ("pruned_heads", json!({})),
            ("quantization_config", json!({})),
            ("quantization_config", Value::Null),
            ("rope_scaling", Value::Null),
            ("rope_scaling", json!({})),
            ("rope_parameters", json!({"rope_type": "default", "rope_theta": 1e6})),
            ("layer_types", json!(["full_attention", "full_attention"])),
            ("architectures", json!([])),
            ("temperature", json!(0.7)),
            ("mergekit_version", json!("0.1.2")),
            ("use_cache", json!(false)),
            ("torch_dtype", json!("float64")),
            ("head_dim", json!(8)),
        ] {
            let mut file = base();
            file[field] = value.clone();
            assert_eq!(parse(&file).unwrap_or_else(|e| panic!("{field}: {e}")), plain, "{field} = {value}");
        }
    }

    /// A base file with these changes; a null removes the field.
    fn with(changes: Value) -> Result<DecoderConfig> {
        let mut file = base();
        for (field, value) in changes.as_object().unwrap() {
            match value {
                Value::Null => drop(file.as_object_mut().unwrap().remove(field)),
                value => file[field] = value.clone(),
            }
        }
        parse(&file)
    }

    #[test]
    fn windows_are_carried_and_limit_the_context() {
        let qwen = [
            (json!({}), None),
            (json!({"use_sliding_window": true}), None),
            (json!({"use_sliding_window": true, "max_window_layers": 1}), Some(128)),
            (json!({"use_sliding_window": true, "max_window_layers": 2}), None),
            (json!({"use_sliding_window": true, "max_window_layers": 0, "sliding_window": null}), Some(4096)),
            (
                json!({"use_sliding_window": true, "layer_types": ["full_attention", "sliding_attention"]}),
                Some(128),
            ),
        ];
        for (changes, window) in qwen {
            let config = with(changes.clone()).unwrap();
            assert_eq!(config.window, window, "{changes}");
            assert_eq!(config.longest_context(), window.unwrap_or(256).min(256), "{changes}");
            assert_eq!(parse(&config.to_json("float32")).unwrap(), config, "{changes}");
        }
        let mistral = |positions: usize, window: Value| {
            let mut file = base();
            for field in ["use_sliding_window", "max_window_layers", "architectures", "sliding_window"] {
                file.as_object_mut().unwrap().remove(field);
            }
            file["model_type"] = json!("mistral");
            file["max_position_embeddings"] = json!(positions);
            if window != json!("absent") {
                file["sliding_window"] = window;
            }
            let config = parse(&file).unwrap();
            assert_eq!(parse(&config.to_json("float32")).unwrap(), config);
            config.longest_context()
        };
        // The published version 0.1, later ones, and a file that leaves the default.
        assert_eq!(mistral(32768, json!(4096)), 4096);
        assert_eq!(mistral(32768, Value::Null), 32768);
        assert_eq!(mistral(32768, json!("absent")), 4096);
        assert_eq!(mistral(2048, json!("absent")), 2048);
    }

    #[test]
    fn scaled_positions_are_those_that_the_scaling_reaches() {
        let reach = |scaling: Value| with(json!({ "rope_scaling": scaling })).unwrap().longest_context();
        let yarn = |original: usize| {
            reach(json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}))
        };
        assert_eq!((yarn(256), yarn(64)), (1024, 256));
        assert_eq!(reach(json!({"rope_type": "linear", "factor": 2})), 512);
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        assert_eq!(reach(llama3), 256);
    }

    #[test]
    fn a_scaling_stated_twice_must_be_the_same() {
        let linear = |factor: f64| json!({"rope_type": "linear", "factor": factor});
        let new = |factor: f64| json!({"rope_type": "linear", "factor": factor, "rope_theta": 1e6});
        let both = |old: Value, new: Value| with(json!({"rope_scaling": old, "rope_parameters": new}));
        let config = both(linear(2.0), new(2.0)).unwrap();
        assert_eq!((config.rope_theta, config.rope_scaling), (1e6, RopeScaling::Linear { factor: 2.0 }));
        let message = both(linear(2.0), new(4.0)).unwrap_err().to_string();
        assert!(message.contains("`rope_scaling` and `rope_parameters`"), "{message}");
        let only_new = with(json!({"rope_theta": null, "rope_parameters": {"rope_theta": 5e5}})).unwrap();
        assert_eq!((only_new.rope_theta, only_new.rope_scaling), (5e5, RopeScaling::None));
        let message = with(json!({"rope_parameters": {"rope_theta": 5e5}})).unwrap_err().to_string();
        assert!(
            message.contains("`rope_theta` = 1000000 and `rope_parameters.rope_theta` = 500000"),
            "{message}"
        );
    }

    /// Whatever numbers a file has: an error, or sizes whose sums and products have room.
    #[test]
    fn no_number_makes_the_reader_fail_otherwise() {
        let numbers: Vec<Value> = [
            "0",
            "1",
            "-1",
            "2",
            "3",
            "128",
            "4096",
            "65537",
            "134217728",
            "268435455",
            "268435456",
            "2147483648",
            "9223372036854775807",
            "18446744073709551615",
            "1e300",
            "-1e-300",
            "0.5",
            "true",
            "null",
            "\"8\"",
            "[]",
            "{}",
        ]
        .iter()
        .map(|text| serde_json::from_str(text).unwrap())
        .collect();
        let fields: Vec<String> = base().as_object().unwrap().keys().cloned().collect();
        let mut stream = gradtx_kernels::rng::Stream::new(5);
        let mut read = 0;
        for _ in 0..20_000 {
            let mut file = base();
            for _ in 0..1 + stream.below(3) {
                let field = &fields[stream.below(fields.len())];
                file[field] = numbers[stream.below(numbers.len())].clone();
            }
            if let Ok(config) = parse(&file) {
                read += 1;
                let sizes = [config.q_dim(), config.qkv_dim(), config.longest_context()];
                assert!(sizes.iter().all(|&n| n > 0) && config.parameters() <= MAX_PARAMETERS, "{file}");
                if config.layers <= 8 {
                    let layout = Decoder::<Cpu, f32>::layout_of(&config);
                    assert!((layout.count() as u128) >= config.parameters(), "{file}");
                }
                assert_eq!(parse(&config.to_json("float32")).unwrap(), config, "{file}");
            }
        }
        assert!(read > 100, "{read} files were read: the others prove little");
    }
}
