//! What `emulate` takes and makes, from a model's sizes and the settings alone: layers by pass, memory, bytes, operations.
//!
//! `emulate` itself, its `--dry-run`, `plan` and `doctor` count with this.

use anyhow::Result;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{
    Activations, BlockConfig, Decoder, DecoderConfig, LayerShape, Mode, ProductStatistics, StatisticsKind,
    StatisticsOf,
};
use gradtx_models::lora::{Module, Projection};
use gradtx_run::config::{EmulatorConfig, Fisher};
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{MemoryPlan, Room};
use std::ops::Range;

/// Bytes of a value in the files of statistics.
const BYTES: u64 = 4;

/// An LLM and how it is to be compressed.
#[derive(Clone, Copy, Debug)]
pub struct Emulation<'a> {
    /// The LLM.
    pub model: &'a DecoderConfig,
    /// The settings.
    pub settings: &'a EmulatorConfig,
}

impl Emulation<'_> {
    /// The layers that are compressed; none where the edge is the whole model.
    pub fn middle(&self) -> Range<usize> {
        let [first, last] = self.settings.edge;
        first..self.model.layers.saturating_sub(last).max(first)
    }

    fn blocks(&self) -> Vec<BlockConfig> {
        let middle = self.middle();
        self.model.blocks().into_iter().skip(middle.start).take(middle.len()).collect()
    }

    /// Parameters of the middle's matrices: of attention, of MLPs.
    pub fn middle_parameters(&self) -> [u64; 2] {
        self.blocks().iter().fold([0, 0], |[attention, mlp], block| {
            let of = |module: &Module| (module.outputs(block).len() * module.fused().dims(block).0) as u64;
            let own: u64 = Module::ATTENTION.iter().map(of).sum();
            [attention + own, mlp + block.matrix_values() as u64 - own]
        })
    }

    /// Share of the middle's parameters that is to be kept.
    pub fn ratio(&self) -> f64 {
        let (of, [attention, mlp]) = (self.middle_parameters(), self.settings.ratios());
        if attention == mlp {
            return attention;
        }
        let all = (of[0] + of[1]).max(1) as f64;
        (of[0] as f64 * attention + of[1] as f64 * mlp) / all
    }

    /// Parameters of the LLM, and those that its emulator will have, but for the rounding of ranks and widths.
    pub fn parameters(&self) -> [u64; 2] {
        let whole = Decoder::<Cpu, f32>::layout_of(self.model).count() as u64;
        let middle: u64 = self.middle_parameters().iter().sum();
        [whole, whole - middle + (middle as f64 * self.ratio()).round() as u64]
    }

    /// Share of the middle's parameters that layers of these shapes have.
    pub fn kept(&self, shapes: &[LayerShape]) -> f64 {
        let of = |(block, shape): (&BlockConfig, &LayerShape)| {
            let attention = Module::ATTENTION.into_iter().map(|module| {
                let (rows, cols) = (module.outputs(block).len(), module.fused().dims(block).0);
                match module.rank(&shape.ranks) {
                    0 => rows * cols,
                    rank => rank * (rows + cols),
                }
            });
            let of_attention: usize =
                Module::ATTENTION.iter().map(|m| m.outputs(block).len() * m.fused().dims(block).0).sum();
            let mlp = block.matrix_values() as f64 - of_attention as f64;
            attention.sum::<usize>() as f64
                + mlp * shape.intermediate as f64 / block.mlp.intermediate.max(1) as f64
        };
        let kept: f64 = self.blocks().iter().zip(shapes).map(of).sum();
        kept / self.middle_parameters().iter().sum::<u64>().max(1) as f64
    }

    /// Bytes of the files of statistics and decompositions.
    pub fn statistics_bytes(&self) -> u64 {
        let of_block = |block: &BlockConfig| {
            let products = Projection::ALL.into_iter().take(2).map(|projection| {
                let (inputs, outputs) = projection.dims(block);
                let own =
                    projection.modules(block).map(|module| module.outputs(block).len().pow(2)).sum::<usize>();
                inputs * inputs + own + 2 * outputs * inputs
            });
            let parts = Module::ATTENTION.into_iter().map(|module| {
                let (rows, cols) = (module.outputs(block).len(), module.fused().dims(block).0);
                rows.min(cols) * (rows + cols + 6)
            });
            // The terms of channels are in both files of a layer.
            let channels = 2 * 5 * block.mlp.intermediate;
            (products.sum::<usize>() + parts.sum::<usize>() + channels + Projection::ALL.len()) as u64
        };
        self.blocks().iter().map(of_block).sum::<u64>() * BYTES
    }

    /// Operations for a token: of forward and backward passes, and of the sums of one layer.
    pub fn operations_per_token(&self) -> [f64; 2] {
        let (all, middle) = (self.model.blocks(), self.middle());
        let values = |from: usize| all.iter().skip(from).map(BlockConfig::matrix_values).sum::<u128>() as f64;
        let head = (self.model.hidden * self.model.vocab) as f64;
        let forward = 2.0 * (values(0) + head);
        let both = forward + 2.0 * (values(middle.start) + head);
        let passes = match self.settings.fisher {
            Fisher::Empirical => both,
            Fisher::Sampled => forward + 2.0 * both,
        };
        let sums: usize = all.get(middle.start).map_or(0, |block| {
            let of = |projection: Projection| {
                let (inputs, outputs) = projection.dims(block);
                let gradient = if projection == Projection::GateUp { 0 } else { inputs * outputs };
                2 * (inputs * inputs + outputs * outputs + gradient)
            };
            Projection::ALL.into_iter().map(of).sum()
        });
        [passes, sums as f64]
    }
}

/// Memory that a pass over these layers takes: the model, activations, sums.
pub fn pass_memory<X: Real, D: Backend<X>>(
    model: &DecoderConfig,
    layers: &[usize],
    capacity: BatchCapacity,
) -> MemoryPlan {
    let of = StatisticsOf { layers: layers.to_vec(), kind: StatisticsKind::Curvature };
    let mut plan = Decoder::<D, X>::plan(model, false);
    plan.extend(Activations::<D, X>::plan(model, capacity, Mode::Statistics(&of)));
    plan.extend(ProductStatistics::<D, X::Acc>::plan(model, &of));
    plan
}

/// Layers by pass, each pass as many as fit; the top ones first, for backward ends at the lowest of a pass. Layers
/// within a pass are in order.
///
/// # Errors
/// When not even one layer fits.
pub fn passes<X: Real, D: Backend<X>>(
    model: &DecoderConfig,
    layers: &[usize],
    capacity: BatchCapacity,
    room: Room,
) -> Result<Vec<Vec<usize>>> {
    let plan = |layers: &[usize]| pass_memory::<X, D>(model, layers, capacity);
    let passes = passes_that(layers, |layers| room.holds(&plan(layers)));
    passes.iter().filter(|layers| layers.len() == 1).try_for_each(|layers| plan(layers).check(room))?;
    Ok(passes)
}

/// [`passes`] by any rule of what fits; a layer alone is a pass in any case.
pub fn passes_that(layers: &[usize], fits: impl Fn(&[usize]) -> bool) -> Vec<Vec<usize>> {
    let mut passes: Vec<Vec<usize>> = vec![];
    for &layer in layers.iter().rev() {
        match passes.last_mut() {
            Some(pass) if fits(&[&[layer], pass.as_slice()].concat()) => pass.insert(0, layer),
            _ => passes.push(vec![layer]),
        }
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_models::decoder::{Family, RopeScaling};
    use gradtx_run::config::KindConfig;

    fn model() -> DecoderConfig {
        DecoderConfig {
            family: Family::Qwen2,
            vocab: 50,
            hidden: 16,
            intermediate: 40,
            layers: 6,
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
            norm_eps: 1e-6,
            rope_theta: 100.0,
            rope_scaling: RopeScaling::None,
            max_positions: 64,
            window: None,
            tied: true,
            bos: None,
            eos: vec![],
            pad: None,
            emulator: None,
        }
    }

    #[test]
    fn parameters_are_those_of_the_middle_s_matrices() {
        let model = model();
        let settings = EmulatorConfig { ratio: 0.5, edge: [1, 2], ..EmulatorConfig::default() };
        let of = Emulation { model: &model, settings: &settings };
        assert_eq!(of.middle(), 1..4);
        assert_eq!(of.middle_parameters(), [3 * (16 * 16 * 2 + 2 * 8 * 16), 3 * 3 * 16 * 40]);
        let [whole, kept] = of.parameters();
        assert_eq!(whole - kept, 3 * (768 + 1920) / 2);
        let attention = KindConfig { ratio: 1.0, ..KindConfig::default() };
        let settings = EmulatorConfig { attention, ..settings.clone() };
        let of = Emulation { model: &model, settings: &settings };
        assert!((of.ratio() - (768.0 + 960.0) / 2688.0).abs() < 1e-12, "{}", of.ratio());
        let edge = EmulatorConfig { edge: [4, 4], ..settings.clone() };
        assert!(Emulation { model: &model, settings: &edge }.middle().is_empty());
    }

    #[test]
    fn passes_have_the_layers_that_fit() {
        let model = model();
        let capacity = BatchCapacity { tokens: 20, segments: 2, labels: 18 };
        let need = |layers: &[usize]| pass_memory::<f32, Cpu>(&model, layers, capacity).total();
        let of = |room: u64| passes::<f32, Cpu>(&model, &[1, 2, 3, 4], capacity, Room::Host(room)).unwrap();
        assert_eq!(of(need(&[1, 2, 3, 4])), [[1, 2, 3, 4]]);
        assert_eq!(of(need(&[1, 2, 3, 4]) - 1), [vec![2, 3, 4], vec![1]]);
        let one = need(&[1]).max(need(&[4]));
        assert_eq!(of(one).len(), 4);
        let refused = passes::<f32, Cpu>(&model, &[1, 4], capacity, Room::Host(need(&[4]) / 2));
        assert!(refused.is_err());
    }

    #[test]
    fn sampled_labels_take_more_passes() {
        let model = model();
        let [empirical, sampled] = [Fisher::Empirical, Fisher::Sampled].map(|fisher| {
            let settings = EmulatorConfig { fisher, ..EmulatorConfig::default() };
            Emulation { model: &model, settings: &settings }.operations_per_token()
        });
        assert_eq!(empirical[1], sampled[1]);
        assert!(sampled[0] > 2.0 * empirical[0] && sampled[0] < 3.0 * empirical[0]);
    }
}
