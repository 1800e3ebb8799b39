//! How close an emulator is to its LLM, on public examples that took no part in its making: the loss of both, and the
//! gradient of the edge's matrices.

use super::statistics::collected;
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Activations, Mode};
use gradtx_models::decoder::{Decoder, Emulator, StatisticsKind, StatisticsOf};
use gradtx_models::lora::Projection;
use gradtx_run::context::Context;
use gradtx_run::dispatch::Work;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_train::model_spec::ModelSpec;
use std::path::Path;

/// What is measured.
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

/// The measurement.
pub(super) struct Measuring<'a> {
    pub context: &'a Context,
    pub llm: &'a ModelSpec,
    /// The emulator's directory.
    pub model: &'a Path,
    /// Which layers are the edge.
    pub edge: &'a Emulator,
    pub streams: &'a [PackedBatch],
}

impl Work for Measuring<'_> {
    type Output = Measured;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Measured> {
        self.context.ui.detail("emulate: the edge's gradient in the LLM and in the emulator");
        let (llm_loss, expected) = self.of_model::<X, D>(device, &self.llm.dir)?;
        let (emulator_loss, found) = self.of_model::<X, D>(device, self.model)?;
        let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let [of_both, of_llm, of_emulator] =
            [inner(&found, &expected), inner(&expected, &expected), inner(&found, &found)];
        Ok(Measured {
            llm_loss,
            emulator_loss,
            cosine: of_both / (of_llm * of_emulator).sqrt(),
            relative_error: ((of_emulator - 2.0 * of_both + of_llm).max(0.0) / of_llm).sqrt(),
        })
    }
}

impl Measuring<'_> {
    /// Mean loss of a token, and the gradient of the edge's matrices.
    fn of_model<X: Real<Acc = f32>, D: Backend<X>>(&self, device: &D, dir: &Path) -> Result<(f64, Vec<f64>)> {
        let decoder = Decoder::<D, X>::load(device, dir)?;
        let capacity = BatchCapacity::of(self.streams);
        let [first, last] = self.edge.edge;
        let layers = decoder.config().layers;
        let layers = (0..first).chain(layers - last..layers).collect();
        let of = StatisticsOf { layers, kind: StatisticsKind::Gradients };
        let sums = collected(&decoder, &of, self.streams, capacity, &mut |_| ())?;
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
        Ok((loss / labels.max(1) as f64, gradient))
    }
}
