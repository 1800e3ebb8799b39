//! Every command that takes a model or an adapter, given an emulator, what was trained through one, or an adapter that
//! is none: it works, or there is one error that says what was expected.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{PeftAdapter, read_peft, write_peft};
use gradtx_tests::miniature::SETTINGS;
use serde_json::{Value, json};

const EMULATOR: &str = "\n[emulator]\nedge = [1, 1]\nratio = 0.5\nnum_tokens = 300\n[lora]\nr = 3\n";
const MODEL: &str = "run/emulator/model";
const CONFIG: &str = "settings.toml";

/// A run with an emulator, and a client that has trained an adapter (`one`) and full weights (`two`) through it.
fn home() -> Home {
    let home = Home::miniature();
    home.write(CONFIG, &(SETTINGS.to_owned() + EMULATOR));
    home.done(&["emulate"]);
    home.ok(&finetune("client", "one", &["--save-adapter"]));
    home.ok(&finetune("client-2", "two", &["--set", "finetune.use_peft=false"]));
    home
}

fn finetune<'a>(run: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["finetune", "--run", run, "--config", CONFIG, "--base", MODEL, "--data", "private.jsonl"];
    [&args[..], &["--out", out], more].concat()
}

#[test]
fn an_emulator_is_no_member_of_a_pair() {
    let home = home();
    let update = "one/update.safetensors";
    let commands: [&[&str]; 5] = [
        &["curate"],
        &["translate", update, "--out", "x"],
        &["refine", update, "--translated", "x"],
        &["cross-validate"],
        &["emulate", "--out", "x"],
    ];
    for command in commands {
        for role in ["tiny", "llm"] {
            if (command[0], role) == ("emulate", "tiny") {
                continue;
            }
            let set = format!("models.{role}={MODEL}");
            let run = ["--run", "pair", "--config", CONFIG, "--set", &set];
            let args = [&command[..1], &run[..], &command[1..]].concat();
            home.refused(&args, 1, &[&format!("models.{role}"), "GradOT emulator"]);
        }
    }
    home.refused(
        &["init-clients", "--run", "client", "--out", "package"],
        1,
        &["models.tiny", "GradOT emulator"],
    );
    let consent = finetune("client", "consent", &["--allow-refinement"]);
    home.refused(&consent, 2, &["--allow-refinement", "GradOT emulator"]);
    let plugin = ["plugin", "--run", "pair", "--config", CONFIG, "--set", "models.llm=run/emulator/model"];
    let plugin = [&plugin[..], &["--adapter", "one/adapter", "--out", "x"]].concat();
    home.refused(&plugin, 1, &["models.llm", "GradOT emulator"]);
}

#[test]
fn an_emulator_is_a_model_to_look_at_and_to_ask() {
    let home = home();
    let said = home.ok(&["inspect", MODEL]);
    for word in ["emulator (GradOT)", "first 1 and last 1 of 3 layers", "gradot_qwen2"] {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
    assert!(!said.contains("does not know"), "{said}");
    home.ok(&["doctor", "--model", MODEL]);
    home.ok(&["preview", "--model", MODEL, "--config", CONFIG, "--data", "private.jsonl"]);
    for adapter in [&[][..], &["--adapter", "one/adapter"]] {
        let ask =
            ["generate", "--model", MODEL, "--config", CONFIG, "--prompt", "a", "--max-new-tokens", "4"];
        home.ok(&[&ask[..], adapter].concat());
        let evaluate = ["evaluate", "--run", "client", "--data", "private.jsonl", "--base", MODEL];
        let out = if adapter.is_empty() { "plain" } else { "tuned" };
        home.ok(&[&evaluate[..], &["--out", out], adapter].concat());
    }
    // An adapter becomes part of its emulator, which stays one.
    home.ok(&["merge", "--run", "client", "--model", "tiny", "--adapter", "one/adapter", "--out", "merged"]);
    let merged = DecoderConfig::read(&home.path("merged")).unwrap();
    assert!(merged.emulator.is_some() && home.path("merged/modeling_gradot.py").is_file());
    // A second round starts from the adapter of the first.
    let again = ["--save-adapter", "--set", "lora.init_adapter_tiny=one/adapter"];
    home.ok(&finetune("client-3", "again", &again));
    home.done(&["plugin", "--adapter", "again/adapter", "--out", "upgraded"]);
    home.ok(&["diff", "one/adapter", "again/adapter"]);
}

#[test]
fn full_weights_are_no_adapter_to_other_commands() {
    let home = home();
    for path in ["two", "two/layers.safetensors"] {
        let set = format!("lora.init_adapter_tiny={path}");
        let commands: [&[&str]; 4] = [
            &["evaluate", "--run", "client", "--data", "private.jsonl", "--out", "x", "--adapter", path],
            &["generate", "--model", MODEL, "--prompt", "a", "--adapter", path],
            &[
                "convert",
                "--run",
                "client",
                "--model",
                "tiny",
                "--examples",
                "7",
                "--out",
                "x",
                "--adapter",
                path,
            ],
            &["finetune", "--run", "client", "--data", "private.jsonl", "--out", "x", "--set", &set],
        ];
        for command in commands {
            home.refused(command, 1, &["full weights of layers", "gradtx merge"]);
        }
    }
    home.refused(&["diff", "two", "one"], 2, &["two", "holds neither"]);
    home.refused(&["diff", "two/layers.safetensors", "one"], 1, &["layers.safetensors"]);
    let translate = ["translate", "two/layers.safetensors", "--method", "mean", "--out", "x"];
    home.stage_refused(&translate, 1, &["layers.safetensors"]);
    home.refused(&["generate", "--model", "two", "--prompt", "a"], 2, &["full weights of some layers"]);
}

/// Writes the client's adapter with changes of values and configuration.
fn changed(home: &Home, values: impl Fn(&mut PeftAdapter), fields: &[(&str, Value)]) {
    let model = DecoderConfig::read(&home.path("llm")).unwrap();
    let mut adapter = read_peft(&home.path("one/adapter"), &model).unwrap();
    values(&mut adapter);
    let dir = home.path("changed");
    std::fs::create_dir_all(&dir).unwrap();
    write_peft(&dir, &adapter.layout, &adapter.values, "llm").unwrap();
    let mut config = home.json("changed/adapter_config.json");
    fields.iter().for_each(|(field, value)| config[field] = value.clone());
    home.write("changed/adapter_config.json", &config.to_string());
}

#[test]
fn adapters_with_impossible_numbers_are_refused() {
    let home = home();
    let refused = |words: &[&str]| {
        let args = ["plugin", "--adapter", "changed", "--emulator", MODEL, "--out", "x"];
        home.stage_refused(&args, 1, &[&["changed"], words].concat());
        let left: Vec<_> = std::fs::read_dir(home.path("x")).into_iter().flatten().flatten().collect();
        assert!(left.iter().all(|entry| !entry.file_name().to_string_lossy().ends_with("safetensors")));
    };
    changed(&home, |_| (), &[("r", json!(0))]);
    refused(&["`r`", "between 1 and 1024"]);
    for alpha in [json!(0), json!(-1), json!(1e30)] {
        changed(&home, |_| (), &[("lora_alpha", alpha)]);
        refused(&["`lora_alpha`", "above 0 and at most 1000000"]);
    }
    changed(&home, |_| (), &[("r", json!(2))]);
    refused(&["lora_A", "expected shape [2, 16], found [3, 16]"]);
    changed(&home, |_| (), &[("layers_to_transform", json!([0, 1]))]);
    refused(&["layers.2", "layers_to_transform"]);
    changed(&home, |_| (), &[("layers_to_transform", json!([0, 9]))]);
    refused(&["layers_to_transform"]);
    for value in [f32::NAN, f32::INFINITY] {
        changed(&home, |adapter| adapter.values[5] = value, &[]);
        refused(&["adapter_model.safetensors", "finite"]);
    }
    changed(&home, |adapter| adapter.values.iter_mut().for_each(|x| *x = 3e38), &[]);
    let args = ["plugin", "--adapter", "changed", "--emulator", MODEL, "--out", "x"];
    home.stage_refused(
        &args,
        1,
        &["model.layers.0.self_attn.q_proj.weight", "with the adapter", "too large"],
    );
}
