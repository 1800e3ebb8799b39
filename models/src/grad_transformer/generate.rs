//! [`Generator`]: predicts a teacher's update block by block from a student's.
//!
//! The student is encoded once and the cross-attention's keys and values are computed
//! once; every step then feeds the predicted block back and attends to what the cache
//! keeps of the blocks before. Both are the same operations for every batch of one size, which
//! the device is asked for once and then repeats.

use super::GradTransformer;
use crate::t5::weights::upload_f32;
use crate::t5::{DecodeCache, Keep, Pass, StackActs, StackShape};
use gradtx_kernels::ops::Backend;
use gradtx_kernels::{GraphCapture, Real};
use gradtx_runtime::buffers::{Allocator, Rows};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// Buffers of generation for a limited number of students at once.
pub struct Generator<D: GraphCapture, X: Real> {
    capacity: usize,
    /// `[B·L_S, d_S]`
    student: Rows<D, X>,
    encoder: StackActs<D, X>,
    cache: DecodeCache<D, X>,
    /// `[B, d_T]`: what the decoder starts with. Stays zero.
    zero_block: Rows<D, X>,
    /// `[L_T, B·d_T]`: predicted blocks.
    blocks: Rows<D, X>,
    /// `[B]`: unused without dropout, but asked for.
    keys: Rows<D, u64>,
    repeated: Repeated<D>,
}

/// Operations as the device remembers them, of one model at a time.
struct Repeated<D: GraphCapture> {
    model: Option<Arc<()>>,
    /// By students in the batch.
    batches: HashMap<usize, BatchGraphs<D>>,
}

/// The operations of a batch.
struct BatchGraphs<D: GraphCapture> {
    /// Encoding the students.
    start: D::Graph,
    /// For each block.
    blocks: Vec<D::Graph>,
}

/// Sizes of batches whose operations are remembered.
const MAX_SIZES: usize = 4;

impl<D: GraphCapture> Repeated<D> {
    /// What is remembered of batches of this size, of a model with so many blocks.
    fn of(&mut self, model: &Arc<()>, batch: usize, blocks: usize) -> &mut BatchGraphs<D> {
        let same = self.model.as_ref().is_some_and(|held| Arc::ptr_eq(held, model));
        if !same || (self.batches.len() >= MAX_SIZES && !self.batches.contains_key(&batch)) {
            self.batches.clear();
            self.model = Some(Arc::clone(model));
        }
        self.batches.entry(batch).or_insert_with(|| BatchGraphs {
            start: D::Graph::default(),
            blocks: (0..blocks).map(|_| D::Graph::default()).collect(),
        })
    }
}

impl<D: Backend<X>, X: Real> Generator<D, X> {
    /// Takes memory for `capacity` students at once.
    pub fn new(model: &GradTransformer<D, X>, capacity: usize) -> Result<Self> {
        Self::allocate(&mut Allocator::new(&model.dev, Purpose::Activations), model, capacity)
    }

    /// The buffers that [`Self::new`] takes.
    pub fn plan(model: &GradTransformer<D, X>, capacity: usize) -> Result<MemoryPlan> {
        Allocator::plan(Purpose::Activations, |alloc| Self::allocate(alloc, model, capacity))
    }

    fn allocate(
        alloc: &mut Allocator<'_, D>,
        model: &GradTransformer<D, X>,
        capacity: usize,
    ) -> Result<Self> {
        let config = &model.config;
        let (blocks_s, blocks_t) = (config.student_blocks, config.teacher_blocks);
        let encoder = StackShape { batch: capacity, tokens: blocks_s, memory: 0 };
        let decoder = StackShape { batch: capacity, tokens: blocks_t, memory: blocks_s };
        Ok(Self {
            capacity,
            student: alloc.rows("student", capacity * blocks_s, config.student_width)?,
            encoder: StackActs::allocate(alloc, &model.encoder, encoder, Keep::Nothing)?,
            cache: DecodeCache::allocate(alloc, &model.decoder, decoder)?,
            zero_block: alloc.rows("zero_block", capacity, config.teacher_width)?,
            blocks: alloc.rows("blocks", blocks_t, capacity * config.teacher_width)?,
            keys: alloc.rows("keys", capacity, 1)?,
            repeated: Repeated { model: None, batches: HashMap::new() },
        })
    }

    /// Teacher updates `[n, L_T, d_T]` for student updates `[n, L_S, d_S]`, both in the model's units.
    pub fn generate(&mut self, model: &GradTransformer<D, X>, students: &[f32]) -> Result<Vec<f32>> {
        let each = model.config.student_len();
        if students.is_empty() || !students.len().is_multiple_of(each) {
            let why = format!("expected updates of {each} values, found {} values", students.len());
            return Err(Error::invalid("student updates to translate", why));
        }
        let mut teachers = Vec::with_capacity(students.len() / each * model.config.teacher_len());
        for part in students.chunks(self.capacity * each) {
            teachers.extend(self.generate_batch(model, part, part.len() / each)?);
        }
        Ok(teachers)
    }

    /// Teacher updates for student updates as they are outside of the model.
    pub fn translate(&mut self, model: &GradTransformer<D, X>, students: &[f32]) -> Result<Vec<f32>> {
        let mut students = students.to_vec();
        model.normalization.apply_student(&mut students)?;
        let mut teachers = self.generate(model, &students)?;
        model.normalization.undo_teacher(&mut teachers)?;
        Ok(teachers)
    }

    fn generate_batch(
        &mut self,
        model: &GradTransformer<D, X>,
        students: &[f32],
        batch: usize,
    ) -> Result<Vec<f32>> {
        let (dev, config) = (&model.dev, &model.config);
        let Self { student, encoder, cache, zero_block, blocks, keys, repeated, .. } = self;
        let graphs = repeated.of(&model.identity, batch, config.teacher_blocks);
        let keys = keys.view(batch);
        let pass = Pass { dev, values: &model.values, keys, batch, dropout: 0.0 };
        let rows = batch * config.student_blocks;
        upload_f32::<D, X>(dev, student.view_mut(rows), students, &mut Vec::new())?;
        dev.capture_or_launch::<Error>(&mut graphs.start, &mut || {
            model.input_proj.forward(&pass, encoder.input_mut(batch), student.view(rows), rows)?;
            model.encoder.forward(&pass, encoder, None)?;
            model.decoder.start_decoding(&pass, cache, encoder)
        })?;
        // A row of `blocks` is as long as for the largest batch.
        let (len, each) = (batch * config.teacher_width, self.capacity * config.teacher_width);
        for (t, graph) in graphs.blocks.iter_mut().enumerate() {
            dev.capture_or_launch::<Error>(graph, &mut || {
                cache.seek(t);
                let input = cache.input_mut(batch);
                if t == 0 && config.start_token.zero_in_generation() {
                    dev.fill(input, X::zero())?;
                } else {
                    let before =
                        if t == 0 { zero_block.view(batch) } else { blocks.part((t - 1) * each, len) };
                    model.embed_proj.forward(&pass, input, before, batch)?;
                }
                model.decoder.decode_step(&pass, cache)?;
                model.output_proj.forward(&pass, blocks.part_mut(t * each, len), cache.output(batch), batch)
            })?;
        }
        let mut teachers = vec![0.0; batch * config.teacher_len()];
        for t in 0..config.teacher_blocks {
            let block = dev.to_host(blocks.part(t * each, len))?;
            for (b, values) in block.chunks(config.teacher_width).enumerate() {
                let start = b * config.teacher_len() + t * config.teacher_width;
                let place = &mut teachers[start..start + config.teacher_width];
                place.iter_mut().zip(values).for_each(|(to, from)| *to = from.to_f64() as f32);
            }
        }
        Ok(teachers)
    }
}
