//! `bench translate`: student updates through the encoder once, teacher blocks out of the decoder
//! one by one.
//!
//! **Bytes**, by [`TranslatorWork::generating`]: all values once for every teacher block, which
//! overstates what the encoder is read by a little; a floor, since at a batch of one every
//! product reads its whole matrix for one row.

use super::counts::Count;
use super::models::{NamedTranslator, TranslatorArgs, check_memory};
use super::options::{Common, at_least_one};
use super::results::{Entry, Results, rounded};
use super::train::updates;
use super::{Measured, On, measure};
use anyhow::{Result, ensure};
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{Generator, GradTransformer};
use gradtx_plan::cost::work::TranslatorWork;
use serde_json::json;

/// What to translate.
#[derive(Debug, clap::Args)]
pub struct Job {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    sizes: TranslatorArgs,
    /// Updates at once.
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
}

impl Measured for Job {
    fn measure<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        on: &On<'_, D>,
        results: &mut Results,
    ) -> Result<()> {
        at_least_one("--batch", self.batch)?;
        let translator = NamedTranslator::find(&self.sizes, on.machine.is_cpu())?;
        let config = &translator.config;
        let outline = GradTransformer::<D, X>::meta(on.device, config.clone())?;
        check_memory(on.device, &translator.name, "--batch", self.batch, |n| {
            let mut plan = Generator::plan(&outline, n)?;
            plan.extend(outline.plan_values()?);
            Ok(plan)
        })?;
        let model = translator.make::<X, D>(on.device)?;
        let mut generator = Generator::new(&model, self.batch)?;
        let students = updates(self.batch * config.student_len(), 3);
        let times = measure::step(on.device, results.repeats(), || {
            let teachers = generator.generate(&model, &students)?;
            ensure!(teachers.iter().all(|x| x.is_finite()), "a translated value is not finite");
            Ok(())
        })?;
        let values = model.layout().count() as f64;
        let work = TranslatorWork { config, values, element: size_of::<X>() as f64 };
        let cost = work.generating(self.batch as f64);
        let count = Count { flops: cost.flops, bytes: cost.bytes };
        let more = json!({"model": translator.name, "batch": self.batch, "parameters": values,
            "updates_per_s": rounded(self.batch as f64 / times.median())});
        let shape = format!("{} batch {}", translator.shape(), self.batch);
        results.add(on.device, Entry::new("translate", shape, count, times).with(more))
    }
}
