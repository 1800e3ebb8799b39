//! The fields of a `config.json`: taken one by one, each checked, so that what is left
//! in the end is either known to change nothing or an error.

use super::Family;
use super::rope::RopeScaling;
use gradtx_runtime::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

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

/// The fields of a file that nobody has looked at yet.
pub(super) struct Fields<'a> {
    path: &'a Path,
    map: Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(path: &'a Path, map: Map<String, Value>) -> Self {
        Self { path, map }
    }

    fn unsupported(&self, field: &str, value: &Value, want: &str) -> Error {
        Error::file(self.path, format!("field `{field}` = {value} is not supported; expected {want}"))
    }

    pub(super) fn missing(&self, field: &str) -> Error {
        Error::file(self.path, format!("field `{field}` is missing"))
    }

    /// Takes a field; null is the same as absent.
    fn take(&mut self, field: &str) -> Option<Value> {
        self.map.remove(field).filter(|v| !v.is_null())
    }

    pub(super) fn optional_size(&mut self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.take(field) else { return Ok(None) };
        match value.as_u64() {
            // Products of three sizes stay far inside 64 bits.
            Some(n @ 1..=0x0FFF_FFFF) => Ok(Some(n as usize)),
            _ => Err(self.unsupported(field, &value, "a positive integer below 2^28")),
        }
    }

    pub(super) fn size(&mut self, field: &str) -> Result<usize> {
        self.optional_size(field)?.ok_or_else(|| self.missing(field))
    }

    pub(super) fn number(&mut self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.take(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x > 0.0 && x.is_finite() => Ok(Some(x)),
            _ => Err(self.unsupported(field, &value, "a positive number")),
        }
    }

    pub(super) fn flag(&mut self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.take(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.unsupported(field, &value, "true or false"))
    }

    /// One token id or a list of them.
    pub(super) fn ids(&mut self, field: &str) -> Result<Vec<u32>> {
        let Some(value) = self.take(field) else { return Ok(vec![]) };
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match &value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|n| vec![n]),
        };
        ids.ok_or_else(|| self.unsupported(field, &value, "a token id or a list of token ids"))
    }

    pub(super) fn family(&mut self) -> Result<Family> {
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

    pub(super) fn check_neutral(&mut self) -> Result<()> {
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
    pub(super) fn check_window(&mut self, family: Family, max_positions: usize, layers: usize) -> Result<()> {
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
    pub(super) fn rope(&mut self, max_positions: usize) -> Result<(f64, RopeScaling)> {
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
    pub(super) fn finish(self) -> Result<()> {
        match self.map.iter().find(|(field, _)| !HARMLESS.contains(&field.as_str())) {
            None => Ok(()),
            Some((field, value)) => Err(Error::file(
                self.path,
                format!("unknown field `{field}` = {value}: it may change what the model computes"),
            )),
        }
    }
}
