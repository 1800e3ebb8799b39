//! [`Normalization`]: the units in which the Grad-Transformer sees updates.
//!
//! Raw updates are tiny and of different size from block to block, and most of an
//! update is common to all shadow pairs. The model therefore sees
//! `(update − mean) / scale`, and its predictions are taken back. Statistics come from
//! the training tuples only, are computed in f64 in one pass (Welford's recurrence),
//! and travel with the translator.

mod fit;

pub use fit::{FitPart, NormalizationFit};

use gradtx_kernels::cpu::simd::{Level, Task, dispatch};
use gradtx_runtime::artifact::{Role, TensorFile, little_endian, write_tensors};
use gradtx_runtime::{Error, Result};
use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// File of a translator directory that holds the statistics.
const FILE: &str = "normalization.safetensors";

/// What is subtracted, and what is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NormalizationMode {
    /// Nothing: raw updates.
    None,
    /// Divided by one number, the root mean square.
    Scalar,
    /// The mean update subtracted, then divided by one number.
    ScalarCentred,
    /// The mean update subtracted, then every block divided by a number of its own.
    Block,
    /// The mean update subtracted, then every coordinate divided by its own deviation.
    Coordinate,
}

impl NormalizationMode {
    const ALL: [(Self, &'static str); 5] = [
        (Self::None, "none"),
        (Self::Scalar, "scalar"),
        (Self::ScalarCentred, "scalar_centred"),
        (Self::Block, "block"),
        (Self::Coordinate, "coordinate"),
    ];

    /// Its name in files and settings.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(mode, _)| *mode == self).expect("ALL holds every variant").1
    }

    /// The mode of a name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, n)| *n == name).map(|(mode, _)| *mode)
    }
}

/// Statistics of one side's updates `[L, d]`.
#[derive(Clone, Debug, PartialEq)]
struct Statistics {
    /// L, d.
    shape: [usize; 2],
    /// `[L, d]`, or nothing where nothing is subtracted.
    mean: Vec<f32>,
    /// `[1]`, `[L]` or `[L, d]`: divisor of every value, block or coordinate.
    scale: Vec<f32>,
}

impl Statistics {
    fn identity(shape: [usize; 2]) -> Self {
        Self { shape, mean: vec![], scale: vec![1.0] }
    }

    /// Updates `[n, L, d]` into the model's units or back, in place.
    fn convert(&self, updates: &mut [f32], way: Way) -> Result<()> {
        let [blocks, width] = self.shape;
        let len = blocks * width;
        if len == 0 || !updates.len().is_multiple_of(len) {
            let why =
                format!("expected updates of {blocks} blocks of {width}, found {} values", updates.len());
            return Err(Error::invalid("normalization", why));
        }
        updates.chunks_exact_mut(len).for_each(|update| self.convert_part(update, 0, way));
        Ok(())
    }

    /// The same of some values of one update, of which the first is value `from`.
    fn convert_part(&self, mut values: &mut [f32], mut from: usize, way: Way) {
        // Values that share a divisor.
        let shared = self.shape[0] * self.shape[1] / self.scale.len();
        while !values.is_empty() {
            let len = if shared == 1 { values.len() } else { (shared - from % shared).min(values.len()) };
            let (run, rest) = values.split_at_mut(len);
            let mean = if self.mean.is_empty() { &[][..] } else { &self.mean[from..from + len] };
            let first = from / shared;
            let scale = &self.scale[first..if shared == 1 { first + len } else { first + 1 }];
            dispatch(Convert { values: run, mean, scale, way });
            (values, from) = (rest, from + len);
        }
    }
}

/// Which way values are converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `(x − mean) / scale`
    IntoUnits,
    /// `x · scale + mean`
    Back,
}

/// Values in a row that have one divisor, or one each; and their means, or none. Computed in f64,
/// rounded once.
struct Convert<'a> {
    values: &'a mut [f32],
    mean: &'a [f32],
    scale: &'a [f32],
    way: Way,
}

impl Task for Convert<'_> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let Self { values, mean, scale, way } = self;
        let n = values.len();
        match (mean.len(), scale.len(), way) {
            (0, 1, Way::IntoUnits) => {
                let scale = scale[0] as f64;
                for i in 0..n {
                    values[i] = (values[i] as f64 / scale) as f32;
                }
            }
            (0, 1, Way::Back) => {
                let scale = scale[0] as f64;
                for i in 0..n {
                    values[i] = (values[i] as f64 * scale + 0.0) as f32;
                }
            }
            (_, 1, Way::IntoUnits) => {
                let (mean, scale) = (&mean[..n], scale[0] as f64);
                for i in 0..n {
                    values[i] = ((values[i] as f64 - mean[i] as f64) / scale) as f32;
                }
            }
            (_, 1, Way::Back) => {
                let (mean, scale) = (&mean[..n], scale[0] as f64);
                for i in 0..n {
                    values[i] = (values[i] as f64 * scale + mean[i] as f64) as f32;
                }
            }
            (_, _, Way::IntoUnits) => {
                let (mean, scale) = (&mean[..n], &scale[..n]);
                for i in 0..n {
                    values[i] = ((values[i] as f64 - mean[i] as f64) / scale[i] as f64) as f32;
                }
            }
            (_, _, Way::Back) => {
                let (mean, scale) = (&mean[..n], &scale[..n]);
                for i in 0..n {
                    values[i] = (values[i] as f64 * scale[i] as f64 + mean[i] as f64) as f32;
                }
            }
        }
    }
}

/// How updates of both sides are normalised.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalization {
    mode: NormalizationMode,
    student: Statistics,
    teacher: Statistics,
}

impl Normalization {
    /// Leaves updates as they are; shapes are (blocks, width).
    pub fn none(student: [usize; 2], teacher: [usize; 2]) -> Self {
        let mode = NormalizationMode::None;
        Self { mode, student: Statistics::identity(student), teacher: Statistics::identity(teacher) }
    }

    /// Its mode.
    pub fn mode(&self) -> NormalizationMode {
        self.mode
    }

    /// Blocks and width of the student's updates.
    pub(crate) fn student_shape(&self) -> [usize; 2] {
        self.student.shape
    }

    /// Blocks and width of the teacher's updates.
    pub(crate) fn teacher_shape(&self) -> [usize; 2] {
        self.teacher.shape
    }

    /// Student updates `[n, L_S, d_S]` into the model's units, in place.
    pub fn apply_student(&self, updates: &mut [f32]) -> Result<()> {
        self.student.convert(updates, Way::IntoUnits)
    }

    /// Teacher updates `[n, L_T, d_T]` into the model's units, in place.
    pub fn apply_teacher(&self, updates: &mut [f32]) -> Result<()> {
        self.teacher.convert(updates, Way::IntoUnits)
    }

    /// Some values of one update of this side into the model's units, in place; the first is value
    /// `from` of the update. The same values as of the whole update.
    ///
    /// # Panics
    /// When the update ends before.
    pub fn apply_part(&self, role: Role, values: &mut [f32], from: usize) {
        let side = match role {
            Role::Student => &self.student,
            Role::Teacher => &self.teacher,
        };
        let [blocks, width] = side.shape;
        assert!(from + values.len() <= blocks * width, "{} values from {from}", values.len());
        side.convert_part(values, from, Way::IntoUnits);
    }

    /// The model's predictions `[n, L_T, d_T]` back into updates, in place.
    pub fn undo_teacher(&self, updates: &mut [f32]) -> Result<()> {
        self.teacher.convert(updates, Way::Back)
    }

    /// All statistics in a row: what makes [`Self::from_values`] the same on another rank.
    pub fn values(&self) -> Vec<f32> {
        [&self.student, &self.teacher].iter().flat_map(|s| [&s.mean[..], &s.scale[..]].concat()).collect()
    }

    /// From what [`Self::values`] gave for statistics of this mode and these shapes.
    ///
    /// # Errors
    /// When there are too few or too many.
    pub fn from_values(
        mode: NormalizationMode,
        student: [usize; 2],
        teacher: [usize; 2],
        values: &[f32],
    ) -> Result<Self> {
        let lengths = [student, teacher].map(|shape| {
            let centred = !matches!(mode, NormalizationMode::None | NormalizationMode::Scalar);
            (if centred { shape[0] * shape[1] } else { 0 }, divisors(mode, shape))
        });
        let wanted: usize = lengths.iter().map(|(mean, scale)| mean + scale).sum();
        if values.len() != wanted {
            let why = format!("expected {wanted} values of mode {}, found {}", mode.name(), values.len());
            return Err(Error::invalid("normalization", why));
        }
        let mut rest = values;
        let mut side = |shape, (mean, scale)| {
            let (own, after) = rest.split_at(mean + scale);
            rest = after;
            Statistics { shape, mean: own[..mean].to_vec(), scale: own[mean..].to_vec() }
        };
        Ok(Self { mode, student: side(student, lengths[0]), teacher: side(teacher, lengths[1]) })
    }

    /// Writes the statistics to a translator directory, if there are any.
    pub fn save(&self, dir: &Path) -> Result<()> {
        if self.mode == NormalizationMode::None {
            return Ok(());
        }
        let sides = [("student", &self.student), ("teacher", &self.teacher)];
        let parts: Vec<_> = sides
            .iter()
            .flat_map(|(side, s)| [(format!("{side}.mean"), &s.mean), (format!("{side}.scale"), &s.scale)])
            .filter(|(_, values)| !values.is_empty())
            .map(|(name, values)| (name, values.len(), little_endian(values)))
            .collect();
        let tensors: Vec<_> = parts
            .iter()
            .map(|(name, len, bytes)| (name.clone(), Dtype::F32, vec![*len], &bytes[..]))
            .collect();
        let metadata = [("format", "pt"), ("mode", self.mode.name())];
        write_tensors(&dir.join(FILE), &tensors, &metadata.map(|(k, v)| (k.to_owned(), v.to_owned())).into())
    }

    /// Reads the statistics of a translator directory whose configuration asks for `mode`.
    ///
    /// # Errors
    /// When the file is missing, of another mode or shape, or holds a divisor that is not positive.
    pub fn load(
        dir: &Path,
        mode: NormalizationMode,
        student: [usize; 2],
        teacher: [usize; 2],
    ) -> Result<Self> {
        if mode == NormalizationMode::None {
            return Ok(Self::none(student, teacher));
        }
        let path = dir.join(FILE);
        let file = TensorFile::open(&path)?;
        if file.metadata("mode") != Some(mode.name()) {
            let found = file.metadata("mode").unwrap_or("none");
            let why = format!("expected statistics of mode {}, found {found}", mode.name());
            return Err(Error::file(&path, why));
        }
        let side = |name: &str, shape: [usize; 2]| -> Result<Statistics> {
            let read = |part: &str, len: usize| -> Result<Vec<f32>> {
                let name = format!("{name}.{part}");
                let tensor = file.tensor(&name)?;
                tensor.expect_shape(&[len])?;
                tensor.to_f32()
            };
            let centred = mode != NormalizationMode::Scalar;
            let mean = if centred { read("mean", shape[0] * shape[1])? } else { vec![] };
            let scale = read("scale", divisors(mode, shape))?;
            if let Some(why) = unusable_divisor(&scale) {
                return Err(Error::tensor(&path, &format!("{name}.scale"), why));
            }
            Ok(Statistics { shape, mean, scale })
        };
        Ok(Self { mode, student: side("student", student)?, teacher: side("teacher", teacher)? })
    }
}

/// What is wrong with divisors, if anything. One that is not a normal number is as bad as zero:
/// what is divided by it is not finite.
fn unusable_divisor(scale: &[f32]) -> Option<String> {
    let (at, bad) = scale.iter().enumerate().find(|(_, s)| !(s.is_normal() && **s > 0.0))?;
    Some(format!("divisors must be positive, found {bad} at element {at}"))
}

/// Number of divisors that a mode has for updates of this shape.
fn divisors(mode: NormalizationMode, [blocks, width]: [usize; 2]) -> usize {
    match mode {
        NormalizationMode::Block => blocks,
        NormalizationMode::Coordinate => blocks * width,
        _ => 1,
    }
}

#[cfg(test)]
mod tests;
