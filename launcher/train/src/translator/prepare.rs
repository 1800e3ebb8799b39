//! How the values of a step's tuples are made: read from the store, perhaps combined, in the
//! model's units, perhaps with noise, rounded to the model's type.
//!
//! A batch is tens of millions of values, so that is done in pieces that stay in a processor's
//! cache, and shared between threads. Every value is computed by itself, in f64 up to the last
//! rounding: results depend neither on the pieces nor on the threads.

use super::source::TupleSource;
use super::tuples::{COMBINED, Tuple};
use anyhow::{Context as _, Result};
use gradtx_kernels::Real;
use gradtx_kernels::cpu::simd::{Level, Task, dispatch};
use gradtx_kernels::cpu::{add_normals, narrow};
use gradtx_models::grad_transformer::{Normalization, StagedMut};
use gradtx_runtime::artifact::Role;
use rayon::prelude::*;

/// Values that are made at a time. They and all that they are made of fit the fastest cache.
pub(super) const PIECE: usize = 2048;
/// Values that a thread takes at a time.
const SHARE: usize = 1 << 16;

/// Threads that prepare tuples.
pub struct Threads {
    /// None for a single one, which is the caller's.
    pool: Option<rayon::ThreadPool>,
}

impl Threads {
    /// So many.
    pub fn new(count: usize) -> Result<Self> {
        let build = || {
            let builder = rayon::ThreadPoolBuilder::new().num_threads(count);
            builder
                .thread_name(|i| format!("tuples-{i}"))
                .build()
                .context("cannot start threads that read tuples")
        };
        Ok(Self { pool: if count > 1 { Some(build()?) } else { None } })
    }

    /// Does `work` for each; the first failure in their order.
    pub(super) fn each<P: Send>(
        &self,
        parts: Vec<P>,
        work: impl Fn(P) -> Result<()> + Sync + Send,
    ) -> Result<()> {
        let Some(pool) = &self.pool else { return parts.into_iter().try_for_each(work) };
        let done: Vec<Result<()>> = pool.install(|| parts.into_par_iter().map(work).collect());
        done.into_iter().collect()
    }
}

/// What one tuple of a step is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Recipe {
    /// Itself.
    Plain(Tuple),
    /// The sum of these with these weights.
    Combined([Tuple; COMBINED], [f64; COMBINED]),
}

/// Normal noise on the students.
#[derive(Clone, Copy, Debug)]
pub(super) struct Noise {
    /// Of this step.
    pub key: u64,
    /// Number of the first student's first value among those of all ranks.
    pub first: u64,
    /// Standard deviation, in the model's units.
    pub spread: f64,
}

/// The tuples of a step on this rank.
pub(super) struct Making<'a> {
    pub source: TupleSource<'a>,
    pub units: &'a Normalization,
    pub recipes: &'a [Recipe],
    pub noise: Option<Noise>,
}

/// A part of one update.
struct Share<'v, X> {
    row: usize,
    role: Role,
    /// Its first value.
    from: usize,
    values: &'v mut [X],
}

impl Making<'_> {
    /// Makes all updates; the keys are left alone.
    ///
    /// # Errors
    /// When a value of the store is not a finite number.
    pub fn fill<X: Real>(&self, to: StagedMut<'_, X>, threads: &Threads) -> Result<()> {
        let [student, teacher] = Role::BOTH.map(|role| self.source.values(role));
        let rows = to.student.chunks_mut(student).zip(to.teacher.chunks_mut(teacher));
        let shares = rows.enumerate().flat_map(|(row, (student, teacher))| {
            [(Role::Student, student), (Role::Teacher, teacher)].into_iter().flat_map(
                move |(role, update)| {
                    let parts = update.chunks_mut(SHARE).enumerate();
                    parts.map(move |(i, values)| Share { row, role, from: i * SHARE, values })
                },
            )
        });
        threads.each(shares.collect(), |share| self.make_share(share))
    }

    fn make_share<X: Real>(&self, share: Share<'_, X>) -> Result<()> {
        let Share { row, role, from, values } = share;
        let mut room = [0.0; PIECE];
        for (i, piece) in values.chunks_mut(PIECE).enumerate() {
            let made = &mut room[..piece.len()];
            self.make(row, role, from + i * PIECE, made)?;
            narrow(piece, made);
        }
        Ok(())
    }

    /// Values of one update from value `from` on.
    fn make(&self, row: usize, role: Role, from: usize, made: &mut [f32]) -> Result<()> {
        let read = |tuple: Tuple, to: &mut [f32]| self.source.read_part(role, tuple, from, to);
        match self.recipes[row] {
            Recipe::Plain(tuple) => read(tuple, made)?,
            Recipe::Combined(parts, weights) => combine(made, weights, |k, to| read(parts[k], to))?,
        }
        self.units.apply_part(role, made, from);
        if let (Some(noise), Role::Student) = (self.noise, role) {
            let before = (row * self.source.values(role) + from) as u64;
            add_normals(made, noise.key, noise.first + before, noise.spread);
        }
        Ok(())
    }
}

/// `made` becomes the sum with these weights of what `read` puts in its place one after the other.
fn combine(
    made: &mut [f32],
    weights: [f64; COMBINED],
    mut read: impl FnMut(usize, &mut [f32]) -> gradtx_runtime::Result<()>,
) -> Result<()> {
    let mut sum = [0.0; PIECE];
    let sum = &mut sum[..made.len()];
    for (k, weight) in weights.into_iter().enumerate() {
        read(k, made)?;
        dispatch(AddWeighted { sum, first: k == 0, values: made, weight });
    }
    dispatch(Round { to: made, sum });
    Ok(())
}

/// `sum = weight · values`, or `sum += …` after the first.
struct AddWeighted<'a> {
    sum: &'a mut [f64],
    first: bool,
    values: &'a [f32],
    weight: f64,
}

impl Task for AddWeighted<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { sum, first, values, weight } = self;
        let values = &values[..sum.len()];
        for i in 0..values.len() {
            let term = weight * values[i] as f64;
            sum[i] = if first { term } else { sum[i] + term };
        }
    }
}

/// `to = sum`, rounded.
struct Round<'a> {
    to: &'a mut [f32],
    sum: &'a [f64],
}

impl Task for Round<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for (to, &sum) in self.to.iter_mut().zip(self.sum) {
            *to = sum as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_combination_is_affine() {
        // Rows of two values, the second of which is 1 − 2 · the first.
        let parts: Vec<f32> = [0.5, -1.0, 3.0].iter().flat_map(|&x| [x, 1.0 - 2.0 * x]).collect();
        let mut rows = [9.0; 4];
        let combine = |row: &mut [f32], weights| {
            let read = |k: usize, to: &mut [f32]| {
                to.copy_from_slice(&parts[2 * k..2 * k + 2]);
                Ok(())
            };
            combine(row, weights, read).unwrap();
        };
        combine(&mut rows[2..], [0.25, 1.5, -0.75]);
        assert_eq!(rows[..2], [9.0, 9.0]);
        assert!((rows[3] - (1.0 - 2.0 * rows[2])).abs() < 1e-6);
        combine(&mut rows[2..], [0.25, 1.5, 0.75]);
        assert!(
            (rows[3] - (1.0 - 2.0 * rows[2])).abs() > 0.1,
            "weights that do not sum to one break the rule"
        );
    }
}
