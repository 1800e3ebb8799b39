//! Sums over products: against gradients of all parameters, by their definition, and what scores made of them are
//! worth.

use crate::common::*;
use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::{
    Activations, Decoder, DecoderConfig, Family, Gradients, Mode, ProductStatistics, ProductSums,
    StatisticsKind, StatisticsOf,
};
use gradtx_models::gradot::{Candidates, channels, components};
use gradtx_models::linalg::Svd;
use gradtx_models::lora::{Module, Projection};
use gradtx_runtime::data::{Example, PackedBatch, SegmentInfo};

fn deep() -> DecoderConfig {
    DecoderConfig { layers: 4, ..config(Family::Qwen3, true) }
}

/// The sums of these layers over streams, one after the other.
fn sums(
    config: &DecoderConfig,
    values: &[f64],
    batches: &[PackedBatch],
    of: &StatisticsOf,
) -> ProductStatistics<Cpu, f64> {
    let cpu = Cpu::new(2);
    let model = decoder::<f64>(&cpu, config, values);
    let mut sums = ProductStatistics::new(&cpu, config, of).unwrap();
    for batch in batches {
        let mut acts = Activations::new(&model, capacity(batch), Mode::Statistics(of)).unwrap();
        let into = Gradients::Statistics(&mut sums);
        model.loss_and_gradient(&mut acts, &upload(&cpu, batch), None, into).unwrap();
    }
    sums
}

fn of(layers: &[usize], kind: StatisticsKind) -> StatisticsOf {
    StatisticsOf { layers: layers.to_vec(), kind }
}

fn get(sums: &ProductStatistics<Cpu, f64>, layer: usize, projection: Projection) -> ProductSums {
    sums.product(&Cpu::new(1), layer, projection).unwrap()
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm: f64 = b.iter().map(|b| b * b).sum();
    assert!(norm > 0.0);
    (a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / norm).sqrt()
}

/// All gradients of the same streams, by name.
fn all_gradients(config: &DecoderConfig, values: &[f64], batch: &PackedBatch, name: &str) -> Vec<f64> {
    let cpu = Cpu::new(2);
    let model = decoder::<f64>(&cpu, config, values);
    let mut acts = Activations::new(&model, capacity(batch), Mode::AllParameters).unwrap();
    let mut grads = cpu.zeros(values.len()).unwrap();
    let into = Gradients::All(&mut grads[..]);
    model.loss_and_gradient(&mut acts, &upload(&cpu, batch), None, into).unwrap();
    grads[model.layout().get(name).unwrap().range()].to_vec()
}

#[test]
fn gradients_are_those_of_all_parameters() {
    let config = deep();
    check_gradients(&config);
    // Without a gate, and with biases of all products.
    check_gradients(&DecoderConfig { layers: 4, ..crate::common::config(Family::Opt, true) });
}

fn check_gradients(config: &DecoderConfig) {
    let values = values(config, 1);
    let batch = batch(config, &[5, 1, 9, 4], &[0; 4], 3);
    let found = sums(config, &values, std::slice::from_ref(&batch), &of(&[1, 3], StatisticsKind::Gradients));
    for layer in [1, 3] {
        for module in config.family.modules() {
            let name = config.family.tensor(layer, module, ".weight");
            let want = all_gradients(config, &values, &batch, &name);
            let block = &config.blocks()[layer];
            let (inputs, rows) = (module.fused().dims(block).0, module.outputs(block));
            let sums = get(&found, layer, module.fused());
            let own = &sums.gradient[rows.start * inputs..rows.end * inputs];
            assert!(far(own, &want) <= 1e-12, "{name}");
            assert!(sums.inputs.is_empty() && sums.outputs.is_empty());
        }
    }
    // Both are the loss's derivative in the size of a channel: a wrong pair of input and gradient would not agree.
    let (gate_up, down) = (get(&found, 1, Projection::GateUp), get(&found, 1, Projection::Down));
    let model = decoder::<f64>(&Cpu::new(1), config, &values);
    let weight = |module: Module| {
        let name = config.family.tensor(1, module, ".weight");
        values[model.layout().get(&name).unwrap().range()].to_vec()
    };
    let (up, of_down) = (weight(Module::Up), weight(Module::Down));
    let (width, hidden) = (config.intermediate, config.hidden);
    let first = Module::Up.outputs(&config.block()).start;
    // A bias of the hidden row is part of the size of a channel too.
    let bias = config.family.tensor(1, Module::Up, ".bias");
    let bias = model.layout().get(&bias).map(|param| {
        let gradient = all_gradients(config, &values, &batch, &param.name);
        values[param.range()].iter().zip(gradient).map(|(b, g)| b * g).collect::<Vec<_>>()
    });
    for j in 0..width {
        let by_bias = bias.as_ref().map_or(0.0, |of_channels| of_channels[j]);
        let by_up: f64 = by_bias
            + (0..hidden)
                .map(|i| up[j * hidden + i] * gate_up.gradient[(first + j) * hidden + i])
                .sum::<f64>();
        let by_down: f64 = (0..hidden).map(|i| of_down[i * width + j] * down.gradient[i * width + j]).sum();
        assert!((by_up - by_down).abs() <= 1e-12 * by_down.abs().max(1e-3), "{j}: {by_up} and {by_down}");
    }
}

/// Where one token has a label, and tokens after it none, `D = g aᵀ`, `G = g gᵀ`: `D Dᵀ = ‖a‖² G`.
#[test]
fn factors_belong_to_one_token() {
    let config = deep();
    let values = values(&config, 1);
    let mut one = PackedBatch::default();
    one.push(&Example { tokens: vec![3, 7], trained: vec![false, true] }, SegmentInfo::default(), 1.0);
    let found = sums(&config, &values, &[one], &of(&[2], StatisticsKind::Curvature));
    for projection in [Projection::Qkv, Projection::O, Projection::Down] {
        let ProductSums { inputs, outputs, gradient } = get(&found, 2, projection);
        let (cols, rows) = (inputs.len().isqrt(), outputs.len().isqrt());
        let square: Vec<f64> = (0..rows * rows)
            .map(|at| {
                (0..cols).map(|k| gradient[at / rows * cols + k] * gradient[at % rows * cols + k]).sum()
            })
            .collect();
        let scale = square.iter().sum::<f64>() / outputs.iter().sum::<f64>();
        let scaled: Vec<f64> = outputs.iter().map(|g| g * scale).collect();
        assert!(far(&square, &scaled) <= 1e-10, "{projection:?}");
        // ‖a‖² of the first of two tokens.
        let trace: f64 = (0..cols).map(|i| inputs[i * cols + i]).sum();
        assert!(scale > 0.0 && scale < trace, "{projection:?}: {scale} of {trace}");
    }
}

#[test]
fn sums_are_the_same_in_other_packings_and_passes() {
    let config = deep();
    let values = values(&config, 1);
    let whole = batch(&config, &[5, 1, 9, 4], &[0; 4], 3);
    let parts: Vec<PackedBatch> = (0..whole.segments())
        .map(|i| {
            let mut part = PackedBatch::default();
            let len = [5, 1, 9, 4][i];
            part.push(&example(&config, len, 3 + i as u64), SegmentInfo::default(), 0.3 + 0.1 * i as f64);
            part
        })
        .collect();
    let all = of(&[1, 2], StatisticsKind::Curvature);
    let together = sums(&config, &values, &[whole], &all);
    let apart = sums(&config, &values, &parts, &all);
    let single = sums(&config, &values, &parts, &of(&[2], StatisticsKind::Curvature));
    for layer in [1, 2] {
        for projection in Projection::ALL {
            let [a, b] = [&together, &apart].map(|sums| get(sums, layer, projection));
            assert!(far(&a.inputs, &b.inputs) <= 1e-12 && far(&a.outputs, &b.outputs) <= 1e-12);
            assert_eq!(a.gradient.is_empty(), projection == Projection::GateUp);
        }
    }
    assert_eq!(get(&apart, 2, Projection::Qkv), get(&single, 2, Projection::Qkv));
    // A token counted twice is found.
    let mut twice = parts.clone();
    twice.push(parts[0].clone());
    let twice = sums(&config, &values, &twice, &all);
    assert!(far(&get(&twice, 1, Projection::O).inputs, &get(&together, 1, Projection::O).inputs) > 1e-3);
}

#[test]
fn buffers_of_other_layers_are_refused() {
    let config = deep();
    let cpu = Cpu::new(1);
    let model = decoder::<f64>(&cpu, &config, &values(&config, 1));
    let batch = batch(&config, &[5], &[0], 3);
    let [one, other] = [1, 2].map(|layer| of(&[layer], StatisticsKind::Curvature));
    let mut sums = ProductStatistics::new(&cpu, &config, &one).unwrap();
    let mut run = |mode| {
        let mut acts = Activations::new(&model, capacity(&batch), mode).unwrap();
        let into = Gradients::Statistics(&mut sums);
        model.loss_and_gradient(&mut acts, &upload(&cpu, &batch), None, into).is_ok()
    };
    assert!(run(Mode::Statistics(&one)));
    assert!(!run(Mode::Statistics(&other)) && !run(Mode::AllParameters));
    assert!(sums.product(&cpu, 3, Projection::O).is_err());
}

/// The gradient of the edge's matrices.
fn edge_gradient(config: &DecoderConfig, values: &[f64], batch: &PackedBatch) -> Vec<f64> {
    let layers = [0, config.layers - 1];
    let found = sums(config, values, std::slice::from_ref(batch), &of(&layers, StatisticsKind::Gradients));
    let of_layer = |layer| Projection::ALL.map(|projection| get(&found, layer, projection).gradient).concat();
    layers.map(of_layer).concat()
}

/// Spearman's rank correlation.
fn rank_correlation(x: &[f64], y: &[f64]) -> f64 {
    let ranks = |values: &[f64]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
        let mut ranks = vec![0.0; values.len()];
        order.into_iter().enumerate().for_each(|(rank, i)| ranks[i] = rank as f64);
        ranks
    };
    let (x, y, n) = (ranks(x), ranks(y), x.len() as f64);
    1.0 - 6.0 * x.iter().zip(&y).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / (n * (n * n - 1.0))
}

/// What leaving out each component or channel alone does to the edge's gradient, and the term that predicts it.
fn measured(
    values: &[f64],
    config: &DecoderConfig,
    batch: &PackedBatch,
    predicted: &Candidates,
    without: impl Fn(usize, &mut [f64]),
) -> (Vec<f64>, Vec<f64>) {
    let whole = edge_gradient(config, values, batch);
    let change = |k: usize| {
        let mut changed = values.to_vec();
        without(k, &mut changed);
        let found = edge_gradient(config, &changed, batch);
        found.iter().zip(&whole).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
    };
    let terms: Vec<f64> = predicted.terms.iter().map(|term| term.second).collect();
    ((0..terms.len()).map(change).collect(), terms)
}

#[test]
fn scores_predict_the_shift_of_the_edge_s_gradient() {
    let config = DecoderConfig { layers: 3, ..deep() };
    let mut values = values(&config, 1);
    let layout = Decoder::<Cpu, f64>::layout_of(&config);
    let at = |module: Module| layout.get(&config.family.tensor(1, module, ".weight")).unwrap().range();
    // Singular values that fall, as those of trained matrices do.
    for module in [Module::Q, Module::V, Module::O] {
        let block = config.block();
        let (rows, cols) = (module.outputs(&block).len(), module.fused().dims(&block).0);
        let svd = Svd::new(rows, cols, &values[at(module)]).unwrap();
        let faded = &mut values[at(module)];
        for (k, value) in svd.values.iter().enumerate() {
            let less = value * (1.0 - (-0.2 * k as f64).exp());
            for i in 0..rows * cols {
                faded[i] -= less * svd.left[k][i / cols] * svd.right[k][i % cols];
            }
        }
    }
    let batch = batch(&config, &[12, 12, 12, 12, 12, 12, 12, 12], &[0; 8], 3);
    let found = sums(&config, &values, std::slice::from_ref(&batch), &of(&[1], StatisticsKind::Curvature));
    for module in [Module::Q, Module::V, Module::O] {
        let block = config.block();
        let (rows, cols) = (module.outputs(&block).len(), module.fused().dims(&block).0);
        let svd = Svd::new(rows, cols, &values[at(module)]).unwrap();
        let candidates = components(&svd, &get(&found, 1, module.fused()), module.outputs(&block));
        let (change, terms) = measured(&values, &config, &batch, &candidates, |k, values| {
            for (i, value) in values[at(module)].iter_mut().enumerate() {
                *value -= svd.values[k] * svd.left[k][i / cols] * svd.right[k][i % cols];
            }
        });
        let correlation = rank_correlation(&change, &terms);
        assert!(correlation >= 0.7, "{module:?}: {correlation}");
    }
    let [gate, up, down] = [Module::Gate, Module::Up, Module::Down].map(|module| values[at(module)].to_vec());
    let [of_gate_up, of_down] = [Projection::GateUp, Projection::Down].map(|p| get(&found, 1, p));
    let candidates = channels([&gate, &up, &down], config.hidden, &of_gate_up, &of_down);
    let width = config.intermediate;
    let (change, terms) = measured(&values, &config, &batch, &candidates, |j, values| {
        values[at(Module::Down)].iter_mut().skip(j).step_by(width).for_each(|value| *value = 0.0);
    });
    let correlation = rank_correlation(&change, &terms);
    assert!(correlation >= 0.6, "channels: {correlation}");
    // With its sign turned the score predicts the opposite.
    let turned: Vec<f64> = terms.iter().map(|term| -term).collect();
    assert!(rank_correlation(&change, &turned) < -0.5);
}
