//! Where a Grad-Transformer comes from and goes to: random values, a published T5, a
//! translator directory (`config.json`, `model.safetensors`, normalisation statistics).

use super::{GradTransformer, GradTransformerConfig, Normalization};
use crate::t5::{T5Config, weights};
use gradtx_kernels::ops::Backend;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Buffer, Real};
use gradtx_runtime::artifact::{TensorSource, write_json, write_params};
use gradtx_runtime::{Error, Result};
use safetensors::Dtype;
use std::path::Path;

/// The T5's parameters within the model.
const T5: &str = "t5.";

impl<D: Backend<X>, X: Real> GradTransformer<D, X> {
    /// A new model: Xavier-uniform projections, zero biases, and a T5 as if never trained.
    pub fn random(dev: &D, config: GradTransformerConfig, key: u64) -> Result<Self> {
        let mut model = Self::empty(dev, config)?;
        weights::randomise::<D, X>(dev, &mut model.values, &model.layout, T5, &model.config.t5, key)?;
        model.randomise_projections(key)?;
        Ok(model)
    }

    /// A new model around the T5 of a Hugging Face directory (such as Flan-T5), whose sizes
    /// must be those of `config.t5`.
    pub fn from_t5(dev: &D, config: GradTransformerConfig, dir: &Path, key: u64) -> Result<Self> {
        let path = dir.join("config.json");
        let found = T5Config::open(&path)?;
        // Dropout is a setting of the training, not of the published weights.
        let found = T5Config { dropout_rate: config.t5.dropout_rate, ..found };
        if found != config.t5 {
            return Err(Error::file(&path, format!("expected a T5 of {:?}, found {found:?}", config.t5)));
        }
        let mut model = Self::meta(dev, config)?;
        let source = TensorSource::open(dir)?;
        weights::check_shapes(&model.layout, T5, &source)?;
        model.values = dev.zeros(model.layout.total())?;
        weights::load::<D, X>(dev, &mut model.values, &model.layout, T5, &source, &weights::UNUSED)?;
        model.randomise_projections(key)?;
        Ok(model)
    }

    fn randomise_projections(&mut self, key: u64) -> Result<()> {
        let mut stage = Vec::new();
        for param in self.layout.params().iter().filter(|p| !p.name.starts_with(T5)) {
            // Biases, of one dimension, stay zero.
            let [out_dim, in_dim] = param.shape[..] else { continue };
            let bound = (6.0 / (in_dim + out_dim) as f64).sqrt();
            let mut stream = Stream::new(derive_named(key, &param.name));
            let host: Vec<f32> =
                (0..param.len()).map(|_| ((2.0 * stream.uniform() - 1.0) * bound) as f32).collect();
            let place = self.values.view_mut(param.range());
            weights::upload_f32::<D, X>(&self.dev, place, &host, &mut stage)?;
        }
        Ok(())
    }

    /// Reads a translator directory. Token embeddings and head of the T5, which are not used,
    /// may be there.
    ///
    /// # Errors
    /// Names the field or tensor that is missing, unknown, of the wrong shape or not finite.
    pub fn load(dev: &D, dir: &Path) -> Result<Self> {
        let (config, mode) = GradTransformerConfig::open(&dir.join("config.json"))?;
        let mut model = Self::meta(dev, config)?;
        let source = TensorSource::open(dir)?;
        weights::check_shapes(&model.layout, "", &source)?;
        model.values = dev.zeros(model.layout.total())?;
        let unused = weights::UNUSED.map(|name| format!("{T5}{name}"));
        let unused: Vec<&str> = unused.iter().map(String::as_str).collect();
        weights::load::<D, X>(dev, &mut model.values, &model.layout, "", &source, &unused)?;
        let (student, teacher) = (model.normalization.student_shape(), model.normalization.teacher_shape());
        model.normalization = Normalization::load(dir, mode, student, teacher)?;
        Ok(model)
    }

    /// Writes a translator directory, which must exist, with the model's values.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_values(dir, &weights::to_f32::<D, X>(&self.dev, &self.values)?)
    }

    /// As [`Self::save`], with other values in the same layout (masters, or an average).
    ///
    /// `config.json` comes last: a directory that has it is whole.
    pub fn save_values(&self, dir: &Path, values: &[f32]) -> Result<()> {
        write_params(&dir.join("model.safetensors"), &self.layout, values, Dtype::F32)?;
        self.normalization.save(dir)?;
        write_json(&dir.join("config.json"), &self.config.to_json(self.normalization.mode()))
    }
}
