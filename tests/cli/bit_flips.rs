//! Single flipped bits in the artifacts of a small run: none of them is used silently by the
//! stage that comes next. Either it fails and makes nothing, or what it makes is the same, byte
//! by byte, as without the flip.

#![allow(clippy::unwrap_used)]

use crate::home::{PROGRAM, copy_tree};
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_tests::miniature::{self, SETTINGS};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const MODEL: &str = "model.safetensors";
/// A file is replaced by one with a flipped bit so many times.
const FLIPS: [(&str, usize, Next); 26] = [
    ("run/shadow/shards/00000.student.safetensors", 8, Next::Baseline("nearest")),
    ("run/shadow/shards/00002.student.safetensors", 6, Next::Baseline("ridge")),
    ("run/shadow/shards/00003.teacher.safetensors", 8, Next::Baseline("mean")),
    ("run/shadow/shards/00004.teacher.safetensors", 8, Next::Train),
    ("run/shadow/init/student.safetensors", 6, Next::Baseline("ridge")),
    ("run/shadow/init/teacher.safetensors", 6, Next::Train),
    ("run/shadow/manifest.json", 10, Next::Baseline("mean")),
    ("run/shadow/manifest.json", 6, Next::Train),
    ("run/shadow/record.json", 10, Next::Baseline("nearest")),
    ("run/shadow/record.json", 4, Next::Train),
    ("run/translator/config.json", 12, Next::Translate),
    ("run/translator/model.safetensors", 14, Next::Translate),
    ("run/translator/normalization.safetensors", 12, Next::Translate),
    ("run/translator/validation.json", 6, Next::Translate),
    ("run/translator/record.json", 10, Next::Translate),
    ("client/update.safetensors", 16, Next::Translate),
    ("client/adapter/adapter_model.safetensors", 8, Next::Evaluate),
    ("client/adapter/adapter_config.json", 8, Next::Evaluate),
    ("client/record.json", 8, Next::Evaluate),
    ("translated/adapter/adapter_model.safetensors", 6, Next::Merge),
    ("translated/adapter/adapter_config.json", 4, Next::Merge),
    ("translated/record.json", 4, Next::Merge),
    ("merged/model.safetensors", 6, Next::EvaluateMerged),
    ("merged/record.json", 4, Next::EvaluateMerged),
    ("score/score.json", 8, Next::Report),
    ("score/record.json", 6, Next::Report),
];
/// And so many bits of a training that was killed: of its checkpoints and its best translators.
const FLIPS_OF_CHECKPOINTS: usize = 24;

/// What uses a file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Next {
    Baseline(&'static str),
    Train,
    Translate,
    Evaluate,
    EvaluateMerged,
    Merge,
    Report,
}

impl Next {
    fn args(self) -> Vec<&'static str> {
        match self {
            Self::Baseline(method) => {
                vec!["translate", "client/update.safetensors", "--method", method, "--out", "out"]
            }
            Self::Train => vec!["train"],
            Self::Translate => vec!["translate", "client/update.safetensors", "--out", "out"],
            Self::Evaluate => {
                let adapter = ["--adapter", "client/adapter", "--model", "tiny", "--out", "out"];
                [&["evaluate", "--data", "private.jsonl"][..], &adapter].concat()
            }
            Self::EvaluateMerged => {
                vec!["evaluate", "--data", "private.jsonl", "--base", "merged", "--out", "out"]
            }
            Self::Merge => vec!["merge", "--adapter", "translated/adapter", "--out", "out"],
            Self::Report => vec!["report", "--scores", "score", "--out", "out/report.html"],
        }
    }

    /// Where its result lies.
    fn out(self) -> &'static str {
        if self == Self::Train { "run/translator" } else { "out" }
    }
}

struct Run {
    dir: PathBuf,
}

impl Run {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg(args[0]).args(["--run", "run"]);
        if args[0] != "report" {
            command.args(["--config", "settings.toml"]);
        }
        command.args(&args[1..]).args(["--threads", "1"]).current_dir(&self.dir);
        command
    }

    fn gradtx(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn done(&self, args: &[&str]) {
        let output = self.gradtx(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Everything but what this test is about is made once.
    fn make(dir: &Path) -> Self {
        let home = Self { dir: dir.to_owned() };
        std::fs::create_dir(dir).unwrap();
        miniature::write(dir);
        // Many checkpoints, for the test that kills it on its way.
        let settings = SETTINGS.replace("max_steps = 6\nglobal", "max_steps = 60\nsave_minutes = 0\nglobal");
        assert_ne!(settings, SETTINGS);
        std::fs::write(home.path("settings.toml"), settings).unwrap();
        home.done(&["curate"]);
        home.done(&["train"]);
        home.done(&["finetune", "--data", "private.jsonl", "--out", "client", "--save-adapter"]);
        home.done(&["translate", "client/update.safetensors", "--out", "translated"]);
        home.done(&["merge", "--adapter", "translated/adapter", "--out", "merged"]);
        let adapter = ["--adapter", "translated/adapter", "--out", "score"];
        home.done(&[&["evaluate", "--data", "private.jsonl"][..], &adapter].concat());
        home
    }

    /// The next stage from scratch: its output, and what it made if it succeeded.
    fn run(&self, next: Next) -> (Output, Option<BTreeMap<PathBuf, String>>) {
        let out = self.path(next.out());
        if out.exists() {
            std::fs::remove_dir_all(&out).unwrap();
        }
        if next == Next::Report {
            std::fs::create_dir(&out).unwrap();
        }
        let output = self.gradtx(&next.args());
        let made = output.status.success().then(|| self.made(next));
        (output, made)
    }

    /// Checksums of a result, without the record, which says what it was made from. Of a
    /// report, the scores: it has dates too.
    fn made(&self, next: Next) -> BTreeMap<PathBuf, String> {
        if next == Next::Report {
            let report: Value =
                serde_json::from_slice(&std::fs::read(self.path("out/report.json")).unwrap()).unwrap();
            return [(PathBuf::from("scores"), report["scores"].to_string())].into();
        }
        let mut sums = miniature::checksums(&self.path(next.out()));
        sums.retain(|path, _| !path.ends_with("record.json"));
        let relative = |path: PathBuf| path.strip_prefix(&self.dir).unwrap().to_owned();
        sums.into_iter().map(|(path, sum)| (relative(path), sum)).collect()
    }
}

/// A file with one bit changed, until it is dropped.
struct Flipped {
    path: PathBuf,
    whole: Vec<u8>,
    what: String,
}

impl Flipped {
    fn new(path: PathBuf, random: &mut Stream) -> Self {
        let whole = std::fs::read(&path).unwrap();
        // Headers are a small part of most files, and as many flips hit them.
        let end = if random.uniform() < 0.5 { whole.len().min(1500) } else { whole.len() };
        let (at, bit) = (random.below(end), random.below(8));
        let mut other = whole.clone();
        other[at] ^= 1 << bit;
        std::fs::write(&path, other).unwrap();
        let what = format!("{}: bit {bit} of byte {at} of {}", path.display(), whole.len());
        Self { path, whole, what }
    }
}

impl Drop for Flipped {
    fn drop(&mut self) {
        std::fs::write(&self.path, &self.whole).unwrap();
    }
}

#[test]
fn no_flipped_bit_is_used_silently() {
    let dir = tempfile::tempdir().unwrap();
    let first = Run::make(&dir.path().join("0"));
    let mut expected = BTreeMap::new();
    for (_, _, next) in FLIPS {
        // Twice the same, so that a difference means something.
        let (output, made) = first.run(next);
        let made = made.unwrap_or_else(|| panic!("{next:?}: {}", String::from_utf8_lossy(&output.stderr)));
        let before = expected.insert(format!("{next:?}"), made.clone());
        assert!(before.is_none_or(|before| before == made), "{next:?} gives the same twice");
    }
    let homes = [first, Run { dir: dir.path().join("1") }];
    copy_tree(&homes[0].dir, &homes[1].dir);
    let (turn, silent) = (AtomicUsize::new(0), Mutex::new(vec![]));
    let work = |home: &Run| {
        let mut refused = 0;
        while let Some((file, count, next)) = FLIPS.get(turn.fetch_add(1, Ordering::Relaxed)) {
            let mut random = Stream::new(derive_named(7, &format!("{file} {next:?}")));
            for _ in 0..*count {
                let flipped = Flipped::new(home.path(file), &mut random);
                let (output, made) = home.run(*next);
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                let has_no_score = made.as_ref().is_some_and(|made| made.values().all(|m| m == "[]"));
                match made {
                    // A report shows everything else, and names the score that it leaves out.
                    Some(_) if *next == Next::Report && has_no_score => refused += 1,
                    Some(made) if made == expected[&format!("{next:?}")] => {}
                    Some(_) => silent.lock().unwrap().push(flipped.what.clone()),
                    None => {
                        refused += 1;
                        let code = output.status.code();
                        assert!(matches!(code, Some(1..=3)), "{}: {code:?}: {said}", flipped.what);
                        assert!(said.starts_with("error: "), "{}: {said}", flipped.what);
                        let result = home.path(next.out()).join("update.safetensors");
                        assert!(!result.exists(), "{}: half a result", flipped.what);
                    }
                }
            }
            // Whatever a refused training left.
            if *next == Next::Train {
                home.run(Next::Train);
            }
        }
        refused
    };
    let refused = std::thread::scope(|scope| {
        let work = &work;
        let workers = homes.each_ref().map(|home| scope.spawn(move || work(home)));
        workers.map(|worker| worker.join().unwrap())
    });
    let silent = silent.into_inner().unwrap();
    assert!(silent.is_empty(), "used silently:\n{}", silent.join("\n"));
    let all: usize = FLIPS.iter().map(|(_, count, _)| count).sum();
    assert!(
        all + FLIPS_OF_CHECKPOINTS >= 200 && refused.iter().sum::<usize>() > all / 2,
        "{refused:?} of {all}"
    );
}

#[test]
fn flipped_checkpoint_bits_reach_no_translator() {
    let dir = tempfile::tempdir().unwrap();
    let home = Run::make(&dir.path().join("0"));
    let (_, expected) = home.run(Next::Train);
    let expected = expected.unwrap();
    // Killed on its way, with two checkpoints.
    std::fs::remove_dir_all(home.path("run/translator")).unwrap();
    let mut child = home.command(&["train"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let checkpoints = home.path("run/translator/checkpoints");
    let is_there = |step: u32| checkpoints.join(format!("step-{step:09}.safetensors")).exists();
    while !(20..60).any(is_there) && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let (killed, now) = (home.path("killed"), home.path("run/translator"));
    std::fs::rename(&now, &killed).unwrap();
    let mut files: Vec<PathBuf> = miniature::checksums(&killed.join("checkpoints")).into_keys().collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors" || e == "json"));
    assert!(files.iter().any(|path| path.ends_with(MODEL)), "a best translator: {files:?}");
    let mut random = Stream::new(5);
    for i in 0..FLIPS_OF_CHECKPOINTS {
        copy_tree(&killed, &now);
        let file = now.join(files[i % files.len()].strip_prefix(&killed).unwrap());
        let flipped = Flipped::new(file, &mut random);
        let output = home.gradtx(&["train"]);
        let what = flipped.what.clone();
        // The file is gone with the checkpoints that it was among.
        std::mem::forget(flipped);
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(home.made(Next::Train), expected, "{what}");
        std::fs::remove_dir_all(&now).unwrap();
    }
}
