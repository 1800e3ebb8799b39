//! Models and adapters: stated numbers are used or refused, harmless entries are accepted, and a
//! directory that is something else is named as what it is.

use crate::common::Case;
use serde_json::{Map, Value, json};
use std::os::unix::fs::symlink;

/// A copy of `base` with another configuration.
fn changed(case: &Case, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
    case.copy("base", name);
    case.edit(&format!("{name}/config.json"), |c| change(c.as_object_mut().unwrap()));
}

fn refused(case: &Case, model: &str, words: &[&str]) {
    case.evaluate(&format!("o-{model}"), &["--set", &format!("models.tiny={model}")]).refused().says(words);
}

/// A case whose row is long enough for positions to matter.
fn long() -> Case {
    let case = Case::new();
    case.rows("one.jsonl", &[json!({ "prompt": "How many apples? ".repeat(8), "response": "7" })]);
    case
}

// Stated numbers.

#[test]
fn rope_parameters_of_transformers_5() {
    let case = long();
    let base = case.said_by("base");
    changed(&case, "five", |c| {
        c.remove("rope_theta");
        c.remove("rope_scaling");
        c.insert("rope_parameters".into(), json!({ "rope_type": "default", "rope_theta": 10000.0 }));
    });
    assert_eq!(case.said_by("five"), base);
    changed(&case, "yarn", |c| {
        drop(c.insert(
            "rope_scaling".into(),
            json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64 }),
        ))
    });
    changed(&case, "yarn5", |c| {
        c.remove("rope_theta");
        c.remove("rope_scaling");
        c.insert("rope_parameters".into(), json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0 }));
    });
    assert_eq!(case.said_by("yarn5"), case.said_by("yarn"));
}

#[test]
fn two_statements_that_differ_are_refused() {
    let case = Case::new();
    changed(&case, "both", |c| {
        c.insert("rope_scaling".into(), json!({ "rope_type": "linear", "factor": 2.0 }));
        c.insert(
            "rope_parameters".into(),
            json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0 }),
        );
    });
    refused(&case, "both", &["rope_scaling", "rope_parameters"]);
    changed(&case, "theta", |c| {
        drop(c.insert("rope_parameters".into(), json!({ "rope_type": "default", "rope_theta": 500000.0 })))
    });
    refused(&case, "theta", &["rope_theta"]);
    changed(&case, "types", |c| {
        drop(c.insert("rope_scaling".into(), json!({ "type": "linear", "rope_type": "yarn", "factor": 2.0 })))
    });
    refused(&case, "types", &["rope_type"]);
}

#[test]
fn scalings_that_are_not_known_are_refused() {
    let case = Case::new();
    for kind in ["longrope", "su", "next_year"] {
        changed(&case, kind, |c| {
            drop(c.insert("rope_scaling".into(), json!({ "rope_type": kind, "factor": 2.0 })))
        });
        refused(&case, kind, &[kind]);
    }
    for factor in [json!(0.0), json!(-4.0), json!("4")] {
        changed(&case, "factor", |c| {
            drop(c.insert(
                "rope_scaling".into(),
                json!({ "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64 }),
            ))
        });
        refused(&case, "factor", &["factor"]);
        case.remove("factor");
        case.remove("r-o-factor");
    }
}

/// Splits the weights in two shards with an index; `left_out` gets no entry in it.
fn shard(case: &Case, model: &str) {
    std::fs::copy(
        case.path(&format!("{model}/model.safetensors")),
        case.path(&format!("{model}/model-00001-of-00001.safetensors")),
    )
    .unwrap();
    let bytes = case.bytes(&format!("{model}/model.safetensors"));
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let map: Map<String, Value> = tensors
        .names()
        .into_iter()
        .map(|name| (name.to_string(), json!("model-00001-of-00001.safetensors")))
        .collect();
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    case.write(&format!("{model}/model.safetensors.index.json"), index.to_string());
}

#[test]
fn two_sets_of_weights_are_refused() {
    let case = Case::new();
    case.copy("base", "two");
    shard(&case, "two");
    refused(&case, "two", &["model.safetensors", "model.safetensors.index.json"]);
    // The control: one of them.
    case.remove("two/model.safetensors");
    case.remove("r-o-two");
    assert_eq!(case.said_by("two"), case.said_by("base"));
}

#[test]
fn an_index_that_does_not_fit_is_refused() {
    let case = Case::new();
    case.copy("base", "index");
    shard(&case, "index");
    case.remove("index/model.safetensors");
    case.edit("index/model.safetensors.index.json", |i| {
        i["weight_map"]["model.norm.weight"] = json!("model-00002-of-00002.safetensors")
    });
    refused(&case, "index", &["model-00002-of-00002.safetensors"]);
    case.edit("index/model.safetensors.index.json", |i| {
        i["weight_map"]["model.norm.weight"] = json!("../base/model.safetensors")
    });
    case.remove("r-o-index");
    refused(&case, "index", &["../base/model.safetensors"]);
}

// What is accepted.

#[test]
fn entries_that_are_off_or_bookkeeping() {
    let case = Case::new();
    let base = case.said_by("base");
    let entries = [
        ("unsloth_version", json!("2026.11")),
        ("transformers.js_config", json!({ "use_external_data_format": true })),
        ("rope_interleaved", json!(false)),
        ("neftune_noise_alpha", json!(5)),
        ("quantization_config", json!(null)),
        ("auto_map", json!({ "AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM" })),
        ("next_year_flag", json!(false)),
        ("next_year_list", json!([])),
        ("next_year_object", json!({})),
        ("_attn_implementation_autoset", json!(true)),
        ("_name_or_path", json!("/home/somebody/x")),
    ];
    for (name, value) in entries {
        changed(&case, name, |c| drop(c.insert(name.into(), value)));
        assert_eq!(case.said_by(name), base, "{name}");
    }
}

/// An entry that may change the result is an error that says how to continue all the same.
#[test]
fn entries_that_may_matter() {
    let case = Case::new();
    for (name, value) in [
        ("residual_multiplier", json!(0.5)),
        ("next_year_gate", json!(true)),
        ("next_year_kind", json!("swish")),
    ] {
        changed(&case, name, |c| drop(c.insert(name.into(), value)));
        refused(&case, name, &[name, "config.json"]);
        if name.starts_with("next_year") {
            case.remove(&format!("r-o-{name}"));
            refused(&case, name, &["ignore"]);
        }
    }
}

#[test]
fn adapters_written_otherwise() {
    let case = Case::new();
    case.evaluate("o-adapter", &["--adapter", "adapter"]).well();
    let changes = [
        ("lists", json!({ "exclude_modules": [], "modules_to_save": [], "layers_to_transform": [0, 1] })),
        (
            "ranks",
            json!({ "rank_pattern": { "q_proj": 3, "v_proj": 3 }, "alpha_pattern": { "down_proj": 12.0 } }),
        ),
        (
            "future",
            json!({ "next_year_config": null, "next_year_flag": false, "next_year_parts": { "a": null, "b": false } }),
        ),
        (
            "runtime",
            json!({ "runtime_config": { "ephemeral_gpu_offload": false }, "revision": "main", "lora_dropout": 0.3 }),
        ),
        (
            "suffix",
            json!({ "target_modules": ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"] }),
        ),
        (
            "regex",
            json!({ "target_modules": r"model\.layers\.\d+\.(self_attn\.(q|v|o)_proj|mlp\.down_proj)" }),
        ),
    ];
    for (name, change) in changes {
        case.copy("adapter", name);
        case.edit(&format!("{name}/adapter_config.json"), |c| {
            change.as_object().unwrap().iter().for_each(|(key, value)| c[key] = value.clone());
        });
        case.evaluate(&format!("o-{name}"), &["--adapter", name]).well();
        assert_eq!(case.predictions(&format!("o-{name}")), case.predictions("o-adapter"), "{name}");
    }
}

#[test]
fn adapters_that_are_another_thing() {
    let case = Case::new();
    let changes = [
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("alpha_pattern", json!({ "q_proj": 99 })),
        ("rank_pattern", json!({ "q_proj": 7 })),
        ("layers_to_transform", json!([0])),
        ("modules_to_save", json!(["lm_head"])),
        ("next_year_scaling", json!(true)),
        ("target_modules", json!(r".*\.(q_proj|v_proj)")),
    ];
    for (name, value) in changes {
        case.copy("adapter", name);
        case.edit(&format!("{name}/adapter_config.json"), |c| c[name] = value);
        case.evaluate(&format!("o-{name}"), &["--adapter", name]).refused();
    }
}

// What leaves the house.

#[test]
fn a_merged_model_carries_its_licence_and_no_paths() {
    let case = Case::new();
    case.write("base/LICENSE", "Some Licence 1.0");
    case.write("base/NOTICE.txt", "notice");
    case.finetune("one.jsonl", "c", &["--set", "finetune.tiny.max_steps=1"]).well();
    case.run("merge --run r-c --adapter c/adapter --model tiny --out merged").well();
    assert_eq!(case.read("merged/LICENSE"), "Some Licence 1.0");
    let home = case.path("").display().to_string();
    let home = home.trim_end_matches('/');
    for name in ["merged/README.md", "merged/config.json", "c/adapter/adapter_config.json"] {
        let text = case.read(name);
        assert!(!text.contains(home), "{name}: {text}");
    }
    // It is a model all the same.
    case.run("evaluate --run r-c --data one.jsonl --model tiny --base merged --out e").well();
}

// What a directory really is.

#[test]
fn directories_that_are_no_model() {
    let cases: [(&str, &[&str], &[&str]); 6] = [
        ("bin", &["pytorch_model.bin"], &["pytorch_model.bin", "safe"]),
        ("gguf", &["model.Q4_K_M.gguf"], &["gguf"]),
        ("consolidated", &["consolidated.safetensors", "params.json"], &["consolidated"]),
        ("empty", &[], &["safetensors|config.json"]),
        ("shards", &["model-00001-of-00002.safetensors"], &["index"]),
        ("jax", &["flax_model.msgpack"], &["flax|safetensors"]),
    ];
    for (name, files, words) in cases {
        let case = Case::new();
        case.copy("base", name);
        case.remove(&format!("{name}/model.safetensors"));
        files.iter().for_each(|file| case.write(&format!("{name}/{file}"), "x"));
        refused(&case, name, words);
    }
}

#[test]
fn tokenizers_in_another_form() {
    let case = Case::new();
    case.copy("base", "spm");
    case.remove("spm/tokenizer.json");
    case.write("spm/tokenizer.model", "x");
    refused(&case, "spm", &["tokenizer.model", "tokenizer.json"]);
    case.copy("base", "none");
    case.remove("none/tokenizer.json");
    refused(&case, "none", &["tokenizer.json"]);
}

#[test]
fn files_that_are_empty_or_links_to_nothing() {
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let case = Case::new();
        case.copy("base", "hollow");
        case.write(&format!("hollow/{file}"), "");
        refused(&case, "hollow", &[file, "empty"]);
        case.copy("base", "dangling");
        case.remove(&format!("dangling/{file}"));
        symlink("../../blobs/0123", case.path(&format!("dangling/{file}"))).unwrap();
        refused(&case, "dangling", &[file, "link"]);
    }
}

#[test]
fn a_directory_of_another_kind_is_named() {
    let case = Case::new();
    refused(&case, "adapter", &["adapter"]);
    case.evaluate("o", &["--adapter", "base"]).refused().says(&["adapter", "model"]);
    case.copy("base", "models--org--name/snapshots/0123abcd");
    case.write("models--org--name/refs/main", "0123abcd");
    refused(&case, "models--org--name", &["snapshots"]);
    case.copy("base", "above/base");
    refused(&case, "above", &["above"]);
}
