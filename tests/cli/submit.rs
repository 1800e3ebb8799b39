//! `gradtx submit` where there is no SLURM: what it refuses, and the scripts that it prints.
//! Submissions in earnest are tested by the target `cluster`.

#![allow(clippy::unwrap_used)]

mod jobs;
mod names;
mod profiles;

use crate::home::Home;
use std::path::PathBuf;
use std::process::{Command, Output};

impl Home {
    /// The miniature, and a client whose name needs quotes.
    fn with_client() -> Self {
        let home = Self::miniature();
        std::fs::create_dir_all(home.path("it's ada")).unwrap();
        std::fs::copy(home.path("private.jsonl"), home.path("it's ada/train.jsonl")).unwrap();
        home
    }

    fn submit(&self, words: &[&str]) -> Output {
        self.command(&["submit", "--run", "run", "--config", "settings.toml"])
            .args(words)
            .env("PATH", "")
            .env("HOME", self.dir())
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("GRADTX_PROFILE")
            .output()
            .unwrap()
    }

    fn submit_refused(&self, words: &[&str], expected: &str) {
        let output = self.submit(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "{words:?}: no `{expected}` in: {said}");
        assert!(!self.path("run").exists(), "{words:?}: nothing is written");
    }
}

#[test]
fn impossible_jobs_are_refused_before_any_write() {
    let home = Home::with_client();
    home.submit_refused(&["--stage=train"], "no tuple store");
    home.submit_refused(&["--stage=evaluate", "--client=it's ada"], "no trained translator");
    home.submit_refused(&["--stage=curate", "--set", "train.learning_rate=-1"], "train.learning_rate");
    home.submit_refused(&["--stage=curate", "--set", "models.llm=nowhere"], "models.llm");
    home.submit_refused(&["--stage=curate", "--set", "data.public=nowhere"], "data.public");
    home.submit_refused(&["--stage=train", "--array=4"], "only curation runs as an array");
    home.submit_refused(
        &["--stage=curate", "--client=it's ada"],
        "only for the stages evaluate and pipeline",
    );
    home.submit_refused(&["--stage=pipeline", "--client=nobody"], "--client nobody");
    home.submit_refused(&["--stage=curate", "--sbatch=oops"], "--sbatch oops");
    home.submit_refused(&["--stage=curate", "--nodes=0"], "--nodes");
    std::fs::remove_file(home.path("tiny/tokenizer.json")).unwrap();
    home.submit_refused(&["--stage=curate"], "tokenizer.json");
    home.submit_refused(&["--stage=emulate", "--array=4"], "only curation runs as an array");
    home.submit_refused(&["--stage=emulate", "--set", "data.public=nowhere"], "data.public");
    // It is made without the TinyLM, whose tokenizer is gone.
    let output = home.submit(&["--stage=emulate", "--dry-run", "--gpus-per-node=0", "--time=emulate=30"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for word in ["gradtx-emulate", "ranks emulate --run", "--time=30"] {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
}

#[test]
fn without_slurm_nothing_is_submitted_or_written() {
    Home::with_client().submit_refused(&["--stage=curate"], "sbatch: not on the PATH");
}

/// Scripts of a dry run, by the path that is printed before each.
fn scripts(said: &str) -> Vec<(String, String)> {
    let parts = said.split("# /").skip(1);
    parts.map(|part| part.split_once('\n').unwrap()).map(|(path, text)| (path.into(), text.into())).collect()
}

#[test]
fn a_dry_run_prints_what_would_be_submitted() {
    let home = Home::with_client();
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
    assert!(commands[2].contains("'--dependency=afterok:<id of gradtx-train>' --kill-on-invalid-dep=yes"));
    let of_report = "'--dependency=afterok:<id of gradtx-train>,afterany:<id of gradtx-evaluate>' --kill-on";
    assert!(commands[3].contains(of_report), "a client that fails does not cost the report: {}", commands[3]);
}

/// The words of the `#SBATCH` lines of a script, read as sbatch reads them: up to the first line
/// that is neither empty nor a comment; blanks divide, quotes hold together, `#` begins a comment.
fn options_of(script: &str) -> Vec<String> {
    let is_comment = |line: &&str| line.is_empty() || line.starts_with('#');
    let lines = script.lines().take_while(is_comment).filter_map(|line| line.strip_prefix("#SBATCH"));
    lines.flat_map(words_of).collect()
}

fn words_of(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut escaped) = (vec![], None::<String>, None, false);
    for c in line.chars() {
        match c {
            _ if escaped => {
                word.get_or_insert_default().push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            _ if quote == Some(c) => quote = None,
            '"' | '\'' if quote.is_none() => quote = Some(c),
            '#' if quote.is_none() => break,
            c if c.is_whitespace() && quote.is_none() => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[test]
fn the_parser_of_the_test_sees_what_is_planted() {
    let script =
        "#!/bin/bash\n#SBATCH --output=\"a b\" --wrap=x # c\n\n#SBATCH --qos=h\ntouch x\n#SBATCH --late\n";
    assert_eq!(options_of(script), ["--output=a b", "--wrap=x", "--qos=h"]);
}

/// A PATH with an `sbatch` that keeps what is submitted, and with programs for the script's run.
fn sandbox(home: &Home) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let bin = home.path("bin");
    std::fs::create_dir_all(&bin).unwrap();
    let keep = home.path("submitted");
    std::fs::create_dir_all(&keep).unwrap();
    let sbatch = format!(
        "#!/bin/bash\nn=$(ls '{0}' | wc -l)\ncp -- \"${{@: -1}}\" '{0}'/$n\necho $((n + 7))\n",
        keep.display()
    );
    // What it says is in a file; without one, the queue is empty.
    let squeue = format!("#!/bin/bash\n[ ! -f '{0}' ] || cat '{0}'\n", home.path("queue").display());
    let scancel = format!("#!/bin/bash\nprintf '%s\\n' \"$@\" >>'{}'\n", home.path("cancelled").display());
    for (name, text) in [
        ("sbatch", sbatch.as_str()),
        ("srun", "#!/bin/bash\nprintf '%s\\n' \"$@\" >>\"$SEEN\"\n"),
        ("scontrol", "#!/bin/bash\n"),
        ("scancel", scancel.as_str()),
        ("squeue", squeue.as_str()),
    ] {
        let path = bin.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    bin
}

impl Home {
    /// A submission to the sandbox's sbatch, run from a directory of its own.
    fn submit_in(&self, bin: &std::path::Path, words: &[&std::ffi::OsStr]) -> Output {
        let path = format!("{}:/usr/bin:/bin", bin.display());
        self.command(&["submit", "--config", "settings.toml", "--stage=curate", "--device=cpu"])
            .args(words)
            .env("PATH", path)
            .env("HOME", self.dir())
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("GRADTX_PROFILE")
            .output()
            .unwrap()
    }

    fn submitted(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("submitted")).unwrap().flatten();
        entries.map(|entry| std::fs::read_to_string(entry.path()).unwrap()).collect()
    }
}

/// A command with the sandbox's SLURM, in the home's directory.
fn gradtx(home: &Home, words: &[&str]) -> Output {
    let path = format!("{}:/usr/bin:/bin", sandbox(home).display());
    home.command(words)
        .env("PATH", path)
        .env("HOME", home.dir())
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("GRADTX_PROFILE")
        // A program that computes on GPUs, however the tests were built.
        .env("GRADTX", "/bin/true")
        .output()
        .unwrap()
}

const PIPELINE: [&str; 6] = [
    "submit",
    "--run=run",
    "--config=settings.toml",
    "--stage=pipeline",
    "--client=it's ada",
    "--device=auto",
];

/// What a command prints when it succeeds.
fn ok(home: &Home, words: &[&str]) -> String {
    let output = gradtx(home, words);
    assert_eq!(output.status.code(), Some(0), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What a command says when it fails with this code.
fn refused(home: &Home, words: &[&str], code: i32) -> String {
    let output = gradtx(home, words);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
    said
}
