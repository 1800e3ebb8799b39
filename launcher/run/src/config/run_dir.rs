//! What a directory is that was named as a run and has no run.toml.
//!
//! In: the path that was given as `--run`. Out: an error that says what stands there instead and
//! what was probably meant, with the exit code of an unusable command line. Only reads.

use super::RUN_FILE;
use crate::failure::unusable_with;
use crate::paths::{INDEX_FILE, RUN_FILE_OF_WORLD};
use crate::record::{self, RECORD_FILE};
use crate::text::quoted;
use std::path::{Path, PathBuf};
use strsim::osa_distance;

/// Runs that are named one by one.
const LISTED: usize = 5;
/// Entries of a directory that are examined: a typo is answered at once, however large it is.
const EXAMINED: usize = 10_000;

/// The error for a directory that is no run.
pub fn no_run(path: &Path) -> anyhow::Error {
    let (what, hint) = describe(path);
    unusable_with(format!("{}: {what}; expected a run directory", path.display()), Some(hint))
}

/// What a path is that has no run.toml, and what to do.
pub fn describe(path: &Path) -> (String, String) {
    let creation = format!("to begin a new run there: gradtx curate --run {} --config FILE", shown(path));
    if !path.exists() {
        let what = match std::fs::read_link(path) {
            Ok(target) => format!("is a link to {}, which does not exist", target.display()),
            Err(_) => "there is no such directory".into(),
        };
        let hint = similar(path).map(|run| format!("did you mean {}?", shown(&run)));
        return (what, hint.unwrap_or(creation));
    }
    if !path.is_dir() {
        return match path.file_name().is_some_and(|name| name == RUN_FILE) {
            true => ("is a run file".into(), format!("name its directory: --run {}", shown(parent(path)))),
            false => ("is a file".into(), "name the directory that has a run.toml".into()),
        };
    }
    if path.join(INDEX_FILE).is_file() {
        return ("is the directory of a sweep".into(), one_of(&runs_below(path), "name one of its runs"));
    }
    if let Some(run) = run_above(path) {
        let what = match record::read(&path.join(RECORD_FILE)) {
            Ok(record) => format!("is a directory of the stage {} in a run", record.stage),
            Err(_) => "is a directory within a run".into(),
        };
        return (what, format!("did you mean {}?", shown(&run)));
    }
    let has = |name: &str| path.join(name).is_file();
    // A model that `pretrain` made has a record, and is a model first.
    let model = has("config.json") && !has("adapter_config.json");
    if let Ok(record) = record::read(&path.join(RECORD_FILE))
        && !model
    {
        let hint = match record.stage.as_str() {
            "world" => format!(
                "to begin a run in this world: --run DIR --config {}",
                shown(&path.join(RUN_FILE_OF_WORLD))
            ),
            stage => format!("it was given as --out to `gradtx {stage}`; name the run that it was made from"),
        };
        return (format!("is the output of the stage {}", record.stage), hint);
    }
    if has("adapter_config.json") {
        return ("is a PEFT adapter".into(), "adapters are given as --adapter".into());
    }
    if model {
        let hint = "models are named in the run file: models.tiny and models.llm";
        return ("is a model directory".into(), hint.into());
    }
    let runs = runs_below(path);
    if !runs.is_empty() {
        return ("has no run.toml".into(), one_of(&runs, "name one of the runs in it"));
    }
    match std::fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
        Ok(true) => ("is an empty directory".into(), creation),
        Ok(false) => ("has no run.toml".into(), creation),
        Err(error) => (format!("cannot be read: {error}"), "see its owner and mode".into()),
    }
}

/// A path as it can be pasted into a shell.
fn shown(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn is_run(dir: &Path) -> bool {
    dir.join(RUN_FILE).is_file()
}

/// Runs directly below a directory, by name.
fn runs_below(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().take(EXAMINED).flatten();
    let mut runs: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| is_run(path)).collect();
    runs.sort();
    runs
}

fn one_of(runs: &[PathBuf], what: &str) -> String {
    let names: Vec<String> = runs.iter().take(LISTED).map(|run| shown(run)).collect();
    match runs.len() {
        0 => "it has no runs; `gradtx sweep` writes them".into(),
        n if n > LISTED => format!("{what}: {} and {} more", names.join(", "), n - LISTED),
        _ => format!("{what}: {}", names.join(", ")),
    }
}

/// The run that a directory lies in.
fn run_above(path: &Path) -> Option<PathBuf> {
    let absolute = path.canonicalize().ok()?;
    absolute.ancestors().skip(1).find(|dir| is_run(dir)).map(Path::to_owned)
}

/// A run beside the missing one whose name is like its name.
fn similar(path: &Path) -> Option<PathBuf> {
    let wanted = path.file_name()?.to_string_lossy().to_lowercase();
    let near = |run: &PathBuf| {
        let name = run.file_name()?.to_string_lossy().to_lowercase();
        let far = osa_distance(&wanted, &name);
        (far <= (wanted.chars().count() / 3).max(1)).then_some(far)
    };
    runs_below(parent(path)).into_iter().filter_map(|run| Some((near(&run)?, run))).min().and_then(
        |(_, run)| {
            // As it was typed, with the right name.
            Some(path.with_file_name(run.file_name()?))
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(dir: PathBuf) {
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(RUN_FILE), "seed = 1\n").unwrap();
    }

    #[test]
    fn every_kind_of_directory_is_called_by_its_name() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        run(at("runs/first"));
        run(at("sweep/lr=1"));
        std::fs::write(at("sweep").join(INDEX_FILE), "{}").unwrap();
        for (dir, file) in [("model", "config.json"), ("adapter", "adapter_config.json"), ("data", "x.jsonl")]
        {
            std::fs::create_dir(at(dir)).unwrap();
            std::fs::write(at(dir).join(file), "{}").unwrap();
        }
        std::fs::create_dir(at("pretrained")).unwrap();
        std::fs::write(at("pretrained/config.json"), "{}").unwrap();
        let outputs = [
            ("out", "finetune"),
            ("world", "world"),
            ("runs/first/shadow", "curate"),
            ("pretrained", "pretrain"),
        ];
        for (dir, stage) in outputs {
            std::fs::create_dir_all(at(dir)).unwrap();
            let record =
                format!(r#"{{"stage": "{stage}", "version": "0", "settings": {{}}, "outputs": {{}}}}"#);
            std::fs::write(at(dir).join(RECORD_FILE), record).unwrap();
        }
        std::fs::create_dir(at("empty")).unwrap();
        std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
        for (path, words) in [
            ("runs/frist", ["no such directory", "did you mean"]),
            ("runs/FIRST1", ["no such directory", "runs/first?"]),
            ("runs/quite-another", ["no such directory", "--config FILE"]),
            ("link", ["a link to nowhere", "--config FILE"]),
            ("runs/first/run.toml", ["is a run file", "runs/first"]),
            ("data/x.jsonl", ["is a file", "run.toml"]),
            ("sweep", ["a sweep", "sweep/lr=1"]),
            ("runs/first/shadow", ["the stage curate", "runs/first?"]),
            ("out", ["output of the stage finetune", "--out"]),
            ("world", ["output of the stage world", "settings.toml"]),
            ("adapter", ["PEFT adapter", "--adapter"]),
            ("model", ["model directory", "models.tiny"]),
            ("pretrained", ["model directory", "models.tiny"]),
            ("runs", ["no run.toml", "runs/first"]),
            ("empty", ["empty directory", "--config FILE"]),
            ("data", ["no run.toml", "--config FILE"]),
        ] {
            let (what, hint) = describe(&at(path));
            assert!(what.contains(words[0]) && hint.contains(words[1]), "{path}: {what}; {hint}");
        }
        assert!(!at("runs/frist").exists(), "nothing is made");
    }
}
