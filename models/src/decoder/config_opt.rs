//! OPT's `config.json`: other fields than those of the families with rotary positions.

use super::rope::RopeScaling;
use super::{DecoderConfig, Family};
use crate::fields::Fields;
use gradtx_runtime::Result;
use serde_json::{Value, json};

/// ε of all norms; no field states it.
const NORM_EPS: f64 = 1e-5;
/// What is supported in one form only. Published models have it, but for the one of 350 million parameters.
const FIXED: &[(&str, bool)] = &[
    ("_remove_final_layer_norm", false),
    ("do_layer_norm_before", true),
    ("enable_bias", true),
    ("layer_norm_elementwise_affine", true),
];
/// How a model was initialised, and dropout on the residual stream while all parameters are trained: beside an
/// adapter the base is computed as it is when it is used.
const UNREAD: &[&str] = &["dropout", "init_std"];

/// Takes the fields of an OPT model, emulator's apart.
pub(super) fn read(fields: &mut Fields) -> Result<DecoderConfig> {
    fields.only("activation_function", &json!("relu"))?;
    fields.check_neutral()?;
    for (field, supported) in FIXED {
        fields.only(field, &json!(supported))?;
    }
    UNREAD.iter().for_each(|field| drop(fields.take(field)));
    let hidden = fields.size("hidden_size")?;
    fields.only("word_embed_proj_dim", &json!(hidden))?;
    let heads = fields.size("num_attention_heads")?;
    if !hidden.is_multiple_of(heads) {
        let why = format!("`hidden_size` = {hidden} is not a multiple of `num_attention_heads` = {heads}");
        return Err(fields.file_error(why));
    }
    Ok(DecoderConfig {
        family: Family::Opt,
        vocab: fields.size("vocab_size")?,
        hidden,
        intermediate: fields.size("ffn_dim")?,
        layers: fields.size("num_hidden_layers")?,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        norm_eps: NORM_EPS,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        max_positions: fields.size("max_position_embeddings")?,
        window: None,
        // transformers leaves the field out where it is true.
        tied: fields.flag("tie_word_embeddings")?.unwrap_or(true),
        bos: fields.ids("bos_token_id")?.first().copied(),
        eos: fields.ids("eos_token_id")?,
        pad: fields.ids("pad_token_id")?.first().copied(),
        emulator: None,
    })
}

/// The file that transformers reads.
pub(super) fn to_json(config: &DecoderConfig, eos: &Value, dtype: &str) -> Value {
    let mut out = json!({
        "activation_function": "relu",
        "architectures": [config.family.architecture()],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos,
        "dropout": 0.0,
        "eos_token_id": eos,
        "ffn_dim": config.intermediate,
        "hidden_size": config.hidden,
        "max_position_embeddings": config.max_positions,
        "model_type": config.family.model_type(),
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": config.pad,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": config.vocab,
        "word_embed_proj_dim": config.hidden,
    });
    for (field, value) in FIXED {
        out[*field] = json!(value);
    }
    out
}
