//! A held-out shadow pair in the place of a client.
//!
//! In: a shadow pair's last snapshot of one model. Out: `update.safetensors` and `adapter/`, as
//! `finetune` writes them: the TinyLM's is what a client would send, the LLM's what its data would
//! have given at best.

use crate::artifacts::Tuples;
use crate::records::ShadowClientInputs;
use anyhow::Result;
use gradtx_run::context::Context;
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::stage::Stage;
use gradtx_train::model_spec::ModelSpec;
use std::path::{Path, PathBuf};

/// An update of a shadow pair, taken for a client's.
pub struct ShadowClient<'a> {
    /// Directory of the results.
    pub out: PathBuf,
    /// The whole tuple store.
    pub tuples: &'a Tuples,
    /// The model.
    pub model: &'a ModelSpec,
    /// Shadow index.
    pub shadow: usize,
    /// Examples that it was trained on.
    pub examples: usize,
}

impl Stage for ShadowClient<'_> {
    type Inputs = ShadowClientInputs;
    type Output = ();

    fn dir(&self) -> &Path {
        &self.out
    }

    fn inputs(&self) -> Result<ShadowClientInputs> {
        Ok(ShadowClientInputs {
            tuples: self.tuples.manifest.clone(),
            shadow: self.shadow,
            role: self.model.role,
            model: self.model.space.base_model.clone(),
        })
    }

    fn make(&self, _: &Context) -> Result<(Vec<String>, ())> {
        let Self { out, tuples, model, shadow, .. } = self;
        let store = &tuples.store;
        let pair = (0..store.pairs()).find(|&pair| store.shadow(pair) == *shadow);
        let pair = pair.ok_or_else(|| anyhow::anyhow!("shadow pair {shadow} is not in the tuple store"))?;
        let mut values = vec![0.0; model.space.values()];
        store.read(model.role.side(), pair, store.steps() - 1, &mut values)?;
        let mut update = model.update(values, self.examples as u64);
        // Public data: nobody has to be asked.
        update.meta.refinement = true;
        let mut files = model.write_peft(out, &update.values)?;
        update.write(&out.join(UPDATE_FILE))?;
        files.push(UPDATE_FILE.into());
        Ok((files, ()))
    }

    fn report(&self, _: &Context, (): &()) -> Result<()> {
        Ok(())
    }
}
