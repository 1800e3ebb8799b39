//! Training of the translator, from a store of tuples.
//!
//! In: a tuple store. Out, in a directory: the Grad-Transformer that had the smallest
//! validation error, its normalisation, `metrics.jsonl` (every step's loss, written as it
//! goes), and `throughput.jsonl` (tuples per second).
//!
//! The teachers' updates may be replaced by coordinates (`train.targets`; [`source`]).
//!
//! Ranks share every step: each reads and computes a part of its tuples, and updates a part
//! of the parameters. [`tuples`] says which tuples a step has, [`prepare`] makes their values,
//! [`prefetch`] has that done ahead, [`steps`] goes through the steps, [`data_parallel`] adds up over
//! ranks, [`mod@validate`] measures generated updates, and [`resume`] keeps checkpoints. Only
//! rank 0 writes files, except for checkpoints, of which every rank writes its part.
//!
//! Validation splits by shadow subset unless told otherwise: the tuples of one subset are
//! near duplicates. Its error is relative: 1 is what the mean of the teachers reaches.

pub mod data_parallel;
pub mod prefetch;
pub mod prepare;
pub mod resume;
pub mod source;
pub mod steps;
pub mod tuples;
pub mod validate;

use crate::products::coordinates::{self, Coordinates};
use anyhow::Result;
use data_parallel::DataParallel;
use gradtx_kernels::collective::Candidate;
use gradtx_kernels::rng::derive_named;
use gradtx_kernels::{Backend, Collective, Real};
use gradtx_models::grad_transformer::{
    Generator, GradTransformer, GradTransformerConfig, Normalization, Targets, Trainer,
};
use gradtx_models::t5::T5Config;
use gradtx_run::config::{Config, TrainConfig, TranslatorConfig};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, host_memory, memory_for};
use gradtx_run::interrupt::ShutdownGuard;
use gradtx_runtime::artifact::{Role, TupleStore};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::plan::Room;
use prefetch::Prefetcher;
use prepare::Threads;
use resume::{Best, Checkpoints};
use source::TupleSource;
use std::path::Path;
use steps::Run;
use tuples::{Split, mean_teacher};
use validate::Validation;

/// Sizes of the translator between two sides, each `[blocks, width]`.
pub fn model_config(
    settings: &TranslatorConfig,
    student: [usize; 2],
    teacher: [usize; 2],
) -> Result<GradTransformerConfig> {
    let t5 = if settings.pretrained_path.as_os_str().is_empty() {
        T5Config {
            d_model: settings.d_model,
            d_kv: settings.d_kv,
            d_ff: settings.d_ff,
            num_layers: settings.num_layers,
            num_decoder_layers: settings.num_decoder_layers,
            num_heads: settings.num_heads,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            dropout_rate: settings.dropout_rate,
        }
    } else {
        let published = T5Config::open(&settings.pretrained_path.join("config.json"))?;
        T5Config { dropout_rate: settings.dropout_rate, ..published }
    };
    Ok(GradTransformerConfig {
        student_blocks: student[0],
        student_width: student[1],
        teacher_blocks: teacher[0],
        teacher_width: teacher[1],
        start_token: settings.decoder_start,
        targets: Targets::Factors,
        t5,
    })
}

/// What is predicted for a teacher with updates of this shape, `[blocks, width]`, from so many groups of
/// shadows.
pub fn target_shape(train: &TrainConfig, teacher: [usize; 2], groups: usize) -> [usize; 2] {
    match train.targets {
        Targets::Factors => teacher,
        Targets::Products | Targets::Residual => {
            [teacher[0], coordinates::width(groups, train.max_components)]
        }
    }
}

/// A training that is to be done, on this rank.
pub struct Train<'a> {
    /// What every stage is given.
    pub context: &'a Context,
    /// The ranks that share every step.
    pub comm: &'a dyn Comm,
    /// The settings.
    pub config: &'a Config,
    /// The tuples.
    pub store: &'a TupleStore,
    /// Which of them are trained on, and which are held out.
    pub split: &'a Split,
    /// What is predicted in the place of the teachers' updates.
    pub coordinates: Option<&'a Coordinates>,
    /// Directory of the results and checkpoints.
    pub dir: &'a Path,
    /// Elements of a bucket of gradients at least.
    pub bucket: usize,
}

impl Work for Train<'_> {
    /// On rank 0 the best step, and its validation.
    type Output = Option<(Best, Validation)>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Self::Output> {
        let (settings, train) = (&self.config.translator, &self.config.train);
        let [student, teacher] = Role::BOTH.map(|role| self.source().shape(role));
        let shape =
            GradTransformerConfig { targets: train.targets, ..model_config(settings, student, teacher)? };
        let key = derive_named(self.config.seed, "translator");
        let mut model = match settings.pretrained_path.as_os_str().is_empty() {
            true => GradTransformer::<D, X>::random(device, shape, derive_named(key, "weights"))?,
            false => GradTransformer::from_t5(
                device,
                shape,
                &settings.pretrained_path,
                derive_named(key, "weights"),
            )?,
        };
        let mut ranks = DataParallel::new(self.comm, device, model.layout(), self.bucket)?;
        if let (true, Candidate::Able { library, .. }) = (ranks.are_between_devices(), device.candidate()) {
            self.context.note_device(format!("sums between {} devices by {library}", self.comm.size()));
        }
        let threads = Threads::new(self.context.threads)?;
        model.set_normalization(self.units(&ranks, &threads, student, teacher)?)?;
        let micro_batch = train.per_device_train_batch_size.min(ranks.part(train.global_batch_size).len());
        let at_once = ranks.part(self.split.validation.len()).len().clamp(1, validate::AT_ONCE);
        let own = ranks.owned();
        let mut plan = Trainer::plan_of_ranges(&model, micro_batch, own.clone())?;
        plan.extend(Generator::plan(&model, at_once)?);
        let mut on_host = ranks.plan(X::DTYPE.size());
        on_host.extend(Prefetcher::<D, X>::plan(model.config(), ranks.part(train.global_batch_size).len()));
        match memory_for(device, self.comm.place())? {
            Room::Device { free, .. } => {
                plan.check(Room::Device { free, group: ranks.are_between_devices() })?;
                on_host.check(host_memory(self.comm.place())?)?;
                plan.extend(on_host);
            }
            host @ Room::Host(_) => {
                plan.extend(on_host);
                plan.check(host)?;
            }
        }
        self.context.show_plan("train", &plan);
        let mut trainer = Trainer::of_ranges(&mut model, micro_batch, own)?;
        self.context.ui.line(format!(
            "train: {} parameters, {} tuples, {} held out",
            model.layout().count(),
            self.split.training.len(),
            self.split.validation.len(),
        ));
        let steps = train.epochs_as_steps(self.split.training.len());
        steps.into_iter().for_each(|steps| self.context.ui.line(format!("train: {steps}")));
        let _patience = ShutdownGuard::begin();
        let mut checkpoints = Checkpoints::of(self.dir);
        let progress = checkpoints.restore(&mut ranks, &mut model, &mut trainer)?;
        if let Some(progress) = &progress {
            self.context.ui.line(format!("train: going on after step {}", progress.steps));
        }
        let run = Run {
            train: &self,
            key,
            checkpoints,
            mean: self.mean(&ranks, &threads)?,
            generator: Generator::new(&model, at_once)?,
            model,
            trainer,
            ranks,
            progress: progress.unwrap_or_default(),
            bytes: plan.total(),
        };
        run.finish()
    }
}

impl<'a> Train<'a> {
    /// Where values are read.
    fn source(&self) -> TupleSource<'a> {
        TupleSource::new(self.store, self.coordinates)
    }

    /// Statistics of the training tuples: rank 0 reads them all, for all.
    fn units<D: Collective>(
        &self,
        ranks: &DataParallel<'_, D>,
        threads: &Threads,
        student: [usize; 2],
        teacher: [usize; 2],
    ) -> Result<Normalization> {
        let mode = self.config.translator.update_normalization;
        let mut values = vec![];
        if ranks.is_first() {
            values = tuples::fit(self.source(), &self.split.training, mode, threads)?.values();
        }
        Ok(Normalization::from_values(mode, student, teacher, &ranks.values_of_first(values)?)?)
    }

    /// The mean of the training teachers.
    fn mean<D: Collective>(&self, ranks: &DataParallel<'_, D>, threads: &Threads) -> Result<Vec<f32>> {
        let mut mean = vec![];
        if ranks.is_first() {
            mean = mean_teacher(self.source(), &self.split.training, threads)?;
        }
        ranks.values_of_first(mean)
    }
}
