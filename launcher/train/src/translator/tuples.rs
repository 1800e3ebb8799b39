//! The tuples of a step: which ones, read from the store, and mixed where that is asked for.
//!
//! In: the tuple store and the settings. Out: [`Split`], the tuples for training and those
//! for validation, and [`Source`], which gives the student and teacher updates of a step.
//! A step's tuples depend on the seed and the step alone, and what becomes of each of them on its
//! place among them: ranks that share a step read their own, and together have all.

use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_models::grad_transformer::{Normalization, NormalizationFit, NormalizationMode};
use gradtx_run::config::{TrainConfig, ValidationSplit};
use gradtx_run::failure::unusable;
use gradtx_runtime::artifact::{Role, TupleStore};
use gradtx_runtime::data::Order;
use serde_json::{Value, json};
use std::ops::Range;

/// A tuple: a pair of the store, and a snapshot of it.
pub type Tuple = (usize, usize);

/// Tuples for training and for validation.
pub struct Split {
    /// For training.
    pub training: Vec<Tuple>,
    /// Held out.
    pub validation: Vec<Tuple>,
}

impl Split {
    /// Holds out a part of the shadow subsets, or of the tuples.
    pub fn of(store: &TupleStore, train: &TrainConfig, key: u64) -> Result<Self> {
        let tuples = |pairs: &[usize]| -> Vec<Tuple> {
            pairs.iter().flat_map(|&pair| (0..store.steps()).map(move |step| (pair, step))).collect()
        };
        let part = |count: usize| (count as f64 * train.validation).ceil() as usize;
        let (what, all, held) = match train.validation_by {
            ValidationSplit::Subset => ("shadow subset", store.pairs(), part(store.pairs())),
            ValidationSplit::Tuple => {
                let count = store.pairs() * store.steps();
                ("tuple", count, part(count))
            }
        };
        if held == 0 || held >= all {
            return Err(unusable(format!(
                "train.validation: at least one {what} must be held out, and one left; {held} of {all} are \
                 asked for"
            )));
        }
        let mut training = Stream::new(key).permutation(all);
        let mut validation = training.split_off(all - held);
        training.sort_unstable();
        validation.sort_unstable();
        Ok(match train.validation_by {
            ValidationSplit::Subset => Self { training: tuples(&training), validation: tuples(&validation) },
            ValidationSplit::Tuple => {
                let tuple = |i: usize| (i / store.steps(), i % store.steps());
                Self {
                    training: training.into_iter().map(tuple).collect(),
                    validation: validation.into_iter().map(tuple).collect(),
                }
            }
        })
    }

    /// What was held out, for anyone to see: (shadow subset, snapshot).
    pub fn describe(&self, store: &TupleStore) -> Value {
        let name = |&(pair, step): &Tuple| json!([store.shadow(pair), step]);
        json!(self.validation.iter().map(name).collect::<Vec<_>>())
    }
}

/// Statistics of the training tuples in the units that the settings ask for.
pub fn fit(store: &TupleStore, tuples: &[Tuple], mode: NormalizationMode) -> Result<Normalization> {
    let (s, t) = (store.space(Role::Student), store.space(Role::Teacher));
    let mut fit = NormalizationFit::new(mode, [s.blocks, s.width], [t.blocks, t.width]);
    let (mut student, mut teacher) = (vec![0.0; s.values()], vec![0.0; t.values()]);
    for &(pair, step) in tuples {
        store.read_pair(pair, step, &mut student, &mut teacher)?;
        fit.add(&student, &teacher)?;
    }
    Ok(fit.finish()?)
}

/// Student and teacher updates, one after the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Updates {
    /// `[n, L_S, d_S]`
    pub students: Vec<f32>,
    /// `[n, L_T, d_T]`
    pub teachers: Vec<f32>,
}

impl Updates {
    /// Reads tuples as they are in the store.
    pub fn read(store: &TupleStore, tuples: &[Tuple]) -> Result<Self> {
        let (s, t) = (store.space(Role::Student).values(), store.space(Role::Teacher).values());
        let mut students = vec![0.0; tuples.len() * s];
        let mut teachers = vec![0.0; tuples.len() * t];
        for ((&(pair, step), student), teacher) in
            tuples.iter().zip(students.chunks_mut(s)).zip(teachers.chunks_mut(t))
        {
            store.read_pair(pair, step, student, teacher)?;
        }
        Ok(Self { students, teachers })
    }
}

/// Pairs that are combined into one.
const COMBINED: usize = 3;

/// Gives the tuples of every step.
pub struct Source<'a> {
    store: &'a TupleStore,
    train: &'a TrainConfig,
    tuples: &'a [Tuple],
    order: Order,
    key: u64,
}

impl<'a> Source<'a> {
    /// Of these tuples, in an order of the key.
    pub fn new(store: &'a TupleStore, train: &'a TrainConfig, tuples: &'a [Tuple], key: u64) -> Result<Self> {
        let order = Order::new(tuples.len(), train.batch, derive_named(key, "order"))?;
        Ok(Self { store, train, tuples, order, key })
    }

    /// The tuples of a step (from 0), before anything is mixed.
    pub fn tuples(&mut self, step: u32) -> Vec<Tuple> {
        self.order.step(step as usize).into_iter().map(|i| self.tuples[i]).collect()
    }

    /// The updates of tuples `own` of a step, in the units of a normalisation.
    ///
    /// With `train.augment`, so large a share of them is replaced by affine combinations
    /// of three: with normal weights `w` of spread `train.augment_spread`, the first
    /// raised by `1 − Σw`, so that the weights sum to one. If the relation between student
    /// and teacher updates is affine, combinations obey it too, and teach it where no
    /// shadow subset is. `train.student_noise` adds normal noise to the students.
    pub fn step(&mut self, step: u32, own: Range<usize>, units: &Normalization) -> Result<Updates> {
        let chosen = &self.tuples(step)[own.clone()];
        let mut updates = Updates::read(self.store, chosen)?;
        for (row, (i, &first)) in own.clone().zip(chosen).enumerate() {
            if let Some((parts, weights)) = self.combination(step, i, first) {
                let parts = Updates::read(self.store, &parts)?;
                combine(&mut updates.students, row, &parts.students, weights);
                combine(&mut updates.teachers, row, &parts.teachers, weights);
            }
        }
        units.apply_student(&mut updates.students)?;
        units.apply_teacher(&mut updates.teachers)?;
        if self.train.student_noise > 0.0 {
            let before = (own.start * self.store.space(Role::Student).values()) as u64;
            let key = derive(derive_named(self.key, "student noise"), step as u64);
            let mut noise = Stream::after_normals(key, before);
            let spread = self.train.student_noise;
            updates.students.iter_mut().for_each(|x| *x += (noise.normal() * spread) as f32);
        }
        Ok(updates)
    }

    /// The tuples that tuple i of a step is made of: itself, and others where it is combined.
    pub fn parts(&mut self, step: u32, i: usize) -> Vec<Tuple> {
        let first = self.tuples(step)[i];
        self.combination(step, i, first).map_or(vec![first], |(parts, _)| parts.to_vec())
    }

    /// What tuple i of a step, which is `first`, is perhaps replaced by: a combination of itself
    /// and two others, with these weights.
    fn combination(&self, step: u32, i: usize, first: Tuple) -> Option<([Tuple; COMBINED], [f64; COMBINED])> {
        if self.train.augment == 0.0 {
            return None;
        }
        let key = derive(derive(derive_named(self.key, "augment"), step as u64), i as u64);
        let mut random = Stream::new(key);
        if random.uniform() >= self.train.augment {
            return None;
        }
        let mut parts = [first; COMBINED];
        for part in &mut parts[1..] {
            *part = self.tuples[random.below(self.tuples.len())];
        }
        let mut weights = [0.0f64; COMBINED];
        weights.iter_mut().for_each(|w| *w = random.normal() * self.train.augment_spread);
        weights[0] += 1.0 - weights.iter().sum::<f64>();
        Some((parts, weights))
    }
}

/// Row i of `rows` becomes the weighted sum of the rows of `parts`.
fn combine(rows: &mut [f32], i: usize, parts: &[f32], weights: [f64; COMBINED]) {
    let len = parts.len() / COMBINED;
    for (at, out) in rows[i * len..(i + 1) * len].iter_mut().enumerate() {
        let sum: f64 = (0..COMBINED).map(|k| weights[k] * parts[k * len + at] as f64).sum();
        *out = sum as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_combination_is_affine() {
        // Rows of two values, the second of which is 1 − 2 · the first.
        let parts: Vec<f32> = [0.5, -1.0, 3.0].iter().flat_map(|&x| [x, 1.0 - 2.0 * x]).collect();
        let mut rows = vec![9.0; 4];
        combine(&mut rows, 1, &parts, [0.25, 1.5, -0.75]);
        assert_eq!(rows[..2], [9.0, 9.0]);
        assert!((rows[3] - (1.0 - 2.0 * rows[2])).abs() < 1e-6);
        combine(&mut rows, 1, &parts, [0.25, 1.5, 0.75]);
        assert!(
            (rows[3] - (1.0 - 2.0 * rows[2])).abs() > 0.1,
            "weights that do not sum to one break the rule"
        );
    }
}
