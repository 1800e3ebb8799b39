//! [`T5Config`]: sizes of a T5 v1.1 / Flan-T5 model, as in its `config.json`.

use crate::fields::Fields;
use gradtx_runtime::Result;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Fields without influence on the two stacks: token ids, file formats, the token
/// embedding and the head (which are not used here), other heads, and what only
/// gives other programs how to call the model.
const HARMLESS: [&str; 22] = [
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "classifier_dropout",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "initializer_factor",
    "n_positions",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "return_dict",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
];

/// Blocks of a stack, buckets, and parameters at most: far beyond any published model, and so few
/// that every size and sum fits into its type.
const MAX_LAYERS: usize = 4096;
const MAX_BUCKETS: usize = 1 << 16;
pub(crate) const MAX_PARAMETERS: u128 = 1 << 46;

/// Sizes of a T5 v1.1 encoder–decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    /// Width of the residual stream, d.
    pub d_model: usize,
    /// Width of a head, D.
    pub d_kv: usize,
    /// Width of the feed-forward's hidden layer, F.
    pub d_ff: usize,
    /// Blocks of the encoder.
    pub num_layers: usize,
    /// Blocks of the decoder.
    pub num_decoder_layers: usize,
    /// Heads, H. `H · D` need not be `d`.
    pub num_heads: usize,
    /// Buckets of relative positions.
    pub relative_attention_num_buckets: usize,
    /// Distance from which on all positions share the last bucket.
    pub relative_attention_max_distance: usize,
    /// ε of the layer norms.
    pub layer_norm_epsilon: f64,
    /// Dropout probability in training, everywhere that T5 has dropout.
    pub dropout_rate: f64,
}

impl T5Config {
    /// The size that Flan-T5 was published in under this name: `small`, `base`, `large`, `xl`, `xxl`.
    pub fn preset(name: &str) -> Option<Self> {
        let (d_model, d_ff, layers, num_heads) = match name {
            "small" => (512, 1024, 8, 6),
            "base" => (768, 2048, 12, 12),
            "large" => (1024, 2816, 24, 16),
            "xl" => (2048, 5120, 24, 32),
            "xxl" => (4096, 10240, 24, 64),
            _ => return None,
        };
        Some(Self {
            d_model,
            d_kv: 64,
            d_ff,
            num_layers: layers,
            num_decoder_layers: layers,
            num_heads,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            dropout_rate: 0.1,
        })
    }

    /// Reads the `config.json` of a Hugging Face T5.
    ///
    /// # Errors
    /// Names file, field and value when a field is missing, unknown, or asks for
    /// something else than T5 v1.1 (gated GELU in its tanh form).
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_fields(Fields::open(path, "model")?)
    }

    pub(crate) fn from_fields(mut fields: Fields) -> Result<Self> {
        fields.only("model_type", &json!("t5"))?;
        fields.only("is_encoder_decoder", &json!(true))?;
        fields.only("is_decoder", &json!(false))?;
        fields.only("is_gated_act", &json!(true))?;
        fields.only("dense_act_fn", &json!("gelu_new"))?;
        match fields.text("feed_forward_proj")?.as_deref() {
            Some("gated-gelu") => {}
            // Where the field is absent, the original T5's plain ReLU is meant.
            found => {
                let found = found.unwrap_or("relu (the default)");
                let why = format!("only gated-gelu (T5 v1.1, Flan-T5) is supported, found {found}");
                return Err(fields.error("feed_forward_proj", &why));
            }
        }
        let num_layers = fields.size("num_layers")?;
        let config = Self {
            d_model: fields.size("d_model")?,
            d_kv: fields.size("d_kv")?,
            d_ff: fields.size("d_ff")?,
            num_layers,
            num_decoder_layers: fields.optional_size("num_decoder_layers")?.unwrap_or(num_layers),
            num_heads: fields.size("num_heads")?,
            relative_attention_num_buckets: fields
                .optional_size("relative_attention_num_buckets")?
                .unwrap_or(32),
            relative_attention_max_distance: fields
                .optional_size("relative_attention_max_distance")?
                .unwrap_or(128),
            layer_norm_epsilon: fields.number("layer_norm_epsilon")?.unwrap_or(1e-6),
            dropout_rate: fields.number("dropout_rate")?.unwrap_or(0.1),
        };
        config.check(&fields)?;
        fields.finish(&HARMLESS)?;
        Ok(config)
    }

    fn check(&self, fields: &Fields) -> Result<()> {
        if let Err((name, why)) = self.check_sizes() {
            return Err(fields.error(name, &why));
        }
        if !(0.0..1.0).contains(&self.dropout_rate) {
            return Err(
                fields.error("dropout_rate", &format!("expected 0 ≤ p < 1, found {}", self.dropout_rate))
            );
        }
        let epsilon = self.layer_norm_epsilon;
        if !(0.0..=0.1).contains(&epsilon) {
            let why = format!("expected a small number such as 1e-6, found {epsilon}");
            return Err(fields.error("layer_norm_epsilon", &why));
        }
        let buckets = self.relative_attention_num_buckets;
        // Below 4 the encoder's half has no room for exact and logarithmic buckets.
        if buckets < 4 || !buckets.is_multiple_of(2) {
            let why = format!("expected an even number, at least 4, found {buckets}");
            return Err(fields.error("relative_attention_num_buckets", &why));
        }
        let distance = self.relative_attention_max_distance;
        if distance <= buckets / 2 {
            let why = format!("expected more than half the buckets ({}), found {distance}", buckets / 2);
            return Err(fields.error("relative_attention_max_distance", &why));
        }
        Ok(())
    }

    /// Whether a model of these sizes can be; otherwise the field that is too large, and why.
    pub(crate) fn check_sizes(&self) -> std::result::Result<(), (&'static str, String)> {
        let limits = [
            ("num_layers", self.num_layers, MAX_LAYERS),
            ("num_decoder_layers", self.num_decoder_layers, MAX_LAYERS),
            ("relative_attention_num_buckets", self.relative_attention_num_buckets, MAX_BUCKETS),
        ];
        if let Some((name, found, limit)) = limits.into_iter().find(|(_, found, limit)| found > limit) {
            return Err((name, format!("{found}; at most {limit} are possible")));
        }
        let parameters = self.parameters();
        if parameters > MAX_PARAMETERS {
            let why = format!(
                "{}: with the other sizes, {parameters} parameters; at most {MAX_PARAMETERS} are \
                 possible",
                self.d_model
            );
            return Err(("d_model", why));
        }
        Ok(())
    }

    /// Parameters of the two stacks' matrices.
    fn parameters(&self) -> u128 {
        let [d, d_kv, heads, d_ff] = [self.d_model, self.d_kv, self.num_heads, self.d_ff].map(|n| n as u128);
        let attention = 4 * d * d_kv.saturating_mul(heads);
        let feed_forward = 3 * d * d_ff;
        let (encoder, decoder) = (self.num_layers as u128, self.num_decoder_layers as u128);
        encoder * (attention + feed_forward) + decoder * (2 * attention + feed_forward)
    }

    /// The fields of a `config.json` that describes this model.
    pub fn to_json(&self) -> Map<String, Value> {
        let value = json!({
            "model_type": "t5",
            "d_model": self.d_model,
            "d_kv": self.d_kv,
            "d_ff": self.d_ff,
            "num_layers": self.num_layers,
            "num_decoder_layers": self.num_decoder_layers,
            "num_heads": self.num_heads,
            "relative_attention_num_buckets": self.relative_attention_num_buckets,
            "relative_attention_max_distance": self.relative_attention_max_distance,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "dropout_rate": self.dropout_rate,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": true,
        });
        match value {
            Value::Object(map) => map,
            _ => unreachable!("the literal above is an object"),
        }
    }

    /// Width of all heads together, I = H · D.
    pub fn inner(&self) -> usize {
        self.num_heads * self.d_kv
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(change: impl Fn(&mut Map<String, Value>)) -> Result<T5Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let mut map = T5Config::preset("large").unwrap().to_json();
        change(&mut map);
        std::fs::write(&path, Value::Object(map).to_string()).unwrap();
        T5Config::open(&path)
    }

    #[test]
    fn what_is_written_reads_back() {
        assert_eq!(read(|_| {}).unwrap(), T5Config::preset("large").unwrap());
        let flan = |map: &mut Map<String, Value>| {
            map.insert("n_positions".into(), json!(512));
            map.insert("dense_act_fn".into(), json!("gelu_new"));
            map.insert("is_gated_act".into(), json!(true));
            // What changes nothing.
            map.insert("an_entry_of_next_year".into(), json!(null));
            map.insert("num_decoder_layers".into(), json!(null));
            map.insert("quantization_config".into(), json!({}));
            map.insert("unsloth_fixed".into(), json!(true));
        };
        assert_eq!(read(flan).unwrap(), T5Config::preset("large").unwrap());
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (field, value) in [
            ("feed_forward_proj", json!("relu")),
            ("dense_act_fn", json!("silu")),
            ("is_gated_act", json!(false)),
            ("model_type", json!("umt5")),
            ("dropout_rate", json!(1.0)),
            ("relative_attention_num_buckets", json!(7)),
            ("relative_attention_max_distance", json!(16)),
            ("d_model", json!("wide")),
            ("num_heads", json!(0)),
            ("scale_embeddings", json!(true)),
            ("num_layers", json!(i64::MAX)),
            ("num_layers", json!(5000)),
            ("d_model", json!(2_000_000_000)),
            ("d_kv", json!(-64)),
            ("layer_norm_epsilon", json!(1e300)),
            ("relative_attention_num_buckets", json!(2_000_000_000)),
        ] {
            let change = |map: &mut Map<String, Value>| drop(map.insert(field.into(), value.clone()));
            let message = read(change).unwrap_err().to_string();
            assert!(message.contains("config.json") && message.contains(field), "{message}");
        }
        for field in ["feed_forward_proj", "d_ff"] {
            let message = read(|map| drop(map.shift_remove(field))).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }
}
