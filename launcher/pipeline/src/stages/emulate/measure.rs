//! How close an emulator is to its LLM, on public examples that took no part in its making: the loss of both, and the
//! gradient of the edge's matrices.

use super::collect::collected;
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Activations, Mode};
use gradtx_models::decoder::{Decoder, Emulator, StatisticsKind, StatisticsOf};
use gradtx_models::lora::Projection;
use gradtx_run::context::Context;
use gradtx_run::dispatch::Work;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use std::path::Path;

/// What is measured of an emulator beside its LLM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// Mean loss of a token, in nats.
    pub llm_loss: f64,
    pub emulator_loss: f64,
    /// Of the two gradients.
    pub cosine: f64,
    /// `‖g − g_LLM‖ / ‖g_LLM‖`
    pub relative_error: f64,
}

impl Measured {
    /// Of what was found of both.
    pub fn new(llm: &OfModel, emulator: &OfModel) -> Self {
        let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let (expected, found) = (&llm.gradient, &emulator.gradient);
        let [of_both, of_llm, of_emulator] =
            [inner(found, expected), inner(expected, expected), inner(found, found)];
        Self {
            llm_loss: llm.loss,
            emulator_loss: emulator.loss,
            cosine: of_both / (of_llm * of_emulator).sqrt(),
            relative_error: ((of_emulator - 2.0 * of_both + of_llm).max(0.0) / of_llm).sqrt(),
        }
    }
}

/// What is measured of one model.
pub(super) struct OfModel {
    /// Mean loss of a token, in nats.
    loss: f64,
    /// Of the edge's matrices.
    gradient: Vec<f64>,
}

/// The measurement of a model.
pub(super) struct Measuring<'a> {
    pub context: &'a Context,
    /// The model's directory.
    pub dir: &'a Path,
    /// Which layers are the edge.
    pub edge: &'a Emulator,
    pub streams: &'a [PackedBatch],
}

impl Work for Measuring<'_> {
    type Output = OfModel;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<OfModel> {
        self.context.ui.detail(format!("emulate: loss and gradient of the edge in {}", self.dir.display()));
        let decoder = Decoder::<D, X>::load(device, self.dir)?;
        let capacity = BatchCapacity::of(self.streams);
        let [first, last] = self.edge.edge;
        let layers = decoder.config().layers;
        let layers = (0..first).chain(layers - last..layers).collect();
        let of = StatisticsOf { layers, kind: StatisticsKind::Gradients };
        let sums = collected(&decoder, &of, self.streams, capacity)?;
        let mut gradient = vec![];
        for &layer in &of.layers {
            for projection in Projection::ALL {
                gradient.extend(sums.product(device, layer, projection)?.gradient);
            }
        }
        let mut acts = Activations::new(&decoder, capacity, Mode::Inference(None))?;
        let mut batch = DeviceBatch::new(device, capacity)?;
        let (mut loss, mut labels) = (0.0, 0);
        for stream in self.streams {
            batch.load(device, stream)?;
            decoder.loss(&mut acts, &batch, None)?;
            loss += device.to_host(acts.losses())?.iter().map(|x| x.to_f64()).sum::<f64>();
            labels += stream.labels();
        }
        Ok(OfModel { loss: loss / labels.max(1) as f64, gradient })
    }
}
