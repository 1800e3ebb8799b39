//! [`Normalization`]: the units in which the Grad-Transformer sees updates.
//!
//! Raw updates are tiny and of different size from block to block, and most of an
//! update is common to all shadow pairs. The model therefore sees
//! `(update − mean) / scale`, and its predictions are taken back. Statistics come from
//! the training tuples only, are computed in f64 in one pass (Welford's recurrence),
//! and travel with the translator.

use gradtx_kernels::cpu::simd::{Level, Task, dispatch};
use gradtx_runtime::artifact::{Role, TensorFile, little_endian, write_tensors};
use gradtx_runtime::{Error, Result};
use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// File of a translator directory that holds the statistics.
const FILE: &str = "normalization.safetensors";

/// Share of the mean scale that is added to every coordinate's own, so that coordinates
/// that hardly vary are not blown up.
const COORDINATE_FLOOR: f64 = 0.05;

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
    pub fn student_shape(&self) -> [usize; 2] {
        self.student.shape
    }

    /// Blocks and width of the teacher's updates.
    pub fn teacher_shape(&self) -> [usize; 2] {
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

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    const STUDENT: [usize; 2] = [2, 5];
    const TEACHER: [usize; 2] = [3, 7];
    const COUNT: usize = 41;

    /// Tuples whose coordinates have means and deviations of their own.
    fn tuples(shape: [usize; 2], key: u64) -> Vec<f32> {
        let mut stream = Stream::new(key);
        let values = (0..COUNT).flat_map(|_| 0..shape[0] * shape[1]);
        values.map(|i| (3.0 + i as f64 + stream.normal() * (0.1 + i as f64)) as f32 * 1e-3).collect()
    }

    fn fit(mode: NormalizationMode) -> (Normalization, Vec<f32>, Vec<f32>) {
        let (student, teacher) = (tuples(STUDENT, 1), tuples(TEACHER, 2));
        let mut fit = NormalizationFit::new(mode, STUDENT, TEACHER);
        for (s, t) in student.chunks(10).zip(teacher.chunks(21)) {
            fit.add(s, t).unwrap();
        }
        (fit.finish().unwrap(), student, teacher)
    }

    #[test]
    fn a_fit_in_parts_is_the_same_to_the_bit() {
        for (mode, _) in NormalizationMode::ALL {
            let (whole, student, teacher) = fit(mode);
            for len in [1, 4, 100] {
                let mut fit = NormalizationFit::new(mode, STUDENT, TEACHER);
                for tuples in [0..17, 17..COUNT] {
                    for mut part in fit.add_in_parts(tuples.len(), len) {
                        let (all, each) = match part.role() {
                            Role::Student => (&student, 10),
                            Role::Teacher => (&teacher, 21),
                        };
                        for tuple in tuples.clone() {
                            let from = tuple * each + part.from();
                            part.add(&all[from..from + part.len()]);
                        }
                    }
                }
                assert_eq!(fit.finish().unwrap(), whole, "{mode:?} in parts of {len}");
            }
        }
    }

    fn mean(x: impl Iterator<Item = f64>) -> f64 {
        let values: Vec<f64> = x.collect();
        values.iter().sum::<f64>() / values.len() as f64
    }

    #[test]
    fn every_mode_can_be_undone_and_survives_files() {
        let dir = tempfile::tempdir().unwrap();
        for (mode, name) in NormalizationMode::ALL {
            assert_eq!(NormalizationMode::parse(name), Some(mode));
            let (normalization, _, teacher) = fit(mode);
            let mut there = teacher.clone();
            normalization.apply_teacher(&mut there).unwrap();
            assert_eq!(there == teacher, mode == NormalizationMode::None);
            normalization.undo_teacher(&mut there).unwrap();
            let worst = there.iter().zip(&teacher).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-8, "{name}: {worst}");
            normalization.save(dir.path()).unwrap();
            let loaded = Normalization::load(dir.path(), mode, STUDENT, TEACHER).unwrap();
            assert_eq!(loaded, normalization);
            let mut values = normalization.values();
            assert_eq!(Normalization::from_values(mode, STUDENT, TEACHER, &values).unwrap(), normalization);
            values.push(1.0);
            assert!(Normalization::from_values(mode, STUDENT, TEACHER, &values).is_err());
        }
        let wrong = Normalization::load(dir.path(), NormalizationMode::Block, STUDENT, TEACHER);
        assert!(wrong.unwrap_err().to_string().contains("coordinate"));
    }

    /// As the formula has it, value by value; parts of any length from anywhere are those of the whole.
    #[test]
    fn every_mode_computes_its_formula_to_the_bit() {
        for (mode, name) in NormalizationMode::ALL {
            let (normalization, students, teachers) = fit(mode);
            for (role, side, all) in [
                (Role::Student, &normalization.student, &students),
                (Role::Teacher, &normalization.teacher, &teachers),
            ] {
                let len = side.shape[0] * side.shape[1];
                let at = |i: usize| {
                    let mean = side.mean.get(i % len).map_or(0.0, |&m| m as f64);
                    (mean, side.scale[i % len / (len / side.scale.len())] as f64)
                };
                let wanted: Vec<f32> =
                    (0..all.len()).map(|i| ((all[i] as f64 - at(i).0) / at(i).1) as f32).collect();
                let mut found = all.clone();
                side.convert(&mut found, Way::IntoUnits).unwrap();
                assert!(found.iter().map(|x| x.to_bits()).eq(wanted.iter().map(|x| x.to_bits())), "{name}");
                for (from, to) in [(0, len), (0, 1), (3, 9), (len - 1, len), (4, 4), (1, len)] {
                    let mut part = all[from..to].to_vec();
                    normalization.apply_part(role, &mut part, from);
                    assert_eq!(part, wanted[from..to], "{name}: {from}..{to}");
                }
                side.convert(&mut found, Way::Back).unwrap();
                let back = (0..all.len()).map(|i| (wanted[i] as f64 * at(i).1 + at(i).0) as f32);
                assert!(back.map(f32::to_bits).eq(found.iter().map(|x| x.to_bits())), "{name}");
                assert!(side.convert(&mut [0.0; 4], Way::Back).is_err());
            }
        }
    }

    #[test]
    fn what_each_mode_normalises_has_mean_0_and_square_1() {
        let square = |x: &[f32]| mean(x.iter().map(|&v| (v as f64).powi(2)));
        for mode in [NormalizationMode::Scalar, NormalizationMode::ScalarCentred, NormalizationMode::Block] {
            let (normalization, mut student, _) = fit(mode);
            normalization.apply_student(&mut student).unwrap();
            assert!((square(&student) - 1.0).abs() <= 1e-4, "{mode:?}");
            let first: f64 = mean(student.iter().step_by(10).map(|&x| x as f64));
            assert_eq!(first.abs() <= 1e-5, mode != NormalizationMode::Scalar, "{mode:?}: mean {first}");
            let block: Vec<f32> = student.chunks(10).flat_map(|u| u[..5].to_vec()).collect();
            let alike = (square(&block) - 1.0).abs() <= 1e-4;
            assert_eq!(alike, mode == NormalizationMode::Block, "{mode:?}");
        }
        let (normalization, mut student, _) = fit(NormalizationMode::Coordinate);
        normalization.apply_student(&mut student).unwrap();
        let last: Vec<f32> = student.iter().skip(9).step_by(10).copied().collect();
        assert!((0.8..1.0).contains(&square(&last)), "{}", square(&last));
    }

    #[test]
    fn statistics_that_are_no_units_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mode = NormalizationMode::Block;
        let (good, ..) = fit(mode);
        let refused = |say: &str, change: &dyn Fn(&mut Normalization)| {
            let mut bad = good.clone();
            change(&mut bad);
            bad.save(dir.path()).unwrap();
            let message = Normalization::load(dir.path(), mode, STUDENT, TEACHER).unwrap_err().to_string();
            assert!(message.contains(say) && message.contains(FILE), "{message}");
        };
        refused("teacher.scale", &|n| n.teacher.scale[2] = 0.0);
        refused("student.scale", &|n| n.student.scale[0] = -1.0);
        refused("element 1", &|n| n.teacher.scale[1] = 1e-42);
        refused("not a finite number", &|n| n.student.scale[1] = f32::NAN);
        refused("not a finite number", &|n| n.student.scale[1] = f32::INFINITY);
        refused("student.mean", &|n| n.student.mean[7] = f32::NEG_INFINITY);
        refused("expected shape", &|n| _ = n.teacher.scale.pop());
        good.save(dir.path()).unwrap();
        assert_eq!(Normalization::load(dir.path(), mode, STUDENT, TEACHER).unwrap(), good);
        // Updates so small that no number of 32 bits divides them.
        let mut tiny = NormalizationFit::new(mode, STUDENT, TEACHER);
        for sign in [1.0, -1.0] {
            tiny.add(&[sign * 1e-41; 10], &[sign; 21]).unwrap();
        }
        assert!(tiny.finish().unwrap_err().to_string().contains("student"));
    }

    #[test]
    fn what_cannot_be_fitted_is_refused() {
        let mut fit = NormalizationFit::new(NormalizationMode::ScalarCentred, STUDENT, TEACHER);
        assert!(fit.add(&[1.0; 9], &[1.0; 21]).is_err());
        let mut fit = NormalizationFit::new(NormalizationMode::ScalarCentred, STUDENT, TEACHER);
        for _ in 0..3 {
            fit.add(&[1.0; 10], &[2.0; 21]).unwrap();
        }
        assert!(fit.finish().unwrap_err().to_string().contains("student"));
        assert!(NormalizationFit::new(NormalizationMode::Scalar, STUDENT, TEACHER).finish().is_err());
        let mut fit = NormalizationFit::new(NormalizationMode::Scalar, STUDENT, TEACHER);
        fit.add(&[f32::NAN; 10], &[2.0; 21]).unwrap();
        assert!(fit.finish().is_err());
    }
}
