//! GradOT: an emulator of the LLM is made, trained through, plugged in; and what does not fit.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{peft_note, read_peft, write_peft, write_peft_with_notes};
use gradtx_runtime::artifact::TensorSource;
use gradtx_tests::miniature::{SETTINGS, checksums};
use serde_json::json;

/// One layer of three between.
const EMULATOR: &str = "\n[emulator]\nedge = [1, 1]\nratio = 0.5\nnum_tokens = 300\n[lora]\nr = 3\n";

/// A run, and a client that has the emulator and nothing of the provider's.
fn home(emulator: &str) -> Home {
    let home = Home::miniature();
    home.write("settings.toml", &(SETTINGS.to_owned() + emulator));
    home
}

fn train(home: &Home, base: &str, out: &str) {
    train_in(home, "client", base, out);
}

fn train_in(home: &Home, run: &str, base: &str, out: &str) {
    home.ok(&[&client(run, base)[..], &["--out", out, "--save-adapter"]].concat());
}

/// The words before what a client may add.
fn client<'a>(run: &'a str, base: &'a str) -> [&'a str; 9] {
    let config = "settings.toml";
    ["finetune", "--run", run, "--config", config, "--base", base, "--data", "private.jsonl"]
}

/// A stage in a run of its own, with one setting in the place of the run file's.
fn in_run<'a>(stage: &'a str, run: &'a str, set: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&[stage, "--run", run, "--config", "settings.toml", "--set", set], more].concat()
}

#[test]
fn an_emulator_is_made_trained_and_plugged_in() {
    let home = home(EMULATOR);
    home.done(&["emulate"]);
    for file in ["config.json", "model.safetensors", "modeling_gradot.py", "tokenizer.json"] {
        assert!(home.path("run/emulator/model").join(file).is_file(), "{file}");
    }
    let config = DecoderConfig::read(&home.path("run/emulator/model")).unwrap();
    let emulator = config.emulator.clone().unwrap();
    assert_eq!((emulator.edge, emulator.middle_layers()), ([1, 1], 1..2));
    assert!(emulator.layers[1] != emulator.layers[0] && emulator.layers[1].intermediate < 24);
    let report = home.json("run/emulator/report.json");
    let kept = report["kept"].as_f64().unwrap();
    assert!((0.4..0.9).contains(&kept), "{report}");
    let cosine = report["edge_gradient_cosine"].as_f64().unwrap();
    assert!(cosine > 0.3 && cosine < 0.999_999, "{report}");
    // Nothing about what was left out goes to clients.
    let names: Vec<_> = std::fs::read_dir(home.path("run/emulator/model")).unwrap().flatten().collect();
    assert!(names.iter().all(|entry| !entry.file_name().to_string_lossy().contains("report")));

    train(&home, "run/emulator/model", "one");
    let adapter = home.json("one/adapter/adapter_config.json");
    assert_eq!(adapter["layers_to_transform"], json!([0, 2]));
    home.done(&["plugin", "--adapter", "one/adapter", "--out", "upgraded"]);
    let [before, after] = ["llm", "upgraded"].map(|dir| TensorSource::open(&home.path(dir)).unwrap());
    for name in before.names() {
        let [old, new] = [&before, &after].map(|source| source.tensor(name).unwrap().bytes.to_vec());
        let is_trained = ["layers.0.", "layers.2."].iter().any(|layer| name.contains(layer))
            && ["q_proj.weight", "v_proj.weight"].iter().any(|module| name.ends_with(module));
        assert_eq!(old != new, is_trained, "{name}");
    }
    // What is evaluated is the plugged-in LLM, and the emulator.
    for (base, out) in [("upgraded", "of-upgraded"), ("run/emulator/model", "of-emulator")] {
        home.done(&["evaluate", "--data", "private.jsonl", "--base", base, "--out", out]);
        assert!(home.json(&format!("{out}/score.json")).is_object());
    }
}

#[test]
fn clients_are_averaged_by_their_examples() {
    let home = home(EMULATOR);
    home.done(&["emulate"]);
    train(&home, "run/emulator/model", "one");
    // Of a client with other weights and twice the examples.
    let lines = home.read("private.jsonl");
    home.write("private.jsonl", &(lines.clone() + &lines));
    train(&home, "run/emulator/model", "two");
    home.done(&["plugin", "--adapter", "one/adapter", "two/adapter", "--out", "both"]);
    home.done(&["plugin", "--adapter", "one/adapter", "--out", "first"]);
    home.done(&["plugin", "--adapter", "two/adapter", "--out", "second"]);
    let [llm, both, first, second] = ["llm", "both", "first", "second"].map(|dir| {
        let source = TensorSource::open(&home.path(dir)).unwrap();
        source.tensor("model.layers.2.self_attn.q_proj.weight").unwrap().to_f32().unwrap()
    });
    for i in 0..llm.len() {
        let want = llm[i] + (first[i] - llm[i]) / 3.0 + 2.0 * (second[i] - llm[i]) / 3.0;
        assert!((both[i] - want).abs() < 1e-5, "{i}: {}, expected {want}", both[i]);
    }
    assert!(first != second);
}

#[test]
fn a_ratio_of_one_without_lambda_is_the_llm() {
    let home = home(&EMULATOR.replace("ratio = 0.5", "ratio = 1.0\nlambda = 0.0"));
    home.done(&["emulate"]);
    let [llm, emulator] =
        ["llm", "run/emulator/model"].map(|dir| TensorSource::open(&home.path(dir)).unwrap());
    for name in llm.names() {
        let [a, b] = [&llm, &emulator].map(|source| source.tensor(name).unwrap().bytes.to_vec());
        assert!(a == b, "{name}");
    }
    let report = home.json("run/emulator/report.json");
    assert_eq!(report["llm_loss"], report["emulator_loss"]);
    assert_eq!(report["kept"], 1.0);
}

#[test]
fn dense_is_the_same_function_in_whole_matrices() {
    let home = home(EMULATOR);
    home.done(&["emulate"]);
    home.done(&["emulate", "--dense", "--out", "dense"]);
    let config = DecoderConfig::read(&home.path("dense/model")).unwrap();
    assert!(config.emulator.is_none());
    let [a, b] = ["run/emulator", "dense"].map(|dir| home.json(&format!("{dir}/report.json")));
    for name in ["emulator_loss", "edge_gradient_cosine"] {
        let [a, b] = [&a, &b].map(|report| report[name].as_f64().unwrap());
        assert!((a - b).abs() < 1e-5 * b.abs(), "{name}: {a} and {b}");
    }
}

#[test]
fn threads_and_resuming_change_no_byte() {
    let home = home(EMULATOR);
    home.done(&["emulate", "--threads", "1"]);
    home.done(&["emulate", "--threads", "3", "--out", "other"]);
    let sums = |dir: &str| checksums(&home.path(dir)).into_values().collect::<Vec<_>>();
    let [one, other] = ["run/emulator/model", "other/model"].map(sums);
    assert_eq!(one, other);
    // A layer's statistics are there, and those of its parts are not.
    let reports = ["run/emulator/report.json", "again/report.json"];
    std::fs::create_dir_all(home.path("again/statistics")).unwrap();
    let of_layer = "statistics/001.safetensors";
    std::fs::copy(home.path("other").join(of_layer), home.path("again").join(of_layer)).unwrap();
    home.done(&["emulate", "--out", "again"]);
    assert_eq!(sums("again/model"), one);
    assert_eq!(home.read(reports[0]), home.read(reports[1]));
}

#[test]
fn scores_other_than_gcs_choose_otherwise() {
    let home = home(EMULATOR);
    let mut seen = std::collections::HashSet::new();
    for score in ["gcs", "magnitude", "random"] {
        home.ok(&in_run("emulate", score, &format!("emulator.score={score}"), &[]));
        let weights = home.path(&format!("{score}/emulator/model/model.safetensors"));
        seen.insert(std::fs::read(weights).unwrap());
    }
    assert!(seen.len() >= 2, "scores choose alike");
}

#[test]
fn what_does_not_fit_is_refused() {
    let home = home(EMULATOR);
    for (set, words) in [
        ("emulator.ratio=0", ["emulator.ratio = 0", "above 0"]),
        ("emulator.ratio=1.2", ["emulator.ratio = 1.2", "at most 1"]),
        ("emulator.edge=[2,1]", ["emulator.edge = [2, 1]", "3 layers"]),
        ("emulator.edge=[0,0]", ["emulator.edge = [0, 0]", "at least one layer"]),
        ("emulator.num_tokens=20", ["emulator.num_tokens", "at least 8"]),
    ] {
        let output = home.gradtx(&in_run("emulate", "bad", set, &[]));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && words.iter().all(|word| said.contains(word)), "{set}: {said}");
    }
    home.done(&["emulate"]);
    // An emulator is no LLM.
    let llm = "models.llm=run/emulator/model";
    for (stage, more) in
        [("curate", &[][..]), ("emulate", &[]), ("plugin", &["--adapter", "x", "--out", "y"])]
    {
        home.refused(&in_run(stage, "of-emulator", llm, more), 1, &["models.llm", "GradOT emulator"]);
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let home = home(EMULATOR);
    home.done(&["emulate"]);
    train(&home, "run/emulator/model", "one");
    let plugin = |adapter: &str, words: &[&str]| {
        home.stage_refused(&["plugin", "--adapter", adapter, "--out", "bad"], 1, words);
    };
    // One that does not say whose it is.
    let model = DecoderConfig::read(&home.path("llm")).unwrap();
    let adapter = read_peft(&home.path("one/adapter"), &model).unwrap();
    std::fs::create_dir(home.path("silent")).unwrap();
    write_peft(&home.path("silent"), &adapter.layout, &adapter.values, "llm").unwrap();
    plugin("silent", &["silent", "does not say", "gradtx merge"]);
    // One of the middle cannot be trained, nor plugged in if it was.
    let middle = ["--set", "lora.layers_to_transform=[1]", "--out", "middle"];
    let args = [&client("middle-client", "run/emulator/model")[..], &middle].concat();
    home.refused(&args, 2, &["lora.layers_to_transform", "layer 1", "[0, 2]"]);
    let base = peft_note(&home.path("one/adapter"), "gradtx_base_fingerprint").unwrap().unwrap();
    let with_notes = |edge: &str, examples: &str| {
        let notes = [
            ("gradtx_base_fingerprint", base.as_str()),
            ("gradtx_edge", edge),
            ("gradtx_examples", examples),
        ];
        let notes = notes.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        std::fs::create_dir_all(home.path("noted")).unwrap();
        write_peft_with_notes(&home.path("noted"), &adapter.layout, &adapter.values, "llm", &notes).unwrap();
    };
    with_notes("1 0", "7");
    plugin("noted", &["noted", "layer 2", "first 1"]);
    with_notes("1", "7");
    plugin("noted", &["noted", "the edge is `1`"]);
    with_notes("1 1", "0");
    plugin("noted", &["noted", "examples is `0`"]);
    // One of another LLM's emulator.
    home.ok(&in_run("emulate", "other", "models.llm=tiny", &["--set", "emulator.edge=[1,0]"]));
    train_in(&home, "other-client", "other/emulator/model", "other-one");
    plugin("other-one/adapter", &["another LLM", "fingerprint"]);
}

#[test]
fn the_report_compares_llm_and_emulator() {
    let home = home(EMULATOR);
    home.done(&["emulate"]);
    train(&home, "run/emulator/model", "one");
    home.done(&["plugin", "--adapter", "one/adapter", "--out", "upgraded"]);
    let edge = "lora.layers_to_transform=[0,2]";
    let llm = ["finetune", "--model", "llm", "--data", "private.jsonl", "--save-adapter"];
    home.done(&[&llm[..], &["--out", "whole"]].concat());
    home.ok(&in_run("finetune", "in-place", edge, &[&llm[1..], &["--out", "edge"]].concat()));
    // What an attacker makes of the emulator: all of it fine-tuned, and then its edge.
    home.done(&["emulate", "--dense", "--out", "dense"]);
    train_in(&home, "attack", "dense/model", "all-layers");
    let attacked = ["--out", "attacked", "--adapter", "all-layers/adapter", "--model", "tiny"];
    home.ok(&in_run("merge", "attack", "models.tiny=dense/model", &attacked));
    let again =
        [&client("attack-client", "attacked")[..], &["--set", edge, "--out", "again", "--save-adapter"]];
    home.ok(&again.concat());
    let models: [(&str, &[&str]); 8] = [
        ("LLM, as it is", &["--model", "llm"]),
        ("emulator, as it is", &["--base", "run/emulator/model"]),
        ("emulator, edge fine-tuned", &["--base", "run/emulator/model", "--adapter", "one/adapter"]),
        ("emulator, all layers fine-tuned", &["--base", "attacked"]),
        ("emulator, all layers, then edge fine-tuned", &["--base", "attacked", "--adapter", "again/adapter"]),
        ("LLM + edge of the emulator", &["--base", "upgraded"]),
        ("LLM, some layers fine-tuned", &["--model", "llm", "--adapter", "edge/adapter"]),
        ("LLM fine-tuned (P_T)", &["--model", "llm", "--adapter", "whole/adapter"]),
    ];
    for (i, (_, model)) in models.iter().enumerate() {
        let out = format!("run/evaluated/{i}");
        home.done(&[&["evaluate", "--data", "private.jsonl", "--out", &out], *model].concat());
    }
    let said = home.ok(&["report", "--run", "run"]);
    assert!(said.contains("With the edge that was trained through the emulator"), "{said}");
    let report = home.json("run/report.json");
    let scores = &report["scores"][0];
    let rows = scores["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, models.map(|(name, _)| name));
    let mean = |name: &str| {
        let row = rows.iter().find(|row| row["name"] == name).unwrap();
        row["mean"].as_f64().unwrap()
    };
    let gap = mean("LLM + edge of the emulator") - mean("emulator, edge fine-tuned");
    assert!((scores["offsite"]["privacy_gap"].as_f64().unwrap() - gap).abs() < 1e-9, "{scores}");
    // Nothing of translation is missing in a run of an emulator; what clients trained is not in it here.
    assert_eq!(report["missing"], json!(["No client: run `gradtx finetune`."]));
    assert!(home.read("run/report.html").contains("privacy gap"));
}
