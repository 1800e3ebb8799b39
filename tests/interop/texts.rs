//! Merged models and generated texts, against what transformers and PEFT made of the same
//! files (`goldens/fixtures/qwen2_text`), by the program as a person runs it.

use gradtx_runtime::artifact::TensorSource;
use gradtx_tests::{copy_files, fixture};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory with a run file for the fixture's model.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_files(&fixture("qwen2_text/model"), &dir.path().join("model"));
        let settings = "[models]\nllm = \"model\"\n[data]\nprompt = \"template\"\n\
            [evaluate]\nmax_new_tokens = 24\nper_device_eval_batch_size = 5\n";
        std::fs::write(dir.path().join("settings.toml"), settings).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, stage: &str, args: &[&str]) -> Vec<String> {
        let words = [env!("CARGO_BIN_EXE_gradtx-under-test"), stage, "--run", "run"];
        let words = words.into_iter().chain(["--config", "settings.toml"]).chain(args.iter().copied());
        words.map(String::from).collect()
    }

    fn gradtx(&self, stage: &str, args: &[&str]) -> Output {
        let words = self.command(stage, args);
        Command::new(&words[0]).args(&words[1..]).current_dir(self.dir.path()).output().unwrap()
    }

    fn done(&self, stage: &str, args: &[&str]) -> Output {
        let output = self.gradtx(stage, args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{stage} {args:?}: {said}");
        output
    }

    fn merge(&self, out: &str) -> Output {
        let adapter = fixture("qwen2_text/adapter");
        self.done("merge", &["--adapter", adapter.to_str().unwrap(), "--out", out])
    }

    /// Generates for the fixture's prompts; texts, whether they ended, and the score.
    fn evaluate(&self, out: &str, args: &[&str]) -> (Vec<(String, bool)>, Value) {
        let data = fixture("qwen2_text/test.jsonl");
        let args = [&["--data", data.to_str().unwrap(), "--out", out], args].concat();
        let output = self.done("evaluate", &args);
        let lines = std::fs::read_to_string(self.path(out).join("predictions.jsonl")).unwrap();
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let text = |line: &Value| line["prediction"].as_str().unwrap().to_string();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        for line in lines.iter().filter(|line| text(line).len() > 5) {
            assert!(!said.contains(&text(line)), "predictions are printed nowhere");
        }
        let texts = lines.iter().map(|line| (text(line), line["ended"].as_bool().unwrap())).collect();
        let score = std::fs::read_to_string(self.path(out).join("score.json")).unwrap();
        (texts, serde_json::from_str(&score).unwrap())
    }
}

/// What the reference wrote, with or without the adapter.
fn stored(which: &str) -> Vec<(String, bool)> {
    let text = std::fs::read_to_string(fixture("qwen2_text/greedy.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let one = |x: &Value| (x["text"].as_str().unwrap().to_string(), x["ended"].as_bool().unwrap());
    all[which].as_array().unwrap().iter().map(one).collect()
}

/// Tensors of `found` that are further than 1e-6 from `wanted`, relative to its largest value.
fn differing(found: &Path, wanted: &Path) -> Vec<String> {
    let (found, wanted) = (TensorSource::open(found).unwrap(), TensorSource::open(wanted).unwrap());
    assert_eq!(found.names(), wanted.names());
    let differs = |name: &&&str| {
        let (a, b) = (found.tensor(name).unwrap(), wanted.tensor(name).unwrap());
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}");
        let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
        let largest = b.iter().fold(0f32, |m, x| m.max(x.abs()));
        !a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-6 * largest)
    };
    found.names().iter().filter(differs).map(|name| name.to_string()).collect()
}

#[test]
fn merged_tensors_are_those_of_peft() {
    let home = Home::new();
    home.merge("merged");
    assert_eq!(differing(&home.path("merged"), &fixture("qwen2_text/merged")), [""; 0]);
    // Control: all adapted matrices, and no others, differ from the base model's.
    let changed = differing(&home.path("merged"), &home.path("model"));
    assert_eq!(changed.len(), 2 * 4, "{changed:?}");
    assert!(
        changed
            .iter()
            .all(|name| ["q_proj", "v_proj", "o_proj", "down_proj"].iter().any(|t| name.contains(t)))
    );
    for entry in std::fs::read_dir(home.path("model")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        let copy = std::fs::read(home.path("merged").join(name)).unwrap();
        assert!(name == "model.safetensors" || copy == std::fs::read(&path).unwrap(), "{name:?}");
    }
    // Again: nothing to do. Damaged: made again with the same bytes.
    let file = home.path("merged/model.safetensors");
    let before = std::fs::read(&file).unwrap();
    assert!(String::from_utf8_lossy(&home.merge("merged").stdout).contains("finished"));
    std::fs::write(&file, &before[1..]).unwrap();
    home.merge("merged");
    assert!(std::fs::read(&file).unwrap() == before);
}

#[test]
fn greedy_texts_are_those_of_transformers_and_peft() {
    let home = Home::new();
    home.merge("merged");
    let adapter = fixture("qwen2_text/adapter");
    let (base, score) = home.evaluate("base", &[]);
    assert_eq!(base, stored("base"));
    assert_eq!(
        (&score["kind"], &score["model"], &score["metric"]),
        (&"base".into(), &"llm".into(), &"exact_match".into())
    );
    assert_eq!(score["data_name"], "qwen2_text/test");
    let (adapted, score) = home.evaluate("adapted", &["--adapter", adapter.to_str().unwrap()]);
    assert_eq!(adapted, stored("adapter"));
    assert_eq!((&score["kind"], &score["method"]), (&"adapter".into(), &Value::Null));
    let (merged, score) = home.evaluate("of-merged", &["--base", "merged"]);
    assert_eq!(merged, stored("adapter"));
    assert_eq!((&score["kind"], &score["model"]), (&"adapter".into(), &"llm".into()));
    // Control: the adapter is seen in the texts.
    let same = base.iter().zip(&adapted).filter(|(a, b)| a == b).count();
    assert!(same <= 2, "{same} texts are the same without the adapter");
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let home = Home::new();
    let refused = |adapter: PathBuf, out: &str, code: i32, words: &[&str]| {
        let output = home.gradtx("merge", &["--adapter", adapter.to_str().unwrap(), "--out", out]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        words.iter().for_each(|word| assert!(said.contains(word), "no `{word}` in: {said}"));
    };
    refused(fixture("qwen2_lora/adapter"), "x", 1, &["lora_A", "expected shape [2, 16]", "[2, 32]"]);
    refused(fixture("qwen2_text/model"), "x", 1, &["adapter_config.json"]);
    assert!(!home.path("x").exists(), "nothing is made before the adapter is known to fit");
    refused(fixture("qwen2_text/adapter"), "model", 2, &["own directory"]);
    home.merge("merged");
    std::fs::write(home.path("model/generation_config.json"), "{}").unwrap();
    let adapter = home.path("other");
    copy_files(&fixture("qwen2_text/adapter"), &adapter);
    let config = std::fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let config = config.replace("\"lora_alpha\": 12", "\"lora_alpha\": 13");
    std::fs::write(adapter.join("adapter_config.json"), config).unwrap();
    refused(adapter, "merged", 3, &["+ adapter"]);
}

/// A file size limit stands in for a full disk: the write fails in the middle.
#[test]
fn a_full_disk_leaves_no_half_model() {
    let home = Home::new();
    let adapter = fixture("qwen2_text/adapter");
    let words = home.command("merge", &["--adapter", adapter.to_str().unwrap(), "--out", "merged"]);
    // 16 KiB or less, whatever the unit; without the signal, writing fails with an error.
    let script = "trap '' XFSZ; ulimit -f 16; exec \"$@\"";
    let output =
        Command::new("sh").args(["-c", script, "sh"]).args(&words).current_dir(home.dir.path()).output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("model.safetensors"), "{said}");
    let left: Vec<_> =
        std::fs::read_dir(home.path("merged")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["failed.json", "record.json"]);
    home.merge("merged");
    assert_eq!(differing(&home.path("merged"), &fixture("qwen2_text/merged")), [""; 0]);
}
