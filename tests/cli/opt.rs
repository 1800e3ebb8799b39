//! OPT through the program: as both models of a run, and as the LLM beside a TinyLM of another family.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_models::decoder::Family;
use gradtx_runtime::artifact::{TensorFile, TensorSource};
use gradtx_tests::miniature::{SETTINGS, write_models};
use serde_json::json;

const LORA: &str = "\n[lora]\ntarget_modules = [\"q_proj\", \"out_proj\", \"fc1\", \"fc2\", \"gate_proj\"]\n";

fn home(tiny: Family, settings: &str) -> Home {
    let home = Home::miniature();
    write_models(&home.path("."), [tiny, Family::Opt]);
    home.write("settings.toml", &(SETTINGS.to_owned() + settings));
    home
}

fn evaluate(home: &Home, out: &str, more: &[&str]) -> String {
    home.done(&[&["evaluate", "--data", "private.jsonl", "--out", out], more].concat());
    home.read(&format!("{out}/predictions.jsonl"))
}

#[test]
fn the_whole_pipeline_on_opt() {
    let home = home(Family::Opt, LORA);
    home.ok(&["doctor", "--run", "settings.toml"]);
    home.done(&["curate"]);
    home.done(&["train"]);
    home.done(&["finetune", "--data", "private.jsonl", "--out", "client", "--save-adapter"]);
    home.done(&["translate", "client/update.safetensors", "--out", "upgraded"]);
    home.done(&["merge", "--adapter", "upgraded/adapter", "--out", "merged"]);
    // The gate, which OPT lacks, is left out.
    let config = home.json("upgraded/adapter/adapter_config.json");
    assert_eq!(config["target_modules"], json!(["q_proj", "out_proj", "fc1", "fc2"]));
    let names = TensorFile::open(&home.path("upgraded/adapter/adapter_model.safetensors")).unwrap().names();
    let one = "base_model.model.model.decoder.layers.2.fc1.lora_A.weight";
    assert!(names.len() == 3 * 4 * 2 && names.iter().any(|name| name == one), "{names:?}");
    let [before, after] = ["llm", "merged"].map(|dir| TensorSource::open(&home.path(dir)).unwrap());
    for name in before.names() {
        let [old, new] = [&before, &after].map(|source| source.tensor(name).unwrap().bytes.to_vec());
        let modules = ["q_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight"];
        assert_eq!(old != new, modules.iter().any(|module| name.ends_with(module)), "{name}");
    }
    let with_adapter = evaluate(&home, "with-adapter", &["--adapter", "upgraded/adapter"]);
    assert_eq!(with_adapter, evaluate(&home, "of-merged", &["--base", "merged"]));
    assert_ne!(with_adapter, evaluate(&home, "of-llm", &[]));
}

#[test]
fn a_tinylm_of_another_family_beside_opt() {
    let home = home(Family::Qwen2, LORA);
    home.done(&["curate"]);
    home.done(&["train"]);
    home.done(&["finetune", "--data", "private.jsonl", "--out", "client", "--save-adapter"]);
    home.done(&["translate", "client/update.safetensors", "--out", "upgraded"]);
    let targets = |adapter: &str| {
        home.json(&format!("{adapter}/adapter/adapter_config.json"))["target_modules"].clone()
    };
    assert_eq!(targets("client"), json!(["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]));
    assert_eq!(targets("upgraded"), json!(["q_proj", "out_proj", "fc1", "fc2"]));
}

#[test]
fn what_opt_cannot_do_is_refused() {
    let home = home(Family::Opt, "");
    home.stage_refused(&["emulate"], 1, &["models.llm", "found type opt", "gated MLP"]);
    let path = home.path("llm/config.json");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (field, value) in [("do_layer_norm_before", json!(false)), ("word_embed_proj_dim", json!(8))] {
        let mut changed = config.clone();
        changed[field] = value.clone();
        std::fs::write(&path, changed.to_string()).unwrap();
        let words = ["llm/config.json", &format!("`{field}` = {value}"), "expected"];
        home.refused(&["curate", "--run", "bad", "--config", "settings.toml"], 1, &words);
    }
    std::fs::write(&path, config.to_string()).unwrap();
    let settings = "\n[lora]\ntarget_modules = [\"gate_proj\"]\n";
    home.write("settings.toml", &(SETTINGS.to_owned() + settings));
    home.refused(
        &["curate", "--run", "gate", "--config", "settings.toml"],
        1,
        &["gate_proj", "opt", "fc1, fc2"],
    );
}
