//! Adapters in the directory format of the PEFT library: `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! What its configuration means is read in `peft_config`; names of tensors are taken as any
//! version of PEFT, and programs around it, write them.

use super::peft_config::{self, PeftConfig};
use super::{BlockLayout, Factor, Module, Slice};
use crate::decoder::DecoderConfig;
use gradtx_runtime::artifact::{
    MAX_CONFIG_BYTES, NewTensor, TensorFile, not_an_adapter, read_text, write_atomic, write_tensors,
};
use gradtx_runtime::{Error, Result};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

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
///
/// # Errors
/// Names the field or tensor that does not fit; for a path that is no adapter, what it is instead.
pub fn read_peft(dir: &Path, model: &DecoderConfig) -> Result<PeftAdapter> {
    let [path, tensors] = [CONFIG, TENSORS].map(|name| dir.join(name));
    if path.symlink_metadata().is_err() || tensors.symlink_metadata().is_err() {
        return Err(not_an_adapter(dir));
    }
    let text = read_text(&path, MAX_CONFIG_BYTES)?;
    let PeftConfig { lora, base_model } = peft_config::parse(&path, &text, model)?;
    let layout = BlockLayout::new(model, &lora)?;
    let file = TensorFile::open(&tensors)?;
    let mut found: HashMap<Place, String> = HashMap::new();
    for name in file.names() {
        let Some(place) = place_of(&name).filter(|place| place.is_in(&layout)) else {
            let mut why = format!("{CONFIG} and the model ({} blocks) have no such tensor", model.layers);
            if !layout.lora().layers.is_empty() {
                why += &format!("; its `layers_to_transform` are {:?}", layout.layers());
            }
            return Err(Error::tensor(file.path(), &name, why));
        };
        if let Some(before) = found.insert(place, name.clone()) {
            return Err(Error::tensor(file.path(), &name, format!("is the same matrix as `{before}`")));
        }
    }
    let mut values = vec![0.0; layout.total()];
    for (block, slice) in matrices(&layout) {
        let standard = tensor_name(&layout, block, slice);
        let place = Place { block: layout.layers()[block], module: slice.module, factor: slice.factor };
        let tensor = file.tensor(found.get(&place).map_or(standard.as_str(), String::as_str))?;
        tensor.expect_shape(&slice.shape)?;
        tensor.read_f32(&mut values[layout.range(block, slice)])?;
    }
    Ok(PeftAdapter { layout, values, base_model })
}

/// A note that [`write_peft_with_notes`] left in an adapter directory; none if there is no such note.
pub fn peft_note(dir: &Path, key: &str) -> Result<Option<String>> {
    let file = TensorFile::open(&dir.join(TENSORS))?;
    Ok(file.metadata(key).map(str::to_owned))
}

/// One matrix of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    /// The layer of the model.
    block: usize,
    module: Module,
    factor: Factor,
}

impl Place {
    fn is_in(&self, layout: &BlockLayout) -> bool {
        layout.layers().contains(&self.block) && layout.lora().targets.contains(&self.module)
    }
}

/// One matrix of an adapter's file.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftMatrix {
    /// The block that it is of.
    pub block: usize,
    /// The adapted module.
    pub module: Module,
    /// A or B.
    pub factor: Factor,
    /// Rows and columns.
    pub shape: Vec<usize>,
    /// Its values, row by row.
    pub values: Vec<f32>,
}

/// The matrices of an adapter directory by block and module, whatever model it is of.
///
/// # Errors
/// When it is no adapter, or has tensors that are no LoRA matrices of a decoder's blocks.
pub fn peft_matrices(dir: &Path) -> Result<Vec<PeftMatrix>> {
    let path = dir.join(TENSORS);
    if path.symlink_metadata().is_err() {
        return Err(not_an_adapter(dir));
    }
    let file = TensorFile::open(&path)?;
    let mut matrices = vec![];
    for name in file.names() {
        let Some(Place { block, module, factor }) = place_of(&name) else {
            return Err(Error::tensor(&path, &name, "is no LoRA matrix of a block's linear layer"));
        };
        let tensor = file.tensor(&name)?;
        let (shape, values) = (tensor.shape.to_vec(), tensor.to_f32()?);
        matrices.push(PeftMatrix { block, module, factor, shape, values });
    }
    matrices.sort_by_key(|m| (m.block, m.module, m.factor == Factor::B));
    Ok(matrices)
}

/// What stands before `layers.N` in some program's names, and wrappers of modules between.
const WRAPPERS: [&str; 7] =
    ["base_model", "model", "decoder", "language_model", "module", "_orig_mod", "_fsdp_wrapped_module"];

/// The matrix of a tensor's name, such as
/// `base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight`.
fn place_of(name: &str) -> Option<Place> {
    let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    let (block, rest) = match parts.as_slice() {
        ["layers", block, rest @ ..] => (block, rest),
        _ => return None,
    };
    // With or without the adapter's own name behind.
    let (path, factor) = match rest {
        [path @ .., factor, "default", "weight"] | [path @ .., factor, "weight"] => (path, *factor),
        _ => return None,
    };
    let factor = match factor {
        "lora_A" => Factor::A,
        "lora_B" => Factor::B,
        _ => return None,
    };
    Some(Place { block: block.parse().ok()?, module: Module::from_path(&path.join("."))?, factor })
}

/// Writes an adapter `[L, d]` into a directory that exists. `base_model` is the name or
/// path under which others find the base.
pub fn write_peft(dir: &Path, layout: &BlockLayout, values: &[f32], base_model: &str) -> Result<()> {
    write_peft_with_notes(dir, layout, values, base_model, &BTreeMap::new())
}

/// The same with notes about the adapter, which are read back from the metadata of its tensors' file.
pub fn write_peft_with_notes(
    dir: &Path,
    layout: &BlockLayout,
    values: &[f32],
    base_model: &str,
    notes: &BTreeMap<String, String>,
) -> Result<()> {
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
            (tensor_name(layout, block, slice), Dtype::F32, slice.shape.to_vec(), &bytes[..])
        })
        .collect();
    let mut metadata = notes.clone();
    metadata.insert("format".into(), "pt".into());
    write_tensors(&dir.join(TENSORS), &tensors, &metadata)?;
    let text = format!("{:#}\n", config_json(layout, base_model));
    write_atomic(&dir.join(CONFIG), |out| out.write_all(text.as_bytes()))
}

/// All matrices in the order of the flat adapter.
fn matrices(layout: &BlockLayout) -> impl Iterator<Item = (usize, &Slice)> {
    (0..layout.blocks()).flat_map(|block| layout.slices().iter().map(move |slice| (block, slice)))
}

fn tensor_name(layout: &BlockLayout, block: usize, slice: &Slice) -> String {
    let layer = layout.layers()[block];
    let factor = match slice.factor {
        Factor::A => "lora_A",
        Factor::B => "lora_B",
    };
    format!("base_model.model.{}", layout.family().tensor(layer, slice.module, &format!(".{factor}.weight")))
}

fn config_json(layout: &BlockLayout, base_model: &str) -> Value {
    let lora = layout.lora();
    // PEFT types α as an integer.
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    let mut config = json!({
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
        "target_modules": layout.target_names(),
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    });
    if !lora.layers.is_empty() {
        config["layers_to_transform"] = json!(lora.layers);
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::{LoraConfig, Module, initial_adapter};

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
        let matrices = peft_matrices(dir.path()).unwrap();
        assert_eq!(matrices.iter().flat_map(|m| &m.values).copied().collect::<Vec<f32>>(), values);
        assert_eq!((matrices[2].module, matrices[2].factor), (Module::K, Factor::A));
        let file = TensorFile::open(&dir.path().join(TENSORS)).unwrap();
        let name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight";
        assert_eq!(file.tensor(name).unwrap().shape, [3, 24]);
    }

    #[test]
    fn a_frozen_a_is_written_with_b() {
        let dir = tempfile::tempdir().unwrap();
        let (whole, values) = adapter();
        let frozen = BlockLayout::with_frozen_a(&model(), whole.lora()).unwrap();
        let ordered = whole.reordered(&values, &frozen).unwrap();
        assert_ne!(ordered, values);
        write_peft(dir.path(), &frozen, &ordered, "some/base").unwrap();
        let found = read_peft(dir.path(), &model()).unwrap();
        assert_eq!((&found.layout, &found.values), (&whole, &values));
    }

    #[test]
    fn adapters_of_some_layers_are_read_and_written() {
        let dir = tempfile::tempdir().unwrap();
        let model = DecoderConfig { layers: 4, ..model() };
        let lora = LoraConfig { layers: vec![0, 3], ..LoraConfig::default() };
        let layout = BlockLayout::new(&model, &lora).unwrap();
        let values: Vec<f32> = (0..layout.total()).map(|i| i as f32 * 1e-3).collect();
        write_peft(dir.path(), &layout, &values, "some/base").unwrap();
        let path = dir.path().join(CONFIG);
        let config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(config["layers_to_transform"], json!([0, 3]));
        let names = TensorFile::open(&dir.path().join(TENSORS)).unwrap().names();
        assert!(
            names.iter().all(|name| name.contains("layers.0.") || name.contains("layers.3.")),
            "{names:?}"
        );
        let found = read_peft(dir.path(), &model).unwrap();
        assert_eq!((&found.layout, &found.values), (&layout, &values));
        // Named otherwise, it is the same adapter.
        for (field, value) in [
            ("layers_to_transform", json!([3, 0, 3])),
            ("target_modules", json!(r"model\.layers\.(0|3)\.self_attn\.[qv]_proj")),
        ] {
            let mut config = config.clone();
            if field == "target_modules" {
                config["layers_to_transform"] = Value::Null;
            }
            config[field] = value;
            std::fs::write(&path, config.to_string()).unwrap();
            assert_eq!(read_peft(dir.path(), &model).unwrap().layout, layout, "{field}");
        }
        // Other layers than the file's.
        for layers in [json!([0, 2]), json!([0]), json!([])] {
            let mut config = config.clone();
            config["layers_to_transform"] = layers.clone();
            std::fs::write(&path, config.to_string()).unwrap();
            let message = read_peft(dir.path(), &model).unwrap_err().to_string();
            assert!(message.contains(TENSORS) && message.contains("layers."), "{layers}: {message}");
        }
    }

    #[test]
    fn names_are_those_of_the_family() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"model_type": "opt", "vocab_size": 11, "hidden_size": 16, "ffn_dim": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}"#;
        let opt = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
        let lora = LoraConfig { rank: 3, targets: Module::ALL.to_vec(), ..Default::default() };
        let layout = BlockLayout::new(&opt, &lora).unwrap();
        assert_eq!(layout.slices().len(), 12, "there is no gate");
        let values: Vec<f32> = (0..layout.total()).map(|i| i as f32 * 1e-3).collect();
        write_peft(dir.path(), &layout, &values, "some/base").unwrap();
        let path = dir.path().join(CONFIG);
        let config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"];
        assert_eq!(config["target_modules"], json!(names));
        let file = TensorFile::open(&dir.path().join(TENSORS)).unwrap();
        let name = "base_model.model.model.decoder.layers.1.fc2.lora_A.weight";
        assert_eq!(file.tensor(name).unwrap().shape, [3, 24]);
        let found = read_peft(dir.path(), &opt).unwrap();
        assert_eq!((&found.layout, &found.values), (&layout, &values));
        assert_eq!(peft_matrices(dir.path()).unwrap().len(), 2 * 12);
        for (targets, words) in [
            (json!("all-linear"), ""),
            (json!(r"model\.decoder\.layers\.\d+\.(fc[12]|self_attn\.(.*_proj))"), ""),
            (json!(["gate_proj", "o_proj"]), "those are q_proj, k_proj, v_proj, out_proj, fc1, fc2"),
            (json!(["q_proj", "embed_positions"]), "`model.decoder.embed_positions`"),
        ] {
            let mut config = config.clone();
            config["target_modules"] = targets.clone();
            std::fs::write(&path, config.to_string()).unwrap();
            match read_peft(dir.path(), &opt) {
                Ok(found) => assert!(words.is_empty() && found.layout == layout, "{targets}"),
                Err(e) => assert!(!words.is_empty() && e.to_string().contains(words), "{targets}: {e}"),
            }
        }
        // A module that the family lacks alone, and the adapter of another family.
        let gate = LoraConfig { targets: vec![Module::Gate], ..Default::default() };
        let message = BlockLayout::new(&opt, &gate).unwrap_err().to_string();
        assert!(message.contains("gate_proj are to be adapted") && message.contains("fc1, fc2"), "{message}");
        std::fs::write(&path, config.to_string()).unwrap();
        assert!(read_peft(dir.path(), &model()).is_err());
    }

    /// Writes an adapter of q, v, o and down, and reads it with these changes of its configuration.
    fn changed(changes: &Value) -> Result<PeftAdapter> {
        let dir = tempfile::tempdir().unwrap();
        let targets = vec![Module::Q, Module::V, Module::O, Module::Down];
        let lora = LoraConfig { rank: 4, alpha: 12.0, dropout: 0.0, targets, layers: vec![] };
        let layout = BlockLayout::new(&model(), &lora).unwrap();
        let values: Vec<f32> = (0..layout.total()).map(|i| i as f32 * 1e-3).collect();
        write_peft(dir.path(), &layout, &values, "some/base").unwrap();
        let path = dir.path().join(CONFIG);
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        changes.as_object().unwrap().iter().for_each(|(field, value)| config[field] = value.clone());
        std::fs::write(&path, config.to_string()).unwrap();
        read_peft(dir.path(), &model())
    }

    #[test]
    fn options_that_change_the_meaning_are_errors() {
        let cases = [
            ("use_dora", json!(true)),
            ("bias", json!("all")),
            ("modules_to_save", json!(["lm_head"])),
            ("rank_pattern", json!({"q_proj": 3})),
            ("alpha_pattern", json!({"q_proj": 4})),
            ("alpha_pattern", json!({"layers.1.self_attn.v_proj": 4})),
            ("alpha_pattern", json!({"(": 4})),
            ("layers_to_transform", json!([0])),
            ("layers_to_transform", json!(1)),
            ("init_lora_weights", json!("pissa")),
            ("init_lora_weights", json!("pissa_niter_16")),
            ("init_lora_weights", json!("loftq")),
            ("target_modules", json!(["c_attn"])),
            ("target_modules", json!(["q_proj", "lm_head"])),
            ("target_modules", json!(["layers.0.self_attn.q_proj", "v_proj", "o_proj", "down_proj"])),
            ("target_modules", json!("q_proj")),
            ("target_modules", json!(".*q_proj)|(.*")),
            ("target_modules", json!("((a+)+)+b(?=c)\\1")),
            ("target_modules", json!(7)),
            ("exclude_modules", json!(["layers.0.self_attn.q_proj"])),
            ("exclude_modules", json!("(")),
            ("peft_type", json!("VERA")),
            ("task_type", json!("SEQ_CLS")),
            ("r", json!(2.5)),
            ("r", json!(-2)),
            ("r", json!(1_000_000_000)),
            ("lora_alpha", json!(-8)),
            ("lora_alpha", json!(0)),
            ("lora_alpha", json!(1e30)),
            ("lora_dropout", json!(1.5)),
            ("use_rslora", json!("yes")),
            ("alora_invocation_tokens", json!([151_644])),
            ("arrow_config", json!({"top_k": 3})),
            ("use_bdlora", json!({"nblocks": 2})),
            ("something_new", json!(1)),
        ];
        for (field, value) in cases {
            let message = changed(&json!({ field: value })).expect_err(field).to_string();
            assert!(message.contains(CONFIG) && message.contains(field), "{field} = {value}: {message}");
        }
        let message = changed(&json!({"something_new": 1})).unwrap_err().to_string();
        assert!(message.contains("models.ignore_fields = [\"something_new\"]"), "{message}");
    }

    #[test]
    fn the_same_adapter_written_otherwise_is_the_same() {
        let want = changed(&json!({})).unwrap();
        let full: Vec<String> = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]
            .iter()
            .flat_map(|module| (0..2).map(move |layer| format!("model.layers.{layer}.{module}")))
            .collect();
        let cases = [
            json!({"target_modules": r".*\.(q_proj|v_proj|o_proj|down_proj)"}),
            json!({"target_modules": r"model\.layers\.\d+\.(?:self_attn\.(?:[qvo])|mlp\.down)_proj"}),
            json!({"target_modules": r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q|v|o|down)_proj.*?)"}),
            json!({"target_modules": r"^(?!.*(k_proj|gate_proj|up_proj|lm_head|embed_tokens)).*_proj$"}),
            json!({"target_modules": full}),
            json!({"target_modules": "all-linear", "exclude_modules": ["k_proj", "gate_proj", "up_proj"]}),
            json!({"target_modules": "all-linear", "exclude_modules": r".*\.(k|gate|up)_proj"}),
            json!({"target_modules": ["self_attn.q_proj", "v_proj", "o_proj", "mlp.down_proj", "c_attn"]}),
            json!({"alpha_pattern": {"q_proj": 12}}),
            json!({"alpha_pattern": {".*": 12}, "lora_alpha": 99}),
            json!({"alpha_pattern": {"k_proj": 99}, "rank_pattern": {"gate_proj": 64}}),
            json!({"rank_pattern": {"self_attn\\..*": 4, "^model.layers.0.mlp.down_proj": 4}}),
            json!({"layers_to_transform": [1, 0], "layers_pattern": "layers"}),
            json!({"use_rslora": true, "lora_alpha": 6}),
            json!({"init_lora_weights": "gaussian", "eva_config": {"rho": 2.0}, "loftq_config": {}}),
            json!({"fan_in_fan_out": true, "qalora_group_size": 16, "megatron_core": "megatron.core"}),
            json!({"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "peft_version": "0.30.1.dev0"}),
            json!({"an_entry_of_next_year": null, "another": {"inner": false}, "third": []}),
            json!({"runtime_config": {"ephemeral_gpu_offload": false}, "task_type": null, "revision": "main"}),
        ];
        for case in cases {
            let found = changed(&case).unwrap_or_else(|e| panic!("{case}: {e}"));
            assert_eq!(found, want, "{case}");
        }
    }

    #[test]
    fn tensors_are_found_under_the_names_of_every_writer() {
        let base = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
        let want = Place { block: 1, module: Module::Q, factor: Factor::A };
        for name in [
            base,
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
            "model.layers.1.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight",
            "module.base_model.model.model.layers.1._orig_mod.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.decoder.layers.1.self_attn.q_proj.lora_A.weight",
        ] {
            assert_eq!(place_of(name), Some(want), "{name}");
        }
        for name in [
            "base_model.model.model.layers.1.mlp.q_proj.lora_A.weight",
            "base_model.model.model.layers.1.self_attn.q_proj.lora_C.weight",
            "base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector",
            "base_model.model.model.vision.layers.1.self_attn.q_proj.lora_A.weight",
            "base_model.model.lm_head.lora_A.weight",
        ] {
            assert_eq!(place_of(name), None, "{name}");
        }
    }

    #[test]
    fn a_directory_that_is_no_adapter_is_described() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG), "{}").unwrap();
        std::fs::write(dir.path().join("adapter_model.bin"), "PK").unwrap();
        let message = read_peft(dir.path(), &model()).unwrap_err().to_string();
        assert!(message.contains("adapter_model.bin") && message.contains("save_file"), "{message}");
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
