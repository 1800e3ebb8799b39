//! Finding score files.
//!
//! In: directories. Out: [`Scored`], and the files that are none, with the reason.

use super::{Entry, SCORE_FILE, Scored, Tuned};
use gradtx_pipeline::cross_validation::CROSS_VALIDATION_DIR;
use gradtx_pipeline::lineage::Kind;
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, checksum, read_text};
use gradtx_runtime::data::Metric;
use gradtx_train::baselines::Method;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The part of a score file that the table needs.
#[derive(Deserialize)]
struct ScoreFile {
    examples: usize,
    metric: Metric,
    score: Option<f64>,
    model: Role,
    #[serde(flatten)]
    lineage: ScoredLineage,
    data: String,
    data_name: String,
}

/// How the model came to be, in files of every age.
#[derive(Deserialize)]
struct ScoredLineage {
    kind: Kind,
    method: Option<Method>,
    #[serde(default)]
    random_student: bool,
    #[serde(default)]
    refined: bool,
    #[serde(default)]
    emulator: bool,
    #[serde(default)]
    healed: bool,
    #[serde(default)]
    edge: bool,
}

impl ScoredLineage {
    fn entry(&self, model: Role) -> std::result::Result<Entry, String> {
        let &Self { kind, method, random_student, refined, emulator, healed, edge } = self;
        Ok(match (kind, method) {
            (Kind::Base, _) if emulator => Entry::Emulator(Tuned::Nothing),
            (Kind::Finetuned, _) if healed && edge => Entry::Emulator(Tuned::WholeThenEdge),
            (Kind::Finetuned, _) if emulator && !edge => Entry::Emulator(Tuned::Whole),
            (Kind::Finetuned, _) if emulator => Entry::Emulator(Tuned::Edge),
            (Kind::Base, _) => Entry::Base(model),
            (Kind::Finetuned, _) if edge => Entry::FinetunedEdge(model),
            (Kind::Finetuned, _) => Entry::Finetuned(model),
            (Kind::PluggedIn, _) => Entry::PluggedIn,
            (Kind::Adapter, _) => Entry::Adapter(model),
            (Kind::Translated, Some(method)) if refined => Entry::Refined(method),
            (Kind::Translated, Some(method)) => Entry::Translated { method, random_student },
            (Kind::Translated, None) => return Err("a translation without its method".into()),
        })
    }
}

impl ScoreFile {
    fn read(path: &Path) -> std::result::Result<Scored, String> {
        let text = read_text(path, MAX_CONFIG_BYTES).map_err(|e| e.to_string())?;
        verify(path, &text)?;
        let file: Self = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        Ok(Scored {
            entry: file.lineage.entry(file.model)?,
            metric: file.metric,
            score: file.score.unwrap_or(f64::NAN),
            examples: file.examples,
            data: file.data,
            data_name: file.data_name,
            path: path.to_owned(),
        })
    }
}

/// Fails when the record beside a score says that it is not what `evaluate` wrote. A score alone
/// is taken as it is.
fn verify(path: &Path, text: &str) -> std::result::Result<(), String> {
    let record = path.with_file_name(RECORD_FILE);
    if !record.exists() {
        return Ok(());
    }
    let record = record::read(&record).map_err(|error| format!("{error:#}"))?;
    match record.outputs.get(SCORE_FILE) {
        Some(sum) if *sum == checksum(text.as_bytes()) => Ok(()),
        Some(_) => Err("damaged: not the score that `evaluate` wrote; run it again".into()),
        None => Err("its evaluation has not finished".into()),
    }
}

/// Directories below the roots are entered this deep.
const DEPTH: usize = 12;

/// All files of this name at or below these directories, each once, sorted. Links to
/// directories are not followed, and no cross-validation below is entered: shadow pairs that play
/// clients are no clients.
pub fn find(roots: &[&Path], name: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, name: &str, depth: usize, out: &mut BTreeSet<PathBuf>) {
        let Ok(entries) = std::fs::read_dir(dir) else { return };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() && depth > 0 && entry.file_name() != CROSS_VALIDATION_DIR {
                walk(&entry.path(), name, depth - 1, out);
            } else if kind.is_file() && entry.file_name() == name {
                out.insert(entry.path());
            }
        }
    }
    let mut out = BTreeSet::new();
    for root in roots {
        if let Ok(root) = root.canonicalize() {
            walk(&root, name, DEPTH, &mut out);
        }
    }
    out.into_iter().collect()
}

/// Every score below these directories; and the files that could not be used, with why.
pub fn collect(roots: &[&Path]) -> (Vec<Scored>, Vec<(PathBuf, String)>) {
    let (mut scored, mut unusable) = (vec![], vec![]);
    for path in find(roots, SCORE_FILE) {
        match ScoreFile::read(&path) {
            Ok(found) => scored.push(found),
            Err(why) => unusable.push((path, why)),
        }
    }
    (scored, unusable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_that_its_record_does_not_know_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let settings = serde_json::json!({});
        let open = || record::open(dir.path(), "evaluate", settings.clone()).unwrap();
        let record::State::Open(output) = open() else { panic!("there is no result yet") };
        let path = dir.path().join(SCORE_FILE);
        let text = r#"{"examples": 7, "metric": "rouge1", "score": 0.5, "model": "llm", "kind": "base",
            "method": null, "data": "ab", "data_name": "c/test"}"#;
        std::fs::write(&path, text).unwrap();
        assert!(collect(&[dir.path()]).1[0].1.contains("has not finished"));
        output.finish(&[SCORE_FILE.into()]).unwrap();
        assert_eq!(collect(&[dir.path()]).0.len(), 1);
        std::fs::write(&path, text.replace("0.5", "0.7")).unwrap();
        let (scored, unusable) = collect(&[dir.path()]);
        assert!(scored.is_empty() && unusable[0].1.contains("damaged"), "{unusable:?}");
    }

    #[test]
    fn a_cross_validation_has_no_clients() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join(CROSS_VALIDATION_DIR);
        let text = r#"{"examples": 7, "metric": "rouge1", "score": 0.5, "model": "llm", "kind": "base",
            "method": null, "data": "ab", "data_name": "c/test"}"#;
        for at in [dir.path().join("clients/a"), home.join("fold-1/b")] {
            std::fs::create_dir_all(&at).unwrap();
            std::fs::write(at.join(SCORE_FILE), text).unwrap();
        }
        let paths = |root: &Path| -> Vec<PathBuf> {
            collect(&[root]).0.into_iter().map(|scored| scored.path).collect()
        };
        assert!(matches!(&paths(dir.path())[..], [one] if one.ends_with("clients/a/score.json")));
        assert_eq!(paths(&home).len(), 1, "its own summary sees them");
    }

    #[test]
    fn score_files_are_found_and_what_is_not_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let at = dir.path().join(name);
            std::fs::create_dir_all(&at).unwrap();
            std::fs::write(at.join(SCORE_FILE), text).unwrap();
        };
        let text = r#"{"examples": 7, "metric": "rouge1", "score": 0.5, "exact_match": 0.1, "rouge1": 0.5,
            "right": 1, "ended": 1.0, "answer": "whole", "model": "llm", "kind": "translated",
            "method": "grad-transformer", "random_student": true, "data": "ab", "data_name": "c/test"}"#;
        put("a/b", text);
        put("old", r#"{"examples": 7, "right": 1, "exact_match": 0.1}"#);
        put("null", &text.replace("0.5", "null").replace("true", "false"));
        let sub = dir.path().join("a");
        let (mut found, unusable) = collect(&[dir.path(), &sub, Path::new("/nowhere/at/all")]);
        assert_eq!((found.len(), unusable.len()), (2, 1));
        assert!(unusable[0].0.ends_with("old/score.json"));
        assert!(found.pop().unwrap().score.is_nan());
        let first = found.pop().unwrap();
        assert_eq!((first.entry, first.metric, first.score), (Entry::RANDOM_STUDENT, Metric::Rouge1, 0.5));
    }
}
