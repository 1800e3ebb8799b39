//! The full weights of the edge: trained through an emulator, plugged in, merged; resumed; and what does not fit.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{peft_note, read_peft, write_peft};
use gradtx_runtime::artifact::{NewTensor, TensorFile, TensorSource, write_tensors};
use gradtx_tests::miniature::{SETTINGS, checksums};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// One layer of three between.
const EMULATOR: &str = "\n[emulator]\nedge = [1, 1]\nratio = 0.5\nnum_tokens = 300\n[lora]\nr = 3\n";
const MODEL: &str = "run/emulator/model";
const FULL: &str = "finetune.use_peft=false";
const CONFIG: &str = "settings.toml";

/// A run with an emulator.
fn home() -> Home {
    let home = Home::miniature();
    home.write(CONFIG, &(SETTINGS.to_owned() + EMULATOR));
    home.done(&["emulate"]);
    home
}

/// A client's fine-tuning of full weights in the run `client`.
fn full<'a>(base: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["finetune", "--run", "client", "--config", CONFIG, "--base", base, "--data", "private.jsonl"];
    [&args[..], &["--set", FULL, "--out", out], more].concat()
}

/// A client's LoRA adapter.
fn adapter<'a>(run: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["finetune", "--run", run, "--config", CONFIG, "--base", MODEL, "--data", "private.jsonl"];
    [&args[..], &["--save-adapter", "--out", out], more].concat()
}

fn tensors(home: &Home, dir: &str) -> TensorSource {
    TensorSource::open(&home.path(dir)).unwrap()
}

fn is_of_edge(name: &str) -> bool {
    ["model.layers.0.", "model.layers.2."].iter().any(|layer| name.starts_with(layer))
}

#[test]
fn full_weights_of_the_edge_are_trained_and_plugged_in() {
    let home = home();
    let said = home.ok(&full(MODEL, "one", &[]));
    assert!(said.contains("full weights of layers [0, 2]"), "{said}");
    let mut files: Vec<String> = std::fs::read_dir(home.path("one"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("events"))
        .collect();
    files.sort();
    let expected =
        ["layers.safetensors", "metrics.jsonl", "record.json", "throughput-steps.jsonl", "throughput.jsonl"];
    assert_eq!(files, expected);
    let file = TensorFile::open(&home.path("one/layers.safetensors")).unwrap();
    let names: Vec<String> = file.all_metadata().into_keys().map(String::from).collect();
    let notes = [
        "format",
        "gradtx_base_fingerprint",
        "gradtx_edge",
        "gradtx_emulator_fingerprint",
        "gradtx_examples",
    ];
    assert_eq!(names, notes);
    assert_eq!(file.metadata("gradtx_examples"), Some("7"));
    let said = home.ok(&["inspect", "one/layers.safetensors"]);
    assert!(said.contains("full weights of layers") && said.contains("gradtx_edge"), "{said}");

    home.done(&["plugin", "--adapter", "one", "--out", "upgraded"]);
    let [before, after] = ["llm", "upgraded"].map(|dir| tensors(&home, dir));
    for name in before.names() {
        let [old, new] = [&before, &after].map(|source| source.tensor(name).unwrap().bytes.to_vec());
        // Matrices, biases and norms.
        assert_eq!(old != new, is_of_edge(name), "{name}");
        if is_of_edge(name) {
            assert!(file.tensor(name).unwrap().bytes == new, "{name}");
        }
    }
    let card = home.read("upgraded/README.md");
    assert!(card.contains("layers [0, 2] fine-tuned"), "{card}");
    // The client sees what it trained in the emulator, which stays one.
    home.ok(&["merge", "--run", "client", "--model", "tiny", "--adapter", "one", "--out", "tuned"]);
    assert!(DecoderConfig::read(&home.path("tuned")).unwrap().emulator.is_some());
    assert!(home.path("tuned/modeling_gradot.py").is_file());
    for (run, base, out) in [("run", "upgraded", "of-upgraded"), ("client", "tuned", "of-tuned")] {
        home.ok(&["evaluate", "--run", run, "--data", "private.jsonl", "--base", base, "--out", out]);
        assert!(home.json(&format!("{out}/score.json")).is_object());
    }
}

#[test]
fn an_edge_without_a_step_is_the_llm() {
    for half in [false, true] {
        let home = Home::miniature();
        home.write(CONFIG, &(SETTINGS.to_owned() + EMULATOR));
        if half {
            halve(&home, "llm");
        }
        home.done(&["emulate"]);
        let still = ["--set", "finetune.tiny.learning_rate=1e-300", "--set", "finetune.tiny.weight_decay=0"];
        home.ok(&full(MODEL, "one", &still));
        home.done(&["plugin", "--adapter", "one", "--out", "same"]);
        assert!(home.bytes("llm/model.safetensors") == home.bytes("same/model.safetensors"), "half: {half}");
    }
}

/// Makes the weights of a model BF16.
fn halve(home: &Home, dir: &str) {
    let source = tensors(home, dir);
    let tensors: Vec<_> = source
        .names()
        .into_iter()
        .map(|name| {
            let tensor = source.tensor(name).unwrap();
            let bytes: Vec<u8> =
                tensor.to_f32().unwrap().iter().flat_map(|x| x.to_le_bytes()[2..].to_vec()).collect();
            (name.to_owned(), tensor.shape.to_vec(), bytes)
        })
        .collect();
    let list: Vec<NewTensor<'_>> = tensors
        .iter()
        .map(|(name, shape, bytes)| (name.clone(), Dtype::BF16, shape.clone(), &bytes[..]))
        .collect();
    write_tensors(&home.path(dir).join("model.safetensors"), &list, &BTreeMap::new()).unwrap();
}

#[test]
fn full_weights_are_averaged_by_examples() {
    let home = home();
    home.ok(&full(MODEL, "one", &[]));
    home.ok(&full(MODEL, "two", &["--set", "finetune.tiny.learning_rate=0.1"]));
    let plugin = |out: &str, more: &[&str]| {
        home.done(&[&["plugin", "--adapter", "one", "two/layers.safetensors", "--out", out], more].concat());
    };
    plugin("even", &[]);
    plugin("uneven", &["--examples", "1", "3"]);
    let [one, two, even, uneven] = ["one/layers.safetensors", "two/layers.safetensors", "even", "uneven"]
        .map(|dir| {
            let source = tensors(&home, dir);
            source.tensor("model.layers.2.input_layernorm.weight").unwrap().to_f32().unwrap()
        });
    assert!(one != two);
    for i in 0..one.len() {
        assert!((even[i] - 0.5 * (one[i] + two[i])).abs() < 1e-6, "{i}");
        assert!((uneven[i] - 0.25 * one[i] - 0.75 * two[i]).abs() < 1e-6, "{i}");
    }
    let few = ["plugin", "--adapter", "one", "two", "--out", "bad", "--examples", "3"];
    home.stage_refused(&few, 2, &["--examples", "each of 2 --adapter", "found 1"]);
}

#[test]
fn layers_of_a_whole_model_are_trained_too() {
    let home = home();
    let args = ["finetune", "--model", "llm", "--data", "private.jsonl", "--set", FULL, "--set"];
    home.done(&[&args[..], &["lora.layers_to_transform=[2,0]", "--out", "edge"]].concat());
    let args =
        ["finetune", "--run", "other", "--config", CONFIG, "--model", "llm", "--data", "private.jsonl"];
    home.ok(&[&args[..], &["--set", FULL, "--out", "all"]].concat());
    let layers = |dir: &str| home.json(&format!("{dir}/record.json"))["settings"]["layers"].clone();
    assert_eq!((layers("edge"), layers("all")), (serde_json::json!([0, 2]), serde_json::json!([0, 1, 2])));
    home.done(&["merge", "--adapter", "edge/layers.safetensors", "--out", "merged"]);
    let [before, after] = ["llm", "merged"].map(|dir| tensors(&home, dir));
    for name in before.names() {
        let [old, new] = [&before, &after].map(|source| source.tensor(name).unwrap().bytes.to_vec());
        assert_eq!(old != new, is_of_edge(name), "{name}");
    }
    // Not of an emulator: who trained it does not say of which.
    home.stage_refused(&["plugin", "--adapter", "edge", "--out", "bad"], 1, &["edge", "does not say"]);
}

#[test]
fn threads_and_settings_of_adapters_change_no_byte() {
    let home = home();
    home.ok(&full(MODEL, "one", &["--threads", "1"]));
    home.ok(&full(MODEL, "three", &["--threads", "3", "--set", "lora.r=1"]));
    assert!(home.bytes("one/layers.safetensors") == home.bytes("three/layers.safetensors"));
    assert_eq!(home.json("one/record.json")["settings"], home.json("three/record.json")["settings"]);
}

/// Killed at several moments, each time after another checkpoint.
#[test]
fn killed_training_of_full_weights_resumes_with_the_same_bytes() {
    let home = home();
    let long = ["--threads", "1", "--set", "finetune.tiny.max_steps=6000"];
    home.ok(&full(MODEL, "whole", &long));
    let args = full(MODEL, "parts", &long);
    let checkpoint = home.path("parts/checkpoint.safetensors");
    let (mut kills, mut last) = (0, None);
    while kills < 2 {
        let mut child = home.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        let changed = || std::fs::metadata(&checkpoint).and_then(|found| found.modified()).ok();
        while changed() == last
            && child.try_wait().unwrap().is_none()
            && begun.elapsed() < Duration::from_secs(60)
        {
            std::thread::sleep(Duration::from_millis(20));
        }
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        last = changed();
        kills += 1;
    }
    home.ok(&args);
    assert!(kills > 0, "it ended before it had written a checkpoint");
    for file in ["layers.safetensors", "metrics.jsonl"] {
        assert!(home.bytes(&format!("whole/{file}")) == home.bytes(&format!("parts/{file}")), "{file}");
    }
    assert!(!checkpoint.exists());
}

#[test]
fn what_needs_an_adapter_is_refused_with_full_weights() {
    let home = home();
    for (more, words) in [
        (&["--save-adapter"][..], ["--save-adapter", "use_peft"]),
        (&["--allow-refinement"], ["--allow-refinement", "GradOT emulator"]),
        (&["--dp-epsilon", "3"], ["[privacy]", "LoRA adapter"]),
    ] {
        home.refused(&full(MODEL, "bad", more), 2, &words);
    }
    home.refused(&full("tiny", "bad", &["--allow-refinement"]), 2, &["--allow-refinement", "use_peft"]);
    let middle = ["--set", "lora.layers_to_transform=[1]"];
    home.refused(&full(MODEL, "bad", &middle), 2, &["lora.layers_to_transform", "layer 1", "[0, 2]"]);
}

/// A copy of a file of layers with other tensors and notes.
fn changed(
    home: &Home,
    from: &str,
    change: impl Fn(&mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>, &mut BTreeMap<String, String>),
) {
    let file = TensorFile::open(&home.path(from)).unwrap();
    let mut notes: BTreeMap<String, String> =
        file.all_metadata().into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let mut tensors: Vec<_> = file
        .names()
        .into_iter()
        .map(|name| {
            let tensor = file.tensor(&name).unwrap();
            (name.clone(), tensor.dtype, tensor.shape.to_vec(), tensor.bytes.to_vec())
        })
        .collect();
    change(&mut tensors, &mut notes);
    let list: Vec<NewTensor<'_>> =
        tensors.iter().map(|(n, d, s, b)| (n.clone(), *d, s.clone(), &b[..])).collect();
    write_tensors(&home.path("bad.safetensors"), &list, &notes).unwrap();
}

#[test]
fn edges_that_do_not_fit_are_refused() {
    let home = home();
    home.ok(&full(MODEL, "one", &[]));
    let own = "one/layers.safetensors";
    let refused = |words: &[&str]| {
        let all = [&["bad.safetensors"], words].concat();
        home.stage_refused(&["plugin", "--adapter", "bad.safetensors", "--out", "bad"], 1, &all);
    };
    let norm = "model.layers.0.input_layernorm.weight";
    let at =
        |tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]| tensors.iter().position(|t| t.0 == norm).unwrap();
    changed(&home, own, |_, notes| {
        drop(notes.insert("gradtx_base_fingerprint".into(), "\u{1b}[2Jother".into()))
    });
    refused(&["another LLM", "\\u001b[2Jother"]);
    changed(&home, own, |_, notes| drop(notes.remove("gradtx_base_fingerprint")));
    refused(&["does not say", "--emulator DIR"]);
    changed(&home, own, |all, _| drop(all.remove(at(all))));
    refused(&[norm, "is not there"]);
    changed(&home, own, |all, _| all.retain(|tensor| tensor.0.starts_with("model.layers.0.")));
    refused(&["layer 2 is not there", "first 1 and the last 1 of 3"]);
    let middle = "model.layers.1.self_attn.q_proj.weight";
    changed(&home, own, |all, _| all.push((middle.into(), Dtype::F32, vec![1], vec![0; 4])));
    refused(&["model.layers.1.", "is not there"]);
    changed(&home, own, |all, _| all.push(("lm_head.weight".into(), Dtype::F32, vec![1], vec![0; 4])));
    refused(&["`lm_head.weight`", "and no other"]);
    changed(&home, own, |all, _| {
        let i = at(all);
        all[i].2 = vec![4, 4];
    });
    refused(&[norm, "[16]", "[4, 4]"]);
    changed(&home, own, |all, _| {
        let i = at(all);
        (all[i].1, all[i].3) = (Dtype::BF16, vec![0; 32]);
    });
    refused(&[norm, "expected F32", "found BF16"]);
    for (value, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        changed(&home, own, |all, _| {
            let i = at(all);
            all[i].3[8..12].copy_from_slice(&value.to_le_bytes());
        });
        refused(&[norm, word, "element 2"]);
    }
    let bytes = home.bytes(own);
    std::fs::write(home.path("bad.safetensors"), &bytes[..bytes.len() - 3]).unwrap();
    refused(&["truncated"]);
    // Two kinds at once.
    home.ok(&adapter("client-2", "lora", &[]));
    let mixed = ["plugin", "--adapter", "one", "lora/adapter", "--out", "bad"];
    home.stage_refused(&mixed, 1, &["full weights of layers", "a LoRA adapter", "one kind"]);
    // Where an adapter or a model is expected.
    let evaluate = ["evaluate", "--data", "private.jsonl", "--out", "bad", "--adapter", "one"];
    home.stage_refused(&evaluate, 1, &["full weights of layers", "gradtx merge"]);
    let evaluate = ["evaluate", "--data", "private.jsonl", "--out", "bad", "--base", "one"];
    home.stage_refused(&evaluate, 1, &["full weights of some layers", "gradtx merge"]);
    // Another model than the one that it was trained in, with and without its record.
    let merge = |from: &str, words: &[&str]| {
        home.stage_refused(&["merge", "--model", "tiny", "--adapter", from, "--out", "bad"], 1, words);
    };
    merge(own, &["layers.safetensors"]);
    changed(&home, own, |_, notes| drop(notes.insert("gradtx_base_fingerprint".into(), "0".into())));
    let copy = ["merge", "--adapter", "bad.safetensors", "--out", "bad"];
    home.stage_refused(&copy, 1, &["layers of another model", "found"]);
}

#[test]
fn an_adapter_that_peft_wrote_is_plugged_in_through_its_emulator() {
    let home = home();
    home.ok(&adapter("client", "one", &[]));
    home.done(&["plugin", "--adapter", "one/adapter", "--out", "expected"]);
    // As PEFT writes it: without notes.
    let model = DecoderConfig::read(&home.path("llm")).unwrap();
    let own = read_peft(&home.path("one/adapter"), &model).unwrap();
    std::fs::create_dir(home.path("peft")).unwrap();
    write_peft(&home.path("peft"), &own.layout, &own.values, "model").unwrap();
    assert_eq!(peft_note(&home.path("peft"), "gradtx_base_fingerprint").unwrap(), None);
    for (out, emulator) in [("by-model", MODEL), ("by-stage", "run/emulator")] {
        home.done(&["plugin", "--adapter", "peft", "--emulator", emulator, "--out", out]);
        assert!(
            home.bytes("expected/model.safetensors") == home.bytes(&format!("{out}/model.safetensors")),
            "{out}"
        );
    }
    // One with a number of examples and one without.
    let both = ["plugin", "--adapter", "peft", "one/adapter", "--emulator", MODEL, "--out", "both"];
    home.stage_refused(&both, 1, &["peft", "how many examples", "--examples"]);
    home.done(&[&both[..], &["--examples", "2", "5"]].concat());
    // Dense emulators are known by their stage's record.
    home.done(&["emulate", "--dense", "--out", "dense"]);
    for (out, emulator) in [("by-dense", "dense"), ("by-dense-model", "dense/model")] {
        home.done(&["plugin", "--adapter", "peft", "--emulator", emulator, "--out", out]);
        assert!(
            home.bytes("expected/model.safetensors") == home.bytes(&format!("{out}/model.safetensors")),
            "{out}"
        );
    }
    // The emulator of another LLM, no emulator, and another emulator of the same LLM.
    let plugin = |adapter: &str, emulator: &str, words: &[&str]| {
        let args = ["plugin", "--adapter", adapter, "--emulator", emulator, "--out", "bad"];
        home.stage_refused(&args, 1, words);
    };
    let other = ["emulate", "--run", "other", "--config", CONFIG, "--set", "models.llm=tiny"];
    home.ok(&[&other[..], &["--set", "emulator.edge=[1,0]"]].concat());
    plugin("peft", "other/emulator", &["--emulator other/emulator", "of another LLM"]);
    plugin("peft", "llm", &["--emulator llm", "found none", "gradtx emulate"]);
    let again = ["emulate", "--run", "again", "--config", CONFIG, "--set", "emulator.ratio=0.7"];
    home.ok(&again);
    plugin("one/adapter", "again/emulator", &["another emulator", "expected the fingerprint"]);
    // An emulator whose edge is smaller than what was trained.
    let small = ["emulate", "--run", "small", "--config", CONFIG, "--set", "emulator.edge=[1,0]"];
    home.ok(&small);
    plugin("peft", "small/emulator", &["it changes layer 2", "first 1 and the last 0"]);
}

#[test]
fn a_private_client_trains_the_edge_of_an_emulator() {
    let home = home();
    let private = ["--dp-epsilon", "8", "--set", "privacy.insecure_seed=5"];
    let said = home.ok(&adapter("client", "one", &private));
    assert!(said.contains("differentially private"), "{said}");
    assert_eq!(
        home.json("one/adapter/adapter_config.json")["layers_to_transform"],
        serde_json::json!([0, 2])
    );
    // The same bytes with another number of threads: gradients are clipped by example.
    home.ok(&adapter("client", "two", &[&private[..], &["--threads", "3"]].concat()));
    let weights = |dir: &str| home.bytes(&format!("{dir}/adapter/adapter_model.safetensors"));
    assert!(weights("one") == weights("two"));
    home.done(&["plugin", "--adapter", "one/adapter", "--out", "upgraded"]);
    let [before, after] = ["llm", "upgraded"].map(|dir| tensors(&home, dir));
    let middle = "model.layers.1.self_attn.q_proj.weight";
    assert!(before.tensor(middle).unwrap().bytes == after.tensor(middle).unwrap().bytes);
}

/// Nothing that a client sees or gives back has a word of its data.
#[test]
fn what_a_client_gives_back_has_no_word_of_its_data() {
    let home = home();
    let secret = "zyxwv-secret-4711";
    let lines = home.read("private.jsonl");
    let marked = lines.replacen("\"task\"", &format!("\"note\": \"{secret}\", \"task\""), 1);
    home.write("private.jsonl", &marked);
    let mut said = home.ok(&full(MODEL, "one", &["-v"]));
    said += &home.ok(&adapter("client-2", "two", &["-v"]));
    assert!(!said.contains(secret));
    for path in checksums(&home.path("one")).into_keys().chain(checksums(&home.path("two")).into_keys()) {
        let bytes = std::fs::read(&path).unwrap();
        let path = path.display();
        assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()), "{path}");
        // The client's own notes name its file; what it gives back does not.
        let is_given =
            path.to_string().contains("layers.safetensors") || path.to_string().contains("adapter/");
        let names = bytes.windows(13).any(|window| window == b"private.jsonl");
        assert!(!(is_given && names), "{path}");
    }
}
