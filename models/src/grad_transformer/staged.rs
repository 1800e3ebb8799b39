//! [`StagedTuples`]: a batch of tuples on the host, as the model computes in them, in memory that copies
//! to the device start from; and [`Batch`], all that a trainer can be given.
//!
//! Who prepares batches fills staged ones, on as many threads as it likes: the thread that trains then
//! only asks for the copies.

use super::{GradTransformerConfig, Tuples};
use gradtx_kernels::{AsyncCopy, CopyStream, Pinned, Real};
use gradtx_runtime::{Error, Result};

/// A batch of tuples in the model's units and type, in memory that is taken once.
pub struct StagedTuples<D: AsyncCopy, X: Real> {
    /// `[B, L_S, d_S]`
    student: D::Pinned<X>,
    /// `[B, L_T, d_T]`
    teacher: D::Pinned<X>,
    /// `[B]`
    keys: D::Pinned<u64>,
    /// Values of an update of each side.
    each: [usize; 2],
}

/// The same for writing.
#[derive(Debug)]
pub struct StagedMut<'a, X> {
    /// `[B, L_S, d_S]`
    pub student: &'a mut [X],
    /// `[B, L_T, d_T]`
    pub teacher: &'a mut [X],
    /// `[B]`: key of each tuple's dropout masks in this step.
    pub keys: &'a mut [u64],
}

impl<D: AsyncCopy, X: Real> StagedTuples<D, X> {
    /// Takes memory for `batch` tuples; all values are zero.
    pub fn new(dev: &D, config: &GradTransformerConfig, batch: usize) -> Result<Self> {
        let each = [config.student_len(), config.teacher_len()];
        Ok(Self {
            student: dev.pinned(batch * each[0])?,
            teacher: dev.pinned(batch * each[1])?,
            keys: dev.pinned(batch)?,
            each,
        })
    }

    /// Number of tuples.
    pub fn len(&self) -> usize {
        self.keys.values().len()
    }

    /// True if there is room for none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of it for writing, once the last copies to the device are done. Any thread may ask.
    pub fn values_mut(&mut self) -> Result<StagedMut<'_, X>> {
        Ok(StagedMut {
            student: self.student.values_mut()?,
            teacher: self.teacher.values_mut()?,
            keys: self.keys.values_mut()?,
        })
    }
}

/// Some tuples in a row of staged ones.
pub struct StagedPart<'a, D: AsyncCopy, X: Real> {
    of: &'a StagedTuples<D, X>,
    from: usize,
    to: usize,
}

/// Tuples on the host that a trainer can be given.
pub enum Batch<'a, D: AsyncCopy, X: Real> {
    /// Converted and copied by the thread that trains.
    Plain(Tuples<'a>),
    /// Ready to be copied.
    Staged(StagedPart<'a, D, X>),
}

impl<D: AsyncCopy, X: Real> Clone for StagedPart<'_, D, X> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: AsyncCopy, X: Real> Copy for StagedPart<'_, D, X> {}

impl<D: AsyncCopy, X: Real> Clone for Batch<'_, D, X> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: AsyncCopy, X: Real> Copy for Batch<'_, D, X> {}

impl<'a, D: AsyncCopy, X: Real> From<Tuples<'a>> for Batch<'a, D, X> {
    fn from(tuples: Tuples<'a>) -> Self {
        Self::Plain(tuples)
    }
}

impl<'a, D: AsyncCopy, X: Real> From<&'a StagedTuples<D, X>> for Batch<'a, D, X> {
    fn from(of: &'a StagedTuples<D, X>) -> Self {
        Self::Staged(StagedPart { of, from: 0, to: of.len() })
    }
}

impl<'a, D: AsyncCopy, X: Real> Batch<'a, D, X> {
    /// Number of tuples.
    pub fn len(&self) -> usize {
        self.keys().len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Key of each tuple's dropout masks.
    pub fn keys(&self) -> &'a [u64] {
        match self {
            Self::Plain(tuples) => tuples.keys,
            Self::Staged(part) => &part.of.keys.values()[part.from..part.to],
        }
    }

    /// Tuples `from..to` of these.
    pub fn part(&self, config: &GradTransformerConfig, from: usize, to: usize) -> Self {
        match self {
            Self::Plain(tuples) => Self::Plain(tuples.part(config, from, to)),
            Self::Staged(part) => {
                let whole = part.to - part.from;
                assert!(from <= to && to <= whole, "tuples {from}..{to} of {whole}");
                Self::Staged(StagedPart { of: part.of, from: part.from + from, to: part.from + to })
            }
        }
    }

    /// Fails unless both sides have as many updates as there are keys, at least one, of the model's
    /// shapes.
    pub(super) fn check(&self, config: &GradTransformerConfig) -> Result<()> {
        match self {
            Self::Plain(tuples) => tuples.check(config),
            Self::Staged(part) if part.of.each != [config.student_len(), config.teacher_len()] => {
                let why = format!("its updates have {:?} values, not those of the model", part.of.each);
                Err(Error::invalid("a batch", why))
            }
            Self::Staged(_) if self.is_empty() => Err(Error::invalid("a batch", "it holds no tuples")),
            Self::Staged(_) => Ok(()),
        }
    }
}

impl<D: AsyncCopy, X: Real> StagedPart<'_, D, X> {
    /// Asks for the copies to the device: `[n, L_S, d_S]`, `[n, L_T, d_T]` and `[n]`.
    pub(super) fn upload(
        &self,
        copies: &mut D::CopyStream,
        student: D::ViewMut<'_, X>,
        teacher: D::ViewMut<'_, X>,
        keys: D::ViewMut<'_, u64>,
    ) -> Result<()> {
        let Self { of, from, to } = *self;
        let of_side = |each: usize| from * each..to * each;
        copies.upload_pinned(keys, &of.keys, from..to)?;
        copies.upload_pinned(student, &of.student, of_side(of.each[0]))?;
        Ok(copies.upload_pinned(teacher, &of.teacher, of_side(of.each[1]))?)
    }
}
