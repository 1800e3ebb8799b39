//! What a client gave back, and whose emulator it was trained through.

use crate::records::EmulateInputs;
use crate::trained::{self, Trained};
use anyhow::Result;
use gradtx_models::decoder::DecoderConfig;
use gradtx_run::failure::failed;
use gradtx_run::paths::EMULATOR_MODEL_DIR;
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_runtime::artifact::{fingerprint, is_model_dir};
use gradtx_runtime::text::shown;
use gradtx_train::model_spec::{ModelSpec, NOTE_BASE, NOTE_EDGE, NOTE_EMULATOR, NOTE_EXAMPLES};
use std::path::Path;

/// An emulator that the provider made, as its directory says.
pub(super) struct Origin {
    edge: [usize; 2],
    /// Fingerprint; none of one in whole matrices, which clients do not know for an emulator.
    fingerprint: Option<String>,
}

impl Origin {
    /// Reads the directory of an emulator, or the one of `emulate` that it lies in.
    ///
    /// # Errors
    /// When it is none, or one of another LLM.
    pub(super) fn read(dir: &Path, llm: &ModelSpec, threads: usize) -> Result<Self> {
        let inside = dir.join(EMULATOR_MODEL_DIR);
        let model = if is_model_dir(&inside) { &inside } else { dir };
        let emulator = match is_model_dir(model) {
            true => DecoderConfig::read(model)?.emulator,
            false => None,
        };
        let (edge, fingerprint, of) = match emulator {
            Some(emulator) => (emulator.edge, Some(fingerprint(model, threads)?), emulator.base_fingerprint),
            None => {
                let made = Self::recorded(dir)?;
                (made.emulator.edge, None, made.llm)
            }
        };
        if of != llm.space.base_model {
            let what = format!(
                "--emulator {}: of another LLM: expected the fingerprint {}, found {of}",
                shown(dir),
                llm.space.base_model
            );
            return Err(failed(what, "name the emulator of this run's LLM"));
        }
        Ok(Self { edge, fingerprint })
    }

    /// What `emulate` recorded of an emulator in whole matrices.
    fn recorded(dir: &Path) -> Result<EmulateInputs> {
        for home in [Some(dir), dir.parent()].into_iter().flatten() {
            if home.join(RECORD_FILE).is_file()
                && let Some(made) = record::read(&home.join(RECORD_FILE))?.inputs::<EmulateInputs>(home)?
            {
                return Ok(made);
            }
        }
        let what = format!("--emulator {}: expected the directory of an emulator; found none", shown(dir));
        Err(failed(what, "name what `gradtx emulate` wrote: RUN/emulator, or its folder model"))
    }
}

/// What a client gave back.
pub(super) struct Client {
    pub(super) trained: Trained,
    /// Examples that it was trained on, if it says so.
    pub(super) examples: Option<u32>,
}

impl Client {
    /// Opens what a client gave back: it must be of the edge of an emulator of this LLM, by its own notes or by the
    /// emulator that the provider names.
    pub(super) fn open(path: &Path, llm: &ModelSpec, origin: Option<&Origin>) -> Result<Self> {
        let note = |key: &str| trained::note(path, key);
        let of = note(NOTE_BASE)?;
        if let Some(of) = of.as_ref().filter(|of| **of != llm.space.base_model) {
            let what = format!(
                "{}: trained through another LLM's emulator: made for the fingerprint {of}, found {}",
                shown(path),
                llm.space.base_model
            );
            return Err(failed(what, "use the LLM that the emulator was made of"));
        }
        if let (Some(known), Some(found)) =
            (origin.and_then(|origin| origin.fingerprint.as_ref()), note(NOTE_EMULATOR)?)
            && *known != found
        {
            let what = format!(
                "{}: trained through another emulator than --emulator: expected the fingerprint {known}, found {found}",
                shown(path)
            );
            return Err(failed(what, "name the emulator that this client had"));
        }
        let edge = match (origin, of) {
            (Some(origin), _) => origin.edge,
            (None, Some(_)) => noted_edge(path, note(NOTE_EDGE)?)?,
            (None, None) => {
                let what = format!("{}: it does not say of which LLM's emulator it is", shown(path));
                let hint = "name the emulator that the client had, --emulator DIR, for what other programs than \
                            gradtx wrote; `gradtx merge` takes any adapter";
                return Err(failed(what, hint));
            }
        };
        let trained = Trained::open(path, &llm.model, &llm.dir)?;
        let client = Self { examples: examples(path, note(NOTE_EXAMPLES)?)?, trained };
        client.expect_edge(path, edge, llm.model.layers)?;
        Ok(client)
    }

    /// Fails unless it changes the edge and nothing else; for full weights, all of the edge.
    fn expect_edge(&self, path: &Path, [first, last]: [usize; 2], layers: usize) -> Result<()> {
        let middle = first..layers.saturating_sub(last);
        let own = self.trained.layers();
        let expected =
            format!("expected the edge alone, the first {first} and the last {last} of {layers} layers");
        if let Some(layer) = own.iter().find(|layer| middle.contains(layer)) {
            let hint = "train with `lora.layers_to_transform` unset, or naming layers of the edge";
            return Err(failed(format!("{}: it changes layer {layer}; {expected}", shown(path)), hint));
        }
        let is_missing = |layer: &usize| !middle.contains(layer) && !own.contains(layer);
        if let (Trained::Layers(_), Some(layer)) = (&self.trained, (0..layers).find(is_missing)) {
            let what = format!("{}: layer {layer} is not there; {expected}, whole", shown(path));
            return Err(failed(what, "train all layers of the edge: leave `lora.layers_to_transform` unset"));
        }
        Ok(())
    }
}

fn wrong(path: &Path, what: &str, found: &str) -> anyhow::Error {
    let what = format!("{}: {what} `{found}` in its notes", shown(path));
    failed(what, "it is damaged or was edited: ask the client for it again")
}

fn noted_edge(path: &Path, note: Option<String>) -> Result<[usize; 2]> {
    let note = note.unwrap_or_default();
    let numbers: Option<Vec<usize>> = note.split(' ').map(|n| n.parse().ok()).collect();
    let edge = numbers.and_then(|n| <[usize; 2]>::try_from(n).ok());
    edge.ok_or_else(|| wrong(path, "the edge is", &note))
}

fn examples(path: &Path, note: Option<String>) -> Result<Option<u32>> {
    let Some(note) = note else { return Ok(None) };
    match note.parse::<u32>() {
        Ok(count) if count > 0 => Ok(Some(count)),
        _ => Err(wrong(path, "the number of examples is", &note)),
    }
}
