//! [`PerExampleLora`]: an adapter in training whose examples' gradients are apart, for differentially private training.
//!
//! In: packed streams whose segment i has gradient row i. Out: the gradient of every example, on the host. What
//! becomes of them, up to the gradient of the step, is the caller's; optimizer and adapter are those of
//! [`MultiLora`] with one job. The rows are all that is added to its memory.

use super::{BlockLayout, MultiLora};
use crate::decoder::{AdapterView, Decoder, DecoderConfig};
use gradtx_kernels::ops::AdamWStep;
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::data::{BatchCapacity, PackedBatch};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};

/// One adapter, and room for the gradients of the examples of a stream.
pub struct PerExampleLora<D: Device, X: Real> {
    adapter: MultiLora<D, X>,
    /// `[segments, L·d]`
    rows: D::Buf<X::Acc>,
}

/// What the examples of a stream give.
#[derive(Clone, Debug, PartialEq)]
pub struct ExampleGradients {
    /// `[segments]` weighted losses.
    pub losses: Vec<f64>,
    /// `[segments, L·d]`
    pub gradients: Vec<f32>,
}

fn rows<D: Device, X: Real>(
    alloc: &mut Allocator<'_, D>,
    layout: &BlockLayout,
    segments: usize,
) -> Result<D::Buf<X::Acc>> {
    alloc.set_purpose(Purpose::Gradients);
    alloc.buffer("gradients of examples", &layout.rows(segments))
}

impl<D: Backend<X>, X: Real> PerExampleLora<D, X> {
    /// An adapter that starts as `initial` `[L·d]`, and buffers for streams up to `capacity`.
    pub fn new(
        decoder: &Decoder<D, X>,
        layout: &BlockLayout,
        initial: &[f32],
        capacity: BatchCapacity,
    ) -> Result<Self> {
        let mut alloc = Allocator::new(decoder.device(), Purpose::Gradients);
        Ok(Self {
            adapter: MultiLora::new(decoder, layout, 1, initial, capacity)?,
            rows: rows::<D, X>(&mut alloc, layout, capacity.segments)?,
        })
    }

    /// All buffers, those of the passes included and the base model left out.
    pub fn plan(config: &DecoderConfig, layout: &BlockLayout, capacity: BatchCapacity) -> MemoryPlan {
        let mut plan = MultiLora::<D, X>::plan(config, layout, 1, capacity);
        plan.extend(Allocator::plan_sizes(Purpose::Gradients, |alloc: &mut Allocator<'_, D>| {
            rows::<D, X>(alloc, layout, capacity.segments)
        }));
        plan
    }

    /// Loss and gradient of every example of a stream. Segment i must have adapter 0 and gradient row i.
    pub fn gradients(&mut self, decoder: &Decoder<D, X>, batch: &PackedBatch) -> Result<ExampleGradients> {
        let segments = batch.segments();
        if let Some(i) = (0..segments).find(|&i| (batch.adapter[i], batch.grad_row[i]) != (0, i as u32)) {
            let why = format!(
                "adapter {} and gradient row {}; expected adapter 0 and row {i}",
                batch.adapter[i], batch.grad_row[i]
            );
            return Err(Error::invalid(format!("segment {i}"), why));
        }
        let device = decoder.device();
        let used = 0..segments * self.adapter.layout().total();
        device.fill(self.rows.view_mut(used.clone()), X::Acc::zero())?;
        let losses = self.adapter.pass(decoder, batch, self.rows.all_mut())?;
        let gradients = device.to_host(self.rows.view(used))?;
        let mut sums = vec![0.0; segments];
        for (i, loss) in losses.iter().enumerate() {
            sums[batch.label_segment[i] as usize] += batch.weights[i] * loss;
        }
        Ok(ExampleGradients {
            losses: sums,
            gradients: gradients.iter().map(|x| x.to_f64() as f32).collect(),
        })
    }

    /// An optimizer step with this gradient `[L·d]`; returns its norm. One that is not finite is an error that
    /// changes nothing.
    pub fn apply(&mut self, gradient: &[f32], step: AdamWStep) -> Result<f64> {
        self.adapter.set_gradient(gradient)?;
        Ok(self.adapter.apply(step, None)?[0])
    }

    /// The adapter, as a pass uses it; no dropout.
    pub fn adapters(&self) -> AdapterView<'_, D, X::Acc> {
        self.adapter.adapters()
    }

    /// The adapter and its optimizer, for checkpoints.
    pub fn adapter_mut(&mut self) -> &mut MultiLora<D, X> {
        &mut self.adapter
    }

    /// The update vector `[L, d]`: the adapter less the initial one.
    pub fn update(&self) -> Result<Vec<f32>> {
        self.adapter.update(0)
    }
}
