//! The sums over public data of the middle layers: collected in as many passes as memory asks for, a file per layer.

use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{
    Activations, Decoder, Gradients, Mode, ProductStatistics, ProductSums, StatisticsKind, StatisticsOf,
};
use gradtx_models::lora::Projection;
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, memory_for};
use gradtx_runtime::artifact::{NewTensor, TensorFile, little_endian, write_tensors};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_train::model_spec::ModelSpec;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where the statistics of the middle layers are, and of what.
pub(super) struct Statistics<'a> {
    pub dir: &'a Path,
    pub side: &'a ModelSpec,
    /// The middle.
    pub layers: &'a [usize],
    pub streams: &'a [PackedBatch],
}

const PROJECTIONS: [&str; 4] = ["qkv", "o", "gate_up", "down"];
const SUMS: [&str; 3] = ["inputs", "outputs", "gradient"];

impl Statistics<'_> {
    /// The file of a layer.
    fn path(&self, layer: usize) -> PathBuf {
        self.dir.join(format!("{layer:03}.safetensors"))
    }

    /// The mean sums of a layer by [`Projection`]: A and G over tokens, D over labels.
    pub fn read(&self, layer: usize) -> Result<[ProductSums; 4]> {
        let file = TensorFile::open(&self.path(layer))?;
        let blocks = self.side.model.blocks();
        let of = |projection: Projection| -> Result<ProductSums> {
            let (inputs, outputs) = projection.dims(&blocks[layer]);
            let read = |sum: &str, shape: [usize; 2]| -> Result<Vec<f64>> {
                let name = format!("{}.{sum}", PROJECTIONS[projection as usize]);
                if projection == Projection::GateUp && sum == SUMS[2] {
                    return Ok(vec![]);
                }
                let tensor = file.tensor(&name)?;
                tensor.expect_shape(&shape)?;
                Ok(tensor.to_f32()?.into_iter().map(f64::from).collect())
            };
            Ok(ProductSums {
                inputs: read(SUMS[0], [inputs, inputs])?,
                outputs: read(SUMS[1], [outputs, outputs])?,
                gradient: read(SUMS[2], [outputs, inputs])?,
            })
        };
        let [qkv, o, gate_up, down] = Projection::ALL;
        Ok([of(qkv)?, of(o)?, of(gate_up)?, of(down)?])
    }

    fn write(&self, layer: usize, sums: &[ProductSums; 4]) -> Result<()> {
        let blocks = self.side.model.blocks();
        let tokens: usize = self.streams.iter().map(PackedBatch::len).sum();
        let labels: usize = self.streams.iter().map(PackedBatch::labels).sum();
        let mut values: Vec<(String, Vec<usize>, Vec<f32>)> = vec![];
        for projection in Projection::ALL {
            let (inputs, outputs) = projection.dims(&blocks[layer]);
            let ProductSums { inputs: a, outputs: g, gradient: d } = &sums[projection as usize];
            let shapes = [[inputs, inputs], [outputs, outputs], [outputs, inputs]];
            let by = [tokens, tokens, labels];
            for (((name, sum), shape), by) in SUMS.iter().zip([a, g, d]).zip(shapes).zip(by) {
                if !sum.is_empty() {
                    let mean = sum.iter().map(|x| (x / by.max(1) as f64) as f32).collect();
                    values.push((format!("{}.{name}", PROJECTIONS[projection as usize]), shape.into(), mean));
                }
            }
        }
        write_f32(&self.path(layer), &values)
    }
}

/// Writes tensors in f32.
pub(super) fn write_f32(path: &Path, values: &[(String, Vec<usize>, Vec<f32>)]) -> Result<()> {
    let bytes: Vec<_> = values.iter().map(|(_, _, values)| little_endian(values)).collect();
    let tensors: Vec<NewTensor<'_>> = values
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (name.clone(), Dtype::F32, shape.clone(), &bytes[..]))
        .collect();
    Ok(write_tensors(path, &tensors, &BTreeMap::new())?)
}

/// Collecting what is not there yet.
pub(super) struct Collecting<'a> {
    pub statistics: &'a Statistics<'a>,
    pub context: &'a Context,
}

impl Work for Collecting<'_> {
    type Output = ();

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<()> {
        let Self { statistics, context } = self;
        let Statistics { side, layers, streams, .. } = statistics;
        let missing: Vec<usize> = layers
            .iter()
            .copied()
            .filter(|layer| TensorFile::open(&statistics.path(*layer)).is_err())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let capacity = BatchCapacity::of(streams.iter());
        let room = memory_for(device, &context.place)?;
        // What a pass over these layers takes.
        let plan = |layers: &[usize]| {
            let of = StatisticsOf { layers: layers.to_vec(), kind: StatisticsKind::Curvature };
            let mut plan = Decoder::<D, X>::plan(&side.model, false);
            plan.extend(Activations::<D, X>::plan(&side.model, capacity, Mode::Statistics(&of)));
            plan.extend(ProductStatistics::<D, X::Acc>::plan(&side.model, &of));
            plan
        };
        plan(&missing[missing.len() - 1..]).check(room)?;
        // The top layers first: backward ends at the lowest of a pass.
        let mut passes: Vec<Vec<usize>> = vec![];
        for &layer in missing.iter().rev() {
            let fits =
                passes.last().is_some_and(|pass| room.holds(&plan(&[&[layer], pass.as_slice()].concat())));
            match passes.last_mut() {
                Some(pass) if fits => pass.insert(0, layer),
                _ => passes.push(vec![layer]),
            }
        }
        let decoder = Decoder::<D, X>::load(device, &side.dir)?;
        let steps = (passes.len() * streams.len()) as u64;
        let mut progress = context.ui.progress("emulate: statistics", steps);
        for (n, pass) in passes.iter().enumerate() {
            let of = StatisticsOf { layers: pass.clone(), kind: StatisticsKind::Curvature };
            context.show_plan("emulate: statistics", &plan(pass));
            let sums = collected(&decoder, &of, streams, capacity, &mut |stream| {
                let done = (n * streams.len() + stream + 1) as u64;
                progress.set(done, format!("pass {} of {}", n + 1, passes.len()));
            })?;
            for &layer in pass {
                let mut of_layer: [ProductSums; 4] = Default::default();
                for projection in Projection::ALL {
                    of_layer[projection as usize] = sums.product(device, layer, projection)?;
                }
                statistics.write(layer, &of_layer)?;
            }
        }
        Ok(())
    }
}

/// The sums over these streams, in their order; `after` each is called.
pub(super) fn collected<X: Real<Acc = f32>, D: Backend<X>>(
    decoder: &Decoder<D, X>,
    of: &StatisticsOf,
    streams: &[PackedBatch],
    capacity: BatchCapacity,
    after: &mut dyn FnMut(usize),
) -> Result<ProductStatistics<D, X::Acc>> {
    let device = decoder.device();
    let mut sums = ProductStatistics::new(device, decoder.config(), of)?;
    let mut acts = Activations::new(decoder, capacity, Mode::Statistics(of))?;
    let mut batch = DeviceBatch::new(device, capacity)?;
    for (i, stream) in streams.iter().enumerate() {
        batch.load(device, stream)?;
        decoder.loss_and_gradient(&mut acts, &batch, None, Gradients::Statistics(&mut sums))?;
        after(i);
    }
    Ok(sums)
}
