//! [`Trained`]: what fine-tuning gives back to be put into a model, a PEFT adapter or the full weights of layers.
//!
//! In: a path, and the model that it is for. Out: what it holds, compared with that model. Files may come from clients:
//! nothing that they say is believed before it is checked, and none of their text gets into messages as it is.

use crate::lineage::adapter_sums;
use anyhow::Result;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{BlockLayout, PeftAdapter, merge, peft_note, read_peft};
use gradtx_models::{LAYERS_FILE, LayerFile, is_layer_file};
use gradtx_run::failure::failed;
use gradtx_runtime::artifact::{TensorFile, TensorSource, checksum_file, not_an_adapter};
use gradtx_runtime::text::{printable_line, shown};
use gradtx_train::model_spec::{NOTE_BASE, NOTE_EMULATOR};
use std::path::{Path, PathBuf};

/// What is put into a model, for people.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// An adapter of this kind.
    Adapter(&'a BlockLayout),
    /// The full weights of these layers.
    Layers(&'a [usize]),
}

/// What was trained.
#[derive(Debug)]
pub enum Trained {
    /// A LoRA adapter.
    Adapter(PeftAdapter),
    /// The full weights of some layers.
    Layers(LayerFile),
}

/// The file of full weights that a path names, itself or the directory of a stage; none for any other path.
pub(crate) fn layer_file(path: &Path) -> Option<PathBuf> {
    let inside = path.join(LAYERS_FILE);
    match path.is_dir() {
        true => (is_layer_file(&inside) && !path.join("adapter_config.json").exists()).then_some(inside),
        false => is_layer_file(path).then(|| path.to_owned()),
    }
}

/// Checksums of the files that a path names.
pub(crate) fn sums(path: &Path) -> Result<Vec<String>> {
    match layer_file(path) {
        Some(file) => Ok(vec![checksum_file(&file)?]),
        None => adapter_sums(path),
    }
}

/// A note that whoever trained what a path names left in its file, fit for a line of text; none if there is no such
/// note. Nothing else of the file is looked at.
pub(crate) fn note(path: &Path, key: &str) -> Result<Option<String>> {
    let note = match layer_file(path) {
        Some(file) => TensorFile::open(&file)?.metadata(key).map(str::to_owned),
        None if path.join("adapter_model.safetensors").is_file() => peft_note(path, key)?,
        None => return Err(not_an_adapter(path).into()),
    };
    Ok(note.map(|note| printable_line(&note).into_owned()))
}

impl Trained {
    /// Opens a PEFT directory, or a file of full weights (or its directory), for the model in `base`.
    ///
    /// # Errors
    /// Names the file, the tensor or field, what was expected and what was found.
    pub fn open(path: &Path, model: &DecoderConfig, base: &Path) -> Result<Self> {
        Ok(match layer_file(path) {
            Some(file) => Self::Layers(LayerFile::open(&file, model, &TensorSource::open(base)?)?),
            None => Self::Adapter(read_peft(path, model)?),
        })
    }

    /// What it is, for people.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Adapter(_) => "a LoRA adapter",
            Self::Layers(_) => "full weights of layers",
        }
    }

    /// The layers that it changes, in increasing order.
    pub(crate) fn layers(&self) -> &[usize] {
        match self {
            Self::Adapter(adapter) => adapter.layout.layers(),
            Self::Layers(file) => file.layers(),
        }
    }

    /// Fails for full weights of layers whose notes say that they are of other models than the one with this
    /// fingerprint: of another emulator, and another LLM.
    pub(crate) fn expect_base(&self, path: &Path, fingerprint: &str) -> Result<()> {
        let Self::Layers(_) = self else { return Ok(()) };
        let mut known = vec![];
        for key in [NOTE_EMULATOR, NOTE_BASE] {
            known.extend(note(path, key)?);
        }
        if known.is_empty() || known.iter().any(|known| known == fingerprint) {
            return Ok(());
        }
        let what = format!(
            "{}: layers of another model: expected the fingerprint {}, found {fingerprint}",
            shown(path),
            known.join(" (the emulator) or ")
        );
        Err(failed(what, "put them into the emulator that they were trained in, or into its LLM"))
    }

    /// Puts it into the model in `base` and writes that to `out`. Returns the names of the files.
    pub(crate) fn put_into(&self, base: &Path, out: &Path, threads: usize) -> Result<Vec<String>> {
        Ok(match self {
            Self::Adapter(adapter) => merge(base, adapter, out, threads)?,
            Self::Layers(file) => LayerFile::put_into(base, &[(file, 1.0)], out)?,
        })
    }

    /// What a model card says of it.
    pub(crate) fn change(&self) -> Change<'_> {
        match self {
            Self::Adapter(adapter) => Change::Adapter(&adapter.layout),
            Self::Layers(file) => Change::Layers(file.layers()),
        }
    }
}
