//! Models and adapters as people have them, through the program: what cannot change a result
//! is read, what contradicts itself is refused by name, what is no model is described, and a
//! file that shrinks while it is mapped ends the program with an error.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, PROGRAM, said};
use gradtx_tests::{copy_files, fixture};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

impl Home {
    /// With a model, an adapter for it, a line of data and a run file.
    fn with_adapter() -> Self {
        let home = Self::empty();
        copy_files(&fixture("qwen2_text/model"), &home.path("base"));
        copy_files(&fixture("qwen2_text/adapter"), &home.path("adapter"));
        std::fs::write(home.path("one.jsonl"), "{\"prompt\": \"price?\", \"response\": \"7\"}\n").unwrap();
        let settings = "[models]\ntiny = \"base\"\nllm = \"base\"\n[data]\npublic = \"one.jsonl\"\nmax_length = 128\n\
            prompt = \"chatml\"\n[finetune]\ntiny.max_steps = 2\n[evaluate]\nmax_new_tokens = 12\n";
        std::fs::write(home.path("settings.toml"), settings).unwrap();
        home
    }

    /// A copy of a directory whose JSON file has these changes.
    fn changed(&self, from: &str, to: &str, file: &str, changes: &Value) {
        copy_files(&self.path(from), &self.path(to));
        let path = self.path(to).join(file);
        let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        changes.as_object().unwrap().iter().for_each(|(field, new)| value[field] = new.clone());
        std::fs::write(path, value.to_string()).unwrap();
    }

    fn evaluate(&self, out: &str, args: &[&str]) -> Output {
        let run = format!("run-{out}");
        let fixed = [
            "evaluate",
            "--run",
            &run,
            "--config",
            "settings.toml",
            "--data",
            "one.jsonl",
            "--model",
            "tiny",
        ];
        self.gradtx(&[&fixed[..], &["--out", out, "--threads", "1"], args].concat())
    }

    /// Predictions of an evaluation that must work.
    fn predictions(&self, out: &str, args: &[&str]) -> String {
        let output = self.evaluate(out, args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", said(&output));
        std::fs::read_to_string(self.path(out).join("predictions.jsonl")).unwrap()
    }
}

fn must_say(output: &Output, words: &[&str]) {
    let text = said(output);
    assert!(matches!(output.status.code(), Some(1 | 2)), "exit {:?}: {text}", output.status);
    words.iter().for_each(|word| assert!(text.contains(word), "no `{word}` in: {text}"));
}

#[test]
fn unknown_entries_are_refused_with_an_override() {
    let home = Home::with_adapter();
    let want = home.predictions("plain", &[]);
    let entries = json!({"unsloth_fixed": true, "transformers.js_config": {"dtype": "q4"}, "an_entry_of_next_year": null,
        "auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}, "neftune_noise_alpha": 5.0});
    home.changed("base", "other", "config.json", &entries);
    assert_eq!(home.predictions("other-out", &["--set", "models.tiny=other"]), want);

    home.changed("base", "new", "config.json", &json!({"scale_by": 2}));
    let refused = home.evaluate("new-out", &["--set", "models.tiny=new"]);
    must_say(&refused, &["config.json", "`scale_by` = 2", "models.ignore_fields = [\"scale_by\"]"]);
    // In the same run: the setting says what may be read, so it may be added later.
    let ignored = ["--set", "models.tiny=new", "--set", "models.ignore_fields=[\"scale_by\"]"];
    assert_eq!(home.predictions("new-out", &ignored), want);
    let stored = std::fs::read_to_string(home.path("run-new-out/run.toml")).unwrap();
    assert!(stored.contains("ignore_fields = [\"scale_by\"]"), "{stored}");
}

#[test]
fn adapters_written_otherwise_are_the_same() {
    let home = Home::with_adapter();
    let want = home.predictions("plain", &["--adapter", "adapter"]);
    assert_ne!(want, home.predictions("none", &[]), "the adapter changes the answer");
    let config: Value =
        serde_json::from_slice(&std::fs::read(home.path("adapter/adapter_config.json")).unwrap()).unwrap();
    let (rank, alpha) = (config["r"].as_f64().unwrap(), config["lora_alpha"].as_f64().unwrap());
    let names: Vec<&str> =
        config["target_modules"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for (name, changes) in [
        ("new", json!({"alora_invocation_tokens": null, "kasa_config": null, "ensure_weight_tying": false})),
        ("regex", json!({"target_modules": format!(r"(?:.*\.)?({})", names.join("|"))})),
        ("pattern", json!({"alpha_pattern": {r".*_proj": alpha}, "lora_alpha": 1})),
        ("rslora", json!({"use_rslora": true, "lora_alpha": alpha / rank.sqrt()})),
    ] {
        home.changed("adapter", name, "adapter_config.json", &changes);
        assert_eq!(home.predictions(&format!("{name}-out"), &["--adapter", name]), want, "{name}");
    }
    home.changed("adapter", "dora", "adapter_config.json", &json!({"use_dora": true}));
    must_say(&home.evaluate("dora-out", &["--adapter", "dora"]), &["adapter_config.json", "use_dora"]);
}

#[test]
fn the_factor_of_yarn_counts() {
    let home = Home::with_adapter();
    let yarn = |original: usize| json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": original});
    home.changed(
        "base",
        "card",
        "config.json",
        &json!({"rope_scaling": yarn(256), "max_position_embeddings": 256}),
    );
    home.changed(
        "base",
        "long",
        "config.json",
        &json!({"rope_scaling": yarn(256), "max_position_embeddings": 1024}),
    );
    let texts = ["card", "long"].map(|model| {
        let model_is = format!("models.tiny={model}");
        home.predictions(&format!("{model}-out"), &["--adapter", "adapter", "--set", &model_is])
    });
    assert_eq!(texts[0], texts[1]);
}

#[test]
fn what_is_no_model_is_described_with_what_helps() {
    let home = Home::with_adapter();
    let pointer =
        format!("version https://git-lfs.github.com/spec/v1\noid sha256:{:064}\nsize 988097824\n", 7);
    for (name, file) in
        [("weights", "model.safetensors"), ("tokenizer", "tokenizer.json"), ("config", "config.json")]
    {
        copy_files(&home.path("base"), &home.path(name));
        std::fs::write(home.path(name).join(file), &pointer).unwrap();
        let output = home.evaluate(&format!("{name}-out"), &["--set", &format!("models.tiny={name}")]);
        must_say(&output, &[file, "Git LFS", "git lfs pull"]);
    }
    std::fs::create_dir(home.path("parent")).unwrap();
    std::fs::rename(home.path("config"), home.path("parent/inner")).unwrap();
    std::fs::create_dir_all(home.path("models--o--n/snapshots/abc")).unwrap();
    for (model, words) in [
        ("adapter", &["PEFT adapter", "gradtx merge"][..]),
        ("parent", &["above models", "inner"]),
        ("models--o--n", &["hub's cache", "snapshots/abc"]),
        ("one.jsonl", &["this is a file"]),
    ] {
        let output = home.evaluate(&format!("{model}-out"), &["--set", &format!("models.tiny={model}")]);
        must_say(&output, words);
    }
    must_say(&home.evaluate("swapped", &["--adapter", "base"]), &["whole model, not a PEFT adapter"]);
}

#[test]
fn claimed_sizes_are_checked_against_the_file() {
    let home = Home::with_adapter();
    for (field, value) in [
        ("num_hidden_layers", json!(134_217_728)),
        ("num_hidden_layers", json!(4000)),
        ("intermediate_size", json!(200_000_000)),
    ] {
        let name = format!("{field}-{value}");
        home.changed("base", &name, "config.json", &json!({ field: value }));
        let (model_is, run) = (format!("models.tiny={name}"), format!("run-{name}"));
        let evaluate: &[&str] = &[
            "evaluate",
            "--run",
            &run,
            "--config",
            "settings.toml",
            "--data",
            "one.jsonl",
            "--model",
            "tiny",
            "--out",
            "o",
            "--set",
            &model_is,
        ];
        for command in [evaluate, &["inspect", &name], &["doctor", "--model", &name]] {
            let began = Instant::now();
            let output = home.gradtx(command);
            let text = said(&output);
            assert!(began.elapsed() < Duration::from_secs(10), "{command:?} took {:?}", began.elapsed());
            assert_eq!(output.status.code(), Some(1), "{command:?}: {text}");
            let names_it = [field, "layers.", "expected shape"].iter().any(|word| text.contains(word));
            assert!(names_it, "{command:?}: {text}");
        }
    }
}

#[test]
fn merged_models_carry_licence_and_card_and_no_path() {
    let home = Home::with_adapter();
    std::fs::write(home.path("base/LICENSE"), "Terms of the makers.\n").unwrap();
    std::fs::write(home.path("base/README.md"), "---\nlicense: mit\n---\n# The makers' card\n").unwrap();
    let finetune = [
        "finetune",
        "--run",
        "run",
        "--config",
        "settings.toml",
        "--data",
        "one.jsonl",
        "--model",
        "tiny",
        "--out",
        "client",
        "--threads",
        "1",
        "--save-adapter",
    ];
    let output = home.gradtx(&finetune);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let merge =
        ["merge", "--run", "run", "--adapter", "client/adapter", "--model", "tiny", "--out", "merged"];
    let output = home.gradtx(&merge);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(!said(&output).contains("as its base model"), "the same base model: {}", said(&output));
    let card = std::fs::read_to_string(home.path("merged/README.md")).unwrap();
    assert!(card.starts_with("---\nlicense: mit\n") && card.contains("# The makers' card"), "{card}");
    assert_eq!(std::fs::read_to_string(home.path("merged/LICENSE")).unwrap(), "Terms of the makers.\n");
    let place = home.dir().to_str().unwrap();
    for dir in ["merged", "client/adapter"] {
        for entry in std::fs::read_dir(home.path(dir)).unwrap() {
            let path = entry.unwrap().path();
            let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
            assert!(!text.contains(place), "{}: holds a path of this machine", path.display());
        }
    }
    let config: Value =
        serde_json::from_slice(&std::fs::read(home.path("client/adapter/adapter_config.json")).unwrap())
            .unwrap();
    assert_eq!(config["base_model_name_or_path"], "base");
}

/// Waits until a file is there; fails after half a minute.
fn wait_for(path: &Path) {
    let began = Instant::now();
    while !path.exists() {
        assert!(began.elapsed() < Duration::from_secs(30), "{}: not there", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_shard_that_shrinks_while_it_is_mapped_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let gradtx = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(dir.path()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let made = gradtx(&["demo", "d", "--world", "smoke", "--threads", "1", "-q"]).output().unwrap();
    assert_eq!(made.status.code(), Some(0), "{}", said(&made));
    let run = dir.path().join("d/run");
    std::fs::remove_dir_all(run.join("translator")).unwrap();
    // Long enough that it does not end by itself.
    let text = std::fs::read_to_string(run.join("run.toml")).unwrap();
    let mut section = "";
    let mut longer = String::new();
    for line in text.lines() {
        section = if line.starts_with('[') { line } else { section };
        let key = line.split(" = ").next().unwrap();
        let is_length = section == "[train]" && ["max_steps", "eval_steps"].contains(&key);
        longer += &if is_length { format!("{key} = 1000000\n") } else { format!("{line}\n") };
    }
    std::fs::write(run.join("run.toml"), longer).unwrap();
    let training = gradtx(&["train", "--run", "d/run", "--threads", "1"]).spawn().unwrap();
    wait_for(&run.join("translator/progress.json"));
    std::thread::sleep(Duration::from_millis(1500));
    for shard in std::fs::read_dir(run.join("shadow/shards")).unwrap() {
        let file = std::fs::File::options().write(true).open(shard.unwrap().path()).unwrap();
        file.set_len(0).unwrap();
    }
    let ended = training.wait_with_output().unwrap();
    let text = said(&ended);
    assert_eq!(ended.status.code(), Some(1), "{:?}: {text}", ended.status);
    assert!(text.contains("shadow/shards/") && text.contains("truncated while in use"), "{text}");
}
