//! [`Lineage`]: what was done to a base model to get the model that is evaluated or
//! merged, as the records of earlier stages report it.
//!
//! In: an adapter directory or a model directory. Out: how it came to be. A report gives
//! the rows of its table apart by this, so it comes from records, never from names.

pub use crate::records::{Kind, Lineage};

use crate::records::{
    ClientVariantInputs, EmulateInputs, FinetuneInputs, MergeInputs, PluginInputs, RefineInputs,
    ShadowClientInputs, TranslateInputs,
};
use crate::trained;
use anyhow::Result;
use gradtx_models::LAYERS_FILE;
use gradtx_models::decoder::DecoderConfig;
use gradtx_run::failure::failed;
use gradtx_run::paths::{ADAPTER_DIR, EMULATOR_MODEL_DIR};
use gradtx_run::record::{self, RECORD_FILE, Record};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{checksum_file, not_an_adapter};
use gradtx_runtime::text::shown;
use std::path::Path;

/// Files of a PEFT directory.
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Checksums of a PEFT directory's files.
pub fn adapter_sums(dir: &Path) -> Result<Vec<String>> {
    if ADAPTER_FILES.iter().any(|file| dir.join(file).symlink_metadata().is_err()) {
        return Err(not_an_adapter(dir).into());
    }
    ADAPTER_FILES.iter().map(|file| Ok(checksum_file(&dir.join(file))?)).collect()
}

/// Fails when files in the directory that a stage has finished are not what it wrote. For a
/// model that comes from elsewhere there is nothing to compare with.
pub(crate) fn verify_model(dir: &Path) -> Result<Option<Record>> {
    let path = dir.join(RECORD_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let record = record::read(&path)?;
    if record.outputs.is_empty() {
        let what = format!("{}: `{}` has not finished here", shown(dir), record.stage);
        return Err(failed(what, "run the stage again: it does what is missing"));
    }
    match record.problems(dir, |_| true).into_iter().next() {
        None => Ok(Some(record)),
        Some(problem) => {
            Err(failed(problem, "run the stage again that made it; or copy the model elsewhere"))
        }
    }
}

impl Lineage {
    /// A model as it was given.
    pub const BASE: Self = Self {
        kind: Kind::Base,
        method: None,
        random_student: false,
        refined: false,
        emulator: false,
        healed: false,
        edge: false,
    };

    fn of_kind(kind: Kind) -> Self {
        Self { kind, ..Self::BASE }
    }

    /// Of an adapter, or of full weights of layers, with these checksums, that is to be used with a model of this
    /// fingerprint: as the record of the stage's directory says that it lies in. An adapter
    /// that no record names is from elsewhere.
    ///
    /// # Errors
    /// When the adapter is not what the stage wrote, or is of another base model.
    pub fn of_adapter(dir: &Path, sums: &[String], base: &str) -> Result<Self> {
        let elsewhere = Self::of_kind(Kind::Adapter);
        let dir = std::path::absolute(trained::layer_file(dir).unwrap_or_else(|| dir.to_owned()))?;
        let (Some(home), Some(name)) = (dir.parent(), dir.file_name()) else { return Ok(elsewhere) };
        let path = home.join(RECORD_FILE);
        let files: Vec<String> = match name.to_str() {
            Some(ADAPTER_DIR) => ADAPTER_FILES.map(|file| format!("{ADAPTER_DIR}/{file}")).into(),
            Some(LAYERS_FILE) => vec![LAYERS_FILE.into()],
            _ => return Ok(elsewhere),
        };
        if !path.exists() {
            return Ok(elsewhere);
        }
        let record = record::read(&path)?;
        let (lineage, made_for) = if let Some(made) = record.inputs::<FinetuneInputs>(home)? {
            let edge = made.layers.is_some() || !made.adapter.layers_to_transform.is_empty();
            (Self { edge, ..Self::of_kind(Kind::Finetuned) }, made.model)
        } else if let Some(made) = record.inputs::<ShadowClientInputs>(home)? {
            (Self::of_kind(Kind::Finetuned), made.model)
        } else if let Some(made) = record.inputs::<ClientVariantInputs>(home)? {
            (Self::of_kind(Kind::Finetuned), made.model)
        } else if let Some(made) = record.inputs::<TranslateInputs>(home)? {
            let (method, random_student) = (Some(made.method), made.random_student);
            (Self { method, random_student, ..Self::of_kind(Kind::Translated) }, made.llm)
        } else if let Some(made) = record.inputs::<RefineInputs>(home)? {
            let lineage = Self { method: made.method, refined: true, ..Self::of_kind(Kind::Translated) };
            (lineage, made.llm)
        } else {
            return Ok(elsewhere);
        };
        for (file, sum) in files.iter().zip(sums) {
            if record.outputs.get(file) != Some(sum) {
                let what = format!("{}: not what `{}` wrote here", shown(&home.join(file)), record.stage);
                let why = "it is damaged, was edited, or belongs to an attempt that has not finished; run the \
                           stage again, or copy the adapter elsewhere to use it as your own";
                return Err(failed(what, why));
            }
        }
        if made_for != base {
            let what = format!(
                "{}: an adapter of another base model: made for the fingerprint {made_for}, found {base}",
                shown(&dir)
            );
            let why =
                "use the model that it was made for; or copy the adapter elsewhere to use it as your own";
            return Err(failed(what, why));
        }
        Ok(lineage)
    }

    /// Of an LLM with an edge that clients trained.
    pub(crate) fn plugged_in() -> Self {
        Self::of_kind(Kind::PluggedIn)
    }

    /// Of this adapter's model, whose base came to be like that.
    pub(crate) fn on(self, base: Self) -> Self {
        let healed = base.healed || (base.emulator && base.kind == Kind::Finetuned && !base.edge);
        Self { emulator: base.emulator, healed, ..self }
    }

    /// Of a model directory: what `merge` recorded in it, with the model that it is of; for
    /// any other, a base model, or the emulator of one.
    ///
    /// # Errors
    /// When a stage made the model, and its files are not what it wrote.
    pub fn of_model(dir: &Path) -> Result<(Option<Role>, Self)> {
        let Some(record) = verify_model(dir)? else {
            return Ok((None, Self { emulator: is_emulator(dir)?, ..Self::BASE }));
        };
        if record.inputs::<PluginInputs>(dir)?.is_some() {
            return Ok((Some(Role::Llm), Self::plugged_in()));
        }
        let merged = record.inputs::<MergeInputs>(dir)?;
        Ok(merged.map_or((None, Self::BASE), |made| (Some(made.role), made.lineage)))
    }
}

/// Whether it is an emulator: one of layers of their own, or what `emulate` wrote in whole matrices.
fn is_emulator(dir: &Path) -> Result<bool> {
    if DecoderConfig::read(dir).is_ok_and(|model| model.emulator.is_some()) {
        return Ok(true);
    }
    let dir = std::path::absolute(dir)?;
    let (Some(home), Some(name)) = (dir.parent(), dir.file_name()) else { return Ok(false) };
    if name != EMULATOR_MODEL_DIR || !home.join(RECORD_FILE).is_file() {
        return Ok(false);
    }
    Ok(record::read(&home.join(RECORD_FILE))?.inputs::<EmulateInputs>(home)?.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aggregate::Combine;
    use gradtx_run::config::{DeviceConfig, EvaluateConfig, ReadingInputs, Recipe, RefineConfig};
    use gradtx_run::record::State;
    use gradtx_run::stage::Inputs;
    use gradtx_train::baselines::Method;
    use gradtx_train::examples::DataInputs;
    use gradtx_train::model_spec::AdapterInputs;
    use serde::{Deserialize, Serialize};

    /// A stage's directory with an adapter in it.
    fn stage<I: Inputs>(inputs: &I) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let State::Open(output) = record::open(dir.path(), I::STAGE, inputs.value().unwrap()).unwrap() else {
            panic!("a new directory has no result");
        };
        std::fs::create_dir(dir.path().join("adapter")).unwrap();
        let files = ADAPTER_FILES.map(|file| format!("adapter/{file}"));
        files.iter().for_each(|file| std::fs::write(dir.path().join(file), file).unwrap());
        output.finish(&files).unwrap();
        dir
    }

    fn finetuned() -> FinetuneInputs {
        FinetuneInputs { model: "base".into(), ..FinetuneInputs::default() }
    }

    fn translated(method: &str, random_student: bool, llm: &str) -> TranslateInputs {
        TranslateInputs {
            method: Method::named(method).unwrap(),
            combine: Combine::Mean,
            aggregation: None,
            random_student,
            updates: vec![],
            held_out: vec![],
            with: serde_json::Map::new(),
            llm: llm.into(),
            device: DeviceConfig::default(),
            products: None,
            lora_r: None,
        }
    }

    /// A stage that makes base models.
    #[derive(Serialize, Deserialize)]
    struct Other {}

    impl Inputs for Other {
        const STAGE: &'static str = "world";
    }

    fn lineage(dir: &Path) -> Result<Lineage> {
        let adapter = dir.join("adapter");
        Lineage::of_adapter(&adapter, &adapter_sums(&adapter).unwrap(), "base")
    }

    #[test]
    fn adapters_are_told_apart_by_their_records() {
        let dir = stage(&finetuned());
        assert_eq!(lineage(dir.path()).unwrap(), Lineage::of_kind(Kind::Finetuned));
        let dir = stage(&translated("ridge", true, "base"));
        let of_translation = Lineage { kind: Kind::Translated, ..Lineage::BASE };
        let want = Lineage { method: Method::named("ridge"), random_student: true, ..of_translation };
        assert_eq!(lineage(dir.path()).unwrap(), want);
        let refined = stage(&RefineInputs {
            seed: 1,
            data: DataInputs::default(),
            max_length: 1,
            refine: RefineConfig::default(),
            recipe: Recipe::default(),
            evaluate: EvaluateConfig::default(),
            updates: vec![],
            translated: vec![],
            held_out: vec![],
            method: Some(Method::Products),
            tiny: "tiny".into(),
            llm: "base".into(),
            adapter: AdapterInputs::default(),
            device: DeviceConfig::default(),
            reading: ReadingInputs::default(),
        });
        let want = Lineage { method: Some(Method::Products), refined: true, ..of_translation };
        assert_eq!(lineage(refined.path()).unwrap(), want);
        // A copy is anybody's own.
        let copy = tempfile::tempdir().unwrap();
        std::fs::create_dir(copy.path().join("adapter")).unwrap();
        for file in ADAPTER_FILES.map(|file| format!("adapter/{file}")) {
            std::fs::copy(dir.path().join(&file), copy.path().join(&file)).unwrap();
        }
        assert_eq!(lineage(copy.path()).unwrap().kind, Kind::Adapter);
        std::fs::remove_file(dir.path().join(RECORD_FILE)).unwrap();
        assert_eq!(lineage(dir.path()).unwrap().kind, Kind::Adapter);
    }

    #[test]
    fn adapters_changed_after_their_stage_are_refused() {
        let refused = |dir: &Path, words: &[&str]| {
            let error = lineage(dir).unwrap_err();
            let message = format!("{error:#}");
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        };
        for file in ADAPTER_FILES {
            let dir = stage(&finetuned());
            std::fs::write(dir.path().join("adapter").join(file), "another").unwrap();
            refused(dir.path(), &[file, "not what `finetune` wrote"]);
        }
        let dir = stage(&translated("mean", false, "other"));
        refused(dir.path(), &["another base model", "other", "base"]);
        let path = dir.path().join(RECORD_FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("mean", "maan")).unwrap();
        refused(dir.path(), &[RECORD_FILE, "damaged"]);
        // Begun and not finished.
        std::fs::remove_file(&path).unwrap();
        drop(record::open(dir.path(), "finetune", finetuned().value().unwrap()).unwrap());
        refused(dir.path(), &["not what `finetune` wrote"]);
    }

    #[test]
    fn merged_models_keep_their_lineage() {
        let lineage = Lineage { kind: Kind::Translated, method: Method::named("mean"), ..Lineage::BASE };
        let dir = stage(&MergeInputs {
            role: Role::Tiny,
            model: "base".into(),
            lineage,
            adapter: vec![],
            stops: None,
        });
        assert_eq!(Lineage::of_model(dir.path()).unwrap(), (Some(Role::Tiny), lineage));
        std::fs::write(dir.path().join("adapter").join(ADAPTER_FILES[1]), "another").unwrap();
        assert!(Lineage::of_model(dir.path()).unwrap_err().to_string().contains("damaged"));
        let dir = stage(&Other {});
        assert_eq!(Lineage::of_model(dir.path()).unwrap(), (None, Lineage::BASE));
        assert_eq!(Lineage::of_model(&dir.path().join("adapter")).unwrap(), (None, Lineage::BASE));
    }
}
