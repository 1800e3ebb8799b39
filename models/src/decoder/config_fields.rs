//! The fields of a `config.json`: taken one by one, each checked, so that what is left
//! in the end is either known to change nothing or an error.

use super::Family;
use super::rope::RopeScaling;
use crate::foreign::{is_harmless, is_off, shown, unknown};
use gradtx_runtime::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Fields that say nothing about the mathematics of a forward or backward pass: how transformers
/// handles the model, its heads for other tasks, how it was trained, how it is to generate where
/// nobody says otherwise, and what other programs note.
const HARMLESS: &[&str] = &[
    "attn_implementation",
    "auto_map",
    "author",
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "language",
    "length_penalty",
    "library_name",
    "license",
    "max_length",
    "max_sequence_length",
    "min_length",
    "model_max_length",
    "model_name",
    "name_or_path",
    "neftune_noise_alpha",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pipeline_tag",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "typical_p",
    "unk_token_id",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention_2",
    "use_flash_attn",
];

/// Switches that are supported in one position only: absent, null, or this one.
const NEUTRAL: &[(&str, bool)] = &[
    ("add_cross_attention", false),
    ("alibi", false),
    ("attention_bias", false),
    ("is_causal", true),
    ("is_decoder", false),
    ("is_encoder_decoder", false),
    ("mlp_bias", false),
    ("rope_interleaved", false),
    ("tie_encoder_decoder", false),
    ("use_mrope", false),
    ("use_rope", true),
];

/// Factors and rates that are supported at one number only: absent, null, or this one.
const NEUTRAL_NUMBERS: &[(&str, f64)] = &[
    ("attention_dropout", 0.0),
    ("chunk_size_feed_forward", 0.0),
    ("embedding_multiplier", 1.0),
    ("logits_scaling", 1.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("partial_rotary_factor", 1.0),
    ("residual_multiplier", 1.0),
    ("rope_ratio", 1.0),
];

/// Marks of weights that were quantised: other tensors, other mathematics.
const QUANTISED: &[&str] = &["quantization_config", "quantization", "compression_config"];

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
        Error::file(
            self.path,
            format!("field `{field}` = {} is not supported; expected {want}", shown(value)),
        )
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
            && !is_off(&value)
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
        for field in QUANTISED {
            if let Some(value) = self.take(field).filter(|value| !is_off(value)) {
                let want = "weights in bf16, f16 or f32: use the original model, or one that was dequantised";
                return Err(self.unsupported(field, &value, want));
            }
        }
        Ok(())
    }

    /// The smallest window of the layers that slide; none where every token sees all before it.
    ///
    /// As in transformers: Mistral slides everywhere, by 4096 where the file is silent; Qwen where
    /// `use_sliding_window` says so, from layer `max_window_layers` on; `layer_types` overrules both.
    pub(super) fn window(&mut self, family: Family, layers: usize) -> Result<Option<usize>> {
        let is_stated = self.map.contains_key("sliding_window");
        let window = self.optional_size("sliding_window")?;
        let window = if is_stated { window } else { Some(4096) };
        let is_used = self.flag("use_sliding_window")?;
        let first = self.take("max_window_layers");
        let first = match &first {
            None => 28,
            Some(value) => value
                .as_u64()
                .ok_or_else(|| self.unsupported("max_window_layers", value, "a number of layers"))?,
        };
        let window = match family {
            Family::Mistral => window,
            Family::Qwen2 | Family::Qwen3 => window.filter(|_| is_used == Some(true)),
            Family::Llama => None,
        };
        let Some(types) = self.take("layer_types").filter(|value| !is_off(value)) else {
            let slides = family == Family::Mistral || first < layers as u64;
            return Ok(window.filter(|_| slides));
        };
        let names: Option<Vec<&str>> =
            types.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        let full = |name: &&str| *name == "full_attention";
        match names {
            Some(names) if names.len() != layers => {
                let want = format!("one entry for each of `num_hidden_layers` = {layers}");
                Err(self.unsupported("layer_types", &types, &want))
            }
            Some(names) if names.iter().all(full) => Ok(None),
            Some(names) if window.is_some() && names.iter().all(|n| full(n) || *n == "sliding_attention") => {
                Ok(window)
            }
            _ => {
                let want =
                    "\"full_attention\" for every layer, or \"sliding_attention\" with a window in force";
                Err(self.unsupported("layer_types", &types, want))
            }
        }
    }

    /// Base and scaling of the rotary frequencies: `rope_theta` and `rope_scaling`, or
    /// both in `rope_parameters` as newer files have it. Where a file states one thing twice,
    /// both must say the same.
    pub(super) fn rope(&mut self, max_positions: usize) -> Result<(f64, RopeScaling)> {
        let wrong = |path, why: String| Err(Error::file(path, why));
        let mut theta = self.number("rope_theta")?.map(|theta| ("rope_theta".to_owned(), theta));
        let mut stated: Option<(&str, RopeScaling)> = None;
        for field in ["rope_scaling", "rope_parameters"] {
            let Some(mut value) = self.take(field).filter(|value| *value != json!({})) else { continue };
            if let Some(inner) = value.as_object_mut().and_then(|o| o.remove("rope_theta")) {
                self.map.insert("rope_theta".into(), inner);
                let inner = self.number("rope_theta")?.map(|theta| (format!("{field}.rope_theta"), theta));
                if let (Some((a, outer)), Some((b, inner))) = (&theta, &inner)
                    && outer != inner
                {
                    return wrong(self.path, format!("`{a}` = {outer} and `{b}` = {inner}: which is meant?"));
                }
                theta = theta.or(inner);
            }
            let scaling = RopeScaling::parse(&value, max_positions)
                .map_err(|why| Error::file(self.path, format!("field `{field}`: {why}")))?;
            if let Some((other, before)) = &stated
                && *before != scaling
            {
                let why = format!("`{other}` and `{field}` = {} say different things", shown(&value));
                return wrong(self.path, format!("{why}; remove the one that is not meant"));
            }
            stated = Some((field, scaling));
        }
        let theta = theta.map_or(10_000.0, |(_, theta)| theta);
        // At 1 all frequencies are the same; published bases are 10^4 to 10^7.
        if !(theta > 1.0 && theta <= 1e15) {
            return Err(self.unsupported("rope_theta", &json!(theta), "a number above 1"));
        }
        Ok((theta, stated.map_or(RopeScaling::None, |(_, scaling)| scaling)))
    }

    /// Fails when a field is left that nobody knows.
    pub(super) fn finish(self) -> Result<()> {
        let is_known = |field: &str, value| HARMLESS.contains(&field) || is_harmless(field, value);
        match self.map.iter().find(|(field, value)| !is_known(field, value)) {
            None => Ok(()),
            Some((field, value)) => Err(unknown(self.path, field, value, "model")),
        }
    }
}
