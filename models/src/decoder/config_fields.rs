//! The fields of a `config.json`: taken one by one, each checked, so that what is left
//! in the end is either known to change nothing or an error.

use super::family::{Family, WindowRule};
use super::rope::RopeScaling;
use crate::fields::{Fields, POSITIVE, as_positive};
use crate::foreign::{is_off, shown};
use gradtx_runtime::Result;
use serde_json::{Value, json};

/// What `model_type` of an emulator begins with; the family's own follows.
pub(super) const MODEL_TYPE: &str = "gradot_";
/// What the entry of `architectures` of an emulator begins with; the family's own follows.
pub(super) const ARCHITECTURE: &str = "GradOt";
/// The object of `config.json` that makes a model an emulator.
pub(super) const FIELD: &str = "gradot";
/// The entry of `architectures` of an emulator.
pub(super) fn emulator_architecture(family: Family) -> String {
    format!("{ARCHITECTURE}{}", family.architecture())
}

/// Fields that say nothing about the mathematics of a forward or backward pass: how transformers
/// handles the model, its heads for other tasks, how it was trained, how it is to generate where
/// nobody says otherwise, and what other programs note.
pub(super) const HARMLESS: &[&str] = &[
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

impl Fields {
    /// The family, and whether this is an emulator of one of its models.
    pub(super) fn family(&mut self) -> Result<(Family, bool)> {
        let value = self.take("model_type").ok_or_else(|| self.missing("model_type"))?;
        let own = value.as_str().map(|name| (name, name.strip_prefix(MODEL_TYPE)));
        let is_emulator = own.is_some_and(|(_, base)| base.is_some());
        let name = own.map(|(name, base)| base.unwrap_or(name));
        let family = Family::ALL.into_iter().find(|f| name == Some(f.model_type()));
        let family = family.ok_or_else(|| {
            let known = Family::ALL.map(Family::model_type).join(", ");
            self.unsupported("model_type", &value, &format!("one of {known}"))
        })?;
        let architectures = self.take("architectures");
        if !is_emulator && self.has(FIELD) {
            let want =
                format!("\"{MODEL_TYPE}{}\": `{}` makes the model an emulator", family.model_type(), FIELD);
            return Err(self.unsupported("model_type", &value, &want));
        }
        let architecture = match is_emulator {
            true => emulator_architecture(family),
            false => family.architecture().to_owned(),
        };
        if let Some(value) = architectures
            && !is_off(&value)
            && value != json!([architecture])
        {
            let want = format!("[\"{architecture}\"]");
            return Err(self.unsupported("architectures", &value, &want));
        }
        Ok((family, is_emulator))
    }

    pub(super) fn check_neutral(&mut self) -> Result<()> {
        for (field, neutral) in NEUTRAL {
            self.only(field, &json!(neutral))?;
        }
        for (field, neutral) in NEUTRAL_NUMBERS {
            self.only(field, &json!(neutral))?;
        }
        let want = "weights in bf16, f16 or f32: use the original model, or one that was dequantised";
        QUANTISED.iter().try_for_each(|field| self.off(field, want))
    }

    /// The smallest window of the layers that slide; none where every token sees all before it.
    ///
    /// As in transformers: Mistral slides everywhere, by 4096 where the file is silent; Qwen where
    /// `use_sliding_window` says so, from layer `max_window_layers` on; `layer_types` overrules both.
    pub(super) fn window(&mut self, rule: WindowRule, layers: usize) -> Result<Option<usize>> {
        let is_stated = self.has("sliding_window");
        let window = self.optional_size("sliding_window")?;
        let window = if is_stated { window } else { Some(4096) };
        let is_used = self.flag("use_sliding_window")?;
        let first = self.take("max_window_layers");
        let first = match &first {
            None => 28,
            Some(value) => self.read("max_window_layers", value, "a number of layers", Value::as_u64)?,
        };
        let window = match rule {
            WindowRule::Never => None,
            WindowRule::Always => window,
            WindowRule::Switched => window.filter(|_| is_used == Some(true)),
        };
        let Some(types) = self.take("layer_types").filter(|value| !is_off(value)) else {
            let slides = rule == WindowRule::Always || first < layers as u64;
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
        let mut theta = self.positive("rope_theta")?.map(|theta| ("rope_theta".to_owned(), theta));
        let mut stated: Option<(&str, RopeScaling)> = None;
        for field in ["rope_scaling", "rope_parameters"] {
            let Some(mut value) = self.take(field).filter(|value| *value != json!({})) else { continue };
            let inner = value.as_object_mut().and_then(|entries| entries.shift_remove("rope_theta"));
            if let Some(inner) = inner.filter(|inner| !inner.is_null()) {
                let name = format!("{field}.rope_theta");
                let inner = self.read(&name, &inner, POSITIVE, as_positive)?;
                if let Some((a, outer)) = &theta
                    && *outer != inner
                {
                    return Err(
                        self.file_error(format!("`{a}` = {outer} and `{name}` = {inner}: which is meant?"))
                    );
                }
                theta = theta.or(Some((name, inner)));
            }
            let scaling = RopeScaling::parse(&value, max_positions).map_err(|why| self.error(field, &why))?;
            if let Some((other, before)) = &stated
                && *before != scaling
            {
                let why = format!("`{other}` and `{field}` = {} say different things", shown(&value));
                return Err(self.file_error(format!("{why}; remove the one that is not meant")));
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
}
