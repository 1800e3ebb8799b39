//! Adapters in the directory format of the PEFT library: `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! Settings of PEFT that change what an adapter means and that we do not compute
//! (another scale, magnitudes, per-module ranks, trained biases, …) are errors that
//! name file, field and value; so are settings that nobody here knows.

use super::{BlockLayout, Factor, LoraConfig, Slice};
use crate::decoder::DecoderConfig;
use gradtx_runtime::artifact::{NewTensor, TensorFile, write_atomic, write_tensors};
use gradtx_runtime::{Error, Result};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// Fields that do not change what a stored adapter computes.
const HARMLESS: &[&str] = &[
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Fields that must be null, false or empty.
const OFF: &[&str] = &[
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
    "use_rslora",
];

/// An adapter as a directory holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftAdapter {
    /// Rank, α, dropout, targets, and where the values lie.
    pub layout: BlockLayout,
    /// `[L, d]`
    pub values: Vec<f32>,
    /// The base model's name or path, as whoever wrote it gave it.
    pub base_model: Option<String>,
}

/// Reads an adapter directory for a model. Every matrix must be there, and no other tensor.
pub fn read_peft(dir: &Path, model: &DecoderConfig) -> Result<PeftAdapter> {
    let path = dir.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
    let (lora, base_model) = parse_config(&path, &text)?;
    let layout = BlockLayout::new(model, &lora)?;
    let file = TensorFile::open(&dir.join(TENSORS))?;
    let mut values = vec![0.0; layout.total()];
    let mut expected = Vec::new();
    for (block, slice) in matrices(&layout) {
        let name = tensor_name(block, slice);
        let tensor = file.tensor(&name)?;
        tensor.expect_shape(&slice.shape)?;
        tensor.read_f32(&mut values[layout.range(block, slice)])?;
        expected.push(name);
    }
    expected.sort_unstable();
    match file.names().iter().find(|name| expected.binary_search(name).is_err()) {
        None => Ok(PeftAdapter { layout, values, base_model }),
        Some(name) => {
            let why = format!("{CONFIG} and the model ({} blocks) have no such tensor", model.layers);
            Err(Error::tensor(file.path(), name, why))
        }
    }
}

/// Writes an adapter `[L, d]` into a directory that exists. `base_model` is the name or
/// path under which others find the base.
pub fn write_peft(dir: &Path, layout: &BlockLayout, values: &[f32], base_model: &str) -> Result<()> {
    if values.len() != layout.total() {
        let why = format!("the layout has {} values, found {}", layout.total(), values.len());
        return Err(Error::invalid("adapter to be written", why));
    }
    let bytes: Vec<Vec<u8>> = matrices(layout)
        .map(|(block, slice)| {
            values[layout.range(block, slice)].iter().flat_map(|x| x.to_le_bytes()).collect()
        })
        .collect();
    let tensors: Vec<NewTensor<'_>> = matrices(layout)
        .zip(&bytes)
        .map(|((block, slice), bytes)| {
            (tensor_name(block, slice), Dtype::F32, slice.shape.to_vec(), &bytes[..])
        })
        .collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_tensors(&dir.join(TENSORS), &tensors, &metadata)?;
    let text = format!("{:#}\n", config_json(layout.lora(), base_model));
    write_atomic(&dir.join(CONFIG), |out| out.write_all(text.as_bytes()))
}

/// All matrices in the order of the flat adapter.
fn matrices(layout: &BlockLayout) -> impl Iterator<Item = (usize, &Slice)> {
    (0..layout.blocks()).flat_map(|block| layout.slices().iter().map(move |slice| (block, slice)))
}

fn tensor_name(block: usize, slice: &Slice) -> String {
    let factor = match slice.factor {
        Factor::A => "lora_A",
        Factor::B => "lora_B",
    };
    format!("base_model.model.model.layers.{block}.{}.{factor}.weight", slice.module.path())
}

fn config_json(lora: &LoraConfig, base_model: &str) -> Value {
    // PEFT types α as an integer.
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    let targets: Vec<&str> = lora.targets.iter().map(|m| m.name()).collect();
    json!({
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    })
}

fn parse_config(path: &Path, text: &str) -> Result<(LoraConfig, Option<String>)> {
    let value: Value =
        serde_json::from_str(text).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))?;
    let Value::Object(mut map) = value else {
        return Err(Error::file(path, "expected a JSON object"));
    };
    let unsupported = |field: &str, value: &Value, want: &str| {
        Error::file(path, format!("field `{field}` = {value} is not supported; expected {want}"))
    };
    let fixed = [
        ("peft_type", vec![json!("LORA")]),
        ("task_type", vec![json!("CAUSAL_LM"), Value::Null]),
        ("bias", vec![json!("none"), Value::Null]),
        // Other ways to begin also change the base weights.
        ("init_lora_weights", vec![json!(true), json!(false), json!("gaussian"), Value::Null]),
    ];
    for (field, allowed) in fixed {
        let value = map.remove(field).unwrap_or(Value::Null);
        if !allowed.contains(&value) {
            return Err(unsupported(field, &value, &allowed[0].to_string()));
        }
    }
    for field in OFF {
        if let Some(value) = map.remove(*field)
            && !is_off(&value)
        {
            return Err(unsupported(field, &value, "null, false or nothing in it"));
        }
    }
    let mut number = |field: &str, default: Option<f64>| {
        let value = map.remove(field).unwrap_or(Value::Null);
        let found = if value.is_null() { default } else { value.as_f64() };
        found.ok_or_else(|| unsupported(field, &value, "a number"))
    };
    let rank = number("r", None)?;
    let alpha = number("lora_alpha", None)?;
    let dropout = number("lora_dropout", Some(0.0))?;
    if rank.fract() != 0.0 || rank < 1.0 {
        return Err(unsupported("r", &json!(rank), "a positive integer"));
    }
    let targets = target_names(&mut map).map_err(|value| {
        unsupported("target_modules", &value, "a list of module names such as [\"q_proj\", \"v_proj\"]")
    })?;
    let targets = LoraConfig::targets_from_names(&targets)
        .map_err(|e| Error::file(path, format!("field `target_modules`: {e}")))?;
    let base_model = map.remove("base_model_name_or_path").and_then(|v| v.as_str().map(str::to_owned));
    if let Some((field, value)) = map.iter().find(|(field, _)| !HARMLESS.contains(&field.as_str())) {
        let why = format!("unknown field `{field}` = {value}: it may change what the adapter computes");
        return Err(Error::file(path, why));
    }
    Ok((LoraConfig { rank: rank as usize, alpha, dropout, targets }, base_model))
}

/// Null, false, or an object or list with nothing in it.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

fn target_names(map: &mut Map<String, Value>) -> std::result::Result<Vec<String>, Value> {
    let value = map.remove("target_modules").unwrap_or(Value::Null);
    let names = value.as_array().map(|list| list.iter().map(|v| v.as_str().map(str::to_owned)).collect());
    match names {
        Some(Some(names)) => Ok(names),
        _ => Err(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::{Module, initial_adapter};

    fn model() -> DecoderConfig {
        let text = r#"{"model_type": "llama", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64}"#;
        DecoderConfig::parse(Path::new("config.json"), text).unwrap()
    }

    fn adapter() -> (BlockLayout, Vec<f32>) {
        let lora = LoraConfig { rank: 3, alpha: 24.0, targets: Module::ALL.to_vec(), ..Default::default() };
        let layout = BlockLayout::new(&model(), &lora).unwrap();
        let values =
            initial_adapter(&layout, 3).iter().enumerate().map(|(i, x)| x + i as f32 * 1e-3).collect();
        (layout, values)
    }

    #[test]
    fn what_is_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let (layout, values) = adapter();
        write_peft(dir.path(), &layout, &values, "some/base").unwrap();
        let found = read_peft(dir.path(), &model()).unwrap();
        assert_eq!((&found.layout, &found.values), (&layout, &values));
        assert_eq!(found.base_model.as_deref(), Some("some/base"));
        let file = TensorFile::open(&dir.path().join(TENSORS)).unwrap();
        let name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight";
        assert_eq!(file.tensor(name).unwrap().shape, [3, 24]);
    }

    #[test]
    fn options_that_change_the_meaning_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let (layout, values) = adapter();
        write_peft(dir.path(), &layout, &values, "some/base").unwrap();
        let path = dir.path().join(CONFIG);
        let good = std::fs::read_to_string(&path).unwrap();
        let cases = [
            ("use_rslora", json!(true)),
            ("use_dora", json!(true)),
            ("bias", json!("all")),
            ("modules_to_save", json!(["lm_head"])),
            ("rank_pattern", json!({"q_proj": 4})),
            ("alpha_pattern", json!({"q_proj": 4})),
            ("layers_to_transform", json!([0])),
            ("init_lora_weights", json!("pissa")),
            ("target_modules", json!("all-linear")),
            ("target_modules", json!(["c_attn"])),
            ("peft_type", json!("VERA")),
            ("r", json!(2.5)),
            ("something_new", json!(1)),
        ];
        for (field, value) in cases {
            let mut config: Value = serde_json::from_str(&good).unwrap();
            config[field] = value;
            std::fs::write(&path, config.to_string()).unwrap();
            let message = read_peft(dir.path(), &model()).expect_err(field).to_string();
            assert!(message.contains(CONFIG) && message.contains(field), "{field}: {message}");
        }
    }

    #[test]
    fn missing_misshapen_and_surplus_tensors_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let (layout, values) = adapter();
        write_peft(dir.path(), &layout, &values, "some/base").unwrap();
        let config = std::fs::read_to_string(dir.path().join(CONFIG)).unwrap();
        let edit = |from: &str, to: &str| {
            std::fs::write(dir.path().join(CONFIG), config.replace(from, to)).unwrap();
            read_peft(dir.path(), &model()).unwrap_err().to_string()
        };
        assert!(edit("\"r\": 3", "\"r\": 4").contains("expected shape [4, 16]"));
        assert!(edit("\"q_proj\",", "").contains("no such tensor"));
        std::fs::write(dir.path().join(CONFIG), &config).unwrap();
        let deeper = DecoderConfig { layers: 3, ..model() };
        assert!(read_peft(dir.path(), &deeper).unwrap_err().to_string().contains("layers.2."));
    }
}
