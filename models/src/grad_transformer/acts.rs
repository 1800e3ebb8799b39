//! [`Activations`]: everything that a training step keeps, allocated once.
//!
//! There are two sets of inputs: while the device works on one, the next batch goes into the
//! other, beside the operations.

use super::{Batch, GradTransformer, GradTransformerConfig};
use crate::t5::weights::upload_f32_async;
use crate::t5::{Keep, StackActs, StackShape};
use gradtx_kernels::ops::{Backend, Elementwise, StridedRows};
use gradtx_kernels::{AsyncCopy, CopyStream, Real};
use gradtx_runtime::buffers::{Allocator, Rows};
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

/// A batch on the device.
pub(super) struct Inputs<D: AsyncCopy, X: Real> {
    /// `[B·L_S, d_S]`
    pub(super) student: Rows<D, X>,
    /// `[B·L_T, d_T]`: of each example a zero block, then all teacher blocks but the last. The zero
    /// blocks are never written to.
    pub(super) shifted: Rows<D, X>,
    /// `[B·L_T, d_T]`
    pub(super) target: Rows<D, X>,
    /// `[B]`
    pub(super) keys: Rows<D, u64>,
    /// Of uploads into these buffers.
    copies: D::CopyStream,
}

impl<D: Backend<X>, X: Real> Inputs<D, X> {
    fn allocate(
        alloc: &mut Allocator<'_, D>,
        dev: &D,
        config: &GradTransformerConfig,
        capacity: usize,
    ) -> Result<Self> {
        let (rows_s, rows_t) = (capacity * config.student_blocks, capacity * config.teacher_blocks);
        Ok(Self {
            student: alloc.rows("student", rows_s, config.student_width)?,
            shifted: alloc.rows("shifted", rows_t, config.teacher_width)?,
            target: alloc.rows("target", rows_t, config.teacher_width)?,
            keys: alloc.rows("keys", capacity, 1)?,
            copies: dev.copy_stream()?,
        })
    }

    /// Copies tuples to the device, beside the operations; `stage` is room for converting them.
    fn upload(
        &mut self,
        config: &GradTransformerConfig,
        tuples: Batch<'_, D, X>,
        stage: &mut Vec<X>,
    ) -> Result<()> {
        let batch = tuples.len();
        let (rows_s, rows_t) = (batch * config.student_blocks, batch * config.teacher_blocks);
        let Self { student, target, keys, copies, .. } = self;
        let (student, target, keys) =
            (student.view_mut(rows_s), target.view_mut(rows_t), keys.view_mut(batch));
        match tuples {
            Batch::Staged(part) => part.upload(copies, student, target, keys),
            Batch::Plain(tuples) => {
                copies.upload_async(keys, tuples.keys)?;
                upload_f32_async::<D, X>(copies, student, tuples.student, stage)?;
                upload_f32_async::<D, X>(copies, target, tuples.teacher, stage)
            }
        }
    }

    /// Makes operations wait for what was uploaded, and shifts the teacher's blocks.
    fn begin(&mut self, dev: &D, config: &GradTransformerConfig, batch: usize) -> Result<()> {
        self.copies.wait()?;
        let (len, width) = (config.teacher_len(), config.teacher_width);
        let rows = StridedRows { rows: batch, cols: len - width, out_stride: len, x_stride: len };
        let shifted = self.shifted.part_mut(width, batch * len - width);
        Ok(Elementwise::<X>::copy_strided(dev, shifted, self.target.part(0, batch * len), rows)?)
    }
}

/// Activations of a Grad-Transformer for batches of limited size.
pub struct Activations<D: AsyncCopy, X: Real> {
    /// Tuples at most.
    capacity: usize,
    /// Tuples of the batch that was loaded last, B.
    pub(super) batch: usize,
    /// That batch, and the one before it or the next.
    pub(super) inputs: [Inputs<D, X>; 2],
    /// Which of the two is the batch that was loaded last.
    pub(super) current: usize,
    /// Keys of the batch that the other holds already, if it holds one.
    ahead: Option<Vec<u64>>,
    pub(super) encoder: StackActs<D, X>,
    pub(super) decoder: StackActs<D, X>,
    /// `[B·L_T, d_T]`
    pub(super) pred: Rows<D, X>,
    /// `[B·L_T, d_T]`
    pub(super) d_pred: Rows<D, X>,
    /// `[B·L_T]`: squared error of each block.
    pub(super) sums: Rows<D, X::Acc>,
    /// Released when the sums are there, so that they can be read beside the backward pass.
    pub(super) sums_copies: D::CopyStream,
    /// On the host: values on their way to the device, where they must be converted.
    stage: Vec<X>,
}

impl<D: Backend<X>, X: Real> Activations<D, X> {
    /// Takes memory for batches of at most `capacity` tuples.
    pub fn new(model: &GradTransformer<D, X>, capacity: usize) -> Result<Self> {
        Self::allocate(&mut Allocator::new(&model.dev, Purpose::Batch), model, capacity)
    }

    /// The buffers that [`Self::new`] takes.
    pub fn plan(model: &GradTransformer<D, X>, capacity: usize) -> Result<MemoryPlan> {
        Allocator::plan(Purpose::Batch, |alloc| Self::allocate(alloc, model, capacity))
    }

    /// [`Self::new`] with an allocator.
    pub(super) fn allocate(
        alloc: &mut Allocator<'_, D>,
        model: &GradTransformer<D, X>,
        capacity: usize,
    ) -> Result<Self> {
        let config = &model.config;
        let (blocks_s, blocks_t) = (config.student_blocks, config.teacher_blocks);
        let (rows_t, width_t) = (capacity * blocks_t, config.teacher_width);
        let encoder = StackShape { batch: capacity, tokens: blocks_s, memory: 0 };
        let decoder = StackShape { batch: capacity, tokens: blocks_t, memory: blocks_s };
        alloc.set_purpose(Purpose::Batch);
        let mut inputs = || Inputs::allocate(alloc, &model.dev, config, capacity);
        let inputs = [inputs()?, inputs()?];
        alloc.set_purpose(Purpose::Activations);
        Ok(Self {
            capacity,
            batch: 0,
            inputs,
            current: 0,
            ahead: None,
            encoder: StackActs::allocate(alloc, &model.encoder, encoder, Keep::ForBackward)?,
            decoder: StackActs::allocate(alloc, &model.decoder, decoder, Keep::ForBackward)?,
            pred: alloc.rows("pred", rows_t, width_t)?,
            d_pred: alloc.rows("d_pred", rows_t, width_t)?,
            sums: alloc.rows("sums", rows_t, 1)?,
            sums_copies: model.dev.copy_stream()?,
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

    /// Begins with a batch. One that [`Self::load_ahead`] has uploaded is recognised by its keys.
    pub(super) fn load(
        &mut self,
        dev: &D,
        config: &GradTransformerConfig,
        tuples: Batch<'_, D, X>,
    ) -> Result<()> {
        self.check(config, tuples)?;
        let next = 1 - self.current;
        if self.ahead.take().is_none_or(|keys| keys != tuples.keys()) {
            self.inputs[next].upload(config, tuples, &mut self.stage)?;
        }
        // Everything that uses the batch before has been asked for.
        self.inputs[self.current].copies.release()?;
        self.inputs[next].begin(dev, config, tuples.len())?;
        (self.current, self.batch) = (next, tuples.len());
        Ok(())
    }

    /// Uploads the batch that is loaded next, beside the operations on the present one.
    pub(super) fn load_ahead(
        &mut self,
        config: &GradTransformerConfig,
        tuples: Batch<'_, D, X>,
    ) -> Result<()> {
        self.check(config, tuples)?;
        self.ahead = None;
        self.inputs[1 - self.current].upload(config, tuples, &mut self.stage)?;
        self.ahead = Some(tuples.keys().to_vec());
        Ok(())
    }

    /// Forgets a batch that was uploaded ahead.
    pub(super) fn forget_ahead(&mut self) {
        self.ahead = None;
    }

    fn check(&self, config: &GradTransformerConfig, tuples: Batch<'_, D, X>) -> Result<()> {
        tuples.check(config)?;
        if tuples.len() > self.capacity {
            let why = format!("{} tuples, where {} have room", tuples.len(), self.capacity);
            return Err(Error::invalid("a batch of a Grad-Transformer", why));
        }
        Ok(())
    }
}
