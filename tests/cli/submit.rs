//! `gradtx submit` where there is no SLURM: what it refuses, and the scripts that it prints.
//! Submissions in earnest are tested by the target `cluster`.

#![allow(clippy::unwrap_used)]

use gradtx_tests::miniature;
use std::path::PathBuf;
use std::process::{Command, Output};

struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let home = Self { dir: tempfile::tempdir().unwrap() };
        miniature::write(home.dir.path());
        std::fs::create_dir_all(home.path("it's ada")).unwrap();
        std::fs::copy(home.path("private.jsonl"), home.path("it's ada/train.jsonl")).unwrap();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn submit(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_gradtx-under-test"))
            .args(["submit", "--run", "run", "--config", "settings.toml"])
            .args(words)
            .current_dir(self.dir.path())
            .env("PATH", "")
            .output()
            .unwrap()
    }

    fn refused(&self, words: &[&str], expected: &str) {
        let output = self.submit(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "{words:?}: no `{expected}` in: {said}");
        assert!(!self.path("run").exists(), "{words:?}: nothing is written");
    }
}

#[test]
fn what_must_fail_is_refused_before_anything_is_written() {
    let home = Home::new();
    home.refused(&["--stage=train"], "no tuple store");
    home.refused(&["--stage=evaluate", "--client=it's ada"], "no trained translator");
    home.refused(&["--stage=curate", "--set", "train.lr=-1"], "train.lr");
    home.refused(&["--stage=curate", "--set", "models.llm=nowhere"], "models.llm");
    home.refused(&["--stage=curate", "--set", "data.public=nowhere"], "data.public");
    home.refused(&["--stage=train", "--array=4"], "only curation runs as an array");
    home.refused(&["--stage=curate", "--client=it's ada"], "only for the stages evaluate and pipeline");
    home.refused(&["--stage=pipeline", "--client=nobody"], "--client nobody");
    home.refused(&["--stage=curate", "--extra=oops"], "--extra oops");
    home.refused(&["--stage=curate", "--nodes=0"], "--nodes");
    std::fs::remove_file(home.path("tiny/tokenizer.json")).unwrap();
    home.refused(&["--stage=curate"], "tokenizer.json");
}

#[test]
fn without_slurm_nothing_is_submitted_or_written() {
    Home::new().refused(&["--stage=curate"], "sbatch: not on the PATH");
}

/// Scripts of a dry run, by the path that is printed before each.
fn scripts(said: &str) -> Vec<(String, String)> {
    let parts = said.split("# /").skip(1);
    parts.map(|part| part.split_once('\n').unwrap()).map(|(path, text)| (path.into(), text.into())).collect()
}

#[test]
fn a_dry_run_prints_what_would_be_submitted() {
    let home = Home::new();
    let words = ["--stage=pipeline", "--client=it's ada", "--dry-run", "--nodes=2", "--array=16"];
    let output = home.submit(&words);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!home.path("run").exists(), "a dry run writes nothing");
    let scripts = scripts(&said);
    let names: Vec<&str> = scripts.iter().map(|(path, _)| path.rsplit('/').next().unwrap()).collect();
    let expected = ["curate", "train", "evaluate", "report"].map(|stage| format!("gradtx-{stage}.sbatch"));
    assert_eq!(names, expected);
    for (path, text) in &scripts {
        let checked = Command::new("bash").args(["-n", "-c", text]).output().unwrap();
        assert!(checked.status.success(), "{path}: {}", String::from_utf8_lossy(&checked.stderr));
        assert!(text.starts_with("#!/bin/bash\n#SBATCH --job-name=gradtx-"), "{path}");
    }
    assert!(scripts[0].1.contains("#SBATCH --array=0-15\n"));
    assert!(scripts[1].1.contains("#SBATCH --nodes=2\n"));
    assert!(scripts[2].1.contains(r"it'\''s ada'"), "the shell sees one word: {}", scripts[2].1);
    let commands: Vec<&str> = said.lines().filter(|line| line.starts_with("# command: sbatch")).collect();
    assert_eq!(commands.len(), 4);
    assert!(!commands[0].contains("--dependency"));
    assert!(commands[3].contains("'--dependency=afterok:<id of gradtx-evaluate>' --kill-on-invalid-dep=yes"));
}
