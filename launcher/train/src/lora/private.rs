//! Differentially private training of one adapter: DP-SGD.
//!
//! In: a model, examples, a [`SampledGaussian`]. Out: an update whose dependence on any one example is bounded. A step
//! draws a Poisson sample, computes the gradient of every example by itself (a gradient row per segment of the packed streams), clips
//! each to C, adds noise of σC to their sum, and divides by the *expected* size of a sample; what the optimizer does after that
//! costs nothing. How many examples share a stream changes no gradient.
//!
//! The order of events in a step is what the guarantee hangs on: it is spent in the [`Ledger`] before anything is
//! drawn for it, and on the disk before its noise is drawn.

use crate::lora::checkpoint::JobCheckpoint;
use crate::lora::trainer::{JobResult, Packing, Step};
use crate::model_spec::ModelSpec;
use crate::privacy::{ClippedSum, Ledger, PrivateRandom, SampledGaussian};
use anyhow::{Result, anyhow};
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_models::lora::PerExampleLora;
use gradtx_run::config::Recipe;
use gradtx_runtime::data::{BatchCapacity, Example, PackedBatch, SegmentInfo};
use gradtx_runtime::metrics::{Rate, TokenMeter};
use gradtx_runtime::plan::MemoryPlan;
use std::time::Instant;

/// Bytes of the gradients of the examples of a stream.
const ROW_BYTES: usize = 128 << 20;
/// Examples of a stream at most.
const MOST_ROWS: usize = 64;

/// How an adapter is trained privately.
pub struct PrivateTrainer<'a> {
    /// The model and its adapter.
    pub side: &'a ModelSpec,
    /// The recipe. Its `max_grad_norm` has no effect, losses are means over an example's tokens.
    pub recipe: &'a Recipe,
    /// Most tokens of one packed stream.
    pub stream_tokens: usize,
    /// Sampling and noise of a step.
    pub mechanism: SampledGaussian,
    /// C, the norm that gradients are clipped to.
    pub max_grad_norm: f64,
    /// Steps that may be spent; training ends there, however far it is.
    pub most_steps: u64,
    /// Where random numbers are from.
    pub random: PrivateRandom,
    /// Key of dropout.
    pub key: u64,
}

/// What came of private training.
pub struct PrivateResult {
    /// Losses and the update. The loss of a step is the mean of its sample.
    pub job: JobResult,
    /// Tokens and time.
    pub rate: Rate,
    /// Gradients that were not finite and counted as zero.
    pub dropped: usize,
}

impl PrivateTrainer<'_> {
    /// Room for any stream of these examples.
    pub fn packing(&self, examples: &[Example]) -> Packing {
        let most = |size: fn(&Example) -> usize| examples.iter().map(size).max().unwrap_or(0);
        let tokens = self.stream_tokens.max(most(|e| e.tokens.len()));
        let row = self.side.layout.total() * size_of::<f32>();
        let segments = (ROW_BYTES / row.max(1)).clamp(1, MOST_ROWS.min(examples.len().max(1)));
        let labels = tokens.min(segments * most(Example::labels));
        let capacity = BatchCapacity { tokens, segments, labels };
        Packing { capacity, limit: tokens, ..Packing::default() }
    }

    /// The base model and every buffer of training.
    pub fn plan<X: Real<Acc = f32>, D: Backend<X>>(&self, examples: &[Example]) -> MemoryPlan {
        let mut plan = Decoder::<D, X>::plan(&self.side.model, false);
        let capacity = self.packing(examples).capacity;
        plan.extend(PerExampleLora::<D, X>::plan(&self.side.model, &self.side.layout, capacity));
        plan
    }

    /// Trains, from where the checkpoint is. Steps that were spent and lost in a crash are not trained again, so that
    /// no more than `most_steps` are ever spent.
    ///
    /// The callback is told of every step; `Step::done` counts those that changed the adapter.
    pub fn run<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        decoder: &Decoder<D, X>,
        examples: &[Example],
        ledger: &mut Ledger,
        checkpoint: &JobCheckpoint,
        callback: &mut dyn PrivateCallback,
    ) -> Result<PrivateResult> {
        let capacity = self.packing(examples).capacity;
        let ModelSpec { layout, init, .. } = self.side;
        let mut adapter = PerExampleLora::new(decoder, layout, init, capacity)?;
        let mut jobs = [JobResult::default()];
        let mut done = checkpoint.restore(decoder.device(), adapter.adapter_mut(), &mut jobs)?;
        let resumed = done;
        let (mut meter, mut saved, mut dropped) = (TokenMeter::start(), Instant::now(), 0);
        while done < self.recipe.max_steps && ledger.spent() < self.most_steps {
            let spent = ledger.spend()?;
            let sample = self.random.sample(spent, examples.len(), self.mechanism.sampling_rate);
            let streams = self.streams(&sample, examples, done, capacity);
            // The disk takes as long as a small stream. Noise is drawn when both are done.
            let (clipped, synced) = std::thread::scope(|scope| {
                let synced = scope.spawn(|| ledger.sync());
                (self.clipped(&mut adapter, decoder, &streams, callback), synced.join())
            });
            synced
                .map_err(|_| anyhow!("the thread that writes the privacy ledger to the disk panicked"))??;
            let Clipped { sum, loss, tokens } = clipped?;
            meter.add(tokens);
            dropped += sum.dropped;
            let gradient = self.noisy_mean(sum, spent, examples.len());
            let norm = adapter.apply(&gradient, self.recipe.optimizer().step(done))?;
            done += 1;
            let [job] = &mut jobs;
            // Nothing is known of the loss in a step without examples.
            let last = job.losses.last().copied().unwrap_or_default();
            job.losses.push(if sample.is_empty() { last } else { loss / sample.len() as f64 });
            job.grad_norms.push(norm);
            job.tokens.push(tokens as u64);
            callback.private_step(&Step { done, jobs: &jobs, rate: meter.total() }, ledger.spent())?;
            if saved.elapsed() >= checkpoint.every {
                checkpoint.save(decoder.device(), adapter.adapter_mut(), done, &jobs)?;
                saved = Instant::now();
            }
        }
        if done > resumed {
            checkpoint.save(decoder.device(), adapter.adapter_mut(), done, &jobs)?;
        }
        let [mut job] = jobs;
        job.updates = adapter.update()?;
        Ok(PrivateResult { job, rate: meter.total(), dropped })
    }

    /// The clipped gradients of a step's examples, without noise.
    fn clipped<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        adapter: &mut PerExampleLora<D, X>,
        decoder: &Decoder<D, X>,
        streams: &[PackedBatch],
        callback: &mut dyn PrivateCallback,
    ) -> Result<Clipped> {
        let values = self.side.layout.total();
        let mut sum = ClippedSum::new(values, self.max_grad_norm);
        let (mut loss, mut tokens) = (0.0, 0);
        for stream in streams {
            let found = adapter.gradients(decoder, stream)?;
            found.gradients.chunks_exact(values).for_each(|gradient| sum.add(gradient));
            loss += found.losses.iter().filter(|loss| loss.is_finite()).sum::<f64>();
            tokens += stream.len();
            callback.between()?;
        }
        Ok(Clipped { sum, loss, tokens })
    }

    /// The gradient of a step: the sum with noise, divided by the expected size of a sample.
    fn noisy_mean(&self, sum: ClippedSum, spent: u64, examples: usize) -> Vec<f32> {
        let SampledGaussian { sampling_rate, noise_multiplier } = self.mechanism;
        let mut sum = sum.into_sum();
        self.random.add_noise(spent, &mut sum, noise_multiplier * self.max_grad_norm);
        let expected = sampling_rate * examples as f64;
        sum.iter().map(|x| (x / expected) as f32).collect()
    }

    /// The packed streams of a sample. Dropout depends on the example and the step, not on what else is in the sample.
    fn streams(
        &self,
        sample: &[usize],
        examples: &[Example],
        step: u32,
        capacity: BatchCapacity,
    ) -> Vec<PackedBatch> {
        let key = derive(derive_named(self.key, "dropout"), step as u64);
        let (mut streams, mut open) = (vec![], PackedBatch::default());
        for &index in sample {
            let example = &examples[index];
            let is_full = open.segments() == capacity.segments
                || (!open.is_empty() && open.len() + example.tokens.len() > self.stream_tokens);
            if is_full {
                streams.push(std::mem::take(&mut open));
            }
            let grad_row = open.segments() as u32;
            let info = SegmentInfo { adapter: 0, grad_row, key: derive(key, index as u64) };
            open.push(example, info, 1.0 / example.labels().max(1) as f64);
        }
        if !open.is_empty() {
            streams.push(open);
        }
        streams
    }
}

/// What the examples of a step give.
struct Clipped {
    sum: ClippedSum,
    /// Of all examples.
    loss: f64,
    tokens: usize,
}

/// Who hears how far a private training is.
pub trait PrivateCallback {
    /// Between the streams of a step.
    fn between(&mut self) -> Result<()> {
        Ok(())
    }

    /// After a step; `spent` steps have cost privacy so far.
    fn private_step(&mut self, step: &Step<'_>, spent: u64) -> Result<()>;
}
