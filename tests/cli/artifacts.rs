//! Artifacts in use: what is damaged, incomplete or of another run is refused by the stage that
//! would use it, by name, before anything is written; and what clients send is believed no more.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, copy_tree, gradtx, stderr};
use gradtx_runtime::artifact::UpdateVector;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Runs that are made once: with seed 3, and with seed 4 and another TinyLM.
fn made(other: bool) -> &'static Home {
    static MADE: [OnceLock<Home>; 2] = [OnceLock::new(), OnceLock::new()];
    MADE[other as usize].get_or_init(|| {
        let home = Home::miniature();
        if other {
            let path = home.path("settings.toml");
            let settings = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, settings.replace("seed = 3", "seed = 4")).unwrap();
            flip(&home.path("tiny/model.safetensors"), 200, 1 << 6);
        }
        home.done(&["curate"]);
        home.done(&["train"]);
        home.done(&["finetune", "--data", "private.jsonl", "--out", "client", "--save-adapter"]);
        home
    })
}

/// Changes bits of a byte, counted from the end.
fn flip(path: &Path, from_end: usize, bits: u8) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.len() - from_end;
    bytes[at] ^= bits;
    std::fs::write(path, bytes).unwrap();
}

impl Home {
    /// A copy of the run with seed 3, to be changed.
    fn before_translate() -> Self {
        let home = Self::empty();
        copy_tree(made(false).dir(), home.dir());
        home
    }

    /// Refused with all of these words, and `x` is not made.
    fn refused_without_output(&self, args: &[&str], words: &[&str]) {
        let output = self.stage(args);
        let said = stderr(&output);
        assert!(matches!(output.status.code(), Some(1..=3)), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
        }
        assert!(!self.path("x").exists(), "{args:?}: nothing is written");
    }

    fn replace_dir(&self, name: &str, with: &Path) {
        std::fs::remove_dir_all(self.path(name)).unwrap();
        copy_tree(with, &self.path(name));
    }
}

const TRANSLATE: [&str; 4] = ["translate", "client/update.safetensors", "--out", "x"];

#[test]
fn what_is_of_another_run_is_refused() {
    let (home, other) = (Home::before_translate(), made(true));
    home.replace_dir("run/translator", &other.path("run/translator"));
    home.refused_without_output(
        &TRANSLATE,
        &["run/translator", "TinyLM", "base model", "initial adapter", "hint: it was made"],
    );
    // The statistics alone.
    home.replace_dir("run/translator", &made(false).path("run/translator"));
    let statistics = "run/translator/normalization.safetensors";
    std::fs::copy(other.path(statistics), home.path(statistics)).unwrap();
    home.refused_without_output(&TRANSLATE, &["normalization.safetensors", "damaged", "gradtx train"]);
    home.replace_dir("run/translator", &made(false).path("run/translator"));
    // Tuples, for training and for the methods that need none.
    home.replace_dir("run/shadow", &other.path("run/shadow"));
    home.refused_without_output(&TRANSLATE, &["was trained on other tuples"]);
    std::fs::remove_dir_all(home.path("run/translator")).unwrap();
    home.refused_without_output(&["train"], &["run/shadow", "TinyLM", "base model"]);
    assert!(!home.path("run/translator").exists());
    for method in ["mean", "nearest", "ridge"] {
        let args = [&TRANSLATE[..], &["--method", method]].concat();
        home.refused_without_output(&args, &["run/shadow", "TinyLM", "base model"]);
    }
    // The control: all of it is of the same run.
    home.replace_dir("run/shadow", &made(false).path("run/shadow"));
    home.done(&["train"]);
    home.done(&TRANSLATE);
}

#[test]
fn a_base_model_that_was_replaced_is_refused() {
    let home = Home::before_translate();
    let evaluate = ["evaluate", "--data", "private.jsonl", "--model", "llm", "--out", "x"];
    flip(&home.path("llm/model.safetensors"), 200, 1 << 6);
    home.refused_without_output(&evaluate, &["models.llm", "fingerprint"]);
    home.refused_without_output(&["train"], &["LLM", "base model"]);
    flip(&home.path("llm/model.safetensors"), 200, 1 << 6);
    // What is not here cannot be compared, and is not needed for training.
    std::fs::rename(home.path("llm"), home.path("away")).unwrap();
    std::fs::remove_dir_all(home.path("run/translator")).unwrap();
    let output = home.stage(&["train"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("models.llm is not here"));
    std::fs::rename(home.path("away"), home.path("llm")).unwrap();
    home.done(&evaluate);
}

#[test]
fn damaged_tuples_are_refused_by_every_method() {
    for (file, from_end) in [
        ("shards/00001.teacher.safetensors", 9),
        ("shards/00003.student.safetensors", 30),
        ("init/teacher.safetensors", 6),
    ] {
        let home = Home::before_translate();
        flip(&home.path("run/shadow").join(file), from_end, 1);
        std::fs::remove_dir_all(home.path("run/translator")).unwrap();
        for method in ["mean", "nearest", "ridge"] {
            home.refused_without_output(
                &[&TRANSLATE[..], &["--method", method]].concat(),
                &[file, "gradtx curate"],
            );
        }
        home.refused_without_output(&["train"], &[file, "gradtx curate"]);
        home.done(&["curate"]);
        home.done(&[&TRANSLATE[..], &["--method", "ridge"]].concat());
    }
}

#[test]
fn unfinished_work_is_not_used() {
    let home = Home::before_translate();
    let unfinish = |dir: &str| {
        let path = home.path(dir).join("record.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let (before, _) = text.split_once("\"outputs\"").unwrap();
        std::fs::write(&path, format!("{before}\"outputs\": {{}}}}")).unwrap();
    };
    unfinish("run/translator");
    home.refused_without_output(&TRANSLATE, &["`train` has not finished"]);
    unfinish("run/shadow");
    home.refused_without_output(&["train"], &["`curate` has not finished"]);
    unfinish("client");
    let evaluate = ["evaluate", "--data", "private.jsonl", "--model", "tiny", "--out", "x", "--adapter"];
    home.refused_without_output(
        &[&evaluate[..], &["client/adapter"]].concat(),
        &["not what `finetune` wrote"],
    );
    std::fs::remove_file(home.path("run/translator/record.json")).unwrap();
    home.refused_without_output(&TRANSLATE, &["no record.json", "gradtx train"]);
}

#[test]
fn an_adapter_is_its_stages_or_ones_own() {
    let home = Home::before_translate();
    let adapter = |name: &'static str| {
        ["evaluate", "--data", "private.jsonl", "--model", "tiny", "--out", "x", "--adapter", name]
    };
    flip(&home.path("client/adapter/adapter_model.safetensors"), 5, 1);
    home.refused_without_output(
        &adapter("client/adapter"),
        &["adapter_model.safetensors", "copy the adapter elsewhere"],
    );
    home.refused_without_output(
        &["merge", "--adapter", "client/adapter", "--model", "tiny", "--out", "x"],
        &["not what"],
    );
    // To start from it is a use too.
    let start = ["--set", "lora.init_adapter_tiny=client/adapter", "--set", "lora.r=2"];
    let curate = ["curate", "--run", "other", "--config", "settings.toml"];
    let output = gradtx(home.dir(), &[&curate[..], &start].concat());
    assert!(
        !output.status.success() && stderr(&output).contains("not what `finetune` wrote"),
        "{}",
        stderr(&output)
    );
    copy_tree(&home.path("client/adapter"), &home.path("own"));
    home.done(&adapter("own"));
    let score = std::fs::read_to_string(home.path("x/score.json")).unwrap();
    assert!(score.contains("\"kind\": \"adapter\""), "{score}");
}

#[test]
fn no_client_is_believed() {
    let home = Home::before_translate();
    let update = UpdateVector::read(&home.path("client/update.safetensors")).unwrap();
    let put = |name: &str, change: &dyn Fn(usize, f32) -> f32| {
        let values = update.values.iter().enumerate().map(|(i, x)| change(i, *x)).collect();
        UpdateVector { values, ..update.clone() }.write(&home.path(name)).unwrap();
    };
    put("near", &|i, x| x * if i % 3 == 0 { 0.9 } else { 1.1 });
    put("loud", &|_, x| x * 1e4);
    put("low", &|_, x| x * 1e-4);
    put("zero", &|_, _| 0.0);
    put("huge", &|i, x| if i == 7 { 3e38 } else { x });
    std::fs::copy(home.path("near"), home.path("copy")).unwrap();
    std::fs::copy(made(true).path("client/update.safetensors"), home.path("seed")).unwrap();
    let mut bytes = std::fs::read(home.path("near")).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(home.path("infinite"), bytes).unwrap();
    flip(&home.path("copy"), 3, 1);
    let refused = |files: &[&str], words: &[&str]| {
        let first = [&TRANSLATE[..2], files, &TRANSLATE[2..], &["--method", "mean"]].concat();
        home.refused_without_output(&first, words);
    };
    refused(&["loud"], &["loud: its norm", "largest of the shadow updates", "--allow-outliers"]);
    refused(&["near", "low"], &["low: its norm", "smallest of the shadow updates"]);
    refused(&["zero"], &["zero: every value is zero"]);
    refused(&["infinite"], &["infinite", "not a finite number"]);
    refused(&["copy"], &["copy: damaged", "checksum"]);
    refused(&["seed"], &["seed: base model", "send it the run.toml"]);
    std::fs::copy(home.path("near"), home.path("copy")).unwrap();
    refused(&["near", "copy"], &["copy: the same update as near", "--allow-duplicates"]);
    refused(&["near", "client/update.safetensors"], &["the same update as client/update.safetensors"]);
    refused(
        &["huge", "--combine", "sum", "--allow-outliers", "huge", "--allow-duplicates"],
        &["too large for 32"],
    );
    home.done(&[&TRANSLATE[..2], &["near"], &TRANSLATE[2..]].concat());
    let all = ["near", "copy", "loud", "--allow-outliers", "--allow-duplicates"];
    home.done(&[&TRANSLATE[..2], &all, &["--out", "y"]].concat());
}

#[test]
fn temporary_and_foreign_files_are_no_results() {
    let home = Home::before_translate();
    home.done(&TRANSLATE);
    let left = ["x/.gradtx-1.tmp", "x/adapter/.gradtx-2.tmp"].map(|name| home.path(name));
    left.iter().for_each(|path| std::fs::write(path, "half").unwrap());
    std::fs::remove_file(home.path("x/update.safetensors")).unwrap();
    home.done(&TRANSLATE);
    assert!(left.iter().all(|path| !path.exists()));
    // A store with more in it than its plan has.
    for name in ["00009.student.safetensors", "notes.txt", ".gradtx-3.tmp"] {
        std::fs::write(home.path("run/shadow/shards").join(name), "foreign").unwrap();
    }
    std::fs::remove_file(home.path("run/shadow/manifest.json")).unwrap();
    home.done(&["curate"]);
    let record = std::fs::read_to_string(home.path("run/shadow/record.json")).unwrap();
    assert!(record.contains("00004.student") && !record.contains("00009") && !record.contains("notes"));
    assert!(!home.path("run/shadow/shards/.gradtx-3.tmp").exists());
    let shown = gradtx(home.dir(), &["inspect", "run/shadow"]);
    assert!(
        String::from_utf8_lossy(&shown.stdout).contains("00009.student.safetensors: not in the manifest")
    );
}

#[test]
fn looking_at_anything_ends() {
    let home = Home::before_translate();
    let inspect = |name: &str, code: i32, words: &[&str]| {
        let began = Instant::now();
        let output = gradtx(home.dir(), &["inspect", name]);
        let shown = String::from_utf8_lossy(&output.stdout).into_owned() + &stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{name}: {shown}");
        assert!(began.elapsed() < Duration::from_secs(10), "{name}");
        assert!(words.iter().all(|word| shown.contains(word)), "{name}: {shown}");
        shown
    };
    std::fs::create_dir_all(home.path("circle/deep")).unwrap();
    for link in ["circle/a", "circle/b", "circle/deep/c"] {
        std::os::unix::fs::symlink(home.path("circle"), home.path(link)).unwrap();
    }
    inspect("circle", 1, &["nothing here is a model"]);
    let status = gradtx(home.dir(), &["status", "circle"]);
    assert_eq!(status.status.code(), Some(1));
    std::fs::create_dir_all(home.path("deep").join("d/".repeat(40))).unwrap();
    inspect("deep", 1, &["directories deep"]);
    assert!(Command::new("mkfifo").arg(home.path("pipe")).status().unwrap().success());
    inspect("pipe", 1, &["a named pipe"]);
    inspect("/dev/zero", 1, &["a device"]);
    inspect("llm", 0, &["intact"]);
    let config = std::fs::read(home.path("llm/config.json")).unwrap();
    std::fs::write(home.path("llm/config.json"), "{").unwrap();
    inspect("llm", 1, &["config.json", "hint: download or copy it again"]);
    std::fs::write(home.path("llm/config.json"), config).unwrap();
    // A manifest and a record that claim more than there is.
    let manifest = home.path("run/shadow/manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    for (from, to) in [
        ("\"shadows\": 5", "\"shadows\": 1000000000000000000"),
        ("\"steps\": 2", "\"steps\": 9007199254740993"),
    ] {
        assert!(text.contains(from), "{text}");
        std::fs::write(&manifest, text.replace(from, to)).unwrap();
        inspect("run/shadow", 1, &["manifest.json"]);
        assert!(gradtx(home.dir(), &["status", "run"]).status.success());
        home.refused_without_output(&["train"], &["manifest.json"]);
    }
    for name in ["../../settings.toml", "/etc/passwd"] {
        let record = home.path("client/record.json");
        let text = std::fs::read_to_string(&record).unwrap();
        std::fs::write(&record, text.replace("update.safetensors", name)).unwrap();
        inspect("client", 1, &["record.json", "within its directory"]);
        std::fs::write(&record, text).unwrap();
    }
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let home = Home::before_translate();
    let name = "evil\u{1b}]0;title\u{7}\u{1b}[2J\rhidden\u{202e}\u{9b}31m\nPROBLEM: none";
    std::fs::create_dir(home.path(name)).unwrap();
    std::fs::write(home.path(name).join("update.safetensors"), "no").unwrap();
    let update = std::fs::read(home.path("client/update.safetensors")).unwrap();
    let header =
        String::from_utf8_lossy(&update).replace("\"layout\":\"", "\"layout\":\"\\u001b[31m\\u202e\\n");
    std::fs::write(home.path("update"), header.as_bytes()).unwrap();
    let record = home.path("client/record.json");
    std::fs::write(
        &record,
        "{\"stage\": \"\\u001b[31mred\", \"version\": \"1\", \"settings\": {}, \"outputs\": {}}",
    )
    .unwrap();
    std::fs::write(home.path("bad.toml"), "[data]\n\"ev\\u001b[31mil\\u0007\" = 1\n").unwrap();
    let long = home.path(name).join("update.safetensors");
    for args in [
        vec!["inspect", name],
        vec!["inspect", long.to_str().unwrap()],
        vec!["inspect", "update"],
        vec!["inspect", "client"],
        vec!["status", "client"],
        vec!["--json", "status", "client"],
        vec!["translate", long.to_str().unwrap(), "--run", "run", "--out", "x"],
        vec!["translate", "update", "--run", "run", "--out", name],
        vec!["--json", "inspect", name],
        vec!["train", "--run", "new", "--config", "bad.toml"],
        vec!["report", "--run", "run", "--scores", "client", "--scores", name],
    ] {
        let output = gradtx(home.dir(), &args);
        for (stream, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
            let text = String::from_utf8_lossy(bytes);
            let bad =
                text.chars().find(|c| c.is_control() && *c != '\n' || ('\u{202a}'..='\u{202e}').contains(c));
            assert_eq!(bad, None, "{args:?}: {stream}: {text:?}");
            assert!(!text.lines().any(|line| line.starts_with("PROBLEM: none")), "{args:?}: {text:?}");
        }
    }
}
