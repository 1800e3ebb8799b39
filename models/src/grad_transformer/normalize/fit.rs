//! [`NormalizationFit`]: the statistics of a [`Normalization`] in one pass over tuples, in f64.

use super::{Normalization, NormalizationMode, Statistics, unusable_divisor};
use gradtx_kernels::cpu::simd::{Level, Task, dispatch};
use gradtx_runtime::artifact::Role;
use gradtx_runtime::{Error, Result};

/// Share of the mean scale that is added to every coordinate's own, so that coordinates
/// that hardly vary are not blown up.
const COORDINATE_FLOOR: f64 = 0.05;

/// Sums over one side's updates: count, mean, and squared deviations, per coordinate.
struct Moments {
    shape: [usize; 2],
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl Moments {
    fn new(shape: [usize; 2]) -> Self {
        let len = shape[0] * shape[1];
        Self { shape, mean: vec![0.0; len], squares: vec![0.0; len] }
    }

    /// Adds the update that is number `count`, from 1.
    fn add(&mut self, side: &str, update: &[f32], count: f64) -> Result<()> {
        if update.len() != self.mean.len() {
            let [blocks, width] = self.shape;
            let why = format!("expected {blocks} blocks of {width} values, found {} values", update.len());
            return Err(Error::invalid(format!("{side} update for normalization"), why));
        }
        dispatch(Accumulate { update, mean: &mut self.mean, squares: &mut self.squares, count });
        Ok(())
    }

    /// Parts of at most `len` coordinates, where `before` updates have been added.
    fn parts(&mut self, role: Role, len: usize, before: f64) -> impl Iterator<Item = FitPart<'_>> {
        let parts = self.mean.chunks_mut(len).zip(self.squares.chunks_mut(len)).enumerate();
        parts.map(move |(i, (mean, squares))| FitPart { role, from: i * len, mean, squares, count: before })
    }

    fn finish(&self, side: &str, mode: NormalizationMode, count: f64) -> Result<Statistics> {
        let len = self.mean.len();
        let centred = mode != NormalizationMode::Scalar;
        // Mean squares of what is left after the subtraction.
        let squares: Vec<f64> = (0..len)
            .map(|i| self.squares[i] / count + if centred { 0.0 } else { self.mean[i].powi(2) })
            .collect();
        let overall = (squares.iter().sum::<f64>() / len as f64).sqrt();
        if !(overall.is_finite() && overall > 0.0) {
            let why = format!("{count} updates vary by {overall}; there is nothing to divide by");
            return Err(Error::invalid(format!("{side} updates for normalization"), why));
        }
        let scale: Vec<f64> = match mode {
            NormalizationMode::Coordinate => {
                let deviations: Vec<f64> = squares.iter().map(|s| s.sqrt()).collect();
                let floor = COORDINATE_FLOOR * deviations.iter().sum::<f64>() / len as f64;
                deviations.iter().map(|s| s + floor).collect()
            }
            NormalizationMode::Block => {
                let blocks = squares.chunks(self.shape[1]);
                let own = blocks.map(|s| (s.iter().sum::<f64>() / s.len() as f64).sqrt());
                // A block that never varies has no size of its own.
                own.map(|s| if s > 0.0 { s } else { overall }).collect()
            }
            _ => vec![overall],
        };
        let narrow = |values: &[f64]| -> Vec<f32> { values.iter().map(|&x| x as f32).collect() };
        let (mean, scale) = (if centred { narrow(&self.mean) } else { vec![] }, narrow(&scale));
        let problem = unusable_divisor(&scale)
            .or_else(|| Some(format!("mean {}", mean.iter().find(|x| !x.is_finite())?)));
        match problem {
            None => Ok(Statistics { shape: self.shape, mean, scale }),
            Some(why) => Err(Error::invalid(format!("{side} updates for normalization"), why)),
        }
    }
}

/// Adds the update that is number `count`, from 1: Welford's recurrence, by coordinate.
struct Accumulate<'a> {
    update: &'a [f32],
    mean: &'a mut [f64],
    squares: &'a mut [f64],
    count: f64,
}

impl Task for Accumulate<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { update, mean, squares, count } = self;
        let n = update.len();
        let (mean, squares) = (&mut mean[..n], &mut squares[..n]);
        for i in 0..n {
            let before = update[i] as f64 - mean[i];
            mean[i] += before / count;
            squares[i] += before * (update[i] as f64 - mean[i]);
        }
    }
}

/// Some coordinates of a [`NormalizationFit`], which is shared between threads by them: what becomes
/// of a coordinate depends on no other.
pub struct FitPart<'a> {
    role: Role,
    from: usize,
    mean: &'a mut [f64],
    squares: &'a mut [f64],
    count: f64,
}

impl FitPart<'_> {
    /// Whose updates.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Number of the first coordinate.
    pub fn from(&self) -> usize {
        self.from
    }

    /// Number of coordinates.
    pub fn len(&self) -> usize {
        self.mean.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.mean.is_empty()
    }

    /// Adds the values of the next update at these coordinates.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn add(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.len(), "a value for every coordinate");
        self.count += 1.0;
        dispatch(Accumulate { update: values, mean: self.mean, squares: self.squares, count: self.count });
    }
}

/// Fits a [`Normalization`] to tuples, one after the other.
pub struct NormalizationFit {
    mode: NormalizationMode,
    student: Moments,
    teacher: Moments,
    count: f64,
}

impl NormalizationFit {
    /// For updates of these shapes (blocks, width).
    pub fn new(mode: NormalizationMode, student: [usize; 2], teacher: [usize; 2]) -> Self {
        Self { mode, student: Moments::new(student), teacher: Moments::new(teacher), count: 0.0 }
    }

    /// Adds a tuple: student update `[L_S, d_S]` and teacher update `[L_T, d_T]`.
    pub fn add(&mut self, student: &[f32], teacher: &[f32]) -> Result<()> {
        self.count += 1.0;
        self.student.add("student", student, self.count)?;
        self.teacher.add("teacher", teacher, self.count)
    }

    /// All coordinates of both sides in parts of at most `len`; the next `tuples` tuples must be
    /// added to each of them, in their order.
    pub fn add_in_parts(&mut self, tuples: usize, len: usize) -> Vec<FitPart<'_>> {
        let before = self.count;
        self.count += tuples as f64;
        let student = self.student.parts(Role::Student, len, before);
        student.chain(self.teacher.parts(Role::Teacher, len, before)).collect()
    }

    /// The normalization of everything that was added.
    ///
    /// # Errors
    /// When the updates do not vary, or not finitely.
    pub fn finish(self) -> Result<Normalization> {
        if self.mode == NormalizationMode::None {
            return Ok(Normalization::none(self.student.shape, self.teacher.shape));
        }
        if self.count == 0.0 {
            return Err(Error::invalid("normalization", "there are no tuples to fit it to"));
        }
        Ok(Normalization {
            mode: self.mode,
            student: self.student.finish("student", self.mode, self.count)?,
            teacher: self.teacher.finish("teacher", self.mode, self.count)?,
        })
    }
}
