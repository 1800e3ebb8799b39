//! [`GradTransformer`]: a T5 between three projections, over one flat parameter buffer.
//!
//! Student blocks go through `input_proj` to the encoder; teacher blocks, shifted by one,
//! through `embed_proj` to the decoder; the decoder's output through `output_proj` to
//! predicted teacher blocks. The loss is the mean squared error over all elements.
//!
//! Parameters lie in the order of the forward pass, so that backward finishes them from
//! the end of the buffer to its beginning.
//!
//! Shapes: B examples; L_S blocks of d_S values (student), L_T blocks of d_T (teacher);
//! d width of the T5.

use super::acts::{Activations, Inputs};
use super::{Batch, GradTransformerConfig, Normalization};
use crate::t5::{Grads, Pass, Side, Stack};
use gradtx_kernels::ops::{
    Backend, Linear, LinearBackwardInput, LinearBackwardWeight, LinearDims, LinearForward, MseDims, Out,
    SquaredError,
};
use gradtx_kernels::{CopyStream, Device, Real, ViewMut};
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::params::ParamLayout;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// A linear layer with bias: weight `[out_dim, in_dim]`, then bias `[out_dim]`.
pub(super) struct Projection {
    range: Range<usize>,
    in_dim: usize,
    out_dim: usize,
}

impl Projection {
    fn new(layout: &mut ParamLayout, name: &str, in_dim: usize, out_dim: usize) -> Self {
        let weight = (format!("{name}.weight"), vec![out_dim, in_dim]);
        let range = layout.push([weight, (format!("{name}.bias"), vec![out_dim])]);
        Self { range, in_dim, out_dim }
    }

    fn weight(&self) -> Range<usize> {
        self.range.start..self.range.start + self.in_dim * self.out_dim
    }

    fn dims(&self, rows: usize) -> LinearDims {
        LinearDims::new(rows, self.in_dim, self.out_dim)
    }

    /// `y = x Wᵀ + b` on `rows` rows.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        y: D::ViewMut<'_, X>,
        x: D::View<'_, X>,
        rows: usize,
    ) -> Result<()> {
        let bias = pass.weight(&(self.weight().end..self.range.end));
        let weight = pass.weight(&self.weight());
        Ok(pass.dev.linear_forward(LinearForward {
            y,
            x,
            w: weight,
            bias: Some(bias),
            residual: None,
            dims: self.dims(rows),
        })?)
    }

    /// The gradients of weight and bias.
    fn backward_weight<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        grads: &mut Grads<'_, D, X>,
        dy: D::View<'_, X>,
        x: D::View<'_, X>,
        rows: usize,
    ) -> Result<()> {
        let (queue, out) = (grads.queue(pass.dev)?, grads.out);
        let (dw, dbias) = grads.at(&self.range).split_at_mut(self.weight().len());
        Linear::<X>::linear_backward_weight(
            &queue,
            LinearBackwardWeight { dw, dbias: Some(dbias), dy, x, dims: self.dims(rows), out },
        )?;
        grads.asked(&self.range);
        Ok(())
    }
}

/// The Grad-Transformer with its parameters.
pub struct GradTransformer<D: Device, X: Real> {
    pub(super) dev: D,
    pub(super) config: GradTransformerConfig,
    pub(super) layout: ParamLayout,
    pub(super) input_proj: Projection,
    pub(super) encoder: Stack,
    pub(super) embed_proj: Projection,
    pub(super) decoder: Stack,
    pub(super) output_proj: Projection,
    pub(super) values: D::Buf<X>,
    /// Another one whenever the values may be another buffer.
    pub(super) identity: Arc<()>,
    pub(super) normalization: Normalization,
}

impl<D: Backend<X>, X: Real> GradTransformer<D, X> {
    /// A model whose parameters are all zero, to be filled.
    pub(super) fn empty(dev: &D, config: GradTransformerConfig) -> Result<Self> {
        let mut model = Self::meta(dev, config)?;
        model.values = model.allocate_values(&mut Allocator::new(dev, Purpose::Trained))?;
        Ok(model)
    }

    /// A model without values: sizes and layout are what memory plans are made of.
    ///
    /// # Errors
    /// Names the size that no model can have.
    pub fn meta(dev: &D, config: GradTransformerConfig) -> Result<Self> {
        config.check_sizes().map_err(|(name, why)| Error::invalid(format!("translator: {name}"), why))?;
        let mut layout = ParamLayout::new();
        let d = config.t5.d_model;
        let input_proj = Projection::new(&mut layout, "input_proj", config.student_width, d);
        let encoder = Stack::new(&config.t5, Side::Encoder, &mut layout, "t5.");
        let embed_proj = Projection::new(&mut layout, "embed_proj", config.teacher_width, d);
        let decoder = Stack::new(&config.t5, Side::Decoder, &mut layout, "t5.");
        let output_proj = Projection::new(&mut layout, "output_proj", d, config.teacher_width);
        let values = dev.zeros(0)?;
        let normalization = Normalization::none(
            [config.student_blocks, config.student_width],
            [config.teacher_blocks, config.teacher_width],
        );
        Ok(Self {
            dev: dev.clone(),
            config,
            layout,
            input_proj,
            encoder,
            embed_proj,
            decoder,
            output_proj,
            values,
            identity: Arc::default(),
            normalization,
        })
    }

    /// A buffer for the parameters, all zero.
    pub(super) fn allocate_values(&self, alloc: &mut Allocator<'_, D>) -> Result<D::Buf<X>> {
        alloc.buffer("values", &[self.layout.total()])
    }

    /// The buffer of the parameters, where they are not trained.
    pub fn plan_values(&self) -> Result<MemoryPlan> {
        Allocator::plan(Purpose::Frozen, |alloc| self.allocate_values(alloc))
    }

    /// Its device.
    pub fn device(&self) -> &D {
        &self.dev
    }

    /// Sizes and settings.
    pub fn config(&self) -> &GradTransformerConfig {
        &self.config
    }

    /// Names, shapes and places of the parameters.
    pub fn layout(&self) -> &ParamLayout {
        &self.layout
    }

    /// The flat parameters.
    pub fn values(&self) -> &D::Buf<X> {
        &self.values
    }

    /// The flat parameters, for writing.
    pub fn values_mut(&mut self) -> &mut D::Buf<X> {
        self.identity = Arc::default();
        &mut self.values
    }

    /// The units that the model was trained in.
    pub fn normalization(&self) -> &Normalization {
        &self.normalization
    }

    /// Sets the units that the model is to be trained in.
    pub fn set_normalization(&mut self, normalization: Normalization) -> Result<()> {
        let want = (self.normalization.student_shape(), self.normalization.teacher_shape());
        let found = (normalization.student_shape(), normalization.teacher_shape());
        if want != found {
            let why = format!("expected statistics of shapes {want:?}, found {found:?}");
            return Err(Error::invalid("normalization", why));
        }
        self.normalization = normalization;
        Ok(())
    }

    /// A pass over the batch that was loaded last; with the model's dropout in training.
    fn pass<'a>(&'a self, keys: D::View<'a, u64>, batch: usize, training: bool) -> Pass<'a, D, X> {
        let dropout = if training { self.config.t5.dropout_rate } else { 0.0 };
        Pass { dev: &self.dev, values: &self.values, keys, batch, dropout }
    }

    /// Copies tuples in the model's units to the device, as the batch of the next passes.
    pub fn load_batch<'t>(
        &self,
        acts: &mut Activations<D, X>,
        tuples: impl Into<Batch<'t, D, X>>,
    ) -> Result<()> {
        acts.load(&self.dev, &self.config, tuples.into())
    }

    /// Predicts every teacher block from the student's blocks and the teacher's blocks before it.
    pub fn forward(&self, acts: &mut Activations<D, X>, training: bool) -> Result<()> {
        let Activations { batch, inputs, current, encoder, decoder, pred, .. } = acts;
        let (batch, Inputs { student, shifted, keys, .. }) = (*batch, &inputs[*current]);
        let pass = self.pass(keys.view(batch), batch, training);
        let config = &self.config;
        let (rows_s, rows_t) = (batch * config.student_blocks, batch * config.teacher_blocks);
        self.input_proj.forward(&pass, encoder.input_mut(batch), student.view(rows_s), rows_s)?;
        self.encoder.forward(&pass, encoder, None)?;
        self.embed_proj.forward(&pass, decoder.input_mut(batch), shifted.view(rows_t), rows_t)?;
        if config.start_token.zero_in_training() {
            self.zero_starts(decoder.input_mut(batch), batch)?;
        }
        self.decoder.forward(&pass, decoder, Some(encoder))?;
        self.output_proj.forward(&pass, pred.view_mut(rows_t), decoder.output(batch), rows_t)
    }

    /// Zeroes position 0 of every example in `x` `[B, L_T, d]`.
    fn zero_starts(&self, mut x: D::ViewMut<'_, X>, batch: usize) -> Result<()> {
        let (tokens, width) = (self.config.teacher_blocks, self.config.t5.d_model);
        for example in 0..batch {
            let start = example * tokens * width;
            let row = x.reborrow().slice(start..start + width);
            self.dev.fill(row, X::zero())?;
        }
        Ok(())
    }

    /// Sum of squared errors of the last forward pass. Also leaves the predictions' gradient of
    /// `scale` times that sum, for backward.
    pub fn loss_sum(&self, acts: &mut Activations<D, X>, scale: f64) -> Result<X::Acc> {
        self.losses(acts, scale)?;
        self.release_losses(acts)?;
        self.sum_of_losses(acts)
    }

    /// The part of [`Self::loss_sum`] on the device.
    pub fn losses(&self, acts: &mut Activations<D, X>, scale: f64) -> Result<()> {
        let rows = acts.batch * self.config.teacher_blocks;
        let dims = MseDims { rows, cols: self.config.teacher_width, grad_scale: 2.0 * scale };
        self.dev.mse(SquaredError {
            sums: acts.sums.view_mut(rows),
            d_pred: Some(acts.d_pred.view_mut(rows)),
            pred: acts.pred.view(rows),
            target: acts.inputs[acts.current].target.view(rows),
            dims,
        })?;
        Ok(())
    }

    /// Lets [`Self::sum_of_losses`] begin where the device's operations are now.
    pub fn release_losses(&self, acts: &mut Activations<D, X>) -> Result<()> {
        Ok(acts.sums_copies.release()?)
    }

    /// The part of [`Self::loss_sum`] on the host: waits for what the device was asked for before
    /// [`Self::release_losses`], and not for later operations.
    pub fn sum_of_losses(&self, acts: &mut Activations<D, X>) -> Result<X::Acc> {
        let rows = acts.batch * self.config.teacher_blocks;
        let mut sums = vec![X::Acc::zero(); rows];
        acts.sums_copies.download(&mut sums, acts.sums.view(rows))?;
        Ok(sums.into_iter().sum())
    }

    /// The mirror of [`Self::forward`], after [`Self::loss_sum`].
    pub fn backward(
        &self,
        acts: &mut Activations<D, X>,
        training: bool,
        grads: &mut Grads<'_, D, X>,
    ) -> Result<()> {
        let Activations { batch, inputs, current, encoder, decoder, d_pred, .. } = acts;
        let (batch, Inputs { student, shifted, keys, .. }) = (*batch, &inputs[*current]);
        let pass = self.pass(keys.view(batch), batch, training);
        let config = &self.config;
        let (rows_s, rows_t) = (batch * config.student_blocks, batch * config.teacher_blocks);
        let d_pred = d_pred.view(rows_t);
        self.output_proj.backward_weight(&pass, grads, d_pred, decoder.output(batch), rows_t)?;
        let weight = pass.weight(&self.output_proj.weight());
        let dims = self.output_proj.dims(rows_t);
        self.dev.linear_backward_input(LinearBackwardInput {
            dx: decoder.d_output_mut(batch)?,
            dy: d_pred,
            w: weight,
            dims,
            out: Out::Assign,
        })?;
        self.decoder.backward(&pass, decoder, Some(encoder), grads)?;
        if config.start_token.zero_in_training() {
            self.zero_starts(decoder.d_input_mut(batch)?, batch)?;
        }
        let d_embedded = decoder.d_input(batch)?;
        self.embed_proj.backward_weight(&pass, grads, d_embedded, shifted.view(rows_t), rows_t)?;
        self.dev.copy(encoder.d_output_mut(batch)?, decoder.d_memory(batch)?)?;
        self.encoder.backward(&pass, encoder, None, grads)?;
        let d_input = encoder.d_input(batch)?;
        self.input_proj.backward_weight(&pass, grads, d_input, student.view(rows_s), rows_s)?;
        grads.finish(&self.dev)
    }
}
