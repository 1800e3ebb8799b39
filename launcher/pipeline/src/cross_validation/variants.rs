//! Clients unlike the shadows: what a held-out shadow pair would have sent if its owner had done
//! something else.
//!
//! In: a held-out shadow pair, the public data. Out: `update.safetensors` and `adapter/` of one model, made from
//! other examples, in another number of steps, or with noise on the update.

use crate::artifacts::Tuples;
use crate::records::{ClientVariantInputs, Noise};
use crate::variant::Variant;
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_run::config::{Config, Recipe};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch, memory_for};
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::role::Role;
use gradtx_run::stage::Stage;
use gradtx_runtime::artifact::{Role as Part, TupleStore};
use gradtx_runtime::data::{Content, Example, Record};
use gradtx_train::examples::Data;
use gradtx_train::lora::trainer::{Callback, Job, LoraTrainer, Snapshots, Step};
use gradtx_train::model_spec::ModelSpec;
use std::path::{Path, PathBuf};

/// Rows whose prompts contain one of these texts.
pub(super) fn rows_with(records: &[Record], texts: &[String]) -> Vec<usize> {
    let has = |text: &str| texts.iter().any(|wanted| text.contains(wanted.as_str()));
    let asks = |record: &Record| match &record.content {
        Content::Pair { prompt, .. } => has(prompt),
        Content::Chat(messages) => {
            messages[..messages.len().saturating_sub(1)].iter().any(|message| has(&message.content))
        }
    };
    (0..records.len()).filter(|&row| asks(&records[row])).collect()
}

/// The update of one model of a client that differs from its shadow pair.
pub struct ClientVariant<'a> {
    /// Directory of the results.
    pub out: PathBuf,
    /// How it differs.
    pub variant: Variant,
    /// The run's settings.
    pub config: &'a Config,
    /// The whole tuple store.
    pub tuples: &'a Tuples,
    /// Shadows that are left out of translators: noise is measured by the others.
    pub held_out: &'a [usize],
    /// The public data.
    pub public: &'a Data,
    /// The model.
    pub model: &'a ModelSpec,
    /// Shadow index.
    pub shadow: usize,
    /// Rows of the public data that it is trained on.
    pub rows: &'a [usize],
}

impl Stage for ClientVariant<'_> {
    type Inputs = ClientVariantInputs;
    type Output = ();

    fn dir(&self) -> &Path {
        &self.out
    }

    fn inputs(&self) -> Result<ClientVariantInputs> {
        let recipe = match self.variant.noise() {
            Some(_) => None,
            None => Some(self.recipe()),
        };
        Ok(ClientVariantInputs {
            seed: self.config.seed,
            tuples: self.tuples.manifest.clone(),
            shadow: self.shadow,
            role: self.model.role,
            model: self.model.space.base_model.clone(),
            variant: self.variant,
            rows: recipe.as_ref().map_or(vec![], |_| self.rows.to_vec()),
            recipe,
            noise: self
                .variant
                .noise()
                .map(|deviations| Noise { deviations, held_out: self.held_out.to_vec() }),
            device: self.config.device.clone(),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let values = match self.variant.noise() {
            Some(deviations) => self.with_noise(deviations)?,
            None => self.trained(context)?,
        };
        let mut update = self.model.update(values, self.rows.len() as u64);
        // Public data: nobody has to be asked.
        update.meta.refinement = true;
        let mut files = self.model.write_peft(&self.out, &update.values)?;
        update.write(&self.out.join(UPDATE_FILE))?;
        files.push(UPDATE_FILE.into());
        Ok((files, ()))
    }

    fn report(&self, _: &Context, (): &()) -> Result<()> {
        Ok(())
    }
}

impl ClientVariant<'_> {
    /// The shadows' recipe, in the variant's number of steps.
    fn recipe(&self) -> Recipe {
        let curate = &self.config.curate;
        let (recipe, factor) = match self.model.role {
            Role::Tiny => (&curate.tiny, self.variant.steps()),
            Role::Llm => (&curate.llm, 1.0),
        };
        let recipe = recipe.resolved(self.rows.len());
        let max_steps = ((f64::from(recipe.max_steps) * factor).round() as u32).max(1);
        Recipe {
            max_steps,
            num_train_epochs: 0.0,
            warmup_steps: recipe.warmup_steps.min(max_steps),
            ..recipe
        }
    }

    fn key(&self) -> u64 {
        let key = derive(derive_named(self.config.seed, "client variant"), self.shadow as u64);
        derive_named(key, self.variant.name())
    }

    fn trained(&self, context: &Context) -> Result<Vec<f32>> {
        let Self { config, public, model, rows, .. } = self;
        let records: Vec<Record> = rows.iter().map(|&row| public.records[row].clone()).collect();
        let prompts = public.prompts(config, model)?;
        let examples = prompts.examples(&records, context.threads)?.0.examples;
        let recipe = self.recipe();
        let trainer = LoraTrainer {
            side: model,
            recipe: &recipe,
            snapshots: Snapshots { count: 1, every: 1 },
            stream_tokens: config.device.max_tokens_per_microbatch,
        };
        dispatch(&config.device, context, Training { context, trainer, examples: &examples, key: self.key() })
    }

    fn with_noise(&self, deviations: f64) -> Result<Vec<f32>> {
        let store = &self.tuples.store;
        let shadow = |pair: usize| store.shadow(pair);
        let mut values = vec![0.0; self.model.space.values()];
        let pair = (0..store.pairs()).find(|&pair| shadow(pair) == self.shadow);
        let pair = pair.with_context(|| format!("shadow pair {} is not in the tuple store", self.shadow))?;
        store.read(self.model.role.side(), pair, store.steps() - 1, &mut values)?;
        let others: Vec<usize> =
            (0..store.pairs()).filter(|&pair| !self.held_out.contains(&shadow(pair))).collect();
        let deviation = deviations * deviation(store, self.model.role.side(), &others)?;
        let mut stream = Stream::new(self.key());
        values.iter_mut().for_each(|value| *value += (stream.normal() * deviation) as f32);
        Ok(values)
    }
}

/// The standard deviation of the last updates of these pairs around their mean: one number, the root
/// mean square over coordinates.
fn deviation(store: &TupleStore, role: Part, pairs: &[usize]) -> Result<f64> {
    let width = store.space(role).values();
    let (mut sums, mut squares, mut values) = (vec![0.0f64; width], 0.0f64, vec![0.0f32; width]);
    for &pair in pairs {
        store.read(role, pair, store.steps() - 1, &mut values)?;
        for (sum, &value) in sums.iter_mut().zip(&values) {
            *sum += f64::from(value);
            squares += f64::from(value).powi(2);
        }
    }
    let count = pairs.len().max(1) as f64;
    let of_mean = sums.iter().map(|sum| (sum / count).powi(2)).sum::<f64>();
    Ok(((squares / count - of_mean).max(0.0) / width.max(1) as f64).sqrt())
}

/// The training of one adapter.
struct Training<'a> {
    context: &'a Context,
    trainer: LoraTrainer<'a>,
    examples: &'a [Example],
    key: u64,
}

impl Work for Training<'_> {
    /// The update.
    type Output = Vec<f32>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Vec<f32>> {
        let jobs = [Job { examples: self.examples.iter().collect(), key: self.key }];
        let (plan, _) = self.trainer.plan::<X, D>(&jobs)?;
        plan.check(memory_for(device, &self.context.place)?)?;
        let decoder = Decoder::<D, X>::load(device, &self.trainer.side.dir)?;
        let trained = self.trainer.run(&decoder, &jobs, None, &mut Unwatched)?;
        let first = trained.and_then(|(jobs, _)| jobs.into_iter().next());
        Ok(first.context("the training of a client gave no update")?.updates)
    }
}

/// Steps that take seconds are not reported.
struct Unwatched;

impl Callback for Unwatched {
    fn step(&mut self, _: &Step<'_>) -> Result<bool> {
        Ok(true)
    }
}
