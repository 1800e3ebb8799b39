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
    home.refused(&["--stage=curate", "--set", "train.learning_rate=-1"], "train.learning_rate");
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
    for (name, text) in [
        ("sbatch", sbatch.as_str()),
        ("srun", "#!/bin/bash\nprintf '%s\\n' \"$@\" >>\"$SEEN\"\n"),
        ("scontrol", "#!/bin/bash\n"),
        ("scancel", "#!/bin/bash\n"),
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
        Command::new(env!("CARGO_BIN_EXE_gradtx-under-test"))
            .args(["submit", "--config", "settings.toml", "--stage=curate", "--device=cpu"])
            .args(words)
            .current_dir(self.dir.path())
            .env("PATH", path)
            .output()
            .unwrap()
    }

    fn submitted(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("submitted")).unwrap().flatten();
        entries.map(|entry| std::fs::read_to_string(entry.path()).unwrap()).collect()
    }
}

#[test]
fn hostile_names_are_refused_before_anything_is_written() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;
    let home = Home::new();
    let bin = sandbox(&home);
    let before = std::fs::read_dir(home.dir.path()).unwrap().count();
    let words: Vec<Vec<OsString>> = [
        vec!["--run", "x\ntouch PWNED\n#"],
        vec!["--run", "x\r\ntouch PWNED"],
        vec!["--run", "x\" --wrap=\"touch PWNED"],
        vec!["--run", "x'; touch PWNED; '"],
        vec!["--run", "x\\"],
        vec!["--run", "$(touch PWNED)"],
        vec!["--run", "`touch PWNED`"],
        vec!["--run=-x\u{1b}[2J"],
        vec!["--run", "run", "--partition", "a\ntouch PWNED"],
        vec!["--run", "run", "--partition", "a --wrap=x"],
        vec!["--run", "run", "--account", "a\"\n#SBATCH --uid=0"],
        vec!["--run", "run", "--account", ""],
        vec!["--run", "run", "--time", "1\ntouch PWNED"],
        vec!["--run", "run", "--time", "10 --exclusive"],
        vec!["--run", "run", "--extra=--qos=a --wrap=x"],
        vec!["--run", "run", "--extra=--comment=a\ntouch PWNED"],
        vec!["--run", "run", "--extra=--comment='a b'"],
        vec!["--run", "run", "--extra=-d afterok:1"],
        vec!["--run", "run", "--extra=--"],
        vec!["--run", "run", "--array", "3%"],
        vec!["--run", "run", "--array", "0-3"],
    ]
    .into_iter()
    .map(|words| words.into_iter().map(OsString::from).collect())
    .chain([vec!["--run".into(), OsStr::from_bytes(b"x\xff\xfe").to_owned()]])
    .collect();
    for words in words {
        let words: Vec<&OsStr> = words.iter().map(OsString::as_os_str).collect();
        for dry in [&[][..], &[OsStr::new("--dry-run")]] {
            let output = home.submit_in(&bin, &[&words[..], dry].concat());
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
            assert!(!said.contains("\u{1b}") && !said.contains('\r'), "{words:?}: {said:?}");
        }
    }
    assert!(home.submitted().is_empty());
    assert_eq!(std::fs::read_dir(home.dir.path()).unwrap().count(), before, "nothing is written");
}

#[test]
fn odd_names_that_are_plain_arrive_as_they_are() {
    let allowed = [
        "--job-name=",
        "--output=",
        "--nodes=",
        "--ntasks-per-node=",
        "--cpus-per-task=",
        "--time=",
        "--array=",
        "--partition=",
        "--account=",
        "--requeue",
        "--signal=",
        "--open-mode=",
        "--constraint=",
    ];
    for run in ["a b", "50%j", "läufe (1)", "semi;touch PWNED;", "#run", "&touch PWNED&", "-dash", "{x"] {
        let home = Home::new();
        let bin = sandbox(&home);
        let words = [
            &format!("--run=./{run}"),
            "--partition=a100,h100",
            "--account=lab_1",
            "--extra=--constraint=a&b|c",
        ];
        let words: Vec<&std::ffi::OsStr> = words.iter().map(|word| std::ffi::OsStr::new(*word)).collect();
        let output = home.submit_in(&bin, &words);
        if run == "{x" {
            assert_eq!(output.status.code(), Some(2), "braces end a word of the script");
            continue;
        }
        assert!(output.status.success(), "{run}: {}", String::from_utf8_lossy(&output.stderr));
        let script = home.submitted().remove(0);
        let options = options_of(&script);
        let known = |word: &String| allowed.iter().any(|start| word.starts_with(start));
        assert!(options.iter().all(known), "{run}: {options:?}");
        let log = options.iter().find_map(|word| word.strip_prefix("--output=")).unwrap();
        let wanted = format!("{}/logs/%x-%j.log", home.path(run).display().to_string().replace('%', "%%"));
        assert_eq!(log, wanted);
        // The script itself, in an empty directory: it does what it should, and nothing that a name says.
        let place = home.path("place");
        std::fs::create_dir(&place).unwrap();
        std::fs::write(home.path("script"), &script).unwrap();
        let seen = home.path("seen");
        let path = format!("{}:/usr/bin:/bin", bin.display());
        let ran = Command::new("bash")
            .arg(home.path("script"))
            .current_dir(&place)
            .env("PATH", path)
            .env("SEEN", &seen)
            .env("SLURM_JOB_ID", "7")
            .env("SLURM_JOB_NAME", "gradtx-curate")
            .env("SLURM_JOB_NODELIST", "n1")
            .env_remove("GRADTX")
            .output()
            .unwrap();
        assert!(ran.status.success(), "{run}: {}", String::from_utf8_lossy(&ran.stderr));
        let seen = std::fs::read_to_string(seen).unwrap();
        assert!(seen.lines().any(|word| word == home.path(run).to_str().unwrap()), "{run}: {seen}");
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0, "{run}: something else was run");
        assert!(!home.path("PWNED").exists() && !home.path(run).join("PWNED").exists());
    }
}

#[test]
fn the_parser_of_the_test_sees_what_is_planted() {
    let script =
        "#!/bin/bash\n#SBATCH --output=\"a b\" --wrap=x # c\n\n#SBATCH --qos=h\ntouch x\n#SBATCH --late\n";
    assert_eq!(options_of(script), ["--output=a b", "--wrap=x", "--qos=h"]);
}
