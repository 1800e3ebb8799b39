//! The penalty of the regression in [`super`]: fixed, or chosen by what it does to groups
//! of shadows that are left out.
//!
//! In: the shadow pairs' products, and for the choice by loss the LLM and public examples of every
//! group. Out: the penalty, and what every candidate reached. It depends on the run alone, not on a
//! client, so it is chosen once, and kept in the run directory.

use super::{Centred, Groups, Kernel};
use crate::examples::Streams;
use crate::model_spec::ModelSpec;
use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Backend, Buffer, Real};
use gradtx_models::decoder::{Activations, AdapterView, Decoder, Mode};
use gradtx_models::lora::Products;
use gradtx_run::config::{LossNormalization, Recipe};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, memory_for};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, Example, PackedBatch};
use gradtx_runtime::plan::Purpose;
use serde::{Deserialize, Serialize};

/// What is tried, in units of the mean square of the centred group means.
pub const CANDIDATES: [f64; 5] = [0.003, 0.01, 0.03, 0.1, 0.3];
/// The penalty where there is nothing to choose it by.
pub const USUAL: f64 = 0.01;
/// Parts of the groups, of which one at a time is left out.
const FOLDS: usize = 3;
/// Groups that are left out at most: the cost of the choice does not grow with the run.
pub const MAX_LEFT_OUT: usize = 32;
/// With fewer groups, what is left of them when a fold is gone says nothing.
const MIN_GROUPS: usize = 4;

/// A penalty and how it was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Penalty {
    /// The penalty.
    pub penalty: f64,
    /// Groups of shadows, T.
    pub groups: usize,
    /// Groups that were left out, each once; none where nothing was chosen.
    pub left_out: usize,
    /// What was tried.
    pub tried: Vec<Tried>,
}

/// A candidate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tried {
    /// The penalty.
    pub penalty: f64,
    /// Mean error of groups that were left out: of products, or the LLM's loss.
    pub error: f64,
}

impl Penalty {
    /// One that nothing was tried for.
    pub fn fixed(penalty: f64, groups: usize) -> Self {
        Self { penalty, groups, left_out: 0, tried: vec![] }
    }

    /// The candidate with the smallest error; the first of equals.
    fn best(groups: usize, left_out: usize, sums: &[f64]) -> Self {
        let tried: Vec<Tried> = CANDIDATES
            .iter()
            .zip(sums)
            .map(|(&penalty, sum)| Tried { penalty, error: sum / left_out.max(1) as f64 })
            .collect();
        let best =
            (0..tried.len()).reduce(|best, i| if tried[i].error < tried[best].error { i } else { best });
        Self { penalty: best.map_or(USUAL, |i| tried[i].penalty), groups, left_out, tried }
    }
}

/// A left-out group, translated from the others with one candidate.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Place in [`CANDIDATES`].
    candidate: usize,
    /// The group.
    pub group: usize,
    /// The groups that are not left out with it.
    from: Vec<usize>,
    /// Their weights.
    weights: Vec<f64>,
}

/// Leaves groups out, a fold of them at a time, and translates each from the rest with every candidate.
/// Nothing where there are too few groups.
pub fn trials(kernel: &Kernel, seed: u64) -> Result<Vec<Trial>> {
    let count = kernel.groups.len();
    if count < MIN_GROUPS {
        return Ok(vec![]);
    }
    let order = Stream::new(derive_named(seed, "folds of groups")).permutation(count);
    let chosen = &order[..count.min(MAX_LEFT_OUT)];
    let mut trials = vec![];
    for fold in 0..FOLDS {
        let of_fold = |place: &usize| place % FOLDS == fold;
        let mut from: Vec<usize> = (0..count).filter(|p| !of_fold(p)).map(|p| order[p]).collect();
        from.sort_unstable();
        let centred = Centred::new(&kernel.groups, &from)?;
        for place in (0..chosen.len()).filter(of_fold) {
            let group = chosen[place];
            for (candidate, &penalty) in CANDIDATES.iter().enumerate() {
                let weights = centred.weights(&kernel.groups[group], penalty)?;
                trials.push(Trial { candidate, group, from: from.clone(), weights });
            }
        }
    }
    Ok(trials)
}

/// The penalty with the smallest squared error of left-out groups' mean products. Those are needed
/// through their inner products `[T, T]` only.
pub fn by_error(trials: &[Trial], products: &[Vec<f64>]) -> Penalty {
    let mut sums = vec![0.0; CANDIDATES.len()];
    for Trial { candidate, group, from, weights } in trials {
        let mut error = products[*group][*group];
        for (&t, w) in from.iter().zip(weights) {
            let inner: f64 = from.iter().zip(weights).map(|(&u, v)| v * products[t][u]).sum();
            error += w * (inner - 2.0 * products[*group][t]);
        }
        sums[*candidate] += error;
    }
    Penalty::best(products.len(), trials.len() / CANDIDATES.len(), &sums)
}

/// The penalty with the smallest loss of the LLM with left-out groups' translations, from the loss of
/// every trial.
pub fn by_loss(trials: &[Trial], groups: usize, losses: &[f64]) -> Penalty {
    let mut sums = vec![0.0; CANDIDATES.len()];
    trials.iter().zip(losses).for_each(|(trial, loss)| sums[trial.candidate] += loss);
    Penalty::best(groups, trials.len() / CANDIDATES.len(), &sums)
}

/// Measures the LLM's loss with the translation of every trial on its group's examples.
pub struct Losses<'a> {
    /// Where messages go.
    pub context: &'a Context,
    /// The LLM, with adapters of the rank that is read out.
    pub side: &'a ModelSpec,
    /// The shadow teachers.
    pub products: &'a Products,
    /// Which shadow is of which group.
    pub groups: &'a Groups,
    /// What is measured.
    pub trials: &'a [Trial],
    /// Examples of every group.
    pub examples: &'a [Vec<Example>],
    /// Most tokens of one packed stream.
    pub stream_tokens: usize,
}

impl Losses<'_> {
    /// A group's examples; the loss is the mean over them of each one's mean over its answer.
    fn streams(&self, group: usize) -> Vec<PackedBatch> {
        let recipe = Recipe { loss_reduction: LossNormalization::Sequence, ..Recipe::default() };
        let mut streams = Streams::new(self.stream_tokens);
        let examples: Vec<&Example> = self.examples[group].iter().collect();
        streams.push_step(&examples, &recipe, 0, 0, 0);
        streams.finish()
    }
}

impl Work for Losses<'_> {
    type Output = Vec<f64>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Vec<f64>> {
        let streams: Vec<Vec<PackedBatch>> = (0..self.groups.count()).map(|t| self.streams(t)).collect();
        let capacity = BatchCapacity::of(streams.iter().flatten());
        let (layout, mode) = (&self.side.layout, Mode::Inference(Some(&self.side.layout)));
        let mut plan = Decoder::<D, X>::plan(&self.side.model, false);
        plan.add(Purpose::Frozen, "adapter", &[layout.total()], size_of::<f32>());
        plan.extend(Activations::<D, X>::plan(&self.side.model, capacity, mode));
        plan.check(memory_for(device, &self.context.place)?)?;
        let decoder = Decoder::<D, X>::load(device, &self.side.dir)?;
        let mut acts = Activations::new(&decoder, capacity, mode)?;
        let mut batch = DeviceBatch::new(device, capacity)?;
        let mut values = device.zeros(layout.total())?;
        let mut progress = self.context.ui.progress("translate", self.trials.len() as u64);
        let mut losses = Vec::with_capacity(self.trials.len());
        for trial in self.trials {
            let weights = self.groups.spread(&trial.from, &trial.weights);
            device.upload(values.all_mut(), &self.products.read_out(&weights, layout)?)?;
            let mut sum = 0.0;
            for stream in &streams[trial.group] {
                batch.load(device, stream)?;
                let view = AdapterView { values: &values, layout, dropout: 0.0 };
                decoder.loss(&mut acts, &batch, Some(view))?;
                let found = device.to_host(acts.losses())?;
                sum += stream.weights.iter().zip(&found).map(|(w, loss)| w * f64::from(*loss)).sum::<f64>();
            }
            losses.push(sum);
            progress.set(losses.len() as u64, "penalty");
        }
        Ok(losses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Students and teachers in which group t is `(cos, sin)` of an angle: teachers are the students.
    fn circle(count: usize) -> Kernel {
        let angle = |t: usize| t as f64 * 0.4;
        let inner = |t: usize, u: usize| 2.0 + (angle(t) - angle(u)).cos();
        let groups = (0..count).map(|t| (0..count).map(|u| inner(t, u)).collect()).collect();
        Kernel { groups, clients: vec![], squares: vec![] }
    }

    #[test]
    fn groups_are_left_out_once_each() {
        let kernel = circle(7);
        let trials = trials(&kernel, 1).unwrap();
        assert_eq!(trials.len(), 7 * CANDIDATES.len());
        for group in 0..7 {
            let of_group: Vec<&Trial> = trials.iter().filter(|trial| trial.group == group).collect();
            assert_eq!(of_group.len(), CANDIDATES.len());
            for trial in of_group {
                assert!(!trial.from.contains(&group) && trial.from.len() < 6);
                assert!((trial.weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            }
        }
        assert_eq!(super::trials(&circle(100), 1).unwrap().len(), MAX_LEFT_OUT * CANDIDATES.len());
        assert!(super::trials(&circle(3), 1).unwrap().is_empty());
    }

    #[test]
    fn smallest_penalty_wins_where_teachers_follow() {
        let kernel = circle(9);
        let trials = trials(&kernel, 1).unwrap();
        let found = by_error(&trials, &kernel.groups);
        assert_eq!((found.penalty, found.groups, found.left_out), (CANDIDATES[0], 9, 9));
        assert!(found.tried.windows(2).all(|pair| pair[0].error < pair[1].error), "{found:?}");
        // Teachers that have nothing to do with the students: the more shrinking the better.
        let mut unrelated = vec![vec![0.0; 9]; 9];
        (0..9).for_each(|t| unrelated[t][t] = 1.0);
        assert_eq!(by_error(&trials, &unrelated).penalty, CANDIDATES[4]);
    }

    #[test]
    fn losses_are_averaged_by_candidate() {
        let trials = trials(&circle(5), 2).unwrap();
        let loss = |trial: &Trial| if trial.candidate == 2 { 0.5 } else { 1.0 + trial.group as f64 };
        let losses: Vec<f64> = trials.iter().map(loss).collect();
        let found = by_loss(&trials, 5, &losses);
        assert_eq!((found.penalty, found.tried[2].error, found.tried[0].error), (CANDIDATES[2], 0.5, 3.0));
    }
}
