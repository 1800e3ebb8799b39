//! Fine-tuning of the full weights of some layers of a model, in the place of adapters.
//!
//! In: a model, layers, one job of examples. Out: the layers' parameters, and the numbers of every step. Order and
//! packing of the examples are those of an adapter's training with the same key and recipe, without dropout; AdamW
//! works on f32 masters, which begin as the values of the model's files.
//! [`LayerCheckpoint`] keeps what is done so far; what is resumed has the same bits.

use crate::lora::streams::{Job, Packing, StepStreams, tokens_of_step};
use crate::lora::trainer::{Callback, JobResult, Step};
use crate::model_spec::ModelSpec;
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Decoder, LayerParams, LayerState, LayerTrainer};
use gradtx_models::read_layers;
use gradtx_run::config::Recipe;
use gradtx_runtime::artifact::TensorSource;
use gradtx_runtime::checkpoint::{self, Checkpoint, Values};
use gradtx_runtime::metrics::{Rate, TokenMeter};
use gradtx_runtime::plan::MemoryPlan;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What is computed in this time may be lost in a crash.
const SAVE_EVERY: Duration = Duration::from_secs(2);
/// Time between two checkpoints, at least, in times that writing one takes.
const SHARE_OF_SAVING: u32 = 20;

/// How layers are trained.
pub struct LayerTraining<'a> {
    /// The model.
    pub side: &'a ModelSpec,
    /// What of it is trained.
    pub params: &'a LayerParams,
    /// The recipe.
    pub recipe: &'a Recipe,
    /// Most tokens of one packed stream.
    pub stream_tokens: usize,
}

impl LayerTraining<'_> {
    fn streams(&self) -> StepStreams<'_> {
        StepStreams { recipe: self.recipe, stream_tokens: self.stream_tokens }
    }

    /// The model and every buffer of training, and how well the streams are filled.
    pub fn plan<X: Real<Acc = f32>, D: Backend<X>>(&self, job: &Job<'_>) -> Result<(MemoryPlan, Packing)> {
        let (streams, jobs) = (self.streams(), std::slice::from_ref(job));
        let packing = streams.packing(&mut streams.orders(jobs)?, jobs);
        let mut plan = Decoder::<D, X>::plan(&self.side.model, false);
        plan.extend(LayerTrainer::<D, X>::plan(&self.side.model, self.params, packing.capacity));
        Ok((plan, packing))
    }

    /// Trains, and returns the parameters `[params]`, the numbers of the steps, and how fast it went; nothing when the
    /// callback stopped it. Begins with what `checkpoint` has, and leaves there what is done so far: now and then,
    /// when it is stopped, and at the end.
    pub fn run<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        decoder: &mut Decoder<D, X>,
        job: &Job<'_>,
        checkpoint: &LayerCheckpoint,
        callback: &mut dyn Callback,
    ) -> Result<Option<(Vec<f32>, JobResult, Rate)>> {
        let (streams, jobs) = (self.streams(), std::slice::from_ref(job));
        let mut orders = streams.orders(jobs)?;
        let capacity = streams.packing(&mut orders, jobs).capacity;
        let start = read_layers(self.params, &TensorSource::open(&self.side.dir)?)?;
        let mut trainer = LayerTrainer::new(decoder, self.params.clone(), &start, capacity)?;
        let (steps, optimizer) = (self.recipe.max_steps, self.recipe.optimizer());
        let mut result = [JobResult::default()];
        let started = match checkpoint.load(self.params.total(), steps)? {
            None => 0,
            Some((done, state, so_far)) => {
                trainer.restore(decoder, &state)?;
                result = [so_far];
                done
            }
        };
        let (mut meter, mut next) = (TokenMeter::start(), Instant::now() + SAVE_EVERY);
        for step in started..steps {
            let mut loss = 0.0;
            for stream in streams.of_step(&mut orders, jobs, step) {
                loss += trainer.accumulate(decoder, &stream)?;
                meter.add(stream.len());
                callback.between()?;
            }
            let norm = trainer.apply(decoder, optimizer.step(step), optimizer.max_grad_norm)?;
            result[0].losses.push(loss);
            result[0].grad_norms.push(norm);
            result[0].tokens.extend(tokens_of_step(&mut orders, jobs, step));
            let done = step + 1;
            let continues = callback.step(&Step { done, jobs: &result, rate: meter.total() })?;
            if !continues || done == steps || Instant::now() >= next {
                let begun = Instant::now();
                checkpoint.save(done, &trainer.state()?, &result[0])?;
                next = Instant::now() + SAVE_EVERY.max(SHARE_OF_SAVING * begun.elapsed());
            }
            if !continues && done < steps {
                return Ok(None);
            }
        }
        let [result] = result;
        Ok(Some((trainer.masters()?, result, meter.total())))
    }
}

/// Where a training's work is kept on the way.
pub struct LayerCheckpoint {
    /// The file.
    pub path: PathBuf,
    /// What the work is, settings and inputs: work of anything else is not resumed.
    pub of: Value,
}

impl LayerCheckpoint {
    /// Writes the state after `steps` steps.
    fn save(&self, steps: u32, state: &LayerState, result: &JobResult) -> Result<()> {
        // As bits, since decimal numbers may lose their last one.
        let bits = |numbers: &[f64]| -> Vec<u64> { numbers.iter().map(|number| number.to_bits()).collect() };
        let (losses, norms) = (bits(&result.losses), bits(&result.grad_norms));
        let buffers = [
            ("masters", Values::F32(&state.masters)),
            ("first_moments", Values::F32(&state.first)),
            ("second_moments", Values::F32(&state.second)),
            ("losses", Values::U64(&losses)),
            ("grad_norms", Values::U64(&norms)),
            ("tokens", Values::U64(&result.tokens)),
        ];
        Ok(checkpoint::save(&self.path, &buffers, &json!({ "of": self.of, "steps": steps }))?)
    }

    /// What the checkpoint holds of a training of so many values and steps: steps that are done, state and numbers.
    /// Nothing if it is not there, of another training or damaged: then training begins again.
    fn load(&self, values: usize, most: u32) -> Result<Option<(u32, LayerState, JobResult)>> {
        if !self.path.is_file() {
            return Ok(None);
        }
        let saved = match Checkpoint::load(&self.path) {
            Ok(saved) if saved.state()["of"] == self.of => saved,
            Ok(_) => return Ok(None),
            Err(error) => {
                tracing::warn!("{error}; training starts over");
                return Ok(None);
            }
        };
        let steps = saved.state()["steps"].as_u64().and_then(|steps| u32::try_from(steps).ok());
        let Some(steps) = steps.filter(|steps| *steps <= most) else { return Ok(None) };
        let moments = ["masters", "first_moments", "second_moments"];
        let numbers = ["losses", "grad_norms", "tokens"];
        let has =
            |names: [&str; 3], len: usize| names.iter().all(|name| saved.len_of(name).ok() == Some(len));
        // What is there, before room is made for what is claimed.
        if !has(moments, values) || !has(numbers, steps as usize) {
            tracing::warn!("{}: of other sizes than it says; training starts over", self.path.display());
            return Ok(None);
        }
        let floats = |name| -> Result<Vec<f32>> {
            let mut out = vec![0.0; values];
            saved.read_f32(name, &mut out)?;
            Ok(out)
        };
        let words = |name| -> Result<Vec<u64>> {
            let mut out = vec![0; steps as usize];
            saved.read_u64(name, &mut out)?;
            Ok(out)
        };
        let doubles =
            |name| -> Result<Vec<f64>> { Ok(words(name)?.into_iter().map(f64::from_bits).collect()) };
        let [masters, first, second] = moments.map(floats);
        let state = LayerState { masters: masters?, first: first?, second: second? };
        let result = JobResult {
            losses: doubles("losses")?,
            grad_norms: doubles("grad_norms")?,
            tokens: words("tokens")?,
            updates: vec![],
        };
        Ok(Some((steps, state, result)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> LayerState {
        let values = |shift: f32| (0..5).map(|i| i as f32 + shift).collect();
        LayerState { masters: values(0.0), first: values(0.5), second: values(0.25) }
    }

    fn result() -> JobResult {
        JobResult { losses: vec![0.1, 0.2], grad_norms: vec![1.5, 2.5], tokens: vec![7, 8], updates: vec![] }
    }

    #[test]
    fn a_checkpoint_comes_back_or_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint.safetensors");
        let checkpoint = |of: &str| LayerCheckpoint { path: path.clone(), of: json!(of) };
        let own = checkpoint("own");
        assert!(own.load(5, 9).unwrap().is_none());
        own.save(2, &state(), &result()).unwrap();
        let (steps, found, numbers) = own.load(5, 9).unwrap().unwrap();
        assert_eq!((steps, &found, &numbers.losses), (2, &state(), &vec![0.1, 0.2]));
        assert_eq!((numbers.grad_norms, numbers.tokens), (vec![1.5, 2.5], vec![7, 8]));
        // Of other settings, other sizes, more steps than there are.
        assert!(checkpoint("other").load(5, 9).unwrap().is_none());
        assert!(own.load(6, 9).unwrap().is_none() && own.load(5, 1).unwrap().is_none());
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, 9, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(own.load(5, 9).unwrap().is_none(), "{len}");
        }
        let mut damaged = bytes.clone();
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(&path, damaged).unwrap();
        assert!(own.load(5, 9).unwrap().is_none());
    }
}
