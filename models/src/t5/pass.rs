//! What all parts of one forward or backward pass share.

use gradtx_kernels::ops::{Backend, DropoutDims, Elementwise, Linear, LinearDims};
use gradtx_kernels::{Device, Elem, Real};
use gradtx_runtime::Result;
use std::ops::Range;

/// One pass over a batch: the device, the parameters, and the dropout of this step.
pub struct Pass<'a, D: Device, X: Elem> {
    /// Where it runs.
    pub dev: &'a D,
    /// The model's flat parameters.
    pub values: &'a D::Buf<X>,
    /// `[B]`: key of each example's dropout masks. Backward needs the keys of its forward.
    pub keys: D::View<'a, u64>,
    /// Examples, B.
    pub batch: usize,
    /// Dropout probability: the model's own in training, 0 otherwise.
    pub dropout: f64,
}

impl<D: Device, X: Elem> Clone for Pass<'_, D, X> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device, X: Elem> Copy for Pass<'_, D, X> {}

impl<D: Backend<X>, X: Real> Pass<'_, D, X> {
    /// Parameters of a range of the flat buffer.
    pub(crate) fn weight(&self, range: &Range<usize>) -> D::View<'_, X> {
        D::view(self.values, range.clone())
    }

    /// Dropout of `rows` rows of `cols` values in place, `tokens` rows per example.
    pub(crate) fn drop(
        &self,
        x: D::ViewMut<'_, X>,
        (rows, cols): (usize, usize),
        tokens: usize,
        site: u32,
    ) -> Result<()> {
        if self.dropout > 0.0 {
            let dims = DropoutDims { rows, cols, rows_per_key: tokens, p: self.dropout, site };
            self.dev.dropout(x, self.keys, dims)?;
        }
        Ok(())
    }

    /// The end of a sublayer: `out = residual + dropout(x Wᵀ)`, W `[out_dim, in_dim]`.
    pub(crate) fn linear_onto_residual(
        &self,
        mut out: D::ViewMut<'_, X>,
        residual: D::View<'_, X>,
        x: D::View<'_, X>,
        weight: &Range<usize>,
        dims: LinearDims,
        (tokens, site): (usize, u32),
    ) -> Result<()> {
        let w = self.weight(weight);
        if self.dropout == 0.0 {
            return Ok(self.dev.linear_forward(out, x, w, None, Some(residual), dims)?);
        }
        self.dev.linear_forward(D::reborrow(&mut out), x, w, None, None, dims)?;
        self.drop(D::reborrow(&mut out), (dims.rows, dims.out_dim), tokens, site)?;
        Ok(<D as Elementwise<X>>::axpby(self.dev, out, 1.0, residual, 1.0)?)
    }
}

/// Flat gradients, added to by a backward pass, which tells when a part of them is final.
pub struct Grads<'a, D: Device, X: Real> {
    /// As long as the parameters, laid out alike.
    pub buf: &'a mut D::Buf<X::Acc>,
    /// Called once for every range that will not be added to any more in this pass,
    /// with the whole buffer. Ranges come from the back of the buffer to its front.
    pub on_ready: &'a mut dyn FnMut(Range<usize>, D::ViewMut<'_, X::Acc>) -> Result<()>,
}

impl<D: Device, X: Real> Grads<'_, D, X> {
    /// The gradients of a range.
    pub(crate) fn at(&mut self, range: &Range<usize>) -> D::ViewMut<'_, X::Acc> {
        D::view_mut(self.buf, range.clone())
    }

    /// Reports a range as final.
    pub(crate) fn ready(&mut self, range: &Range<usize>) -> Result<()> {
        (self.on_ready)(range.clone(), D::all_mut(self.buf))
    }
}

/// `dw += dyᵀ x` for the weight at a range.
pub(crate) fn weight_gradient<D: Backend<X>, X: Real>(
    dev: &D,
    grads: &mut Grads<'_, D, X>,
    weight: &Range<usize>,
    dy: D::View<'_, X>,
    x: D::View<'_, X>,
    dims: LinearDims,
) -> Result<()> {
    Ok(Linear::<X>::linear_backward_weight(dev, grads.at(weight), None, dy, x, dims)?)
}
