//! What all parts of one forward or backward pass share.

use gradtx_kernels::ops::{
    Backend, DropoutDims, Linear, LinearBackwardWeight, LinearDims, LinearForward, Out, ResidualNorm,
    ResidualNormDims, ResidualNormForward, RmsNorm, RmsNormDims, RmsNormForward,
};
use gradtx_kernels::{Buffer, Device, Elem, Queues, Real, ViewMut};
use gradtx_runtime::Result;
use std::collections::VecDeque;
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

/// A norm's weight, and where its results go.
pub(super) struct NormOut<'a, D: Device, X: Real> {
    /// `[d]`
    pub weight: &'a Range<usize>,
    /// `[R, d]`
    pub normed: D::ViewMut<'a, X>,
    /// `[R]`
    pub inv_rms: D::ViewMut<'a, X::Acc>,
    pub eps: f64,
}

impl<D: Backend<X>, X: Real> Pass<'_, D, X> {
    /// Parameters of a range of the flat buffer.
    pub(crate) fn weight(&self, range: &Range<usize>) -> D::View<'_, X> {
        self.values.view(range.clone())
    }

    /// The dropout at a place of the model, of rows of which `tokens` are an example's.
    pub(super) fn drop_dims(
        &self,
        (rows, cols): (usize, usize),
        (tokens, site): (usize, u32),
    ) -> DropoutDims {
        DropoutDims { rows, cols, rows_per_key: tokens, p: self.dropout, site }
    }

    /// Dropout of `rows` rows of `cols` values in place, `tokens` rows per example.
    pub(crate) fn drop(
        &self,
        x: D::ViewMut<'_, X>,
        size: (usize, usize),
        tokens: usize,
        site: u32,
    ) -> Result<()> {
        if self.dropout > 0.0 {
            self.dev.dropout(x, self.keys, self.drop_dims(size, (tokens, site)))?;
        }
        Ok(())
    }

    /// A norm of contiguous rows.
    pub(super) fn norm(
        &self,
        to: NormOut<'_, D, X>,
        x: D::View<'_, X>,
        (rows, cols): (usize, usize),
    ) -> Result<()> {
        let dims = RmsNormDims::new(rows, cols, to.eps);
        let weight = self.weight(to.weight);
        Ok(RmsNorm::<X>::rmsnorm_forward(
            self.dev,
            RmsNormForward { y: to.normed, inv_rms: to.inv_rms, x, w: weight, dims },
        )?)
    }

    /// The end of a sublayer, and the norm of what comes next:
    /// `out = residual + dropout(x Wᵀ)`, W `[out_dim, in_dim]`, `next = norm(out)`.
    pub(super) fn end_sublayer(
        &self,
        mut out: D::ViewMut<'_, X>,
        residual: D::View<'_, X>,
        x: D::View<'_, X>,
        weight: &Range<usize>,
        dims: LinearDims,
        place: (usize, u32),
        next: NormOut<'_, D, X>,
    ) -> Result<()> {
        let (w, size) = (self.weight(weight), (dims.rows, dims.out_dim));
        if self.dropout == 0.0 {
            self.dev.linear_forward(LinearForward {
                y: out.reborrow(),
                x,
                w,
                bias: None,
                residual: Some(residual),
                dims,
            })?;
            return self.norm(next, out.freeze(), size);
        }
        self.dev.linear_forward(LinearForward {
            y: out.reborrow(),
            x,
            w,
            bias: None,
            residual: None,
            dims,
        })?;
        let NormOut { weight, normed, inv_rms, eps } = next;
        let dims = ResidualNormDims { drop: self.drop_dims(size, place), eps };
        let w = self.weight(weight);
        Ok(ResidualNorm::<X>::residual_norm_forward(
            self.dev,
            ResidualNormForward { sum: out, y: normed, inv_rms, residual, w, keys: self.keys, dims },
        )?)
    }
}

/// Flat gradients of a backward pass, which says when a part of them is final.
///
/// Those of weights are computed in the device's second queue, beside the pass itself, which needs
/// none of them. What they are computed from lies in two sets of buffers, used in turns: before the
/// pass writes to one again it waits for the gradients from it.
pub struct Grads<'a, D: Queues, X: Real> {
    /// As long as the parameters, laid out alike.
    buf: &'a mut D::Buf<X::Acc>,
    /// Whether gradients are assigned or added to what `buf` holds.
    pub(crate) out: Out,
    on_ready: OnReady<'a, D, X::Acc>,
    queue: D,
    fork: D::Event,
    /// Ends of the gradients from either set of buffers.
    ends: [D::Event; 2],
    /// What is final after which of the ends; the last entries have none yet.
    waiting: VecDeque<(Option<usize>, Range<usize>)>,
}

/// Whoever is told which gradients are final, and gets them for writing.
pub type OnReady<'a, D, A> = &'a mut dyn FnMut(Range<usize>, <D as Device>::ViewMut<'_, A>) -> Result<()>;

impl<'a, D: Queues, X: Real> Grads<'a, D, X> {
    /// Gradients in `buf`, as long as the parameters and laid out alike: assigned, or added to what it
    /// holds. Between parameters it is left alone. `on_ready` is called once for every range that is
    /// final in this pass, with the whole buffer; ranges come from the back of the buffer to its front.
    pub fn new(dev: &D, buf: &'a mut D::Buf<X::Acc>, out: Out, on_ready: OnReady<'a, D, X::Acc>) -> Self {
        let (fork, ends) = Default::default();
        Self { buf, out, on_ready, queue: dev.second_queue(), fork, ends, waiting: VecDeque::new() }
    }

    /// The gradients of a range.
    pub(crate) fn at(&mut self, range: &Range<usize>) -> D::ViewMut<'_, X::Acc> {
        self.buf.view_mut(range.clone())
    }

    /// Where gradients of weights are computed, after everything that was asked of `dev` so far.
    pub(crate) fn queue(&mut self, dev: &D) -> Result<D> {
        dev.record(&mut self.fork)?;
        self.queue.wait_for(&self.fork)?;
        Ok(self.queue.clone())
    }

    /// Everything of a range has been asked for.
    pub(crate) fn asked(&mut self, range: &Range<usize>) {
        self.waiting.push_back((None, range.clone()));
    }

    /// All gradients from a set of buffers have been asked for.
    pub(super) fn end(&mut self, set: usize) -> Result<()> {
        self.waiting.iter_mut().filter(|(end, _)| end.is_none()).for_each(|(end, _)| *end = Some(set));
        Ok(self.queue.record(&mut self.ends[set])?)
    }

    /// `dev` waits for the gradients from a set of buffers; their ranges are final.
    pub(super) fn wait(&mut self, dev: &D, set: usize) -> Result<()> {
        let Some(last) = self.waiting.iter().rposition(|(end, _)| *end == Some(set)) else { return Ok(()) };
        dev.wait_for(&self.ends[set])?;
        for (_, range) in self.waiting.drain(..=last) {
            (self.on_ready)(range, self.buf.all_mut())?;
        }
        Ok(())
    }

    /// `dev` waits for all gradients that have been asked for.
    pub(crate) fn finish(&mut self, dev: &D) -> Result<()> {
        let Some((end, _)) = self.waiting.back() else { return Ok(()) };
        let set = end.unwrap_or(0);
        if end.is_none() {
            self.end(set)?;
        }
        self.wait(dev, set)
    }
}

/// `dw (=|+=) dyᵀ x` for the weight at a range, in the queue of gradients.
pub(super) fn weight_gradient<D: Backend<X>, X: Real>(
    queue: &D,
    grads: &mut Grads<'_, D, X>,
    weight: &Range<usize>,
    dy: D::View<'_, X>,
    x: D::View<'_, X>,
    dims: LinearDims,
) -> Result<()> {
    let out = grads.out;
    Ok(Linear::<X>::linear_backward_weight(
        queue,
        LinearBackwardWeight { dw: grads.at(weight), dbias: None, dy, x, dims, out },
    )?)
}
