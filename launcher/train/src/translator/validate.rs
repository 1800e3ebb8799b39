//! How far generated updates are from those of shadow subsets that were held out.
//!
//! In: a translator and tuples. Out: [`Validation`]. TupleBatch are generated as in use,
//! every block from blocks that were generated before it. Ranks share the tuples, and add
//! their errors in the tuples' order.

use super::source::TupleSource;
use super::tuples::{Tuple, TupleBatch};
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{Generator, GradTransformer};
use gradtx_runtime::comm::{Collectives, Comm};
use gradtx_runtime::parallel::share;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Errors of generated teacher updates, in the updates' own units.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Mean squared error over all values.
    pub mse: f64,
    /// Squared error, over that of the training teachers' mean: 1 is no better than a
    /// constant, 0 is perfect.
    pub relative_error: f64,
    /// The same for every block of the teacher.
    pub relative_error_by_block: Vec<f64>,
}

/// Measures a translator on tuples, of which each rank generates a part; `mean` is
/// `mean_teacher` of the training tuples. All ranks find the same.
pub fn validate<X: Real, D: Backend<X>>(
    comm: &dyn Comm,
    model: &GradTransformer<D, X>,
    generator: &mut Generator<D, X>,
    source: TupleSource<'_>,
    tuples: &[Tuple],
    mean: &[f32],
) -> Result<Validation> {
    let blocks = model.config().teacher_blocks;
    let parts: Vec<Range<usize>> =
        (0..comm.size()).map(|rank| share(rank, comm.size(), tuples.len())).collect();
    let mut own = vec![];
    for part in tuples[parts[comm.rank()].clone()].chunks(AT_ONCE) {
        let updates = TupleBatch::read(source, part)?;
        let generated = generator.translate(model, &updates.students)?;
        for (found, wanted) in generated.chunks(mean.len()).zip(updates.teachers.chunks(mean.len())) {
            own.extend(distances(found, wanted, blocks));
            own.extend(distances(mean, wanted, blocks));
        }
    }
    let lengths: Vec<usize> = parts.iter().map(|part| 2 * blocks * part.len()).collect();
    let mut all = vec![0.0; 2 * blocks * tuples.len()];
    comm.all_gather_parts(&own, &lengths, &mut all)?;
    let mut errors = Errors::new(blocks);
    for of_tuple in all.chunks(2 * blocks) {
        let (error, of_mean) = of_tuple.split_at(blocks);
        errors.add(error, of_mean, mean.len());
    }
    Ok(errors.finish())
}

/// Tuples that are generated at once.
pub const AT_ONCE: usize = 64;

/// Sum of squared differences in each block.
fn distances(a: &[f32], b: &[f32], blocks: usize) -> Vec<f64> {
    let width = a.len() / blocks;
    let distance = |(a, b): (&[f32], &[f32])| -> f64 {
        a.iter().zip(b).map(|(&x, &y)| (x as f64 - y as f64).powi(2)).sum()
    };
    a.chunks(width).zip(b.chunks(width)).map(distance).collect()
}

/// Sums over tuples, by block.
struct Errors {
    error: Vec<f64>,
    of_mean: Vec<f64>,
    values: usize,
}

impl Errors {
    fn new(blocks: usize) -> Self {
        Self { error: vec![0.0; blocks], of_mean: vec![0.0; blocks], values: 0 }
    }

    /// Adds the squared errors of a tuple of `values` values.
    fn add(&mut self, error: &[f64], of_mean: &[f64], values: usize) {
        self.error.iter_mut().zip(error).for_each(|(sum, e)| *sum += e);
        self.of_mean.iter_mut().zip(of_mean).for_each(|(sum, e)| *sum += e);
        self.values += values;
    }

    fn finish(self) -> Validation {
        let sum: f64 = self.error.iter().sum();
        Validation {
            mse: sum / self.values.max(1) as f64,
            relative_error: relative(sum, self.of_mean.iter().sum()),
            relative_error_by_block: self
                .error
                .iter()
                .zip(&self.of_mean)
                .map(|(&e, &m)| relative(e, m))
                .collect(),
        }
    }
}

/// An error over that of the mean. Where the mean is exact, an error is as large as can be written.
fn relative(error: f64, of_mean: f64) -> f64 {
    match (error > 0.0, of_mean > 0.0) {
        (false, false) if error == 0.0 => 0.0,
        (true, false) => f64::MAX,
        _ => error / of_mean,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_has_relative_error_one_in_every_block() {
        let mean = [1.0, 2.0, -1.0, 0.5];
        let teachers = [[0.0, 1.0, 3.0, 0.0], [2.0, 3.5, -2.0, 1.5]];
        let mut errors = Errors::new(2);
        let add = |errors: &mut Errors, found: &[f32], wanted: &[f32]| {
            errors.add(&distances(found, wanted, 2), &distances(&mean, wanted, 2), 4);
        };
        teachers.iter().for_each(|teacher| add(&mut errors, &mean, teacher));
        let found = errors.finish();
        assert_eq!((found.relative_error, found.relative_error_by_block), (1.0, vec![1.0, 1.0]));

        let mut errors = Errors::new(2);
        add(&mut errors, &[0.0, 1.0, -1.0, 0.5], &teachers[0]);
        let found = errors.finish();
        assert_eq!(found.relative_error_by_block, [0.0, 1.0]);
        assert!((found.mse - 16.25 / 4.0).abs() < 1e-12);
        assert!((found.relative_error - 16.25 / 18.25).abs() < 1e-12);
    }
}
