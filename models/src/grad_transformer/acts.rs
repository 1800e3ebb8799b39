//! [`Activations`]: everything that a training step keeps, allocated once.

use super::{GradTransformer, GradTransformerConfig};
use crate::t5::buffers::{Allocator, Rows};
use crate::t5::weights::upload_f32;
use crate::t5::{Keep, StackActs, StackShape};
use gradtx_kernels::ops::Backend;
use gradtx_kernels::{Device, Real};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};

/// A batch of tuples on the host, in the model's units.
#[derive(Clone, Copy, Debug)]
pub struct Tuples<'a> {
    /// `[B, L_S, d_S]`
    pub student: &'a [f32],
    /// `[B, L_T, d_T]`
    pub teacher: &'a [f32],
    /// `[B]`: key of each tuple's dropout masks in this step.
    pub keys: &'a [u64],
}

impl<'a> Tuples<'a> {
    /// Number of tuples.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Tuples `from..to` of these.
    pub fn part(&self, config: &GradTransformerConfig, from: usize, to: usize) -> Tuples<'a> {
        let (s, t) = (config.student_len(), config.teacher_len());
        Tuples {
            student: &self.student[from * s..to * s],
            teacher: &self.teacher[from * t..to * t],
            keys: &self.keys[from..to],
        }
    }

    /// Fails unless all parts hold the same number of tuples, at least one.
    pub(super) fn check(&self, config: &GradTransformerConfig) -> Result<()> {
        let count = self.keys.len();
        let expect = |what: &str, found: usize, each: usize| {
            if found == count * each {
                return Ok(());
            }
            let why = format!("expected {count} updates of {each} values, found {found} values");
            Err(Error::invalid(format!("{what} updates of a batch"), why))
        };
        expect("student", self.student.len(), config.student_len())?;
        expect("teacher", self.teacher.len(), config.teacher_len())?;
        if count == 0 { Err(Error::invalid("a batch", "it holds no tuples")) } else { Ok(()) }
    }
}

/// Activations of a Grad-Transformer for batches of limited size.
pub struct Activations<D: Device, X: Real> {
    /// Tuples at most.
    capacity: usize,
    /// Tuples of the batch that was loaded last, B.
    pub(super) batch: usize,
    /// `[B·L_S, d_S]`
    pub(super) student: Rows<D, X>,
    /// `[B·L_T, d_T]`: a zero block, then all teacher blocks but the last.
    pub(super) shifted: Rows<D, X>,
    /// `[B·L_T, d_T]`
    pub(super) target: Rows<D, X>,
    /// `[B]`
    pub(super) keys: Rows<D, u64>,
    pub(super) encoder: StackActs<D, X>,
    pub(super) decoder: StackActs<D, X>,
    /// `[B·L_T, d_T]`
    pub(super) pred: Rows<D, X>,
    /// `[B·L_T, d_T]`
    pub(super) d_pred: Rows<D, X>,
    /// `[B·L_T]`: squared error of each block.
    pub(super) sums: Rows<D, X::Acc>,
    /// On the host: values on their way to the device, where they must be converted.
    stage: Vec<X>,
}

impl<D: Backend<X>, X: Real> Activations<D, X> {
    /// Takes memory for batches of at most `capacity` tuples.
    pub fn new(model: &GradTransformer<D, X>, capacity: usize) -> Result<Self> {
        Self::allocate(&mut Allocator::new(&model.dev, false, Purpose::Batch), model, capacity)
    }

    /// The buffers that [`Self::new`] would take, without taking them.
    pub fn plan(model: &GradTransformer<D, X>, capacity: usize) -> Result<MemoryPlan> {
        let mut alloc = Allocator::new(&model.dev, true, Purpose::Batch);
        Self::allocate(&mut alloc, model, capacity)?;
        Ok(alloc.into_plan())
    }

    fn allocate(
        alloc: &mut Allocator<'_, D>,
        model: &GradTransformer<D, X>,
        capacity: usize,
    ) -> Result<Self> {
        let config = &model.config;
        let (blocks_s, blocks_t) = (config.student_blocks, config.teacher_blocks);
        let (width_s, width_t) = (config.student_width, config.teacher_width);
        let (rows_s, rows_t) = (capacity * blocks_s, capacity * blocks_t);
        let encoder = StackShape { batch: capacity, tokens: blocks_s, memory: 0 };
        let decoder = StackShape { batch: capacity, tokens: blocks_t, memory: blocks_s };
        let student = alloc.rows("student", rows_s, width_s)?;
        let shifted = alloc.rows("shifted", rows_t, width_t)?;
        let target = alloc.rows("target", rows_t, width_t)?;
        let keys = alloc.rows("keys", capacity, 1)?;
        alloc.set_purpose(Purpose::Activations);
        Ok(Self {
            capacity,
            batch: 0,
            student,
            shifted,
            target,
            keys,
            encoder: StackActs::allocate(alloc, &model.encoder, encoder, Keep::ForBackward)?,
            decoder: StackActs::allocate(alloc, &model.decoder, decoder, Keep::ForBackward)?,
            pred: alloc.rows("pred", rows_t, width_t)?,
            d_pred: alloc.rows("d_pred", rows_t, width_t)?,
            sums: alloc.rows("sums", rows_t, 1)?,
            stage: vec![],
        })
    }

    /// Tuples at most.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// `[B, L_T, d_T]`: the predictions of the last forward pass.
    pub fn pred(&self, config: &GradTransformerConfig) -> D::View<'_, X> {
        self.pred.view(self.batch * config.teacher_blocks)
    }

    pub(super) fn load(&mut self, dev: &D, config: &GradTransformerConfig, tuples: Tuples<'_>) -> Result<()> {
        tuples.check(config)?;
        let batch = tuples.len();
        if batch > self.capacity {
            let why = format!("{batch} tuples, where {} have room", self.capacity);
            return Err(Error::invalid("a batch of a Grad-Transformer", why));
        }
        self.batch = batch;
        let (rows_s, rows_t) = (batch * config.student_blocks, batch * config.teacher_blocks);
        dev.upload(self.keys.view_mut(batch), tuples.keys)?;
        let Self { student, shifted, target, stage, .. } = self;
        upload_f32::<D, X>(dev, student.view_mut(rows_s), tuples.student, stage)?;
        upload_f32::<D, X>(dev, target.view_mut(rows_t), tuples.teacher, stage)?;
        let (len, width) = (config.teacher_len(), config.teacher_width);
        for example in 0..batch {
            let (zero, earlier) = D::split_mut(shifted.part_mut(example * len, len), width);
            dev.fill(zero, X::zero())?;
            dev.copy(earlier, target.part(example * len, len - width))?;
        }
        Ok(())
    }
}
