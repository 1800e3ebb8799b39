//! [`Lineage`]: what was done to a base model to get the model that is evaluated or
//! merged, as the records of earlier stages tell it.
//!
//! In: an adapter directory or a model directory. Out: how it came to be. A report tells
//! the rows of its table apart by this, so it comes from records, never from names.

use crate::args::{Method, Role};
use crate::record::{self, RECORD_FILE};
use anyhow::Result;
use gradtx_runtime::artifact::{checksum_file, not_an_adapter};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// How a model came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// As it was given.
    Base,
    /// With an adapter that `finetune` trained.
    Finetuned,
    /// With an adapter that `translate` made.
    Translated,
    /// With an adapter from elsewhere.
    Adapter,
}

/// What was done to a base model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// How it came to be.
    pub kind: Kind,
    /// The translator, for [`Kind::Translated`].
    pub method: Option<Method>,
    /// The translator was given noise in the place of an update.
    pub random_student: bool,
}

/// Files of a PEFT directory.
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Checksums of a PEFT directory's files.
pub fn adapter_sums(dir: &Path) -> Result<Vec<String>> {
    if ADAPTER_FILES.iter().any(|file| dir.join(file).symlink_metadata().is_err()) {
        return Err(not_an_adapter(dir).into());
    }
    ADAPTER_FILES.iter().map(|file| Ok(checksum_file(&dir.join(file))?)).collect()
}

impl Lineage {
    /// A model as it was given.
    pub const BASE: Self = Self { kind: Kind::Base, method: None, random_student: false };

    fn of_kind(kind: Kind) -> Self {
        Self { kind, method: None, random_student: false }
    }

    /// Of an adapter with these [`adapter_sums`]: told by the record of the stage's directory
    /// that it lies in. An adapter that is not the recorded one is from elsewhere.
    pub fn of_adapter(dir: &Path, sums: &[String]) -> Self {
        let elsewhere = Self::of_kind(Kind::Adapter);
        let Ok(dir) = std::path::absolute(dir) else { return elsewhere };
        let (Some(home), Some(name)) = (dir.parent(), dir.file_name()) else { return elsewhere };
        let Ok(record) = record::read(&home.join(RECORD_FILE)) else { return elsewhere };
        let recorded = ADAPTER_FILES.iter().zip(sums).all(|(file, sum)| {
            record.outputs.get(&format!("{}/{file}", name.to_string_lossy())) == Some(sum)
        });
        match record.stage.as_str() {
            "finetune" if recorded => Self::of_kind(Kind::Finetuned),
            "translate" if recorded => {
                let method = serde_json::from_value(record.settings["method"].clone()).ok();
                let random_student = record.settings["random_student"] == Value::Bool(true);
                Self { kind: Kind::Translated, method, random_student }
            }
            _ => elsewhere,
        }
    }

    /// Of a model directory: what `merge` recorded in it, with the model that it is of; for
    /// any other, a base model.
    pub fn of_model(dir: &Path) -> (Option<Role>, Self) {
        let merged = record::read(&dir.join(RECORD_FILE)).ok().filter(|record| record.stage == "merge");
        let told = merged.and_then(|record| {
            let lineage = serde_json::from_value(record.settings["lineage"].clone()).ok()?;
            Some((serde_json::from_value(record.settings["role"].clone()).ok(), lineage))
        });
        told.unwrap_or((None, Self::BASE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::State;
    use serde_json::json;

    /// A stage's directory with an adapter in it.
    fn stage(name: &str, settings: Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let State::Open(output) = record::open(dir.path(), name, settings).unwrap() else {
            panic!("a new directory has no result");
        };
        std::fs::create_dir(dir.path().join("adapter")).unwrap();
        let files = ADAPTER_FILES.map(|file| format!("adapter/{file}"));
        files.iter().for_each(|file| std::fs::write(dir.path().join(file), file).unwrap());
        output.finish(&files).unwrap();
        dir
    }

    fn lineage(dir: &Path) -> Lineage {
        let adapter = dir.join("adapter");
        Lineage::of_adapter(&adapter, &adapter_sums(&adapter).unwrap())
    }

    #[test]
    fn adapters_are_told_apart_by_their_records() {
        let dir = stage("finetune", json!({}));
        assert_eq!(lineage(dir.path()), Lineage::of_kind(Kind::Finetuned));
        let dir = stage("translate", json!({"method": "ridge", "random_student": true}));
        let want = Lineage { kind: Kind::Translated, method: Some(Method::Ridge), random_student: true };
        assert_eq!(lineage(dir.path()), want);
        std::fs::write(dir.path().join("adapter").join(ADAPTER_FILES[1]), "another").unwrap();
        assert_eq!(lineage(dir.path()).kind, Kind::Adapter);
        std::fs::remove_file(dir.path().join(RECORD_FILE)).unwrap();
        assert_eq!(lineage(dir.path()).kind, Kind::Adapter);
    }

    #[test]
    fn merged_models_keep_their_lineage() {
        let lineage = Lineage { kind: Kind::Translated, method: Some(Method::Mean), random_student: false };
        let dir = stage("merge", json!({"role": "tiny", "lineage": lineage}));
        assert_eq!(Lineage::of_model(dir.path()), (Some(Role::Tiny), lineage));
        let dir = stage("world", json!({}));
        assert_eq!(Lineage::of_model(dir.path()), (None, Lineage::BASE));
    }
}
