//! `adapter_config.json` of PEFT 0.3 to 0.21: what a stored adapter means, or why that cannot
//! be computed here.
//!
//! Settings that change what an adapter means and that are not computed (magnitudes, trained
//! biases, ranks of single modules, ...) are errors that name file, field and value; so are
//! settings that nobody here knows, unless they are off. What only says how an adapter was
//! started or trained is left unread.

use super::peft_targets::{Adapted, adapted_modules, scale_of_all};
use super::{LoraConfig, layout::MAX_ALPHA};
use crate::decoder::DecoderConfig;
use crate::fields::Fields;
use crate::foreign::is_off;
use gradtx_runtime::Result;
use serde_json::{Value, json};
use std::path::Path;

/// Fields that do not change what a stored adapter computes: where it comes from, how it was
/// initialised and trained. `fan_in_fan_out` is switched off by PEFT for linear layers.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "velora_config",
];

/// Fields that must be off: each adds something to the adapter, or trains something else.
const OFF: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
];

/// Ways to begin that leave the base model's weights as they are. Others (PiSSA, OLoRA, CorDA,
/// LoftQ, LoRA-GA) also change those, so that the stored matrices belong to another base.
const STARTS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// What the file says.
pub(super) struct PeftConfig {
    pub(super) lora: LoraConfig,
    pub(super) base_model: Option<String>,
}

/// Reads the text of an `adapter_config.json` for a model; `path` is for messages.
pub(super) fn parse(path: &Path, text: &str, model: &DecoderConfig) -> Result<PeftConfig> {
    let mut fields = Fields::parse(path, text, "adapter")?;
    match fields.take("peft_type").unwrap_or(Value::Null) {
        value if value == json!("LORA") => {}
        value => return Err(fields.unsupported("peft_type", &value, "\"LORA\"")),
    }
    fields.only("task_type", &json!("CAUSAL_LM"))?;
    fields.only("bias", &json!("none"))?;
    check_start(&mut fields)?;
    OFF.iter().try_for_each(|field| fields.off(field, "null, false or nothing in it"))?;
    let lora = lora_config(&mut fields, model)?;
    let base_model = fields.take("base_model_name_or_path").and_then(|name| name.as_str().map(str::to_owned));
    fields.finish(HARMLESS)?;
    Ok(PeftConfig { lora, base_model })
}

fn check_start(fields: &mut Fields) -> Result<()> {
    match fields.take("init_lora_weights") {
        None | Some(Value::Bool(_)) => Ok(()),
        Some(Value::String(name)) if STARTS.contains(&name.as_str()) => Ok(()),
        Some(value) => {
            let want = "true: this start also changes the base model's weights; save the adapter with PEFT's \
                        `path_initial_model_for_weight_conversion`, which makes it one of the unchanged base";
            Err(fields.unsupported("init_lora_weights", &value, want))
        }
    }
}

/// Rank, α, dropout and targets.
fn lora_config(fields: &mut Fields, model: &DecoderConfig) -> Result<LoraConfig> {
    let dropout = fields.number("lora_dropout")?.unwrap_or(0.0);
    if !(0.0..1.0).contains(&dropout) {
        return Err(fields.unsupported("lora_dropout", &json!(dropout), "a number in [0, 1)"));
    }
    let mut needed = |field: &str| fields.number(field)?.ok_or_else(|| fields.missing(field));
    let (rank, alpha) = (needed("r")?, needed("lora_alpha")?);
    let selection = ["target_modules", "exclude_modules", "layers_to_transform"]
        .map(|name| fields.take(name).unwrap_or(Value::Null));
    let adapted = adapted_modules(model, &selection).map_err(|(field, why)| fields.error(field, &why))?;
    let Adapted { modules, layers, places } = adapted;
    let mut same = |field: &str, default: f64| {
        let pattern = fields.take(field).unwrap_or(Value::Null);
        scale_of_all(&pattern, default, &places).map_err(|why| fields.error(field, &why))
    };
    let (rank, alpha) = (same("rank_pattern", rank)?, same("alpha_pattern", alpha)?);
    if rank.fract() != 0.0 || !(1.0..=1024.0).contains(&rank) {
        return Err(fields.unsupported("r", &json!(rank), "an integer between 1 and 1024"));
    }
    let alpha = match fields.take("use_rslora") {
        // Scaled by α/√r: the same as α·√r over r.
        Some(Value::Bool(true)) => alpha * rank.sqrt(),
        None => alpha,
        Some(value) if is_off(&value) => alpha,
        Some(value) => return Err(fields.unsupported("use_rslora", &value, "true or false")),
    };
    if !(alpha > 0.0 && alpha <= MAX_ALPHA) {
        let want = format!("a number above 0 and at most {MAX_ALPHA}");
        return Err(fields.unsupported("lora_alpha", &json!(alpha), &want));
    }
    Ok(LoraConfig { rank: rank as usize, alpha, dropout, targets: modules, layers })
}
