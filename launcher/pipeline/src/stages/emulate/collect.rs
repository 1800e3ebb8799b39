//! The directory of statistics: a stage of its own, so that emulators with other settings of selection can be made from
//! the same.
//!
//! Ranks share the layers, and each goes through all of the data: sums are taken in one order, so their bytes do not
//! depend on the number of ranks, and every rank has room for the sums of its own layers only.

use super::labels::drawn_labels;
use super::parts::Parts;
use super::statistics::{LayerSums, Statistics};
use super::support::Support;
use crate::records::StatisticsInputs;
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{
    Activations, Decoder, Gradients, Mode, ProductStatistics, ProductSums, StatisticsKind, StatisticsOf,
};
use gradtx_models::lora::Projection;
use gradtx_run::config::{DeviceConfig, Fisher};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch, memory_for};
use gradtx_run::stage::Stage;
use gradtx_run::text::human_seconds;
use gradtx_runtime::comm::Comm;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_train::emulator::{pass_memory, passes};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde_json::json;
use std::path::Path;
use std::time::Instant;

/// Statistics that are ready to be collected, on one of the ranks that share it.
pub struct Collection<'a> {
    pub(super) comm: &'a dyn Comm,
    pub(super) device: &'a DeviceConfig,
    pub(super) inputs: StatisticsInputs,
    pub(super) statistics: Statistics<'a>,
    pub(super) support: &'a Support,
}

impl Stage for Collection<'_> {
    type Inputs = StatisticsInputs;
    type Output = ();
    const HAS_RANKS: bool = true;
    const RESUMES: bool = true;

    fn dir(&self) -> &Path {
        self.statistics.dir
    }

    fn inputs(&self) -> Result<StatisticsInputs> {
        Ok(self.inputs.clone())
    }

    fn advice(&self) -> String {
        "name another directory with --statistics, or remove this one to collect them again".into()
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let Self { comm, statistics, .. } = self;
        let missing = self.missing(context, "statistics", |layer| statistics.intact(layer).is_some())?;
        let own = share(&missing, comm.rank(), comm.size());
        if !own.is_empty() {
            let collecting = Collecting { collection: self, context, layers: own };
            dispatch(self.device, context, collecting)?;
        }
        comm.barrier()?;
        let missing = self.missing(context, "decomposition", |layer| Parts::are_there(statistics, layer))?;
        let own: Vec<usize> = missing.into_iter().skip(comm.rank()).step_by(comm.size()).collect();
        let began = Instant::now();
        let mut progress = context.ui.progress("emulate: decomposition", own.len() as u64);
        let pool = pool(context)?;
        let mut done = 0;
        // A layer has four matrices, each of which is decomposed by one thread.
        for layers in own.chunks(context.threads.div_ceil(4)) {
            pool.install(|| layers.par_iter().try_for_each(|layer| Parts::make(statistics, *layer)))?;
            done += layers.len();
            progress.set(done as u64, "");
        }
        drop(progress);
        if done > 0 {
            let seconds = human_seconds(began.elapsed().as_secs_f64());
            context.ui.line(format!("emulate: decomposition and scores of {done} layers in {seconds}"));
        }
        comm.barrier()?;
        let names =
            |layer: &usize| [format!("{layer:03}.safetensors"), format!("{layer:03}.parts.safetensors")];
        let is_first = comm.rank() == 0;
        Ok((if is_first { statistics.layers.iter().flat_map(names).collect() } else { vec![] }, ()))
    }

    fn report(&self, context: &Context, _: &()) -> Result<()> {
        let dir = self.statistics.dir;
        let layers = self.statistics.layers.len();
        let text = format!("emulate: statistics of {layers} layers, {}", dir.display());
        context.ui.done("statistics", dir, json!({ "layers": layers }), text);
        Ok(())
    }

    fn was_finished(&self, context: &Context) -> Result<()> {
        let dir = self.statistics.dir.display();
        context.ui.line(format!("emulate: {dir}: the statistics are there"));
        Ok(())
    }
}

impl Collection<'_> {
    /// Layers that lack something, on all ranks as rank 0 sees them.
    fn missing(&self, context: &Context, what: &str, is_there: impl Fn(usize) -> bool) -> Result<Vec<usize>> {
        let mut text = vec![];
        if self.comm.rank() == 0 {
            let layers = self.statistics.layers;
            let missing: Vec<usize> = layers.iter().copied().filter(|layer| !is_there(*layer)).collect();
            let found = layers.len() - missing.len();
            if found > 0 {
                context.ui.line(format!("emulate: {what} of {found} of {} layers is there", layers.len()));
            }
            text = serde_json::to_vec(&missing)?;
        }
        self.comm.broadcast_bytes(0, &mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

/// The threads of this rank: others of its node have theirs.
fn pool(context: &Context) -> Result<ThreadPool> {
    Ok(ThreadPoolBuilder::new().num_threads(context.threads).build()?)
}

/// A rank's share of layers: neighbours, for a backward pass ends at the lowest of them.
pub(super) fn share(layers: &[usize], rank: usize, ranks: usize) -> &[usize] {
    &layers[layers.len() * rank / ranks..layers.len() * (rank + 1) / ranks]
}

/// Collecting the statistics of some layers.
struct Collecting<'a> {
    collection: &'a Collection<'a>,
    context: &'a Context,
    layers: &'a [usize],
}

impl Work for Collecting<'_> {
    type Output = ();

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<()> {
        let Self { collection: Collection { statistics, support, inputs, .. }, context, layers } = self;
        let (side, capacity) = (statistics.side, support.capacity());
        let room = memory_for(device, &context.place)?;
        let passes = passes::<X, D>(&side.model, layers, capacity, room)?;
        let decoder = Decoder::<D, X>::load(device, &side.dir)?;
        let drawn = match inputs.fisher {
            Fisher::Empirical => None,
            Fisher::Sampled => Some(drawn_labels(context, &decoder, support, inputs.seed)?),
        };
        let pool = pool(context)?;
        let streams = support.streams().count() * if drawn.is_some() { 2 } else { 1 };
        let mut progress = context.ui.progress("emulate: statistics", (passes.len() * streams) as u64);
        for (n, layers) in passes.iter().enumerate() {
            context.show_plan("emulate: statistics", &pass_memory::<X, D>(&side.model, layers, capacity));
            let mut done = n * streams;
            let mut after = || {
                done += 1;
                progress.set(done as u64, format!("pass {} of {}", n + 1, passes.len()));
            };
            let pass = OnePass { decoder: &decoder, support, drawn: drawn.as_ref(), layers, capacity };
            let began = Instant::now();
            let sums = pass.sums(&mut after)?;
            let (tokens, seconds) = (support.tokens, began.elapsed().as_secs_f64());
            context.ui.line(format!(
                "emulate: statistics: pass {} of {}, {} layers, {tokens} tokens in {}, {:.0} tokens/s",
                n + 1,
                passes.len(),
                layers.len(),
                human_seconds(seconds),
                tokens as f64 / seconds.max(1e-9)
            ));
            for (at, &layer) in layers.iter().enumerate() {
                let of_layer = sums.of_layer(at)?;
                pool.install(|| statistics.write(layer, &of_layer))?;
            }
        }
        Ok(())
    }
}

/// One pass over the data for some layers.
struct OnePass<'a, D: Backend<X>, X: Real<Acc = f32>> {
    decoder: &'a Decoder<D, X>,
    support: &'a Support,
    /// The streams of both halves with drawn labels, where these are for the second order.
    drawn: Option<&'a [Vec<PackedBatch>; 2]>,
    layers: &'a [usize],
    capacity: BatchCapacity,
}

impl<'a, D: Backend<X>, X: Real<Acc = f32>> OnePass<'a, D, X> {
    /// The sums of its layers; `after` each stream is called.
    fn sums(&self, after: &mut dyn FnMut()) -> Result<PassSums<'a, D, X>> {
        let of = |kind| StatisticsOf { layers: self.layers.to_vec(), kind };
        let squares = self.squares_of_first_tokens()?;
        let [first, second] = &self.support.halves;
        let (factors, gradients, halves) = match self.drawn {
            None => {
                let mut all = Sums::new(self, of(StatisticsKind::Curvature))?;
                all.add(first, after)?;
                let halves = all.gradients()?;
                all.add(second, after)?;
                (all, None, halves)
            }
            Some(drawn) => {
                let mut factors = Sums::new(self, of(StatisticsKind::Factors))?;
                drawn.iter().try_for_each(|half| factors.add(half, after))?;
                let mut gradients = Sums::new(self, of(StatisticsKind::FirstOrder))?;
                gradients.add(first, after)?;
                let halves = gradients.gradients()?;
                gradients.add(second, after)?;
                (factors, Some(gradients), halves)
            }
        };
        Ok(PassSums { support: self.support, factors, gradients, halves, squares })
    }

    /// Of every layer, by [`Projection`]: Σ ‖a‖² over the first tokens of all examples.
    fn squares_of_first_tokens(&self) -> Result<Vec<[f64; 4]>> {
        let of = StatisticsOf { layers: self.layers.to_vec(), kind: StatisticsKind::Factors };
        let firsts = self.support.first_tokens();
        // There are no labels, and no more tokens than in other streams.
        let capacity = BatchCapacity { labels: 1, ..BatchCapacity::of(&firsts) };
        let mut sums = Sums { capacity, ..Sums::new(self, of)? };
        sums.add(&firsts, &mut || ())?;
        let device = self.decoder.device();
        let of_layer = |layer: &usize| -> Result<[f64; 4]> {
            let mut squares = [0.0; 4];
            for projection in Projection::ALL {
                squares[projection as usize] =
                    sums.sums.input_squares(device, *layer, projection)?.iter().sum();
            }
            Ok(squares)
        };
        self.layers.iter().map(of_layer).collect()
    }
}

/// What a pass has summed.
struct PassSums<'a, D: Backend<X>, X: Real<Acc = f32>> {
    support: &'a Support,
    factors: Sums<'a, D, X>,
    /// Of D, where the factors are of other labels.
    gradients: Option<Sums<'a, D, X>>,
    /// Of every layer, by [`Projection`]: the sum D of the first half of the examples.
    halves: Vec<[Vec<f32>; 4]>,
    /// See [`OnePass::squares_of_first_tokens`].
    squares: Vec<[f64; 4]>,
}

impl<D: Backend<X>, X: Real<Acc = f32>> PassSums<'_, D, X> {
    /// The means of the layer of this number in the pass.
    fn of_layer(&self, at: usize) -> Result<LayerSums> {
        let tokens = self.support.tokens.max(1) as f64;
        let labels = self.support.labels().map(|labels| labels as f64);
        let of = |projection: Projection| -> Result<ProductSums> {
            let mut sums = self.factors.product(at, projection)?;
            if let Some(gradients) = &self.gradients {
                sums.gradient = gradients.product(at, projection)?.gradient;
            }
            sums.inputs.iter_mut().chain(&mut sums.outputs).for_each(|x| *x /= tokens);
            sums.gradient.iter_mut().for_each(|x| *x /= (labels[0] + labels[1]).max(1.0));
            Ok(sums)
        };
        let [qkv, o, gate_up, down] = Projection::ALL;
        let products = [of(qkv)?, of(o)?, of(gate_up)?, of(down)?];
        let first_position = std::array::from_fn(|i| {
            let inputs = &products[i].inputs;
            let trace: f64 = inputs.iter().step_by(inputs.len().isqrt() + 1).sum();
            if trace > 0.0 { self.squares[at][i] / tokens / trace } else { 0.0 }
        });
        let mean = |sums: &Vec<f32>| sums.iter().map(|x| f64::from(*x) / labels[0].max(1.0)).collect();
        Ok(LayerSums { products, first_half: self.halves[at].each_ref().map(mean), first_position })
    }
}

/// Sums on the device.
struct Sums<'a, D: Backend<X>, X: Real<Acc = f32>> {
    decoder: &'a Decoder<D, X>,
    capacity: BatchCapacity,
    sums: ProductStatistics<D, f32>,
}

impl<'a, D: Backend<X>, X: Real<Acc = f32>> Sums<'a, D, X> {
    fn new(pass: &OnePass<'a, D, X>, of: StatisticsOf) -> Result<Self> {
        let &OnePass { decoder, capacity, .. } = pass;
        Ok(Self { decoder, capacity, sums: ProductStatistics::new(decoder.device(), decoder.config(), &of)? })
    }

    fn add(&mut self, streams: &[PackedBatch], after: &mut dyn FnMut()) -> Result<()> {
        add(self.decoder, &mut self.sums, streams, self.capacity, after)
    }

    /// Those of a product of the layer of this number, on the host.
    fn product(&self, at: usize, projection: Projection) -> Result<ProductSums> {
        Ok(self.sums.product(self.decoder.device(), self.sums.of().layers[at], projection)?)
    }

    /// The sums of gradients of every layer so far, by [`Projection`].
    fn gradients(&self) -> Result<Vec<[Vec<f32>; 4]>> {
        let of_layer = |layer: &usize| -> Result<[Vec<f32>; 4]> {
            let mut all: [Vec<f32>; 4] = Default::default();
            for projection in Projection::ALL {
                all[projection as usize] = self.sums.gradient(self.decoder.device(), *layer, projection)?;
            }
            Ok(all)
        };
        self.sums.of().layers.iter().map(of_layer).collect()
    }
}

/// Adds streams to sums, in their order; `after` each is called.
fn add<X: Real<Acc = f32>, D: Backend<X>>(
    decoder: &Decoder<D, X>,
    sums: &mut ProductStatistics<D, f32>,
    streams: &[PackedBatch],
    capacity: BatchCapacity,
    after: &mut dyn FnMut(),
) -> Result<()> {
    let device = decoder.device();
    let of = sums.of().clone();
    let mut acts = Activations::new(decoder, capacity, Mode::Statistics(&of))?;
    let mut batch = DeviceBatch::new(device, capacity)?;
    for stream in streams {
        batch.load(device, stream)?;
        decoder.loss_and_gradient(&mut acts, &batch, None, Gradients::Statistics(sums))?;
        after();
    }
    Ok(())
}

/// The sums over these streams.
pub(super) fn collected<X: Real<Acc = f32>, D: Backend<X>>(
    decoder: &Decoder<D, X>,
    of: &StatisticsOf,
    streams: &[PackedBatch],
    capacity: BatchCapacity,
) -> Result<ProductStatistics<D, f32>> {
    let mut sums = ProductStatistics::new(decoder.device(), decoder.config(), of)?;
    add(decoder, &mut sums, streams, capacity, &mut || ())?;
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_all_layers() {
        let layers: Vec<usize> = (2..13).collect();
        for ranks in [1, 2, 3, 5, 20] {
            let all: Vec<usize> = (0..ranks).flat_map(|rank| share(&layers, rank, ranks).to_vec()).collect();
            assert_eq!(all, layers, "{ranks} ranks");
            let most = layers.len().div_ceil(ranks);
            assert!((0..ranks).all(|rank| share(&layers, rank, ranks).len() <= most));
        }
    }
}
