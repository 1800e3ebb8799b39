//! How the values of a step's tuples are made: read from the store, perhaps combined, in the
//! model's units, perhaps with noise, rounded to the model's type.
//!
//! A batch is tens of millions of values, so that is done in pieces that stay in a processor's
//! cache, and shared between threads. Every value is computed by itself, in f64 up to the last
//! rounding: results depend neither on the pieces nor on the threads.

use super::tuples::{COMBINED, Tuple};
use anyhow::{Context as _, Result};
use gradtx_kernels::Real;
use gradtx_kernels::cpu::narrow;
use gradtx_kernels::cpu::simd::{Level, Task, dispatch};
use gradtx_kernels::rng::Stream;
use gradtx_models::grad_transformer::{Normalization, StagedMut};
use gradtx_runtime::artifact::{Role, TupleStore};
use rayon::prelude::*;

/// Values that are made at a time. They and all that they are made of fit the fastest cache.
const PIECE: usize = 2048;
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
    fn each<P: Send>(&self, parts: Vec<P>, work: impl Fn(P) -> Result<()> + Sync + Send) -> Result<()> {
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
    pub store: &'a TupleStore,
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
        let [student, teacher] = Role::BOTH.map(|role| self.store.space(role).values());
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
        let read = |(pair, step): Tuple, to: &mut [f32]| self.store.read_part(role, pair, step, from, to);
        match self.recipes[row] {
            Recipe::Plain(tuple) => read(tuple, made)?,
            Recipe::Combined(parts, weights) => {
                let mut sum = [0.0; PIECE];
                let sum = &mut sum[..made.len()];
                for (i, (part, weight)) in parts.into_iter().zip(weights).enumerate() {
                    read(part, made)?;
                    dispatch(AddWeighted { sum, first: i == 0, values: made, weight });
                }
                dispatch(Round { to: made, sum });
            }
        }
        self.units.apply_part(role, made, from);
        if let (Some(noise), Role::Student) = (self.noise, role) {
            let before = (row * self.store.space(role).values() + from) as u64;
            let mut numbers = Stream::after_normals(noise.key, noise.first + before);
            made.iter_mut().for_each(|x| *x += (numbers.normal() * noise.spread) as f32);
        }
        Ok(())
    }
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
