//! The stages as a person runs them, on untrained models and a handful of examples: what
//! is finished stays, what is damaged comes back with the same bytes, and what does not
//! belong together is refused.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_runtime::artifact::{TupleStore, UpdateVector};
use gradtx_runtime::checkpoint::saved;
use gradtx_tests::miniature::{self, SETTINGS};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

fn inspect(home: &Home, name: &str) -> Option<i32> {
    home.gradtx(&["inspect", name]).status.code()
}

/// Checksums of all files below a directory, except for those of times.
fn sums(home: &Home, name: &str) -> BTreeMap<PathBuf, String> {
    miniature::checksums(&home.path(name))
}

const FINETUNE: [&str; 6] = ["finetune", "--data", "private.jsonl", "--out", "client", "--save-adapter"];
const TRANSLATE: [&str; 4] = ["translate", "client/update.safetensors", "--out", "translated"];

fn all_stages(home: &Home) {
    home.done(&["curate"]);
    home.done(&["train"]);
    home.done(&FINETUNE);
    home.done(&TRANSLATE);
    for method in ["mean", "nearest", "ridge", "products"] {
        let args = ["translate", "client/update.safetensors", "--method", method, "--out", method];
        home.done(&args);
    }
    home.done(&["evaluate", "--data", "private.jsonl", "--adapter", "translated/adapter", "--out", "score"]);
}

#[test]
fn all_stages_from_file_to_file() {
    let home = Home::miniature();
    all_stages(&home);
    let store = TupleStore::open(&home.path("run/shadow")).unwrap();
    assert_eq!((store.pairs(), store.steps()), (5, 2));
    assert!(store.verify().is_empty());
    let llm = gradtx_runtime::artifact::Role::Teacher;
    for name in ["translated", "mean", "nearest", "ridge"] {
        let update = UpdateVector::read(&home.path(name).join("update.safetensors")).unwrap();
        assert_eq!(&update.meta.space, store.space(llm));
        assert_eq!(update.meta.examples, 7);
    }
    let text = std::fs::read_to_string(home.path("score/predictions.jsonl")).unwrap();
    assert_eq!(text.lines().count(), 7);
    for name in ["run", "client", "translated", "translated/adapter", "llm", "client/update.safetensors"] {
        assert_eq!(inspect(&home, name), Some(0), "{name} is intact");
    }

    // Everything again changes nothing, on another number of threads too.
    let before = sums(&home, "");
    all_stages(&home);
    assert_eq!(sums(&home, ""), before);
    let other = Home::miniature();
    std::fs::write(other.path("settings.toml"), SETTINGS.replace("jobs_per_batch = 2", "jobs_per_batch = 4"))
        .unwrap();
    other.done(&["curate", "--threads", "3"]);
    let shards = |home: &Home| sums(home, "run/shadow/shards").into_values().collect::<Vec<_>>();
    assert_eq!(shards(&other), shards(&home), "a job's bytes do not depend on its company or on threads");
}

#[test]
fn what_is_damaged_is_made_again_with_the_same_bytes() {
    let home = Home::miniature();
    home.done(&["curate"]);
    let before = sums(&home, "run/shadow");
    let shard = home.path("run/shadow/shards/00003.teacher.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let end = bytes.len() - 5;
    bytes[end] ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    std::fs::remove_file(home.path("run/shadow/shards/00000.student.safetensors")).unwrap();
    assert_eq!(inspect(&home, "run/shadow"), Some(1));
    home.stage_refused(&["train"], 1, &["00000.student", "hint:"]);
    home.done(&["curate"]);
    assert_eq!(sums(&home, "run/shadow"), before);
    assert_eq!(inspect(&home, "run/shadow"), Some(0));
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let home = Home::miniature();
    home.stage_refused(&["train"], 1, &["no tuple store", "gradtx curate"]);
    home.done(&["curate"]);
    home.done(&FINETUNE);
    home.stage_refused(&TRANSLATE, 1, &["translator", "gradtx train"]);
    // Another model's update.
    let mut teacher = FINETUNE.to_vec();
    teacher.extend(["--model", "llm"]);
    teacher[4] = "teacher";
    home.done(&teacher);
    let args = ["translate", "teacher/update.safetensors", "--method", "mean", "--out", "x"];
    home.stage_refused(&args, 1, &["teacher/update.safetensors", "base model"]);
    // Other data for a directory that has a result.
    std::fs::copy(home.path("public.jsonl"), home.path("private.jsonl")).unwrap();
    home.stage_refused(&FINETUNE, 3, &["- data = ", "+ data = ", "hint:"]);
    // Another configuration for the run.
    home.stage_refused(
        &["curate", "--set", "curate.tiny.learning_rate=0.5"],
        3,
        &["- curate.tiny.learning_rate = 0.02", "+ curate.tiny.learning_rate = 0.5"],
    );
}

#[test]
fn files_may_be_moved_but_not_changed() {
    let home = Home::miniature();
    home.done(&["curate"]);
    let before = sums(&home, "run/shadow");
    std::fs::create_dir(home.path("elsewhere")).unwrap();
    for name in ["tiny", "public.jsonl"] {
        std::fs::rename(home.path(name), home.path("elsewhere").join(name)).unwrap();
    }
    let moved = ["--set", "models.tiny=elsewhere/tiny", "--set", "data.public=elsewhere/public.jsonl"];
    home.done(&[&["curate"], &moved[..]].concat());
    assert_eq!(sums(&home, "run/shadow"), before);
    let text = std::fs::read_to_string(home.path("elsewhere/public.jsonl")).unwrap();
    std::fs::write(home.path("elsewhere/public.jsonl"), text.replace("<f", "<g").replace('b', "c")).unwrap();
    home.stage_refused(&[&["curate"], &moved[..]].concat(), 3, &["- data = ", "+ data = "]);
}

#[test]
fn damaged_results_are_found_and_refused() {
    let home = Home::miniature();
    home.done(&["curate"]);
    home.done(&["train"]);
    home.done(&FINETUNE);
    for (file, of) in [
        ("client/update.safetensors", "client"),
        ("client/adapter/adapter_model.safetensors", "client/adapter"),
        ("run/translator/model.safetensors", "run/translator"),
        ("tiny/model.safetensors", "tiny"),
    ] {
        assert_eq!(inspect(&home, of), Some(0), "{of} before");
        let path = home.path(file);
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(inspect(&home, of), Some(1), "{of} with a value that is not a number");
    }
    home.stage_refused(&TRANSLATE, 1, &["client/update.safetensors", "finite"]);
}

#[test]
fn late_array_processes_have_nothing_to_do() {
    let home = Home::miniature();
    home.done(&["curate"]);
    let before = sums(&home, "run/shadow");
    std::fs::remove_file(home.path("run/shadow/manifest.json")).unwrap();
    let lock = std::fs::File::create(home.path("run/shadow/.lock")).unwrap();
    lock.lock().unwrap();
    home.done(&["curate", "--array"]);
    assert!(!home.path("run/shadow/manifest.json").exists(), "it is the other one's to write");
    drop(lock);
    home.done(&["curate", "--array"]);
    assert_eq!(sums(&home, "run/shadow"), before);
}

/// Settings of a training that takes a while, with a checkpoint after every step.
fn long_training() -> String {
    let steps = SETTINGS.replace(
        "max_steps = 6\nglobal_batch_size = 4\n",
        "max_steps = 120\nglobal_batch_size = 4\nsave_minutes = 0\nmixup_prob = 0.5\ninput_noise_std = 0.1\n",
    );
    assert_ne!(steps, SETTINGS);
    steps.replace("eval_steps = 3", "eval_steps = 10")
}

#[test]
fn killed_training_resumes_to_the_same_bytes() {
    let home = Home::miniature();
    std::fs::write(home.path("settings.toml"), long_training()).unwrap();
    home.done(&["curate"]);
    home.done(&["train"]);
    let undisturbed = sums(&home, "run/translator");
    assert!(!home.path("run/translator/checkpoints").exists(), "a finished training needs none");
    std::fs::remove_dir_all(home.path("run/translator")).unwrap();

    let mut went_on = 0;
    for wanted in [20, 60, 90] {
        let mut command = home.command(&["train", "--run", "run", "--config", "settings.toml"]);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let checkpoint = home.path(&format!("run/translator/checkpoints/step-{wanted:09}.safetensors"));
        while !checkpoint.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        let said = child.wait_with_output().unwrap().stdout;
        went_on += String::from_utf8_lossy(&said).contains("going on after step") as usize;
    }
    assert_eq!(went_on, 2, "the second and third attempt go on");
    home.done(&["train"]);
    assert_eq!(sums(&home, "run/translator"), undisturbed);
    assert_eq!(inspect(&home, "run/translator"), Some(0));
}

#[test]
fn checkpoints_without_their_translator_are_refused() {
    let home = Home::miniature();
    std::fs::write(home.path("settings.toml"), long_training()).unwrap();
    home.done(&["curate"]);
    home.done(&["train"]);
    let undisturbed = sums(&home, "run/translator");
    std::fs::remove_dir_all(home.path("run/translator")).unwrap();
    let mut command = home.command(&["train", "--run", "run", "--config", "settings.toml"]);
    let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    while !home.path("run/translator/checkpoints/step-000000040.safetensors").exists() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // The newest translator that was kept; one before it may still have its checkpoint.
    let list = std::fs::read_dir(home.path("run/translator/checkpoints")).unwrap();
    let mut bests: Vec<PathBuf> = list.map(|entry| entry.unwrap().path()).filter(|p| p.is_dir()).collect();
    bests.sort();
    std::fs::write(bests.pop().unwrap().join("model.safetensors"), "damaged").unwrap();
    home.done(&["train"]);
    assert_eq!(sums(&home, "run/translator"), undisturbed);
}

#[test]
fn training_killed_before_its_checkpoint_resumes() {
    let home = Home::miniature();
    let settings = long_training().replace("save_minutes = 0", "save_minutes = 0.003");
    let settings = settings.replace("eval_steps = 10", "eval_steps = 1");
    std::fs::write(home.path("settings.toml"), settings.replace("max_steps = 120", "max_steps = 300"))
        .unwrap();
    home.done(&["curate"]);
    home.done(&["train"]);
    let undisturbed = sums(&home, "run/translator");
    std::fs::remove_dir_all(home.path("run/translator")).unwrap();
    let dir = home.path("run/translator/checkpoints");
    let newest = || saved(&dir).unwrap().pop().map_or(0, |newest| newest.step);
    let mut tries = 0;
    for wait in [60, 100, 30] {
        let before = newest();
        let mut command = home.command(&["train", "--run", "run", "--config", "settings.toml"]);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        while newest() == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        // Meanwhile many translators are the best one so far, and no checkpoint knows them.
        std::thread::sleep(std::time::Duration::from_millis(wait));
        child.kill().unwrap();
        let said = child.wait_with_output().unwrap().stdout;
        let said = String::from_utf8_lossy(&said);
        assert_eq!(before > 0, said.contains(&format!("going on after step {before}\n")), "{said}");
        tries += (before > 0) as usize;
    }
    assert!(tries > 0, "it never got as far as a second attempt");
    home.done(&["train"]);
    assert_eq!(sums(&home, "run/translator"), undisturbed);
}

#[test]
fn training_stops_when_validation_no_longer_improves() {
    let home = Home::miniature();
    let settings = long_training().replace(
        "learning_rate = 0.01\nval_set",
        "learning_rate = 0.5\nearly_stopping_patience = 2\nval_set",
    );
    std::fs::write(home.path("settings.toml"), settings.replace("save_minutes = 0", "")).unwrap();
    home.done(&["curate"]);
    home.done(&["train"]);
    let text = std::fs::read_to_string(home.path("run/translator/metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() < 120, "stopped early, after {} steps", lines.len());
    let errors: Vec<f64> = lines
        .iter()
        .filter(|line| line["validation"].is_object())
        .map(|line| line["validation"]["relative_error"].as_f64().unwrap())
        .collect();
    let best = errors.iter().copied().fold(f64::INFINITY, f64::min);
    let at = errors.iter().position(|&e| e == best).unwrap();
    assert_eq!(errors.len() - 1 - at, 2, "two validations after the best one: {errors:?}");
    let report = std::fs::read_to_string(home.path("run/translator/validation.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["best"]["relative_error"].as_f64(), Some(best));
    assert_eq!(report["best"]["relative_error_by_block"].as_array().unwrap().len(), 3);
}
